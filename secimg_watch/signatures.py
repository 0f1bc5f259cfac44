"""Names picture formats by the first bytes of a file. Compares bytes and decodes nothing."""

from __future__ import annotations

import re
import struct
from typing import Final

HEAD: Final = 4096
"""Bytes from the start of a file that ``sniff`` looks at."""

_SIGNATURES: Final = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"II\*\0.{4}CR", "RAW"),
        (rb"FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0", "RAW"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
        (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "WMF"),
        (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "JXL"),
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"GIF8[79]a", "GIF"),
        (rb"II[*+]\0|MM\0[*+]", "TIFF"),
        (rb"RIFF.{4}WEBP", "WEBP"),
        (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG2000"),
        (rb"8BPS", "PSD"),
        (rb"DDS \x7c\0\0\0", "DDS"),
        (rb"icns", "ICNS"),
        (rb"qoif", "QOI"),
    )
)

# ISO base media file brands: ISO/IEC 23008-12 (HEIF), the AVIF specification, Canon CR3.
_AVIF_BRANDS: Final = frozenset({b"avif", b"avis"})
_HEIF_BRANDS: Final = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
)

# TIFF 6.0, TIFF/EP and DNG tags, and the one value of NewSubfileType that means "thumbnail".
_NEW_SUBFILE_TYPE: Final = 254
_MAKE: Final = 271
_SUB_IFDS: Final = 330
_DNG_VERSION: Final = 50706
_REDUCED: Final = 1
_RAW_MAKERS: Final = (b"NIKON", b"SONY")


def sniff(head: bytes) -> str:
    """Name the picture format whose signature the first 4 KiB of a file carry, or ``""``.

    Names are Pillow's, and "HEIF", "JXL" (JPEG XL) and "RAW" (Canon CR2 and CR3, Nikon NEF,
    Sony ARW, Adobe DNG, Fujifilm RAF, Olympus ORF, Panasonic RW2). Only signatures are
    listed that hardly any other file begins with; never raises.
    """
    name = _brand(head)
    if name:
        return name
    name = next((name for pattern, name in _SIGNATURES if pattern.match(head)), "")
    return "RAW" if name == "TIFF" and _is_raw(_first_directory(head)) else name


def _brand(head: bytes) -> str:
    """Read the file type box that AVIF, HEIF and Canon CR3 files begin with."""
    if head[4:8] != b"ftyp":
        return ""
    box = head[8 : max(8, int.from_bytes(head[:4], "big"))]
    # The four bytes after the major brand are its version.
    brands = {box[:4], *(box[at : at + 4] for at in range(8, len(box), 4))}
    if b"crx " in brands:
        return "RAW"
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else ""


def _first_directory(head: bytes) -> dict[int, bytes]:
    """Map the tags of a TIFF file's first directory to their four bytes of value or offset."""
    order = "<" if head[:2] == b"II" else ">"
    try:
        (at,) = struct.unpack_from(order + "I", head, 4)
        (count,) = struct.unpack_from(order + "H", head, at)
    except struct.error:
        return {}
    tags = {}
    for entry in range(at + 2, min(at + 2 + 12 * count, len(head) - 11), 12):
        tag, kind, length = struct.unpack_from(order + "HHI", head, entry)
        tags[tag] = _value(head, order, kind, length, head[entry + 8 : entry + 12])
    return tags


def _value(head: bytes, order: str, kind: int, length: int, field: bytes) -> bytes:
    """Give text where it is stored in reach, and one number as four big-endian bytes."""
    ascii_kind, short_kind, inline = 2, 3, 4
    if kind == ascii_kind and length > inline:
        (at,) = struct.unpack(order + "I", field)
        return head[at : at + length]
    if kind == short_kind:
        field = b"\0\0" + field[:2] if order == ">" else field[:2] + b"\0\0"
    return field if order == ">" or kind == ascii_kind else field[::-1]


def _is_raw(tags: dict[int, bytes]) -> bool:
    """Tell a camera's raw file in TIFF clothes from a picture of the same maker.

    A raw file's first directory is a thumbnail and points to the sensor's data with SubIFDs;
    a DNG says so itself.
    """
    thumbnail = int.from_bytes(tags.get(_NEW_SUBFILE_TYPE, b""), "big") == _REDUCED
    camera = tags.get(_MAKE, b"").upper().startswith(_RAW_MAKERS)
    return _DNG_VERSION in tags or (thumbnail and camera and _SUB_IFDS in tags)
