"""Killed again and again while it gives objects other keys, a run loses and changes nothing.

``SECIMG_REKEY_KILLS`` and ``SECIMG_REKEY_OBJECTS`` make a longer campaign of it.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from cli_runner import Box, contents, make_box, wait_until
from daemon import LINUX
from path_builders import NO_RESERVE
from rekey_builders import a_key, a_pair, content_of, left_aside, put, sections_of, slots_of

from secimg_watch.gate import add_key
from secimg_watch.keys import decode_ring, provider_for
from secimg_watch.recipients import format_recipient
from secimg_watch.rekey import take_census
from secimg_watch.vault import Vault

if TYPE_CHECKING:
    from pathlib import Path

    from secimg_watch.records import KeyEncryptionKey, ObjectId

pytestmark = pytest.mark.skipif(not LINUX, reason="the service is Linux's")

KILLS = int(os.environ.get("SECIMG_REKEY_KILLS", "2"))
OBJECTS = int(os.environ.get("SECIMG_REKEY_OBJECTS", "100"))
_PATIENCE = 120.0


@dataclass
class Stock:
    """A vault full of objects, and what each of them has to give back whatever happens."""

    box: Box
    vault: Vault
    digests: dict[str, str]  # name and SHA-256 of the picture
    sections: dict[ObjectId, bytes]

    def ring(self) -> tuple[KeyEncryptionKey, ...]:
        return decode_ring(self.box.key.read_text().removesuffix("\n"))

    def rotate(self) -> None:
        """The current key and one former key; what is older is forgotten, as nothing needs it."""
        new = a_key()
        add_key(self.vault, new)
        provider = provider_for("file", "secimg-watch/main", file=self.box.key)
        provider.replace((new, *self.ring()[:1]))

    def check(self) -> None:
        """Every object is there, opens with the keys at hand, and holds what it did."""
        found = {}
        for object_id in self.vault.object_ids():
            content = content_of(self.vault, object_id, *self.ring())
            found[object_id] = hashlib.sha256(content.body).hexdigest()
        assert sorted(found.values()) == sorted(self.digests.values())
        assert found.keys() == self.sections.keys()

    def check_restored(self, target: Path) -> None:
        """The same by the command that a person would use."""
        assert self.box("vault", "restore", "--all", "--to", target).code == 0
        restored = contents(target)
        assert {
            name.rpartition("/")[2]: hashlib.sha256(data).hexdigest()
            for name, data in restored.items()
        } == self.digests

    def changed(self) -> int:
        """How many objects have the current key's slot."""
        return take_census(self.vault).slots[("key", self.ring()[0].key_id)]


def make_stock(directory: Path) -> Stock:
    box = make_box(directory)
    vault = Vault(box.vault, NO_RESERVE)
    stock = Stock(box, vault, {}, {})
    for number in range(OBJECTS):
        name, picture = f"{number}.jpg", os.urandom(random.randrange(30_000))
        object_id = put(vault, stock.ring()[:1], picture, name=name.encode())
        stock.digests[name] = hashlib.sha256(picture).hexdigest()
        stock.sections[object_id] = sections_of(vault, object_id)
    return stock


def kill_at_work(stock: Stock, command: str, dice: random.Random) -> bool:
    """Start a run and kill it at a random moment of its work; whether it was at work still."""
    marks = {path: path.stat().st_ino for path in stock.box.objects()}
    process = stock.box.cli.start("--policy", stock.box.policy, "vault", command)
    try:
        wait_until(
            lambda: (
                process.poll() is not None
                or any(path.stat().st_ino != inode for path, inode in marks.items())
            )
        )
        time.sleep(dice.uniform(0.0, 0.0006 * OBJECTS))
    finally:
        process.kill()
        process.communicate(timeout=_PATIENCE)
    return process.returncode == -9


def finish(stock: Stock, command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        stock.box.cli.argv("--policy", stock.box.policy, "vault", command),
        env=stock.box.cli.environ,
        cwd=stock.box.cli.home,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=True,
    )
    assert left_aside(stock.vault) == []
    return done


@pytest.mark.timeout(60 + 20 * KILLS + OBJECTS)
def test_a_rekey_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    dice = random.Random()
    stock = make_stock(tmp_path)
    _, alice = a_pair()
    stock.box.write_policy(more={"recipients": [format_recipient(alice)]})
    killed = partial = left = rotations = 0
    for _ in range(KILLS):
        if stock.changed() == OBJECTS:
            stock.rotate()
            rotations += 1
        killed += kill_at_work(stock, "rekey", dice)
        partial += 0 < stock.changed() < OBJECTS
        left += bool(left_aside(stock.vault))
        stock.check()
        assert {i: sections_of(stock.vault, i) for i in stock.sections} == stock.sections
    last = finish(stock, "rekey")
    sys.stdout.write(
        f"{OBJECTS} objects, {killed} of {KILLS} runs killed at work: {partial} left objects of"
        f" both kinds, {left} a file aside; {rotations} rotations\n{last.stdout}"
    )
    wanted = sorted([("key", stock.ring()[0].key_id), ("recipient", alice.key_id)])
    assert {tuple(slots_of(stock.vault, each)) for each in stock.sections} == {tuple(wanted)}
    assert dict(take_census(stock.vault).slots) == dict.fromkeys(wanted, OBJECTS)
    assert {i: sections_of(stock.vault, i) for i in stock.sections} == stock.sections
    stock.check()
    stock.check_restored(tmp_path / "restored")
    assert f"0 of {OBJECTS} objects changed, 0 failed" in finish(stock, "rekey").stdout


@pytest.mark.timeout(60 + 20 * KILLS + OBJECTS)
def test_sealing_anew_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    dice = random.Random()
    stock = make_stock(tmp_path)
    stock.rotate()
    for _ in range(KILLS):
        kill_at_work(stock, "reencrypt", dice)
        stock.check()
    # Every run goes on behind the one before, so that all of them come to an end together.
    finish(stock, "reencrypt")
    after = {each: sections_of(stock.vault, each) for each in stock.sections}
    assert [each for each in after if after[each] == stock.sections[each]] == []
    assert dict(take_census(stock.vault).slots) == {("key", stock.ring()[0].key_id): OBJECTS}
    assert os.listdir(stock.box.vault / "rekey") == ["lock"]
    stock.check()
    stock.check_restored(tmp_path / "restored")
