from __future__ import annotations

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from secimg_watch import images, inspector, wire
from secimg_watch.errors import StorageError
from secimg_watch.inspector import Inspector, Limits, parse_reply
from secimg_watch.records import Inspection, Label
from secimg_watch.wire import Request, encode_reply

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no zygote")

# Not every system that the tests are type-checked for has these.
KILL, STOP, HANGUP = (getattr(signal, name, 0) for name in ("SIGKILL", "SIGSTOP", "SIGHUP"))

JPEG = b"\xff\xd8\xff\xe0"


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


SMALL = encoded(Image.new("RGB", (60, 40), "red"), "JPEG")
# Read number by number in Python, which takes seconds.
SLOW = b"P2 4000 4000 9\n" + b"1 " * 16_000_000


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = tmp_path_factory.mktemp("slow") / "slow.pgm"
    path.write_bytes(SLOW)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture(scope="module")
def shared() -> Iterator[Inspector]:
    with Inspector(Limits()) as inspecting:
        yield inspecting


@pytest.fixture
def own() -> Iterator[Inspector]:
    with Inspector(Limits()) as inspecting:
        yield inspecting


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[bytes], int]]:
    fds: list[int] = []

    def opening(data: bytes) -> int:
        path = tmp_path / f"{len(fds)}.jpg"
        path.write_bytes(data)
        fds.append(os.open(path, os.O_RDONLY))
        return fds[-1]

    yield opening
    for fd in fds:
        os.close(fd)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that promises more than it holds."""
    data = b"\x89PNG\r\n\x1a\n"
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", ihdr), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    return data


def inspect(
    inspecting: Inspector, fd: int, *, preview: int = 0, decode: bool = False
) -> Inspection:
    return inspecting.inspect(fd, size=os.fstat(fd).st_size, preview=preview, decode=decode)


def zygote(inspecting: Inspector) -> int:
    assert inspecting._child is not None
    return inspecting._child._process.pid


def workers(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text("latin-1").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def await_worker(parent: int) -> int:
    """Give the first worker of a zygote that has had none before."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if found := workers(parent):
            return found[0]
    pytest.fail("no worker appeared")


def test_a_picture_is_named_measured_and_shown(
    shared: Inspector, opened: Callable[[bytes], int]
) -> None:
    fd = opened(SMALL)
    assert inspect(shared, fd) == Inspection(Label.IMAGE, "JPEG", 60, 40)
    assert inspect(shared, fd, decode=True) == Inspection(Label.IMAGE, "JPEG", 60, 40)
    found = inspect(shared, fd, preview=30)
    assert Image.open(io.BytesIO(found.preview)).size == (30, 20)


def test_the_offset_of_the_file_stays_where_it_was(
    shared: Inspector, opened: Callable[[bytes], int]
) -> None:
    fd = opened(SMALL)
    os.lseek(fd, 17, os.SEEK_SET)
    assert inspect(shared, fd, preview=30).label is Label.IMAGE
    assert os.lseek(fd, 0, os.SEEK_CUR) == 17


