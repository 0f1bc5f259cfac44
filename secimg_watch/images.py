"""What a picture is, as far as Pillow and file signatures can tell. The only door to Pillow.

``probe`` decodes and therefore belongs into the inspector's child process. ``image_to_bytes``
and ``bytes_to_image`` let Pillow read a picture's header, never its pixels.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import io
import os
import stat
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, cast

from PIL import AvifImagePlugin, Image, ImageOps, UnidentifiedImageError

from secimg_watch import kernel
from secimg_watch.errors import (
    CannotCreateError,
    NoInputError,
    NotAllowedError,
    NotAnImageError,
    StorageError,
)
from secimg_watch.records import Inspection, Label
from secimg_watch.signatures import HEAD, sniff
from secimg_watch.wire import MAX_PREVIEW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    Picture = Image.Image
    StrPath = str | os.PathLike[str]

_T = TypeVar("_T")

_QUALITIES: Final = (80, 50, 25)  # JPEG, best first; the rest is for previews over MAX_PREVIEW

# EPS is a program that Ghostscript would have to run; WMF is drawn by the system on Windows.
_REFUSED: Final = frozenset({"EPS", "WMF"})
# Names that no plug-in of Pillow registers, or registers only where an extra is installed.
_EXTRA_FORMATS: Final = frozenset({"HEIF", "JXL", "MPO", "RAW"})
# Raw files are often TIFF outside: opened as such they would pass for their own thumbnail.
_NEVER_OPENED: Final = _REFUSED | {"RAW"}

# Pillow decodes the picture inside as it opens an icon: here the limit has to stand before that.
_ICON: Final = b"\0\0\1\0"

_BOMBS: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# Text encodings that decoders ask for by name; none can be imported once the child is confined.
_ENCODINGS: Final = ("ascii", "latin-1", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "cp1252")
_WARMED: Final = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF")


@functools.cache
def _formats() -> tuple[str, ...]:
    """List the formats that may be opened, in Pillow's own order of trying them."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener(decode_threads=1)
    return tuple(name for name in Image.ID if name not in _REFUSED)


def known_formats() -> frozenset[str]:
    """Every name that ``Inspection.format`` can hold: upper-case letters and digits."""
    return frozenset(_formats()) | _REFUSED | _EXTRA_FORMATS


def warm() -> None:
    """Load every decoder, so that ``probe`` need not import or open anything later.

    Also keeps AVIF decoding to one thread for the whole process, whose processor time is
    limited. For the inspector's child only.
    """
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    for encoding in _ENCODINGS:
        codecs.lookup(encoding)
    _formats()
    sample = Image.new("RGB", (8, 8))
    for name in _WARMED:
        file = io.BytesIO()
        # A build of Pillow may lack a codec; then there is nothing to load for it.
        _attempt(functools.partial(sample.save, file, name))
        probe(io.BytesIO(file.getvalue()), preview=4, decode=True, max_pixels=64)


