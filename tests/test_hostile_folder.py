"""Folders that others may write to as well: what they plant, swap and take away.

A slice of the campaign ``hostile_folder.py``, and what it found, one by one. What is no plain
file, and names of every kind, are in ``test_arrival.py``; what is done to a file in hand is in
``test_hold_and_claim.py`` and ``test_in_hand.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from cli_runner import UNINSPECTED, Cli
from daemon import ROOT, STAGING, Site, picture, place, wait_until
from path_builders import can_mount, desk_in, new_id, only_on_linux, tree

from secimg_watch import kernel
from secimg_watch.claim import claim, set_aside, take_back
from secimg_watch.erase import erase
from secimg_watch.errors import ChangedInHandError
from secimg_watch.jobs import Jobs, State
from secimg_watch.records import Arrival, FolderKey, Identity, Proof, Settled
from secimg_watch.recovery import recover_folder
from secimg_watch.roots import QUARANTINE_NAME

only_on_linux()
assert sys.platform == "linux"
sys.path.insert(0, str(Path(__file__).parent / "campaigns"))  # where the campaigns lie

import hostile_folder  # noqa: E402 - elsewhere it cannot be imported
from hostile_folder import (  # noqa: E402
    ADVERSARY,
    ATTACKS,
    NOBODY,
    Arena,
    Canaries,
    exchange,
    siege,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from path_builders import Desk

root_only = pytest.mark.skipif(not ROOT, reason="only root has files of several users")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Canaries, which must be as they were when the test is over."""
    canaries = Canaries(tmp_path)
    canaries.remember()
    yield canaries.outside
    assert canaries.changes() == []


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desk_in(tmp_path) as made:
        yield made


def drain(site: Site) -> dict[str, Any]:
    """Take everything that is ready; gives what the command says, with its exit code."""
    outcome = Cli(site.top / "home")("--policy", site.policy_path, "--json", "drain")
    assert "Traceback" not in outcome.err, outcome.err
    return {**outcome.json(), "code": outcome.code}


@pytest.fixture
def plain(site: Site) -> Site:
    """A site that needs no decoder."""
    site.folder.update(UNINSPECTED)
    return site


def add_folder(site: Site, name: str, **policy: object) -> tuple[Path, bytes]:
    """Watch one folder more, in which a picture lies."""
    folder = site.top / "folders" / name
    folder.mkdir(parents=True)
    site.policy["folders"].append({**site.folder, "path": str(folder), **policy})
    return folder, place(folder / "a.jpg", picture())


# -- the campaign --------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [None, pytest.param(NOBODY, marks=root_only)])
def test_whatever_an_adversary_does_nothing_outside_is_touched_and_nothing_inside_lost(
    user: int | None,
) -> None:
    if reason := "" if user is None else hostile_folder.why_not_as(user):
        pytest.skip(reason)
    with hostile_folder.ground() as top:
        if reason := hostile_folder.why_no_exchange(top):
            pytest.skip(reason)
        arena = Arena(top, user=user, inspected=False)
        outcome = siege(arena, ATTACKS, 0.7, random.getrandbits(32))
    assert outcome.faults == [], "\n".join(outcome.log[-50:])
    assert outcome.honest
    assert outcome.strikes.total() > 10


