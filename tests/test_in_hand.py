"""Producers that change their minds while the service has a picture in hand.

An adversary goes after each picture as soon as it was written. Whatever was completely written
last under a name must be there in the end, as an object or in the folder, and no object may
hold anything that was never completely written.
"""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from daemon import LINUX, Site, picture, place, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(not LINUX, reason="the service is Linux's")

FILES = int(os.environ.get("SECIMG_FILES", "40"))


@dataclass
class Ledger:
    """What was completely written: everything, and what must be there in the end."""

    complete: set[bytes] = field(default_factory=set)
    wanted: set[bytes] = field(default_factory=set)

    def write(self, content: bytes) -> bytes:
        self.complete.add(content)
        self.wanted.add(content)
        return content

    def supersede(self, old: bytes, new: bytes) -> None:
        self.write(new)
        self.wanted.discard(old)


def append(ledger: Ledger, path: Path, content: bytes) -> None:
    more = os.urandom(60_000)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, more[:30_000])
        os.write(fd, more[30_000:])
    finally:
        os.close(fd)
    ledger.supersede(content, content + more)


def overwrite(ledger: Ledger, path: Path, content: bytes) -> None:
    new = picture(padding=80_000)
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, new[:40_000])
        os.write(fd, new[40_000:])
    finally:
        os.close(fd)
    ledger.supersede(content, new)


def truncate(ledger: Ledger, path: Path, content: bytes) -> None:
    size = len(content) // 2
    os.truncate(path, size)
    ledger.supersede(content, content[:size])


def replace(ledger: Ledger, path: Path, content: bytes) -> None:
    # The one before may be gone with the rename, or sealed already.
    new = picture(padding=80_000)
    ledger.complete.add(new)
    place(path, new)
    ledger.supersede(content, new)


def replace_many_times(ledger: Ledger, path: Path, content: bytes) -> None:
    for _ in range(4):
        new = picture(padding=80_000)
        ledger.complete.add(new)
        place(path, new)
        ledger.supersede(content, new)
        content = new
        time.sleep(random.uniform(0, 0.005))


def remove(ledger: Ledger, path: Path, content: bytes) -> None:
    path.unlink()
    ledger.wanted.discard(content)


def rename(ledger: Ledger, path: Path, content: bytes) -> None:
    path.rename(path.with_name(f"renamed {path.name}"))


def move_to_a_sub_folder(ledger: Ledger, path: Path, content: bytes) -> None:
    (path.parent / "sub").mkdir(exist_ok=True)
    path.rename(path.parent / "sub" / path.name)


def link(ledger: Ledger, path: Path, content: bytes) -> None:
    other = path.parent.parent / secrets.token_hex(8)
    other.hardlink_to(path)
    time.sleep(random.uniform(0, 0.01))
    other.unlink()
    # Removing a name makes no event in the folder; a touch of the other one does.
    os.utime(path)


def touch(ledger: Ledger, path: Path, content: bytes) -> None:
    os.utime(path)


def change_mode(ledger: Ledger, path: Path, content: bytes) -> None:
    path.chmod(0o600)


def open_and_close(ledger: Ledger, path: Path, content: bytes) -> None:
    for _ in range(10):
        os.close(os.open(path, os.O_WRONLY))


ATTACKS = [
    append,
    overwrite,
    truncate,
    replace,
    replace_many_times,
    remove,
    rename,
    move_to_a_sub_folder,
    link,
    touch,
    change_mode,
    open_and_close,
]


