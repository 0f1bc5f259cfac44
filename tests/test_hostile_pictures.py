"""Pictures made to harm whoever decodes them, through the real service from end to end.

What a single decoder, its limits and its confinement do is in ``test_images.py``,
``test_inspector.py`` and ``test_sandbox.py``; this is about all of them in one folder, and about
a decoder that was taken over. Where the environment variable ``SECIMG_CORPUS`` names a directory
with ``files/`` and a ``manifest.tsv`` (columns name, bytes, sha256, and pillow_13_says with
``loads``, ``broken:...``, ``bomb`` or ``not opened:...``), every file of it is sent through, too.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import PIL
import pytest
from cli_runner import Cli
from daemon import LINUX, Site, picture, place, wait_until
from PIL import Image

from secimg_watch import inspector
from secimg_watch.inspector import Inspector, Limits
from secimg_watch.records import Label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not LINUX, reason="the service is Linux's")

CORPUS: Final = os.environ.get("SECIMG_CORPUS")
MEMORY: Final = 160 << 20
MANY: Final = 64 << 20  # bytes that something small unpacks to
KILL: Final = signal.Signals["SIGKILL"] if LINUX else 9
# Pillow deletes comments one by one, and moves all that follows each time.
ENDLESS: Final = b"P2 4000 4000 9\n" + b"#\n" * (1 << 20)


# -- pictures made by hand -----------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    data = kind + body
    return struct.pack(">I", len(body)) + data + struct.pack(">I", zlib.crc32(data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Make a PNG file that has hardly a row, with more chunks before it."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = [chunk(b"IHDR", ihdr), *chunks, chunk(b"IDAT", zlib.compress(bytes(99)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def squeezed(size: int) -> bytes:
    """Zeros, as small as they get."""
    return zlib.compress(bytes(size), 9)


def tiff(width: int, height: int, *more: tuple[int, int, int, int]) -> bytes:
    """Make a TIFF file of one directory, and of one squeezed strip that is too short."""
    strip = squeezed(99)
    # Width, height, bits, compression, colours, and where the strip is.
    single = ((256, width), (257, height), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1))
    lengths = ((278, height), (279, len(strip)))
    entries = [*((tag, 4, 1, value) for tag, value in single + lengths), *more]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", *entry) for entry in sorted(entries)
    )
    start = 8 + len(strip)
    return b"II*\0" + struct.pack("<I", start) + strip + directory + bytes(4)


def encoded(kind: str, side: int = 8, **options: object) -> bytes:
    """A small picture that decodes."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(file, kind, **options)
    return file.getvalue()