def test_hostile_and_foreign_files_are_labelled(
    shared: Inspector, opened: Callable[[bytes], int]
) -> None:
    noise = encoded(Image.effect_noise((300, 300), 50), "JPEG")
    frames = [Image.new("L", (40, 40), index) for index in range(250)]
    deep = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    labels = {
        noise[: len(noise) // 2]: (Label.UNDECODABLE, "JPEG"),
        deep: (Label.IMAGE, "GIF"),
        png_header(60_000, 60_000): (Label.UNDECODABLE, "PNG"),
        b"II*\0\x08\0\0\0\xff\xff" + b"\x7f" * 9000: (Label.UNDECODABLE, "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n(id) run": (Label.UNDECODABLE, "EPS"),
        b"Dear Sir or Madam,\n": (Label.NOT_IMAGE, ""),
        b"": (Label.NOT_IMAGE, ""),
    }
    for data, label in labels.items():
        found = inspect(shared, opened(data), preview=64, decode=True)
        assert (found.label, found.format) == label


def test_only_the_header_is_read_of_a_file_over_the_size_limit(
    opened: Callable[[bytes], int],
) -> None:
    with Inspector(Limits(file_size=100)) as strict:
        found = inspect(strict, opened(SMALL), preview=30, decode=True)
    assert found == Inspection(Label.IMAGE, "JPEG", 60, 40, detail="file too large to decode")


def test_pixels_and_memory_are_limited(opened: Callable[[bytes], int]) -> None:
    with Inspector(Limits(pixels=1000)) as strict:
        assert inspect(strict, opened(SMALL), decode=True).detail == "more pixels than allowed"
    if sys.platform == "linux":
        with Inspector(Limits(memory=200 << 20)) as strict:
            found = inspect(strict, opened(png_header(9000, 9000)), decode=True)
        assert found.label is Label.UNDECODABLE
        assert found.detail == "needs more memory than allowed"


def test_a_descriptor_that_can_be_written_to_is_refused(shared: Inspector, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with pytest.raises(ValueError, match="reading only"):
            inspect(shared, fd)
    finally:
        os.close(fd)


def test_a_picture_that_takes_too_long_is_let_go(opened: Callable[[bytes], int], slow: int) -> None:
    with Inspector(Limits(seconds=0.3)) as strict:
        start = time.monotonic()
        found = inspect(strict, slow, decode=True)
        assert found == Inspection(Label.UNINSPECTED, detail="ran out of time")
        assert time.monotonic() - start < inspector._GRACE
        assert inspect(strict, opened(SMALL)).label is Label.IMAGE


@linux_only
def test_a_crash_of_the_decoder_costs_one_label(
    own: Inspector, opened: Callable[[bytes], int], slow: int
) -> None:
    before = zygote(own)
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(inspect, own, slow, decode=True)
        os.kill(await_worker(before), KILL)
        assert pending.result(30) == Inspection(Label.UNINSPECTED, detail="the decoder crashed")
    assert inspect(own, opened(SMALL)).label is Label.IMAGE
    assert zygote(own) == before


@linux_only
def test_what_was_not_inspected_is_still_named_by_its_signature(
    own: Inspector, opened: Callable[[bytes], int]
) -> None:
    own.close()
    fd = opened(SMALL)
    os.lseek(fd, 9, os.SEEK_SET)
    assert inspect(own, fd) == Inspection(
        Label.UNINSPECTED, "JPEG", detail="the inspector is closed"
    )
    assert os.lseek(fd, 0, os.SEEK_CUR) == 9


@linux_only
def test_a_dead_child_is_replaced_unnoticed(
    shared: Inspector, opened: Callable[[bytes], int]
) -> None:
    for _ in range(2):
        before = zygote(shared)
        os.kill(before, KILL)
        assert inspect(shared, opened(SMALL)).label is Label.IMAGE
        assert zygote(shared) != before


@linux_only
def test_a_picture_in_hand_survives_the_death_of_the_child(own: Inspector, slow: int) -> None:
    before = zygote(own)
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(inspect, own, slow, decode=True)
        await_worker(before)
        os.kill(before, KILL)
        again = own_successor(own, before)
        os.kill(await_worker(again), KILL)
        assert pending.result(30).detail == "the decoder crashed"
    assert workers(before) == []


def own_successor(own: Inspector, before: int) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        child = own._child
        if child is not None and child._process.pid != before:
            return child._process.pid
    pytest.fail("no new child appeared")


@linux_only
def test_a_child_that_hangs_is_replaced(
    monkeypatch: pytest.MonkeyPatch, opened: Callable[[bytes], int]
) -> None:
    monkeypatch.setattr(inspector, "_GRACE", 0.3)
    with Inspector(Limits(seconds=0.1)) as strict:
        before = zygote(strict)
        os.kill(before, STOP)
        assert inspect(strict, opened(SMALL)).detail == "ran out of time"
        monkeypatch.setattr(strict, "limits", Limits())
        assert inspect(strict, opened(SMALL)).label is Label.IMAGE
        assert zygote(strict) != before


@linux_only
def test_a_child_that_never_starts_is_tried_again_but_not_at_once(
    monkeypatch: pytest.MonkeyPatch, opened: Callable[[bytes], int]
) -> None:
    broken = Inspector(Limits())
    monkeypatch.setattr(inspector, "_PYTHON", ("/bin/false",))
    with pytest.raises(StorageError):
        broken.start()
    fd = opened(SMALL)
    details = [inspect(broken, fd).detail for _ in range(3)]
    assert details[0] == "the inspector does not start"
    assert details[1:] == ["the inspector keeps ending"] * 2
    monkeypatch.undo()
    broken._not_before = 0.0
    assert inspect(broken, fd).label is Label.IMAGE
    broken.close()


@linux_only
def test_many_threads_are_served_at_once(shared: Inspector, opened: Callable[[bytes], int]) -> None:
    fds = [opened(encoded(Image.new("L", (10 + index, 5)), "PNG")) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda fd: inspect(shared, fd, preview=4), fds * 5))
    assert [each.width for each in found] == [10 + index for index in range(8)] * 5


@linux_only
def test_a_slow_picture_holds_up_no_other(
    own: Inspector, opened: Callable[[bytes], int], slow: int
) -> None:
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(inspect, own, slow, decode=True)
        worker = await_worker(zygote(own))
        assert inspect(own, opened(SMALL)).label is Label.IMAGE
        assert not pending.done()
        os.kill(worker, KILL)
        pending.result(30)


@linux_only
def test_no_descriptor_is_left_behind(shared: Inspector, opened: Callable[[bytes], int]) -> None:
    if sys.platform == "linux":
        fd = opened(SMALL)
        inspect(shared, fd)
        before = len(os.listdir("/proc/self/fd"))
        _, ceiling = resource.prlimit(zygote(shared), resource.RLIMIT_NOFILE)
        # Three of its shared, the control socket, and two in flight.
        resource.prlimit(zygote(shared), resource.RLIMIT_NOFILE, (12, ceiling))
        child = zygote(shared)
        assert all(inspect(shared, fd).label is Label.IMAGE for _ in range(200))
        assert zygote(shared) == child
        assert len(os.listdir("/proc/self/fd")) == before


@linux_only
def test_ended_workers_do_not_pile_up(shared: Inspector, opened: Callable[[bytes], int]) -> None:
    fd = opened(SMALL)
    for _ in range(20):
        inspect(shared, fd)
    deadline = time.monotonic() + 20
    while subprocess_children(zygote(shared)):
        assert time.monotonic() < deadline


def subprocess_children(parent: int) -> int:
    stats = (path.read_text("latin-1") for path in Path("/proc").glob("[0-9]*/stat"))
    count = 0
    try:
        for stat in stats:
            count += int(stat.rpartition(")")[2].split()[1]) == parent
    except OSError:  # one ended while it was looked at
        return subprocess_children(parent)
    return count


@linux_only
def test_the_child_ends_with_its_socket_and_not_by_the_signals_of_a_shutdown(
    own: Inspector, opened: Callable[[bytes], int]
) -> None:
    child = zygote(own)
    for number in (signal.SIGTERM, signal.SIGINT, HANGUP):
        os.kill(child, number)
    assert inspect(own, opened(SMALL)).label is Label.IMAGE
    assert zygote(own) == child
    own.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@linux_only
def test_closing_ends_what_is_under_way(own: Inspector, slow: int) -> None:
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(inspect, own, slow, decode=True)
        await_worker(zygote(own))
        own.close()
        assert pending.result(30).label is Label.UNINSPECTED


@linux_only
def test_the_child_says_how_it_is_confined(shared: Inspector) -> None:
    assert shared.confinement[0] == "rlimits"
    status = Path(f"/proc/{zygote(shared)}/status").read_text("utf-8")
    assert ("Seccomp:\t2" in status) == ("seccomp" in shared.confinement)
    assert "NoNewPrivs:\t1" in status


@linux_only
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root may look")
def test_the_child_holds_no_environment_and_no_descriptor_but_its_socket(
    shared: Inspector,
) -> None:
    directory = Path(f"/proc/{zygote(shared)}")
    assert (directory / "environ").read_bytes() == b""
    links = [os.readlink(path) for path in (directory / "fd").iterdir()]
    assert sorted(link.partition(":")[0] for link in links) == [*3 * ["/dev/null"], "socket"]


def test_the_child_knows_no_key_and_no_vault() -> None:
    script = (
        "import sys; sys.path.append(sys.argv[1]); import secimg_watch.inspector_child; "
        "print(*(name for name in sys.modules if name.startswith('secimg_watch.')))"
    )
    home = str(Path(inspector.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, home], capture_output=True, check=True, text=True
    )
    names = {name.removeprefix("secimg_watch.") for name in done.stdout.split()}
    assert names == {
        *("errors", "images", "inspector_child", "kernel", "records", "sandbox"),
        *("seccomp", "signatures", "wire"),
    }


def test_noisy_decoders_are_heard_nowhere(
    shared: Inspector, opened: Callable[[bytes], int], capfd: pytest.CaptureFixture[str]
) -> None:
    picture = encoded(Image.effect_noise((200, 200), 50), "TIFF", compression="tiff_lzw")
    noisy = picture[:200] + bytes(4000) + picture[4200:]
    images.probe(io.BytesIO(noisy), preview=0, decode=True, max_pixels=1_000_000)
    assert capfd.readouterr().err  # the same picture, decoded in this very process
    assert inspect(shared, opened(noisy), decode=True).label is Label.UNDECODABLE
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_without_a_zygote_a_new_process_answers(opened: Callable[[bytes], int]) -> None:
    fd = opened(SMALL)
    os.lseek(fd, 17, os.SEEK_SET)
    request = Request(len(SMALL), preview=30, decode=True, max_pixels=9999, memory=0, seconds=20)
    found = parse_reply(inspector._ask_new_process(fd, request), preview=30)
    assert (found.label, found.format, found.width) == (Label.IMAGE, "JPEG", 60)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 17


def test_a_new_process_gets_no_more_time_than_allowed(
    monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    monkeypatch.setattr(inspector, "_GRACE", 0.0)
    request = Request(len(SLOW), preview=0, decode=True, max_pixels=10**8, memory=0, seconds=0.3)
    with pytest.raises(inspector._FailedError, match="ran out of time"):
        inspector._ask_new_process(slow, request)


GOOD = Inspection(Label.IMAGE, "JPEG", 60, 40, JPEG + b"preview", "truncated file")


def test_a_reply_survives_its_encoding() -> None:
    assert parse_reply(encode_reply(GOOD), preview=9) == GOOD


@pytest.mark.parametrize(
    "change",
    [
        {"label": "uninspected"},
        {"label": "gif"},
        {"label": None},
        {"format": "\x1b[2J"},
        {"format": "A" * 17},
        {"format": 7},
        {"width": -1},
        {"width": 1 << 31},
        {"width": True},
        {"width": 1.5},
        {"height": "40"},
        {"detail": "two\nlines"},
        {"detail": "account 4711"},
        {"detail": ["truncated file"]},
        {"detail": None},
    ],
)
def test_a_reply_with_one_value_out_of_place_is_refused(change: dict[str, object]) -> None:
    fields = {"label": "image", "format": "PNG", "width": 1, "height": 1, "detail": ""}
    head = json.dumps(fields | change).encode()
    with pytest.raises(inspector._FailedError):
        parse_reply(struct.pack(">I", len(head)) + head, preview=9)


@pytest.mark.parametrize(
    ("picture", "preview"),
    [(JPEG, 0), (b"<svg onload=alert(1)>", 9), (JPEG + bytes(wire.MAX_PREVIEW), 9)],
)
def test_a_preview_that_was_not_asked_for_or_is_none_is_refused(
    picture: bytes, preview: int
) -> None:
    reply = encode_reply(Inspection(Label.IMAGE, "PNG", 1, 1, picture))
    with pytest.raises(inspector._FailedError):
        parse_reply(reply, preview=preview)


@given(
    st.one_of(
        st.binary(max_size=300),
        st.integers(0, 200).map(lambda at: encode_reply(GOOD)[:at]),
        st.text(max_size=50).map(lambda text: struct.pack(">I", 900) + text.encode()),
        st.just(struct.pack(">I", 4096) + b"[" * 4096),
    )
)
def test_any_other_bytes_are_refused_and_raise_nothing_else(data: bytes) -> None:
    try:
        found = parse_reply(data, preview=9)
    except inspector._FailedError:
        return
    assert found.detail == "truncated file"


@linux_only
def test_an_endless_reply_is_cut_off() -> None:
    ours, theirs = socket.socketpair()
    flood = threading.Thread(target=pour, args=(theirs,))
    with ours, theirs:
        flood.start()
        with pytest.raises(inspector._FailedError, match="makes no sense"):
            inspector._receive(ours, time.monotonic() + 20)
        ours.close()
        flood.join()


def pour(into: socket.socket) -> None:
    try:
        while True:
            into.sendall(bytes(1 << 16))
    except OSError:
        return


@linux_only
def test_a_reply_that_dribbles_is_cut_off_in_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\0")
        with pytest.raises(TimeoutError):
            inspector._receive(ours, time.monotonic() + 0.1)