def fill_and_attack(
    site: Site, attack: Callable[[Ledger, Path, bytes], None], ledger: Ledger, failures: list[str]
) -> None:
    """Write pictures, and go after each from another thread a moment after it was finished."""

    def strike(path: Path, content: bytes, delay: float) -> None:
        time.sleep(delay)
        try:
            attack(ledger, path, content)
        except FileNotFoundError:
            pass  # the service was faster
        except OSError as error:
            failures.append(repr(error))

    threads = []
    for number in range(FILES):
        path = site.drop / f"{number}.jpg"
        content = ledger.write(picture(padding=100_000))
        path.write_bytes(content)
        delay = random.uniform(0, 0.02)
        threads.append(threading.Thread(target=strike, args=(path, content, delay)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_whatever_was_written_last_is_there_in_the_end_and_nothing_torn(
    site: Site, attack: Callable[[Ledger, Path, bytes], None]
) -> None:
    site.folder.update(not_image="encrypt", rescan="1s")
    daemon = site.start()
    ledger = Ledger()
    failures: list[str] = []
    fill_and_attack(site, attack, ledger, failures)
    assert failures == []
    site.wait_until_clear()
    assert daemon.stop() == 0
    sealed = set(site.restored().values())
    assert sealed <= ledger.complete, "an object holds what was never completely written"
    assert ledger.wanted <= sealed, "what was completely written is lost"
    assert site.temporaries() == []


@pytest.mark.parametrize("attack", [append, overwrite, replace, remove], ids=lambda a: a.__name__)
def test_the_same_holds_for_pictures_that_stay_in_place(
    site: Site, attack: Callable[[Ledger, Path, bytes], None]
) -> None:
    site.folder.update(not_image="encrypt", rescan="1s", after="keep")
    daemon = site.start()
    ledger = Ledger()
    failures: list[str] = []
    fill_and_attack(site, attack, ledger, failures)
    assert failures == []

    def settled() -> bool:
        status = site.status()
        return bool(status["kept"] == len(site.plaintexts()) and not status["queued"])

    wait_until(settled, "all to be sealed")
    plain = {(site.drop / os.fsdecode(name)).read_bytes() for name in site.plaintexts()}
    assert daemon.stop() == 0
    sealed = set(site.restored().values())
    assert plain == ledger.wanted
    assert sealed <= ledger.complete, "an object holds what was never completely written"
    assert ledger.wanted <= sealed, "what was completely written is not sealed"


def test_a_producer_that_sets_the_times_last_need_not_wait_for_the_next_scan(site: Site) -> None:
    # Many copy a file, close it, and only then give it the original's times, by its name.
    site.folder["rescan"] = "1h"
    daemon = site.start()
    failures: list[str] = []
    ledger = Ledger()
    fill_and_attack(site, touch, ledger, failures)
    assert failures == []
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert set(site.restored().values()) == ledger.complete


def open_in_hand(site: Site, path: Path) -> bool:
    """Open a file for writing while a worker has it leased; false where it was too fast."""
    wait_until(lambda: any(j["state"] == "taken" for j in site.ask("jobs", "list")), "a job")
    while site.why(path)["verdict"] == "queued":
        try:
            os.close(os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)))
        except BlockingIOError:
            return True  # the lease is being broken now
    return False


def test_a_picture_that_was_opened_while_in_hand_and_not_changed_is_taken_up_again(
    site: Site,
) -> None:
    # Opened for writing and closed as it was, a file looks as before: same size, same times.
    site.folder.update(after="keep", rescan="1s")
    site.start()
    contents = set()
    caught = 0
    for number in range(3):
        path = site.drop / f"{number}.jpg"
        contents.add(place(path, picture(padding=30_000_000)))
        caught += open_in_hand(site, path)
        wait_until(lambda path=path: site.why(path)["verdict"] == "kept", "it to be sealed")  # type: ignore[misc]
    assert caught
    assert set(site.restored().values()) == contents


def test_a_queued_picture_whose_mode_is_changed_is_taken_all_the_same(site: Site) -> None:
    # Its row in the queue describes it as it was before: only the time of change differs.
    site.folder["rescan"] = "1h"
    site.make_vaults()
    away = site.vault.rename(site.top / "away")
    daemon = site.launch()
    daemon.wait_for_notice("READY=1")
    path = site.drop / "a.jpg"
    content = place(path, picture())
    wait_until(lambda: site.status().get("queued") == 1, "the queue")
    path.chmod(0o600)
    daemon.send("USR1")
    daemon.wait_for_log("scanning it whole")
    away.rename(site.vault)
    site.wait_until_clear()
    assert site.restored() == {b"a.jpg": content}


def test_claims_that_came_to_nothing_leave_no_directories(site: Site) -> None:
    site.folder["rescan"] = "1s"
    daemon = site.start()
    failures: list[str] = []
    fill_and_attack(site, replace_many_times, Ledger(), failures)
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert failures == []
    assert os.listdir(site.drop / ".secimg-watch") == []
