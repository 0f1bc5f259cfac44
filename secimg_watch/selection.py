"""Which names and which kinds of file a watched folder takes. Rules only: no disk, no clock."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from secimg_watch.names import is_system, is_temporary

STAGING_NAME = ".secimg-watch"
"""Name of the staging directory in the root of every watched folder."""


class Passed(StrEnum):
    """Why a file is passed over. The text is what a person is told."""

    STAGING = "it lies in the staging directory"
    TEMPORARY = "its name is one that producers use while they write"
    SYSTEM = "its name belongs to the system or to a synchroniser, not to a picture"
    EXCLUDED = "a pattern of 'exclude' matches it"
    NOT_INCLUDED = "no pattern of 'include' matches it"
    DEEPER = "it lies in a sub-folder and the folder is not 'recursive'"
    SIDECAR = "it is a producer's marker file"
    SYMLINK = "it is a symbolic link; links are never followed"
    HARD_LINK = "it has more than one name; deleting one would leave the others in clear"
    DIRECTORY = "it is a directory"
    SPECIAL = "it is a FIFO, socket or device"
    UNREADABLE = "it is, or lies in, a sub-folder that may not be opened"


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a folder's policy that looks at names."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    recursive: bool = True
    sidecar: str = ""  # the marker's suffix, "" where the folder uses none
    staging: str = STAGING_NAME  # the staging directory, where it lies inside the folder

    def passes_over(self, relpath: str) -> Passed | None:
        """Why a relative path is passed over by its name alone, or ``None``."""
        *folders, name = relpath.split("/")
        if relpath.startswith((f"{self.staging}/", f"{STAGING_NAME}/")):
            return Passed.STAGING
        if folders and not self.recursive:
            return Passed.DEEPER
        if any(map(is_system, folders)) or is_system(name):
            return Passed.SYSTEM
        if any(map(is_temporary, folders)) or is_temporary(name):
            return Passed.TEMPORARY
        if self.sidecar and name.endswith(self.sidecar):
            return Passed.SIDECAR
        if _matches(self.exclude, relpath, name):
            return Passed.EXCLUDED
        return None if _matches(self.include, relpath, name) else Passed.NOT_INCLUDED

    def enters(self, relpath: str) -> bool:
        """Whether a directory is looked into. Temporary ones are: their files are counted."""
        name = relpath.rsplit("/", 1)[-1]
        ours = relpath in {self.staging, STAGING_NAME}
        return self.recursive and not ours and not is_system(name)


def _matches(patterns: tuple[str, ...], relpath: str, name: str) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(relpath, p) for p in patterns)


def passes_over_kind(mode: int, links: int) -> Passed | None:
    """Why a file is passed over for what it is (``st_mode``, ``st_nlink``), or ``None``."""
    if stat.S_ISREG(mode):
        return Passed.HARD_LINK if links > 1 else None
    if stat.S_ISLNK(mode):
        return Passed.SYMLINK
    return Passed.DIRECTORY if stat.S_ISDIR(mode) else Passed.SPECIAL
