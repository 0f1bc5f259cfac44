from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from secimg_watch import images, signatures, wire
from secimg_watch.errors import (
    CannotCreateError,
    NoInputError,
    NotAllowedError,
    NotAnImageError,
)
from secimg_watch.records import Inspection, Label

if TYPE_CHECKING:
    from pathlib import Path

MANY = 89_478_485


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def look(data: bytes, *, preview: int = 0, decode: bool = False, pixels: int = MANY) -> Inspection:
    return images.probe(io.BytesIO(data), preview=preview, decode=decode, max_pixels=pixels)


def shown(found: Inspection) -> Image.Image:
    return Image.open(io.BytesIO(found.preview))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + body + png_chunk(b"IEND", b"")


def tiff_head(order: str, *entries: tuple[int, int, int, bytes], text: bytes = b"") -> bytes:
    """A first directory; an entry of ASCII kind points to the text that follows it."""
    at = 8 + 2 + 12 * len(entries) + 4
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    head += struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        field = struct.pack(order + "I", at) if kind == 2 else value
        head += struct.pack(order + "HHI", tag, kind, count) + field
    return head + bytes(4) + text


def nef(order: str, maker: bytes, thumbnail: int) -> bytes:
    return tiff_head(
        order,
        (254, 4, 1, struct.pack(order + "I", thumbnail)),
        (271, 2, len(maker), b""),
        (330, 4, 1, struct.pack(order + "I", 400)),
        text=maker,
    )


def box(*brands: bytes) -> bytes:
    return struct.pack(">I", 12 + 4 * len(brands)) + b"ftyp" + brands[0] + bytes(4) + b"".join(
        brands[1:]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
        (b"\xc5\xd0\xd3\xc6\x20\0\0\0", "EPS"),
        (b"\xd7\xcd\xc6\x9a\0\0", "WMF"),
        (b"\x01\0\0\0" + bytes(36) + b" EMF", "WMF"),
        (box(b"heic", b"mif1", b"heic"), "HEIF"),
        (box(b"mif1", b"mif1", b"heic"), "HEIF"),
        (box(b"mif1", b"mif1", b"avif"), "AVIF"),
        (box(b"avis", b"msf1"), "AVIF"),
        (box(b"crx ", b"isom"), "RAW"),
        (box(b"isom", b"mp42"), ""),
        (b"II*\0\x10\0\0\0CR\x02\0", "RAW"),
        (b"FUJIFILMCCD-RAW 0201", "RAW"),
        (b"IIRO\x08\0\0\0", "RAW"),
        (b"MMOR\0\0\0\x08", "RAW"),
        (b"IIU\0\x18\0\0\0", "RAW"),
        (nef(">", b"NIKON CORPORATION\0", 1), "RAW"),
        (nef("<", b"SONY\0\0\0\0", 1), "RAW"),
        (nef(">", b"NIKON CORPORATION\0", 0), "TIFF"),
        (nef("<", b"EPSON\0\0\0", 1), "TIFF"),
        (tiff_head("<", (50706, 1, 4, b"\x01\x04\0\0")), "RAW"),
        (tiff_head("<", (254, 3, 1, b"\x01\0\0\0"), (330, 4, 1, bytes(4))), "TIFF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
        (b"\xff\x0a\x00\x10", "JXL"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"BM" + bytes(12) + b"\x28\0\0\0", "BMP"),
        (b"BM is how this sentence begins", ""),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WEBP"),
        (b"%PDF-1.7", ""),
        (b"", ""),
    ],
)
def test_signatures_name_the_format(head: bytes, name: str) -> None:
    assert signatures.sniff(head) == name