def probe(file: BinaryIO, *, preview: int, decode: bool, max_pixels: int) -> Inspection:
    """Say what a file is; decode it and make a preview where asked for.

    Args:
        file: Open at its start, seekable.
        preview: Longest side of the preview in pixels, 0 for none. It shows the first frame,
            upright, on white where the picture is transparent, as a JPEG of at most
            ``MAX_PREVIEW`` bytes without metadata.
        decode: Whether to decode the first frame even when there is to be no preview.
        max_pixels: Pictures with more are recognised, but not decoded.

    Returns:
        ``NOT_IMAGE`` where neither Pillow nor a signature recognises the file, ``UNDECODABLE``
        for a picture that is broken, over the limits, or of a format without a decoder,
        otherwise ``IMAGE``. The size is the stored one, before any rotation. A picture that
        decodes but gives no preview stays an ``IMAGE`` and says so in ``detail``.

    It sets Pillow's process-wide pixel limit while it runs: one call at a time in a process.

    Raises:
        OSError, MemoryError: The file could not be read or not be looked into, so that nothing
            is known. What a file contains raises nothing.
    """
    head = file.read(HEAD)
    signature = sniff(head)
    if signature in _NEVER_OPENED:
        return _unopened(signature, "no decoder for this format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        icon = head.startswith(_ICON)
        # The size is wanted of pictures over the limit, too.
        with _pixel_limit(max_pixels if icon else None):
            image = _attempt(lambda: Image.open(file, formats=_formats()))
        if isinstance(image, Exception):
            if icon and isinstance(image, _BOMBS):
                return _unopened("ICO", _reason(image))
            if not signature and _says_nothing(image):
                raise image
            return _unopened(signature, _reason(image))
        with image, _pixel_limit(max_pixels):
            return _examine(image, preview=preview, decode=decode, max_pixels=max_pixels)


def _unopened(signature: str, reason: str) -> Inspection:
    if signature:
        return Inspection(Label.UNDECODABLE, signature, detail=reason)
    return Inspection(Label.NOT_IMAGE)


def _examine(image: Picture, *, preview: int, decode: bool, max_pixels: int) -> Inspection:
    width, height = image.size
    found = Inspection(Label.IMAGE, (image.format or "").upper(), width, height)
    if not (decode or preview):
        return found
    if width * height > max_pixels:
        return replace(found, label=Label.UNDECODABLE, detail="more pixels than allowed")
    loaded = _attempt(lambda: _load(image, preview))
    if isinstance(loaded, Exception):
        return replace(found, label=Label.UNDECODABLE, detail=_reason(loaded))
    if not preview:
        return found
    made = _attempt(lambda: _preview(image, preview))
    if isinstance(made, Exception) or not made:
        return replace(found, detail="no preview can be made of it")
    return replace(found, preview=made)


def _attempt(step: Callable[[], _T]) -> _T | Exception:
    """Run one step of Pillow and hand over whatever it raised.

    A decoder that meets hostile bytes raises nearly any class there is, by design
    (``SyntaxError``) or not (``IndexError``, ``MemoryError``, ``ZeroDivisionError``).
    """
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - see above: no shorter list is complete
        return error


def _says_nothing(error: Exception) -> bool:
    """Whether opening failed for want of memory or of the system's help, not for the bytes."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and bool(error.errno))


def _reason(error: Exception) -> str:
    """Put an error of Pillow into a fixed clause, for its text may quote the file."""
    if isinstance(error, _BOMBS):
        return "more pixels inside than allowed"
    if isinstance(error, MemoryError):
        return "needs more memory than allowed"
    if isinstance(error, UnidentifiedImageError):
        return "broken header"
    if "truncated" in str(error).lower():
        return "truncated file"
    builtin = next(each for each in type(error).__mro__ if each.__module__ == "builtins")
    return f"does not decode ({builtin.__name__})"


@contextlib.contextmanager
def _pixel_limit(pixels: int | None) -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _load(image: Picture, preview: int) -> None:
    """Decode the first frame.

    A JPEG is read to its end at every scale, and a smaller one costs a fraction of the time;
    twice the preview's size leaves enough for a clean reduction.
    """
    image.draft(None, (max(1, 2 * preview), max(1, 2 * preview)))
    image.load()


def _preview(image: Picture, side: int) -> bytes:
    small = _with_direct_colours(image)
    small.thumbnail((side, side), reducing_gap=2.0)
    turned = _attempt(lambda: ImageOps.exif_transpose(small))
    # A broken orientation tag is no reason to have no preview.
    flat = _flatten(small if isinstance(turned, Exception) else turned)
    flat.info = {}  # comments and resolution would be written along otherwise
    for quality in _QUALITIES:
        file = io.BytesIO()
        flat.save(file, "JPEG", quality=quality)
        if file.tell() <= MAX_PREVIEW:
            return file.getvalue()
    return b""


def _with_direct_colours(image: Picture) -> Picture:
    """Replace palette entries and single bits, between which there is nothing to average."""
    if image.mode == "1":
        return image.convert("L")
    if image.mode in {"P", "PA"}:
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image


def _flatten(image: Picture) -> Picture:
    """Bring a picture into 8 bits a channel, grey or colour, on a white ground."""
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return _stretch(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "L" else image.convert("RGB")


def _stretch(image: Picture) -> Picture:
    """Map the values that occur onto 0 to 255: deep grey has no agreed white point."""
    deep = image.convert("F")
    low, high = cast("tuple[float, float]", deep.getextrema())
    scale = 255.0 / (high - low) if high > low else 1.0
    return deep.point(lambda value: value * scale - low * scale).convert("L")


def image_to_bytes(path: StrPath) -> bytes:
    """Read a picture's exact bytes, once Pillow has recognised them as one.

    Raises:
        NoInputError: There is no regular file of that name.
        NotAnImageError: Pillow does not open it, or it is EPS or WMF, which are never opened.
        NotAllowedError: The file may not be read.
        StorageError: Reading failed.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise NoInputError(f"{name} is not a file", hint="check the name of the picture")
    try:
        with open(name, "rb") as file:
            data = file.read()
    except PermissionError as error:
        raise NotAllowedError(f"{name} may not be read") from error
    except OSError as error:
        raise StorageError(f"{name} cannot be read: {error.strerror}") from error
    _require_image(data)
    return data


def bytes_to_image(data: bytes, path: StrPath) -> None:
    """Write a picture's exact bytes, once Pillow has recognised them as one.

    The file appears whole or not at all, readable by its owner only (mode 0600). A regular
    file of that name is replaced; a symbolic link, a directory or a device is not.

    Raises:
        NotAnImageError: Pillow does not open the bytes; nothing is written.
        CannotCreateError: The name is taken by something else, or its folder is missing.
        NotAllowedError: The folder may not be written to.
        StorageError: Writing failed.
    """
    _require_image(data)
    name = os.fspath(path)
    try:
        if os.path.lexists(name) and not stat.S_ISREG(os.lstat(name).st_mode):
            raise CannotCreateError(f"{name} exists and is not a regular file")
        _replace_file(name, data)
    except FileNotFoundError as error:
        raise CannotCreateError(f"the folder of {name} does not exist") from error
    except PermissionError as error:
        raise NotAllowedError(f"{name} may not be written") from error
    except OSError as error:
        raise StorageError(f"{name} cannot be written: {error.strerror}") from error


def _replace_file(name: str, data: bytes) -> None:
    folder = os.path.dirname(os.path.abspath(name))
    # The leading dot and the suffix keep a watcher of that folder from taking it half written.
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    kernel.sync_path(Path(folder))


def _require_image(data: bytes) -> None:
    opened = _attempt(lambda: Image.open(io.BytesIO(data), formats=_formats()))
    if not isinstance(opened, Exception):
        opened.close()
        return
    # Raised of a picture that was recognised; its size is of no concern, it is not decoded.
    if isinstance(opened, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return
    hint = ""
    if sniff(data[:HEAD]) == "HEIF":
        hint = "install the extra 'heif' to read pictures of this format"
    raise NotAnImageError("the data is not an image that Pillow recognises", hint=hint) from opened
