"""File names: showing them safely, knowing temporary and system ones, checking components.

Names are ``str`` with surrogate escapes (PEP 383), so that ``os.fsencode`` gives the exact
bytes back. Everything here looks at one path component, never at a disk.
"""

from __future__ import annotations

import os
import re
import unicodedata

NAME_MAX = 255
"""Bytes in one path component: NAME_MAX of Linux's ``limits.h``."""

# Needed to write Persian, several Indic scripts and joined emoji; they neither move the cursor
# nor reorder text.
_JOINERS = "\u200c\u200d"

# Controls, format characters (bidirectional controls are among them), surrogates, separators.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

# The 66 code points that Unicode reserves for ever; YAML does not allow the last two of a plane.
_NONCHARACTERS = frozenset(
    map(chr, [*range(0xFDD0, 0xFDF0), *(p << 16 | n for p in range(17) for n in (0xFFFE, 0xFFFF))]),
)
_LOW_BYTE = 0xFF

# Suffixes that a producer drops by renaming once the content is whole.
_TEMPORARY_SUFFIXES = (
    ".part",  # Firefox, KIO, curl front ends, Nextcloud's server, pip-like downloaders
    ".partial",  # rclone, Internet Explorer and old Edge
    ".filepart",  # WinSCP, above 100 KiB by its default
    ".crdownload",  # Chrome and its relatives
    ".opdownload",  # Opera
    ".download",  # Safari (a directory)
    ".upload",  # web upload handlers
    ".tmp",  # the convention; also Syncthing's .syncthing.NAME.tmp and ~syncthing~NAME.tmp
    ".temp",  # the convention, spelled out
    ".!sync",  # Resilio Sync
    ".swp",  # vim's swap file
    "~",  # the backup that editors leave beside the file
)

# Prefixes of the same kind.
_TEMPORARY_PREFIXES = (
    ".~tmp~",  # rsync --delay-updates (a directory)
    ".in.",  # proftpd HiddenStores, lftp xfer:use-temp-file
    ".pureftpd-upload.",  # pure-ftpd
    ".sftpgo-upload.",  # SFTPGo's atomic uploads
    ".syncthing.",  # Syncthing on Unix, also where the name was shortened
    "~syncthing~",  # Syncthing on Windows, seen through a share
    ".pending-",  # Android's media store, while an app still writes
    ".goutputstream-",  # GIO: file managers of GNOME, scanner front ends
    ".nfs",  # an NFS client's name for a file deleted while open
    ".fuse_hidden",  # the same of FUSE file systems
    ".smbdelete",  # the same of macOS on SMB shares
    "~$",  # Microsoft Office's owner file
    ".~lock.",  # LibreOffice's lock file
)

_TEMPORARY_FORMS = (
    # rsync: .NAME.XXXXXX, six letters or digits from mkstemp.
    re.compile(r"\..+\.[a-z0-9]{6}", re.DOTALL),
    # Nextcloud and ownCloud desktop clients: .NAME.~HEX
    re.compile(r"\..+\.~[0-9a-f]+", re.DOTALL),
)

_SYSTEM_NAMES = frozenset(
    {
        ".ds_store",  # macOS Finder: window positions
        ".localized",  # macOS: marks a translated folder name
        ".spotlight-v100",  # macOS: search index
        ".trashes",  # macOS: wastebasket of a volume
        "__macosx",  # macOS: resource forks in an unpacked archive
        "desktop.ini",  # Windows Explorer: folder appearance
        "thumbs.db",  # Windows Explorer: its own previews
        "@eadir",  # Synology: its own previews and metadata
        ".stfolder",  # Syncthing: marks a folder root
        ".stignore",  # Syncthing: ignore patterns
        ".stversions",  # Syncthing: old versions it keeps for the user
        "lost+found",  # ext4: fsck's directory
    },
)
_APPLE_DOUBLE = "._"  # macOS on foreign file systems: a file's metadata beside it


def display(name: str) -> str:
    r"""Make any file name safe for a terminal, a log line or YAML, and leave the rest alone.

    Control and invisible format characters (bidirectional controls among them), line and
    paragraph separators, surrogates and noncharacters are escaped: bytes that are no UTF-8
    and ASCII controls as ``\xNN``, all others as ``\uNNNN`` or ``\UNNNNNNNN``.
    """
    if name.isascii() and name.isprintable():
        return name
    return "".join(_shown(character) for character in name)


def is_temporary(name: str) -> bool:
    """Whether a producer uses such a name for content that is not whole yet, or not content.

    ``name`` is one path component; case does not matter, since shares change it.
    """
    folded = name.lower()
    return (
        folded.endswith(_TEMPORARY_SUFFIXES)
        or folded.startswith(_TEMPORARY_PREFIXES)
        or any(form.fullmatch(folded) for form in _TEMPORARY_FORMS)
    )


def is_system(name: str) -> bool:
    """Whether an operating system or a sync service keeps its own data under such a name.

    ``name`` is one path component, of a file or of a directory that is never entered.
    """
    folded = name.lower()
    return folded in _SYSTEM_NAMES or folded.startswith(_APPLE_DOUBLE)


def checked_component(name: bytes) -> str:
    """Decode one path component that comes from outside, for use below a directory of ours.

    A backslash is an ordinary character: restored files lie on POSIX file systems.

    Raises:
        ValueError: the name is empty, ``.``, ``..``, longer than 255 bytes, or contains a
            slash or a NUL.
    """
    if name in (b"", b".", b".."):
        raise ValueError("the name is empty or stands for a directory")
    if b"/" in name or b"\0" in name:
        raise ValueError("the name contains a slash or a NUL")
    if len(name) > NAME_MAX:
        raise ValueError(f"the name is {len(name)} bytes long, {NAME_MAX} is the most")
    return os.fsdecode(name)


def _shown(character: str) -> str:
    code = ord(character)
    if "\udc80" <= character <= "\udcff":  # a byte that is no UTF-8, as PEP 383 carries it
        return f"\\x{code & _LOW_BYTE:02x}"
    if not _needs_escape(character):
        return character
    if character.isascii():
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if character <= "\uffff" else f"\\U{code:08x}"


def _needs_escape(character: str) -> bool:
    if character in _JOINERS:
        return False
    return character in _NONCHARACTERS or unicodedata.category(character) in _UNSAFE_CATEGORIES
