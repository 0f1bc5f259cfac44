"""Killed without warning again and again, the service ends with every picture sealed once.

``SECIMG_KILLS`` and ``SECIMG_FILES`` make a longer campaign of it.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest
from daemon import LINUX, Site, picture, place, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not LINUX, reason="the service is Linux's")

KILLS = int(os.environ.get("SECIMG_KILLS", "4"))
FILES = int(os.environ.get("SECIMG_FILES", "60"))


def backlog(site: Site, numbers: range) -> dict[bytes, bytes]:
    contents = {}
    for number in numbers:
        relative = f"{number % 3}/{number}.jpg" if number % 3 else f"{number}.jpg"
        (site.drop / relative).parent.mkdir(exist_ok=True)
        contents[relative.encode()] = place(site.drop / relative, picture(padding=50_000))
    return contents


def kill_at_a_random_moment(site: Site, dice: random.Random) -> None:
    """Start a daemon and kill it: mostly at work, sometimes while it is still starting."""
    sealed = len(site.objects())
    if dice.random() < 0.2:
        daemon = site.launch()
        time.sleep(dice.uniform(0.2, 0.8))
    else:
        daemon = site.start()
        wait_until(lambda: len(site.objects()) > sealed, "work to begin")
        time.sleep(dice.uniform(0.0, 0.1))
    daemon.kill()
    wait_until(daemon.group_is_empty, "its children to end as well")


def forget_the_queue(state: Path) -> None:
    for file in state.glob("queue.sqlite*"):
        file.unlink()


def corrupt_the_queue(state: Path) -> None:
    for file in state.glob("queue.sqlite*"):
        file.write_bytes(os.urandom(5000))


def finish(site: Site, contents: dict[bytes, bytes]) -> None:
    daemon = site.start()
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert site.restored() == contents
    assert len(site.objects()) == len(contents)
    assert site.temporaries() == []
    assert os.listdir(site.drop / ".secimg-watch") == []


@pytest.mark.timeout(60 + 20 * KILLS)
def test_kills_at_random_moments_lose_nothing_and_seal_nothing_twice(site: Site) -> None:
    dice = random.Random()
    share = FILES // KILLS
    contents: dict[bytes, bytes] = {}
    site.make_vaults()
    for round_ in range(KILLS):
        contents |= backlog(site, range(round_ * share, (round_ + 1) * share))
        kill_at_a_random_moment(site, dice)
    finish(site, contents)


@pytest.mark.parametrize("harm", [forget_the_queue, corrupt_the_queue])
def test_a_queue_lost_between_two_kills_loses_no_picture(site: Site, harm: object) -> None:
    assert callable(harm)
    dice = random.Random()
    contents: dict[bytes, bytes] = {}
    site.make_vaults()
    for round_ in range(2):
        contents |= backlog(site, range(round_ * 30, (round_ + 1) * 30))
        kill_at_a_random_moment(site, dice)
        harm(site.state)
    finish(site, contents)


def test_pictures_that_stay_in_place_survive_kills_too(site: Site) -> None:
    site.folder["after"] = "keep"
    dice = random.Random()
    contents: dict[bytes, bytes] = {}
    site.make_vaults()
    for round_ in range(2):
        contents |= backlog(site, range(round_ * 20, (round_ + 1) * 20))
        kill_at_a_random_moment(site, dice)
    daemon = site.start()
    wait_until(lambda: site.status()["kept"] == 40, "all to be sealed")
    assert daemon.stop() == 0
    assert site.restored() == contents
    assert len(site.objects()) == 40
    assert site.temporaries() == []
    assert {n: (site.drop / os.fsdecode(n)).read_bytes() for n in site.plaintexts()} == contents


def test_pictures_that_are_moved_on_survive_kills_too(site: Site) -> None:
    originals = site.top / "originals"
    site.folder["after"] = f"move:{originals}"
    dice = random.Random()
    contents: dict[bytes, bytes] = {}
    site.make_vaults()
    for round_ in range(2):
        contents |= backlog(site, range(round_ * 20, (round_ + 1) * 20))
        kill_at_a_random_moment(site, dice)
    finish(site, contents)
    moved = {name: (originals / os.fsdecode(name)).read_bytes() for name in contents}
    assert moved == contents
    assert len(site.plaintexts(originals)) == 40


def test_a_killed_service_leaves_no_process_behind(site: Site) -> None:
    daemon = site.start()
    place(site.drop / "a.jpg", picture())
    site.wait_for_objects(1)
    daemon.kill()
    wait_until(daemon.group_is_empty, "its children to end as well")