def test_a_directory_on_the_way_that_becomes_a_link_at_any_call_leads_nowhere() -> None:
    command = [sys.executable, hostile_folder.__file__, "--every", "70"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    if done.returncode == 75:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 faults") == len(hostile_folder.STAGES)


# -- the staging directory -----------------------------------------------------------------------


def link(at: Path, outside: Path) -> None:
    at.symlink_to(outside)


def dangling_link(at: Path, outside: Path) -> None:
    at.symlink_to("nowhere")


def file(at: Path, outside: Path) -> None:
    at.touch()


def fifo(at: Path, outside: Path) -> None:
    os.mkfifo(at)


def foreign_directory(at: Path, outside: Path) -> None:
    at.mkdir()
    if ROOT:
        os.chown(at, ADVERSARY, ADVERSARY)
    else:
        at.rmdir()
        at.symlink_to("/usr")


PLANTS: Final = [link, dangling_link, file, fifo, foreign_directory]


def test_whatever_lies_where_the_staging_directory_should_be_keeps_no_picture_in_clear(
    plain: Site, outside: Path
) -> None:
    plain.policy["folders"].clear()
    pictures = set()
    for plant in PLANTS:
        folder, content = add_folder(plain, plant.__name__)
        plant(folder / STAGING, outside)
        pictures.add(content)
    plain.make_vaults()
    result = drain(plain)
    assert (result["sealed"], result["failed"], result["not_ready"]) == (len(PLANTS), 0, 0)
    assert set(plain.restored().values()) == pictures
    for report in result["folders"]:
        assert report["health"] == "degraded"
        assert "staging directory" in report["reason"]
        assert os.listdir(report["path"]) == [STAGING]


def plant_claims(staging: Path, outside: Path) -> tuple[dict[str, bytes], set[str]]:
    """Plant what looks like claims; gives what is to be sealed, and names that stay for good."""
    staging.mkdir(mode=0o700)
    sealed = {name: picture() for name in ("plain.jpg", "deeper.jpg")}
    places = {name: staging / new_id() for name in ("plain", "deeper", *"abcdefg")}
    for path in places.values():
        path.mkdir()
    (places["plain"] / "plain.jpg").write_bytes(sealed["plain.jpg"])
    (places["deeper"] / "s").mkdir()
    (places["deeper"] / "s" / "deeper.jpg").write_bytes(sealed["deeper.jpg"])
    (places["a"] / "link.jpg").symlink_to(outside / "pic.jpg")
    (places["b"] / "link").symlink_to(outside)
    (places["c"] / "hard.jpg").hardlink_to(outside / "hard" / "5.jpg")
    os.mkfifo(places["d"] / "fifo.jpg")
    (places["e"] / "1.jpg").write_bytes(picture())
    (places["e"] / "2.jpg").write_bytes(picture())
    (places["f"] / "s").symlink_to(outside / "s0")
    (places["f"] / "t").mkdir()
    make_deep(places["g"])
    (staging / "stray.jpg").write_bytes(picture())
    (staging / QUARANTINE_NAME).symlink_to(outside)
    return sealed, {"stray.jpg", *(places[each].name for each in "efg")}


def make_deep(top: Path) -> None:
    """Make a directory below ``top`` that no path leads to, and a file in it."""
    parent = os.open(top, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=parent)
        child = os.open("d" * 250, os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = child
    os.close(os.open("deep.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=parent))
    os.close(parent)


def test_what_was_planted_among_the_claims_stops_nothing_and_is_shown(
    plain: Site, outside: Path
) -> None:
    plain.policy["limits"] = {"attempts": 1}
    staging = plain.drop / STAGING
    sealed, strays = plant_claims(staging, outside)
    sealed["real.jpg"] = place(plain.drop / "real.jpg", picture())
    plain.make_vaults()
    result = drain(plain)
    assert set(plain.restored().values()) == set(sealed.values())
    [report] = result["folders"]
    assert (report["health"], report["sealed"]) == ("ok", len(sealed))
    assert report["quarantined"] == 4
    assert report["passed"] == {"staging": len(strays)}
    rows = {row["name"]: row["reason"] for row in plain.ask("jobs", "quarantine")}
    assert rows.keys() == {"link.jpg", "link", "hard.jpg", "fifo.jpg"}
    assert all(rows.values())
    assert strays < set(os.listdir(staging))
    assert (outside / "hard" / "5.jpg").stat().st_nlink == 2


def test_a_staging_directory_that_is_taken_down_is_made_anew(plain: Site) -> None:
    plain.policy["limits"] = {"attempts": 1}
    plain.start()
    (plain.drop / STAGING).rmdir()
    contents = {f"{n}.jpg".encode(): place(plain.drop / f"{n}.jpg", picture()) for n in range(3)}
    plain.wait_until_clear()
    wait_until((plain.drop / STAGING).is_dir, "a staging directory")
    assert plain.status()["quarantined"] == 0
    assert plain.restored() == contents


def test_a_staging_directory_that_is_moved_away_with_claims_in_it_loses_none(
    plain: Site, outside: Path
) -> None:
    # Without a vault, what is claimed waits.
    plain.make_vaults()
    claimed = plain.drop / STAGING / new_id()
    claimed.mkdir(parents=True)
    content = picture()
    (claimed / "a.jpg").write_bytes(content)
    away = plain.vault.rename(plain.top / "away")
    daemon = plain.launch()
    daemon.wait_for_notice("READY=1")
    wait_until(lambda: plain.status().get("queued") == 1, "the claim")
    (plain.drop / "moved").symlink_to(outside)
    exchange(str(plain.drop / STAGING), str(plain.drop / "moved"))
    daemon.wait_for_log("removed, replaced or mounted over")
    away.rename(plain.vault)
    wait_until(lambda: plain.plaintexts() == [STAGING.encode()], "the picture to go")
    (plain.drop / STAGING).unlink()
    wait_until(lambda: plain.status()["health"] == "ok", "the folder to be well")
    assert set(plain.restored().values()) == {content}


# -- claims that go wrong ------------------------------------------------------------------------


def lay_trap(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """Let a claim meet a directory where its picture was, and somebody else under the name.

    Gives where that directory is afterwards, and a descriptor that was opened before.
    """
    path = desk.drop("sub/x.jpg")
    inspected = desk.inspected(desk.job("sub/x.jpg"))
    trap = desk.folder / "trap"
    (trap / "a").mkdir(parents=True)
    (trap / "a" / "pic.jpg").write_bytes(b"bait")
    held = os.open(trap, os.O_RDONLY)
    exchange(str(path), str(trap))
    back = kernel.rename_noreplace

    def taken(source: str, target: str, *, source_dir: int, target_dir: int) -> None:
        path.write_bytes(b"taken")
        back(source, target, source_dir=source_dir, target_dir=target_dir)

    monkeypatch.setattr(kernel, "rename_noreplace", taken)
    with pytest.raises(ChangedInHandError):
        claim(inspected, desk.root, desk.hands, move=True)
    monkeypatch.undo()
    desk.let_go()
    [lies] = desk.folder.rglob("a")
    return lies.parent, held


def test_a_directory_that_was_claimed_by_mistake_never_stays_among_the_claims(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    lies, held = lay_trap(desk, monkeypatch)
    os.close(held)
    assert lies.parent == desk.folder / "sub"
    assert desk.root.entries() == []
    assert (lies / "a" / "pic.jpg").read_bytes() == b"bait"


def test_also_where_its_own_sub_folder_is_gone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.drop("sub/x.jpg")
    inspected = desk.inspected(desk.job("sub/x.jpg"))
    (desk.folder / "sub" / "x.jpg").unlink()
    (desk.folder / "sub" / "x.jpg").mkdir()
    (desk.folder / "sub" / "x.jpg" / "b.jpg").touch()

    def gone(source: str, target: str, *, source_dir: int, target_dir: int) -> None:
        (desk.folder / "sub").rmdir()
        raise FileNotFoundError(target)

    monkeypatch.setattr(kernel, "rename_noreplace", gone)
    with pytest.raises(ChangedInHandError):
        claim(inspected, desk.root, desk.hands, move=True)
    assert tree(desk.folder) == [STAGING, f"{inspected.held.job.object_id}/b.jpg"]


def test_a_link_in_a_claim_leads_nowhere_also_when_it_gets_there_last(
    desk: Desk, outside: Path, tmp_path: Path
) -> None:
    object_id = new_id()
    inner = desk.root.staging_path / object_id / "x.jpg" / "s"
    (inner / "d").mkdir(parents=True)
    (inner / "d" / "1.jpg").write_bytes(b"bait")
    jobs = Jobs(tmp_path / "queue")
    recover_folder(desk.key, desk.root, jobs)
    job = jobs.take(lambda: [desk.key], 0.0)
    jobs.close()
    assert job is not None
    assert (job.object_id, job.relpath) == (object_id, "x.jpg/s/d/1.jpg")
    committed = desk.committed(job)
    (tmp_path / "waiting").symlink_to(outside / "s0")
    exchange(str(inner), str(tmp_path / "waiting"))
    erase([desk.erasure(committed)])
    assert desk.opened(job.object_id) == b"bait"
    desk.let_go()


def test_nothing_is_set_aside_behind_a_link(desk: Desk, outside: Path) -> None:
    (desk.root.staging_path / QUARANTINE_NAME).symlink_to(outside)
    path = desk.drop()
    held = desk.held(desk.job())
    with contextlib.suppress(OSError):
        set_aside(held.job, held, desk.root)
    assert not path.exists()
    assert desk.root.has_staged(held.job.object_id), "claimed, and not lost"
    assert desk.root.staging is not None
    assert not take_back(held.job.object_id, desk.root.staging)
    assert desk.root.entries(QUARANTINE_NAME) == []


def test_nothing_is_moved_on_behind_a_link(plain: Site, outside: Path) -> None:
    moved = plain.top / "moved"
    moved.mkdir()
    (moved / "s").symlink_to(outside / "s0")
    plain.folder["after"] = f"move:{moved}"
    (plain.drop / "s" / "d").mkdir(parents=True)
    pictures = {place(plain.drop / name, picture()) for name in ("s/9.jpg", "s/d/9.jpg", "8.jpg")}
    plain.make_vaults()
    result = drain(plain)
    assert (result["sealed"], result["folders"][0]["undeletable"]) == (3, 2)
    assert set(plain.restored().values()) == pictures
    assert tree(moved) == ["8.jpg", "s"]


# -- sub-folders ---------------------------------------------------------------------------------


def watches(pid: int) -> int:
    """How many directories a process has watched."""
    count = 0
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            count += info.read_text().count("inotify wd:")
    return count


@pytest.mark.skipif(not ROOT, reason="only root may count what such a process watches")
@pytest.mark.parametrize("how", ["made", "moved in"])
def test_a_sub_folder_that_became_a_link_is_not_watched_through_it(plain: Site, how: str) -> None:
    large = plain.top / "large"
    for number in range(300):
        (large / f"{number}" / "deeper").mkdir(parents=True)
    daemon = plain.start()
    for number in range(20):
        folder = plain.drop / f"{number}"
        (folder if how == "made" else plain.top / "new").mkdir()
        if how == "moved in":
            (plain.top / "new").rename(folder)
        folder.rmdir()
        folder.symlink_to(large)
    content = place(plain.drop / "a.jpg", picture())
    plain.wait_for_objects(1)
    assert watches(daemon.process.pid) < 30
    assert plain.restored() == {b"a.jpg": content}


def test_sub_folders_that_come_and_go_under_one_name_end_no_watch(plain: Site) -> None:
    daemon = plain.start()
    contents = set()
    for number in range(3):
        (plain.drop / "batch").mkdir()
        contents.add(place(plain.drop / "batch" / "a.jpg", picture()))
        plain.wait_for_objects(number + 1)
        if number < 2:
            (plain.drop / "batch").rename(plain.top / f"away {number}")
    (plain.drop / "batch").rmdir()
    for number in range(2):
        (plain.top / f"away {number}").rmdir()
    place(plain.drop / "b.jpg", last := picture())
    plain.wait_for_objects(4)
    daemon.send("HUP")
    daemon.wait_for_log("the new policy is in force")
    assert daemon.stop() == 0
    assert "watching anew" not in daemon.log()
    assert set(plain.restored().values()) == contents | {last}


def test_a_folder_of_the_staging_directorys_name_further_below_is_heard(plain: Site) -> None:
    plain.folder["rescan"] = "1h"
    (plain.drop / "s" / STAGING).mkdir(parents=True)
    plain.start()
    content = place(plain.drop / "s" / STAGING / "a.jpg", picture())
    plain.wait_for_objects(1)
    assert plain.restored() == {f"s/{STAGING}/a.jpg".encode(): content}


def test_pictures_below_a_folder_that_was_a_link_meanwhile_burn_no_attempt(desk: Desk) -> None:
    desk.drop("s/d/a.jpg")
    job = desk.job("s/d/a.jpg")
    for swapped in ("s", "s/d"):
        waiting = desk.folder.parent / "waiting"
        waiting.symlink_to("nowhere")
        exchange(str(desk.folder / swapped), str(waiting))
        with pytest.raises(ChangedInHandError, match="folder above"):
            desk.held(job)
        exchange(str(desk.folder / swapped), str(waiting))
        waiting.unlink()
    assert desk.held(job).name == "a.jpg"


# -- files ---------------------------------------------------------------------------------------


def rewrite(path: Path, content: bytes) -> None:
    """Write other bytes of the same number, and set the times back as a producer may."""
    status = path.stat()
    assert len(content) == status.st_size
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_kept_picture_whose_times_were_set_back_is_sealed_anew_and_an_untouched_one_is_not(
    plain: Site,
) -> None:
    plain.folder["after"] = "keep"
    contents = {name: place(plain.drop / name, picture()) for name in ("a.jpg", "b.jpg")}
    plain.make_vaults()
    assert drain(plain)["sealed"] == 2
    new = contents["a.jpg"][:-8] + os.urandom(8)
    rewrite(plain.drop / "a.jpg", new)
    (plain.drop / "b.jpg").chmod(0o600)
    assert drain(plain)["folders"][0]["kept"] == 2
    assert len(plain.objects()) == 3
    assert set(plain.restored().values()) == {*contents.values(), new}


@pytest.mark.parametrize("state", [State.LEFT, State.QUARANTINED, State.UNDELETABLE, State.KEPT])
def test_what_rests_is_looked_at_again_once_its_file_was_changed_by_anybody(
    tmp_path: Path, state: State
) -> None:
    jobs = Jobs(tmp_path / "queue")
    identity = Identity(dev=1, ino=2, size=3, mtime_ns=4, ctime_ns=5)
    arrival = Arrival(FolderKey("/drop"), "a.jpg", identity, 6)
    jobs.admit([Settled(arrival, Proof.LEASE)])
    job = jobs.take(lambda: [arrival.folder], 0.0)
    assert job is not None
    jobs.rest(job, state, "a reason")
    jobs.admit([Settled(arrival, Proof.LEASE)])
    assert jobs.take(lambda: [arrival.folder], 0.0) is None
    later = dataclasses.replace(identity, ctime_ns=7)
    jobs.admit([Settled(dataclasses.replace(arrival, identity=later), Proof.LEASE)])
    again = jobs.take(lambda: [arrival.folder], 0.0)
    jobs.close()
    assert again is not None
    assert (again.object_id, again.identity, again.attempts) == (job.object_id, later, 1)


NAMES: Final = [
    f"{STAGING}.jpg".encode(),
    f"{STAGING} ".encode(),
    f"{STAGING}\n".encode(),
    f"s/{STAGING}/a.jpg".encode(),
    f"s/{STAGING}".encode() + b"2/" + b"0" * 32 + b"/a.jpg",
    b"...",
    b"..jpg",
    b". ",
    b"%2e%2e%2fa.jpg",
    b"..\\..\\a.jpg",
    b"C:\\a.jpg",
    b"--policy=x",
    b"quarantine/a.jpg",
    b"0123456789abcdef" * 2 + b".simg",
    b"0123456789abcdef" * 2 + b"/x.jpg",
    b"TWIN.JPG",
    b"twin.jpg",
    b"Twin.jpg",
    *(unicodedata.normalize(form, "\u00e9\u1e9b\u0323.jpg").encode() for form in ("NFC", "NFD")),
    b"\xed\xa0\x80.jpg",
    b"\xc0\xae\xc0\xae\xc0\xafa.jpg",
    b"a\xcc\x81" * 85,
    b"\x01\x7f\xc2\x85\xe2\x80\xa8\xe2\x81\xa6.jpg",
    b"a.jpg\xe2\x80\xae.part\xe2\x80\xac x",
    b".a.jpg.part2",
    b"part",
    b"tmp.jpg",
]


def test_names_that_look_like_something_else_come_back_as_they_were(plain: Site) -> None:
    expected = {}
    top = os.fsencode(plain.drop)
    for name in NAMES:
        path = os.path.join(top, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        expected[name] = picture()
        with open(path, "wb") as file:
            file.write(expected[name])
    plain.make_vaults()
    result = drain(plain)
    assert (result["sealed"], result["code"], plain.plaintexts()) == (len(NAMES), 0, [])
    assert plain.restored() == expected


def attributes(path: Path, change: str) -> bool:
    """Change what ``chattr`` changes; false where that is not possible."""
    try:
        done = subprocess.run(["chattr", change, path], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return not done.returncode


@root_only
def test_what_the_system_does_not_let_go_is_sealed_and_shown(plain: Site) -> None:
    contents = {n: place(plain.drop / n, picture()) for n in ("i.jpg", "a.jpg")}
    try:
        if not all(attributes(plain.drop / name, f"+{name[0]}") for name in contents):
            pytest.skip("this file system knows no immutable files")
        plain.make_vaults()
        result = drain(plain)
        assert (result["sealed"], result["failed"], result["code"]) == (2, 2, 1)
        for name in contents:
            answer = plain.why(plain.drop / name)
            assert answer["verdict"] == "undeletable"
            assert "cannot be deleted" in answer["reason"]
        assert set(plain.restored().values()) == set(contents.values())
    finally:
        for name in contents:
            attributes(plain.drop / name, f"-{name[0]}")
    # Seen anew, as their time of change is another one: they go, and are not sealed twice.
    assert drain(plain)["code"] == 0
    assert (plain.plaintexts(), len(plain.objects())) == ([], 2)


@root_only
def test_devices_are_never_opened_and_directories_with_names_of_pictures_are_entered(
    plain: Site,
) -> None:
    try:
        os.mknod(plain.drop / "null.jpg", 0o666 | 0o020000, os.makedev(1, 3))
        os.mknod(plain.drop / "disk.jpg", 0o666 | 0o060000, os.makedev(7, 250))
    except PermissionError:
        pytest.skip("devices may not be made here")
    (plain.drop / "x.png").mkdir()
    content = place(plain.drop / "x.png" / "y.png", picture("PNG"))
    plain.make_vaults()
    result = drain(plain)
    assert (result["sealed"], result["code"]) == (1, 0)
    assert result["folders"][0]["passed"] == {"special": 2}
    assert plain.why(plain.drop / "disk.jpg")["verdict"] == "ignored"
    assert plain.restored() == {b"x.png/y.png": content}


def test_a_huge_file_full_of_holes_waits_and_lets_the_others_by(plain: Site) -> None:
    with (plain.drop / "huge.jpg").open("wb") as file:
        file.write(picture())
        file.truncate(shutil.disk_usage(plain.top).free + (1 << 30))
    plain.start()
    contents = {f"{n}.jpg".encode(): place(plain.drop / f"{n}.jpg", picture()) for n in range(3)}
    plain.wait_for_objects(3)
    assert plain.restored() == contents
    [row] = plain.ask("jobs", "list")
    assert "too little free space" in row["reason"]
    assert plain.temporaries() == []


@root_only
def test_who_owns_none_of_the_files_seals_them_and_shows_what_it_may_not_delete() -> None:
    if reason := hostile_folder.why_not_as(NOBODY):
        pytest.skip(reason)
    with hostile_folder.ground() as top:
        arena = Arena(top, user=NOBODY, mode=0o1777, inspected=False)
        site = arena.site
        pictures = {}
        for name, mode in (("a.jpg", 0o644), ("s0/b.jpg", 0o604), ("c.jpg", 0o600)):
            pictures[name] = place(site.drop / name, picture())
            os.chown(site.drop / name, ADVERSARY, ADVERSARY)
            (site.drop / name).chmod(mode)
        with arena.service():
            wait_until(lambda: site.status().get("undeletable") == 2, "the refusals")
            wait_until(lambda: site.status().get("quarantined") == 1, "the unreadable one")
        assert arena.canaries.changes() == []
        assert arena.sealed() == {pictures["a.jpg"], pictures["s0/b.jpg"]}
        assert "refuses" in site.why(site.drop / "c.jpg")["reason"]


# -- mounts --------------------------------------------------------------------------------------

_IN_A_NAMESPACE = """
import os, subprocess, sys
top, python = sys.argv[1:3]
def mount(*words): subprocess.run(["mount", *words], check=True)
mount("--make-rprivate", "/")
for name in ("again", "other", sys.argv[3]):
    os.makedirs(f"{top}/drop/{name}")
mount("--bind", f"{top}/drop", f"{top}/drop/again")
mount("-t", "tmpfs", "none", f"{top}/drop/other")
mount("-t", "tmpfs", "none", f"{top}/drop/{sys.argv[3]}")
subprocess.run(["cp", f"{top}/other.jpg", f"{top}/drop/other/o.jpg"], check=True)
subprocess.run([python, "-m", "secimg_watch", "--policy", f"{top}/policy.yaml", "drain"])
print(os.listdir(f"{top}/drop/other"), os.listdir(f"{top}/drop/{sys.argv[3]}"))
"""


@pytest.mark.skipif(not can_mount(), reason="mounting takes root's privileges")
def test_what_is_mounted_into_a_folder_is_taken_and_a_mounted_staging_directory_not_used(
    plain: Site, outside: Path
) -> None:
    # The folder shows up in itself, another file system in it, and one more for its staging.
    contents = {place(plain.drop / f"{n}.jpg", picture()) for n in range(3)}
    contents.add(place(plain.top / "other.jpg", picture()))
    plain.folder["proof"] = "quiet"
    plain.make_vaults()
    command = ["unshare", "--mount", sys.executable, "-c", _IN_A_NAMESPACE, str(plain.top)]
    done = subprocess.run(
        [*command, sys.executable, STAGING], capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout.endswith("[] []\n"), done.stdout
    assert "another file system" in done.stderr
    assert plain.plaintexts() == []
    assert set(plain.restored().values()) == contents