@given(
    st.sampled_from([b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0", b"\0\0\0\x20ftyp", b"BM"]),
    st.binary(max_size=200),
)
def test_sniffing_any_bytes_gives_a_known_name_or_none(start: bytes, rest: bytes) -> None:
    assert signatures.sniff(start + rest) in images.known_formats() | {""}


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA"])
def test_a_picture_is_recognised_decoded_and_shown(name: str) -> None:
    data = encoded(Image.new("RGB", (60, 40), "red"), name)
    assert look(data) == Inspection(Label.IMAGE, name, 60, 40)
    assert look(data, decode=True) == Inspection(Label.IMAGE, name, 60, 40)
    found = look(data, preview=30)
    assert (found.label, found.format, found.detail) == (Label.IMAGE, name, "")
    assert shown(found).format == "JPEG"
    assert shown(found).size == (30, 20)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_colour_mode_gives_a_preview(mode: str) -> None:
    found = look(encoded(Image.new(mode, (40, 20)), "TIFF"), preview=16)
    assert (found.label, found.detail) == (Label.IMAGE, "")
    assert shown(found).size == (16, 8)


def test_a_preview_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    found = look(encoded(Image.new("RGB", (60, 40)), "JPEG", exif=exif), preview=30)
    assert (found.width, found.height) == (60, 40)
    assert shown(found).size == (20, 30)


def test_a_broken_orientation_tag_costs_no_preview() -> None:
    data = encoded(Image.new("RGB", (60, 40)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    found = look(data, preview=30)
    assert found.label is Label.IMAGE
    assert shown(found).size == (30, 20)


def test_a_preview_lies_on_white_where_the_picture_is_transparent() -> None:
    found = look(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"), preview=8)
    assert shown(found).getpixel((4, 4)) == (255, 255, 255)


def test_deep_grey_is_stretched_over_the_preview() -> None:
    deep = Image.new("I;16", (16, 16), 1000)
    deep.paste(1100, (8, 0, 16, 16))
    preview = shown(look(encoded(deep, "PNG"), preview=16))
    assert preview.mode == "L"
    assert preview.getextrema() == (0, 255)


def test_a_preview_carries_no_comment() -> None:
    data = encoded(Image.new("RGB", (8, 8)), "JPEG", comment=b"the patient's name")
    assert b"patient" in data
    assert b"patient" not in look(data, preview=8).preview


def test_a_preview_stays_within_its_bytes() -> None:
    noise = Image.frombytes("RGB", (1400, 1400), os.urandom(3 * 1400 * 1400))
    found = look(encoded(noise, "BMP"), preview=1400)
    assert 0 < len(found.preview) <= wire.MAX_PREVIEW


def test_a_small_picture_is_not_enlarged() -> None:
    assert shown(look(encoded(Image.new("L", (8, 4)), "PNG"), preview=64)).size == (8, 4)


def test_of_many_frames_the_first_is_shown() -> None:
    frames = [Image.new("RGB", (8, 8), (index, 0, 255 - index)) for index in range(200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    red, _, blue = shown(look(data, preview=8)).getpixel((4, 4))  # type: ignore[misc]
    assert red < 10
    assert blue > 245


def test_a_pixel_bomb_is_not_decoded_but_measured() -> None:
    found = look(png_header(60_000, 60_000), preview=8)
    assert found == Inspection(
        Label.UNDECODABLE, "PNG", 60_000, 60_000, detail="more pixels than allowed"
    )


def test_nothing_is_wrong_with_a_large_picture_that_need_not_be_decoded() -> None:
    assert look(png_header(60_000, 60_000)).label is Label.IMAGE


def test_the_pixel_limit_of_the_process_is_put_back() -> None:
    before = Image.MAX_IMAGE_PIXELS
    look(png_header(100, 100), preview=8, pixels=50)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_truncated_picture_is_undecodable() -> None:
    data = encoded(Image.effect_noise((200, 200), 50), "JPEG")
    found = look(data[: len(data) // 2], decode=True)
    assert found == Inspection(Label.UNDECODABLE, "JPEG", 200, 200, detail="truncated file")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_junk_behind_a_signature_is_undecodable() -> None:
    found = look(b"\x89PNG\r\n\x1a\n" + b"junk" * 20)
    assert (found.label, found.format) == (Label.UNDECODABLE, "PNG")
    found = look(b"II*\0\x08\0\0\0\xff\xff" + b"\x7f" * 4000, preview=8)
    assert (found.label, found.format) == (Label.UNDECODABLE, "TIFF")


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (nef(">", b"NIKON CORPORATION\0", 1), "RAW"),
        (box(b"heic", b"mif1") + bytes(100), "HEIF"),
        (b"\xff\x0a\x00\x10", "JXL"),
    ],
)
def test_a_format_without_a_decoder_is_known_by_its_signature(head: bytes, name: str) -> None:
    found = look(head, preview=8)
    assert (found.label, found.format) == (Label.UNDECODABLE, name)
    assert found.detail


@pytest.mark.parametrize("data", [b"", b"Dear Sir or Madam,\n" * 50, b"%PDF-1.7\n", b"PK\x03\x04"])
def test_what_is_no_picture_is_said_to_be_none(data: bytes) -> None:
    assert look(data, preview=8) == Inspection(Label.NOT_IMAGE)


def test_a_file_that_cannot_be_read_is_not_said_to_be_no_picture() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 4096:
                raise OSError(5, "Input/output error")
            return super().read(size)

        def seek(self, offset: int, whence: int = 0, /) -> int:
            return super().seek(offset + 4096, whence)

    with pytest.raises(OSError, match="Input/output"):
        images.probe(Failing(b"text " * 5000), preview=8, decode=True, max_pixels=MANY)


@given(st.sampled_from(["PNG", "GIF", "BMP", "JPEG", "PPM", "TGA"]), st.data())
def test_no_damage_to_a_picture_raises(name: str, data: st.DataObject) -> None:
    good = encoded(Image.new("RGB", (16, 16), "blue"), name)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + data.draw(st.binary(max_size=8)) + good[at + data.draw(st.integers(0, 8)) :]
    found = look(bad, preview=8, pixels=1_000_000)
    assert found.format in images.known_formats() | {""}
    assert bool(found.detail) == (found.label is Label.UNDECODABLE)


def test_warming_loads_what_probing_needs() -> None:
    images.warm()
    assert {"JPEG", "PNG", "TIFF", "HEIF", "RAW", "EPS"} <= images.known_formats()


def test_the_exact_bytes_come_back(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (8, 8)), "PNG") + b"trailing bytes"
    images.bytes_to_image(data, tmp_path / "out.png")
    assert images.image_to_bytes(str(tmp_path / "out.png")) == data


def test_a_written_picture_is_for_its_owner_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "out.gif"
    target.write_bytes(b"the one before")
    target.chmod(0o644)
    images.bytes_to_image(encoded(Image.new("L", (8, 8)), "GIF"), target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["out.gif"]


def test_a_picture_too_large_to_decode_is_still_one(tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(png_header(60_000, 60_000))
    assert images.image_to_bytes(tmp_path / "wide.png") == png_header(60_000, 60_000)


def test_what_is_no_picture_is_neither_read_nor_written(tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("Dear Sir or Madam")
    with pytest.raises(NotAnImageError):
        images.image_to_bytes(tmp_path / "letter.png")
    with pytest.raises(NotAnImageError):
        images.bytes_to_image(b"Dear Sir or Madam", tmp_path / "new.png")
    assert not (tmp_path / "new.png").exists()


def test_a_missing_file_and_a_folder_are_no_input(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(NoInputError):
            images.image_to_bytes(path)


def test_links_and_folders_are_not_written_over(tmp_path: Path) -> None:
    data = encoded(Image.new("L", (8, 8)), "GIF")
    (tmp_path / "link.gif").symlink_to("elsewhere.gif")
    (tmp_path / "folder.gif").mkdir()
    for name in ("link.gif", "folder.gif", "missing/out.gif"):
        with pytest.raises(CannotCreateError):
            images.bytes_to_image(data, tmp_path / name)
    assert not (tmp_path / "elsewhere.gif").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do anything")
def test_missing_rights_are_named_as_such(tmp_path: Path) -> None:
    data = encoded(Image.new("L", (8, 8)), "GIF")
    images.bytes_to_image(data, tmp_path / "mine.gif")
    (tmp_path / "mine.gif").chmod(0)
    with pytest.raises(NotAllowedError):
        images.image_to_bytes(tmp_path / "mine.gif")
    tmp_path.chmod(0o500)
    with pytest.raises(NotAllowedError):
        images.bytes_to_image(data, tmp_path / "new.gif")
    tmp_path.chmod(0o700)