def looping_tiff() -> bytes:
    """A TIFF file that decodes, and whose directory is followed by itself."""
    data = bytearray(encoded("TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    return bytes(data)


def gif(width: int, height: int, frames: int = 1) -> bytes:
    """A GIF file whose frames are as large as its screen, and hold two pixels."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x0a\0"
    return screen + frames * frame + b";"


def riff(kind: bytes, body: bytes) -> bytes:
    inner = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


def ico(inner: bytes) -> bytes:
    """An icon of 16 pixels a side, as its directory says, with another file in it."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG file with the size of another one in its header."""
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", data, at, height, width)
    return bytes(data)


def jpeg_with(marker: int, body: bytes) -> bytes:
    data = encoded("JPEG")
    return data[:2] + struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body + data[2:]


LAUGHS: Final = b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "ha">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>
<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/>&c;</svg>"""

IMAGE, BROKEN, NONE = Label.IMAGE, Label.UNDECODABLE, Label.NOT_IMAGE
UNKNOWN: Final = Label.UNINSPECTED

PICTURES: Final[dict[str, tuple[Label, str, Callable[[], bytes]]]] = {
    # Small, and large once they are unpacked.
    "pixels.png": (BROKEN, "PNG", lambda: png(9000, 9000)),
    "text.png": (BROKEN, "PNG", lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + squeezed(MANY)))),
    "profile.png": (BROKEN, "PNG", lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + squeezed(MANY)))),
    "pixels.tif": (BROKEN, "TIFF", lambda: tiff(30_000, 30_000)),
    "memory.gif": (BROKEN, "GIF", lambda: gif(9400, 9400)),
    "canvas.webp": (BROKEN, "WEBP", lambda: riff(b"VP8X", b"\x02\0\0\0" + 6 * b"\xff")),
    "lossless.webp": (BROKEN, "WEBP", lambda: riff(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(9))),
    "pixels.jpg": (BROKEN, "JPEG", lambda: jpeg_of(65_500, 65_500)),
    "svg.svg": (NONE, "", lambda: LAUGHS),
    # Headers that no picture lives up to.
    "side.png": (UNKNOWN, "PNG", lambda: png(0xFFFFFFFF, 1)),
    "no side.png": (BROKEN, "PNG", lambda: png(0, 0)),
    "tags.tif": (BROKEN, "TIFF", lambda: tiff(99, 99, (270, 2, 0xFFFFFFFF, 8))),
    "number.ppm": (NONE, "", lambda: b"P6 " + b"9" * 5000 + b" 1 255\n"),
    "exif.jpg": (
        IMAGE,
        "JPEG",
        lambda: jpeg_with(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + 5000 * b"\x12\x01"),
    ),
    # One inside the other.
    "bomb.ico": (BROKEN, "ICO", lambda: ico(png(60_000, 60_000))),
    "icon.ico": (IMAGE, "ICO", lambda: ico(encoded("PNG", 16))),
    "loop.tif": (IMAGE, "TIFF", looping_tiff),
    "frames.gif": (IMAGE, "GIF", lambda: gif(2, 1, frames=20_000)),
    # Two things at once.
    "zip.jpg": (IMAGE, "JPEG", lambda: encoded("JPEG") + b"PK\x05\x06" + bytes(18)),
    "script.gif": (IMAGE, "GIF", lambda: gif(2, 1) + b"*/=1;alert(1)//"),
    "page.jpg": (IMAGE, "JPEG", lambda: jpeg_with(0xFE, b"<html><script>alert(1)</script>")),
    "pdf.png": (IMAGE, "PNG", lambda: encoded("PNG") + b"%PDF-1.7\n%%EOF"),
    "picture.pdf": (NONE, "", lambda: b"%PDF-1.7\n" + encoded("JPEG") + b"\n%%EOF"),
    "program.eps": (BROKEN, "EPS", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file\n"),
    "phone.heic": (BROKEN, "HEIF", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)),
    # Hardly anything.
    "one byte.jpg": (NONE, "", lambda: b"\xff"),
    "head.jpg": (BROKEN, "JPEG", lambda: b"\xff\xd8\xff"),
    "head.png": (BROKEN, "PNG", lambda: b"\x89PNG\r\n\x1a\n"),
    "head.tif": (BROKEN, "TIFF", lambda: b"II*\0\x08\0\0\0"),
    "cut.avif": (BROKEN, "AVIF", lambda: b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf"),
}
"""What the inspector says of each file, as far as that is not the decoder's own affair."""

# -- one folder of them --------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """The children of all threads of a process."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text("ascii").split())
    return found


def only_child(pid: int, other_than: int = 0) -> int:
    return wait_until(
        lambda: next((each for each in children(pid) if each != other_than), 0), "a child"
    )


def await_confined_worker(zygote: int) -> int:
    """Wait for a worker that may not use more memory than the policy says."""
    worker = only_child(zygote)
    words = ["Max", "address", "space", str(MEMORY), str(MEMORY), "bytes"]

    def confined() -> bool:
        lines = Path(f"/proc/{worker}/limits").read_text("ascii").splitlines()
        return words in [line.split() for line in lines]

    wait_until(confined, "its limits")
    return worker


def most_memory(pid: int) -> int:
    """The most memory that a process ever had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@dataclass(frozen=True)
class Gallery:
    """What became of a folder of hostile pictures."""

    dropped: dict[str, bytes]
    restored: dict[bytes, bytes]
    listed: dict[str, dict[str, Any]]
    grown: dict[str, int]  # by how many bytes, for all the pictures
    status: dict[str, Any]
    log: str


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    site = Site(tmp_path_factory.mktemp("gallery"))
    site.folder.update(not_image="encrypt", preview=64)
    site.policy["limits"] = {"decode_memory": f"{MEMORY}B"}
    daemon = site.start()
    try:
        (site.drop / "nothing.jpg").touch()
        dropped = {"first.jpg": place(site.drop / "first.jpg", picture())}
        site.wait_for_objects(1)
        processes = {"service": daemon.process.pid, "inspector": only_child(daemon.process.pid)}
        before = {name: most_memory(pid) for name, pid in processes.items()}
        for name, (_, _, make) in PICTURES.items():
            dropped[name] = place(site.drop / name, make())
        site.wait_for_objects(len(dropped))
        grown = {name: most_memory(pid) - before[name] for name, pid in processes.items()}
        wait_until(lambda: not children(processes["inspector"]), "the last worker's end")
        dropped["crash.pgm"] = place(site.drop / "crash.pgm", ENDLESS)
        await_confined_worker(processes["inspector"])
        os.kill(processes["inspector"], KILL)
        successor = only_child(daemon.process.pid, other_than=processes["inspector"])
        os.kill(await_confined_worker(successor), signal.SIGSEGV)
        site.wait_for_objects(len(dropped))
        dropped["last.jpg"] = place(site.drop / "last.jpg", picture())
        wait_until(lambda: site.plaintexts() == [b"nothing.jpg"], "all to be gone")
        wait_until(lambda: site.status()["sealed"] == len(dropped), "the status")
        status = site.status()
        assert children(daemon.process.pid) == [successor]
        assert daemon.stop() == 0, daemon.log()
        listed = {entry["name"]: entry for entry in site.listed()}
        yield Gallery(dropped, site.restored(), listed, grown, status, daemon.log())
    finally:
        daemon.close()


def test_every_hostile_picture_is_sealed_with_its_own_bytes(gallery: Gallery) -> None:
    expected = {name.encode(): content for name, content in gallery.dropped.items()}
    assert gallery.restored == expected


@pytest.mark.parametrize("name", PICTURES)
def test_a_hostile_picture_is_labelled_as_what_it_is(gallery: Gallery, name: str) -> None:
    label, kind, _ = PICTURES[name]
    entry = gallery.listed[name]
    assert (entry["label"], entry["format"]) == (label, kind)


def test_the_death_of_the_inspector_and_a_crash_cost_one_label_and_the_next_picture_none(
    gallery: Gallery,
) -> None:
    assert gallery.listed["crash.pgm"]["label"] == "uninspected"
    assert gallery.listed["last.jpg"]["label"] == "image"


def test_nothing_hostile_disturbs_the_service(gallery: Gallery) -> None:
    assert (gallery.status["health"], gallery.status["quarantined"]) == ("ok", 0)
    assert gallery.status["passed"] == {"empty": 1}
    assert "Traceback" not in gallery.log
    assert "a defect" not in gallery.log


def test_neither_the_service_nor_its_inspector_grows_with_what_is_in_a_picture(
    gallery: Gallery,
) -> None:
    assert max(gallery.grown.values()) < 48 << 20, gallery.grown


def test_a_decoder_that_never_ends_is_ended_and_the_service_goes_on(site: Site) -> None:
    site.policy["limits"] = {"decode_seconds": 1}
    daemon = site.start()
    hang = place(site.drop / "hang.pgm", ENDLESS)
    site.wait_for_objects(1)
    zygote = only_child(daemon.process.pid)
    wait_until(lambda: not children(zygote), "the decoder's end")
    after = place(site.drop / "after.jpg", picture())
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert site.restored() == {b"hang.pgm": hang, b"after.jpg": after}
    assert {e["name"]: e["label"] for e in site.listed()}["hang.pgm"] == "uninspected"


# Workers wait before they confine themselves: what their parent's death would tell them is missed.
_SLOW_WORKERS: Final = """
import os, time
from secimg_watch import sandbox
zygote, protect = os.getpid(), sandbox._protect
def late():
    end = time.monotonic() + 60
    while os.getpid() != zygote and os.getppid() == zygote and time.monotonic() < end:
        time.sleep(0.001)
    protect()
sandbox._protect = late
"""


def test_a_decoder_whose_inspector_dies_as_it_starts_does_not_outlive_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inspector, "_BOOT", f"{inspector._BOOT} exec({_SLOW_WORKERS!r}); ")
    path = tmp_path / "endless.pgm"
    path.write_bytes(ENDLESS)
    with Inspector(Limits()) as inspecting, path.open("rb") as file:
        assert inspecting._child is not None
        zygote = inspecting._child._process.pid
        thread = threading.Thread(
            target=inspecting.inspect,
            args=(file.fileno(),),
            kwargs={"size": len(ENDLESS), "preview": 0, "decode": True},
        )
        thread.start()
        orphan = only_child(zygote)
        os.kill(zygote, KILL)
        wait_until(lambda: not Path(f"/proc/{orphan}").exists(), "the orphan's end")
        inspecting.close()  # it goes on with another child, and would wait for that
        thread.join()


# -- a decoder that was taken over ---------------------------------------------------------------

_JPEG: Final = b"\xff\xd8\xff"
# Runs in the real zygote; its workers call "attempts" in the place of the decoder. The finding's
# preview has a letter for each attempt: "." for what was done, "P" and "A" for EPERM and EACCES,
# "B" for EBADF, "x" for anything else.
_EVIL: Final = """
import ctypes, errno, fcntl, os, socket
from secimg_watch import inspector_child, sandbox
from secimg_watch.records import Inspection, Label
OTHER, SERVICE, TOP, JPEG, ATTEMPTS = {settings!r}
ZYGOTE = os.getpid()
LIBC = ctypes.CDLL(None, use_errno=True)
WORDS = (ctypes.c_size_t * 3)()
VECTOR = ctypes.addressof(WORDS)
WORDS[:] = VECTOR + 16, 8, 0
def call(number, *arguments):
    if LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def attempt(statement):
    try:
        exec(statement, globals())
    except OSError as error:
        return {{errno.EPERM: "P", errno.EACCES: "A", errno.EBADF: "B"}}.get(error.errno, "x")
    except BaseException:
        return "x"
    return "."
def attempts(file, request):
    global PICTURE
    PICTURE = file.raw._fd
    return Inspection(Label.IMAGE, preview=JPEG + "".join(map(attempt, ATTEMPTS)).encode())
inspector_child._probe = attempts
"""

# OTHER is a process of the same user, SERVICE the one that started the inspector.
_LOOKS: Final = [
    *(f"os.open('/proc/%d/{name}' % OTHER, os.O_RDONLY)" for name in ("mem", "environ", "maps")),
    *(f"os.open('/proc/%d/{name}' % SERVICE, os.O_RDONLY)" for name in ("mem", "environ")),
    "os.listdir('/proc/%d/fd' % OTHER)",
    "os.listdir('/proc/%d/task' % OTHER)",
    "os.open('/proc/%d/mem' % ZYGOTE, os.O_RDWR)",
    "os.open('/proc/self/mem', os.O_RDWR)",
    "os.open('/proc/self/fd/%d' % PICTURE, os.O_RDWR)",
    "os.open(TOP, os.O_RDONLY)",
    "os.mkdir(TOP + '/new')",
    "os.unlink(TOP + '/a.jpg')",
]
_SIGNALS: Final = ["os.kill(OTHER, 9)", "os.kill(SERVICE, 0)"]
# In order: attaching and seizing by ptrace, reading memory.
_X86_LOOKS: Final = [
    "call(101, 16, OTHER, 0, 0)",
    "call(101, 0x4206, OTHER, 0, 0)",
    "call(310, OTHER, VECTOR, 1, VECTOR, 1, 0)",
]
_CALLS: Final = [
    "os.kill(ZYGOTE, 9)",
    "os.pidfd_open(OTHER)",
    "os.sched_setaffinity(OTHER, [0])",
    "os.setpriority(os.PRIO_PROCESS, OTHER, 19)",
    "os.write(PICTURE, b'x')",
    "os.ftruncate(PICTURE, 0)",
    "os.fchmod(PICTURE, 0o777)",
    "os.fchown(PICTURE, os.getuid(), -1)",
    "os.utime(PICTURE, (0, 0))",
    "os.setxattr(PICTURE, 'user.x', b'x')",
    "os.dup(PICTURE)",
    "os.posix_fallocate(PICTURE, 0, 9)",
    # A lease and a lock belong to the open file, which the service shares with its worker.
    "fcntl.fcntl(PICTURE, fcntl.F_SETLEASE, fcntl.F_UNLCK)",
    "fcntl.flock(PICTURE, fcntl.LOCK_EX)",
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
]


def taken_over(
    monkeypatch: pytest.MonkeyPatch, top: Path, layer: str, attempts: list[str], more: str = ""
) -> dict[str, str]:
    """Have the real worker make attempts; gives those that were not refused."""
    path = top / "a.jpg"
    content = encoded("JPEG")
    path.write_bytes(content)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        evil = _EVIL.format(settings=(other.pid, os.getpid(), str(top), _JPEG, attempts)) + more
        monkeypatch.setattr(inspector, "_BOOT", f"{inspector._BOOT} exec({evil!r}); ")
        try:
            with Inspector(Limits()) as inspecting, path.open("rb") as file:
                if not any(name.startswith(layer) for name in inspecting.confinement):
                    pytest.skip(f"this kernel or machine has no {layer}: {inspecting.confinement}")
                found = inspecting.inspect(file.fileno(), size=len(content), preview=9, decode=True)
            assert other.poll() is None
        finally:
            other.kill()
    assert (os.listdir(top), path.read_bytes()) == (["a.jpg"], content)
    results = dict(zip(attempts, found.preview.removeprefix(_JPEG).decode(), strict=True))
    assert results.pop("os.write(PICTURE, b'x')", "B") == "B"  # writing as such is allowed
    return {attempt: result for attempt, result in results.items() if result not in "PA"}


_X86: Final = platform.machine() == "x86_64"


def test_a_decoder_that_was_taken_over_reaches_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attempts = _LOOKS + _SIGNALS + _CALLS + (_X86_LOOKS if _X86 else [])
    assert taken_over(monkeypatch, tmp_path, "seccomp", attempts) == {}


def test_landlock_alone_keeps_it_from_files_and_from_the_service(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = "sandbox._filters = lambda: None\nsandbox._limit_resources = lambda *a, **k: ()\n"
    attempts = _LOOKS + (_X86_LOOKS if _X86 else [])
    assert taken_over(monkeypatch, tmp_path, "landlock", attempts, alone) == {}


# -- pictures of others --------------------------------------------------------------------------


LABELS: Final = {"loads": "image", "broken": "undecodable", "bomb": "undecodable"}


@pytest.mark.skipif(CORPUS is None, reason="SECIMG_CORPUS names no directory of hostile pictures")
def test_a_corpus_of_hostile_pictures_comes_back_and_is_labelled(site: Site) -> None:
    corpus = Path(CORPUS or "")
    with (corpus / "manifest.tsv").open(encoding="utf-8") as file:
        manifest = {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}
    for name in manifest:
        shutil.copyfile(corpus / "files" / name, site.drop / name)
    site.folder.update(not_image="encrypt", preview=256)
    site.make_vaults()
    outcome = Cli(site.top / "home")("--policy", site.policy_path, "--json", "drain")
    assert (outcome.code, outcome.json()["sealed"]) == (0, len(manifest))
    restored = site.restored()
    sums = {os.fsdecode(n): hashlib.sha256(data).hexdigest() for n, data in restored.items()}
    assert sums == {name: row["sha256"] for name, row in manifest.items()}
    labels = {entry["name"]: entry["label"] for entry in site.listed()}
    assert labels.keys() == manifest.keys()
    # What another version makes of each file differs; some never come to an end.
    if PIL.__version__.startswith("13."):
        said = {n: row["pillow_13_says"].partition(":")[0] for n, row in manifest.items()}
        opened = {n: LABELS[verdict] for n, verdict in said.items() if verdict in LABELS}
        assert {n: labels[n] for n in opened} == opened
        other = {labels[n] for n in labels.keys() - opened.keys()}
        assert not other & {"image", "uninspected"}
