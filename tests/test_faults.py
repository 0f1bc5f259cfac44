"""Full disks, absent folders, wrong keys: nothing is lost, and the reason is there to be read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon import LINUX, ROOT, Site, picture, place, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not LINUX, reason="the service is Linux's")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 8 MiB."""
    if not ROOT:
        pytest.skip("only root can mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "none", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield disk
    finally:
        # Lazily, as the service that has it open ends after this.
        subprocess.run(["umount", "--lazy", disk], check=True)


def use(site: Site, vault: Path, min_free: str = "0B") -> None:
    site.vault = vault
    site.policy["vaults"]["main"] = {"path": str(vault), "min_free": min_free}


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


@pytest.mark.parametrize("min_free", ["0B", "1MiB"])
def test_a_full_vault_pauses_the_folder_until_there_is_room(
    site: Site, small_disk: Path, min_free: str
) -> None:
    use(site, small_disk / "vault", min_free)
    daemon = site.start()
    contents = {b"first.jpg": place(site.drop / "first.jpg", picture())}
    site.wait_until_clear()
    filler = fill(small_disk)
    for number in range(10):
        name = f"{number}.jpg"
        contents[name.encode()] = place(site.drop / name, picture(padding=100_000))
    wait_until(lambda: site.status()["health"] == "paused", "the pause")
    status = site.status()
    assert "full" in status["reason"] or "free space" in status["reason"]
    assert status["quarantined"] == 0
    assert len(site.objects()) == 1
    assert site.temporaries() == []
    assert len(site.plaintexts()) == 10
    daemon.wait_for_notice("STATUS=1 sealed, 10 waiting; paused: ")
    filler.unlink()
    site.wait_until_clear()
    wait_until(lambda: site.status()["health"] == "ok", "the end of the pause")
    assert daemon.stop() == 0
    assert site.restored() == contents


def test_a_pause_ends_when_what_caused_it_is_gone(site: Site, small_disk: Path) -> None:
    use(site, small_disk / "vault")
    site.start()
    fill(small_disk)
    place(site.drop / "large.jpg", picture(padding=1_000_000))
    wait_until(lambda: site.status()["health"] == "paused", "the pause")
    # The picture may be in the staging directory by now; the person who wants it takes it out.
    [name] = site.plaintexts()
    (site.drop / os.fsdecode(name)).unlink()
    wait_until(lambda: site.status()["health"] == "ok", "the end of the pause", 30)


def test_a_file_larger_than_the_vault_does_not_keep_others_out_for_good(
    site: Site, small_disk: Path
) -> None:
    use(site, small_disk / "vault")
    site.start()
    place(site.drop / "huge.jpg", picture(padding=20_000_000))
    wait_until(lambda: site.status()["health"] == "paused", "the pause")
    content = place(site.drop / "small.jpg", picture())
    site.wait_for_objects(1)
    assert site.restored() == {b"small.jpg": content}


def test_a_folder_on_a_full_disk_is_emptied_all_the_same(site: Site, small_disk: Path) -> None:
    drop = small_disk / "drop"
    drop.mkdir()
    site.folder["path"] = str(drop)
    contents = {f"{n}.jpg".encode(): place(drop / f"{n}.jpg", picture()) for n in range(5)}
    fill(small_disk)
    daemon = site.start()
    wait_until(lambda: [n for n in site.plaintexts(drop) if n.endswith(b".jpg")] == [], "none left")
    assert daemon.stop() == 0
    assert site.restored() == contents


def test_a_vault_that_is_unmounted_pauses_the_folder_and_nothing_is_written_below_it(
    site: Site, small_disk: Path
) -> None:
    use(site, small_disk)
    first = site.start()
    assert first.stop() == 0
    subprocess.run(["umount", small_disk], check=True)
    try:
        daemon = site.launch()
        place(site.drop / "a.jpg", picture())
        wait_until(lambda: site.status()["health"] == "paused", "the pause")
        assert "not mounted" in site.status()["reason"]
        assert len(site.plaintexts()) == 1
        assert os.listdir(small_disk) == []
        assert daemon.stop() == 0
    finally:
        command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "none", str(small_disk)]
        subprocess.run(command, check=True)


def test_a_folder_that_is_removed_is_gone_and_taken_up_again_when_it_is_back(site: Site) -> None:
    daemon = site.start()
    first = place(site.drop / "first.jpg", picture())
    site.wait_until_clear()
    shutil.rmtree(site.drop)
    wait_until(lambda: site.status()["health"] == "gone", "the loss to be noticed")
    assert site.status()["reason"]
    site.drop.mkdir()
    (site.drop / "sub").mkdir()
    second = place(site.drop / "sub" / "second.jpg", picture())
    wait_until(lambda: site.status()["health"] == "ok", "the return to be noticed")
    third = place(site.drop / "third.jpg", picture())
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert site.restored() == {b"first.jpg": first, b"sub/second.jpg": second, b"third.jpg": third}


def test_a_folder_that_is_replaced_by_another_is_watched_anew(site: Site, tmp_path: Path) -> None:
    daemon = site.start()
    site.drop.rename(tmp_path / "old")
    site.drop.mkdir()
    daemon.wait_for_log("removed, replaced or mounted over")
    wait_until(lambda: daemon.log().count(": watched (") == 2, "the new one to be watched")
    content = place(site.drop / "a.jpg", picture())
    stays = place(tmp_path / "old" / "b.jpg", picture())
    site.wait_until_clear()
    assert site.restored() == {b"a.jpg": content}
    assert (tmp_path / "old" / "b.jpg").read_bytes() == stays


def test_a_missing_folder_is_gone_and_picked_up_when_it_is_made(site: Site) -> None:
    site.drop.rmdir()
    site.start()
    wait_until(lambda: site.status()["health"] == "gone", "the status")
    assert "cannot be opened" in site.status()["reason"]
    site.drop.mkdir()
    content = place(site.drop / "a.jpg", picture())
    site.wait_until_clear()
    assert site.restored() == {b"a.jpg": content}


def refused(site: Site, code: int, reason: str) -> None:
    """Expect a daemon to end with this code and reason, and nothing to have been touched."""
    before = {name: (site.drop / os.fsdecode(name)).read_bytes() for name in site.plaintexts()}
    assert before
    objects = site.objects()
    daemon = site.launch()
    assert daemon.ended() == code, daemon.log()
    assert reason in daemon.log()
    assert {n: (site.drop / os.fsdecode(n)).read_bytes() for n in site.plaintexts()} == before
    assert site.objects() == objects
    assert "READY=1" not in daemon.notices()


def test_the_key_of_another_vault_is_refused_and_nothing_is_touched(
    site: Site, tmp_path: Path
) -> None:
    daemon = site.start()
    content = place(site.drop / "a.jpg", picture())
    site.wait_until_clear()
    assert daemon.stop() == 0
    other = Site(tmp_path / "other")
    other.make_vaults()
    place(site.drop / "b.jpg", picture())
    site.policy["key"]["file"] = str(other.key)
    refused(site, 78, "nothing was encrypted or deleted")
    site.policy["key"]["file"] = str(site.key)
    site.start()
    site.wait_until_clear()
    assert site.restored()[b"a.jpg"] == content


def test_a_missing_key_is_a_matter_of_configuration(site: Site) -> None:
    site.make_vaults()
    site.key.unlink()
    place(site.drop / "a.jpg", picture())
    refused(site, 78, "does not exist")


def test_a_key_that_others_may_read_is_refused(site: Site) -> None:
    site.make_vaults()
    site.key.chmod(0o444)
    place(site.drop / "a.jpg", picture())
    refused(site, 78, "others may use it")


def test_a_damaged_key_is_refused(site: Site) -> None:
    site.make_vaults()
    site.key.chmod(0o600)
    site.key.write_text("nonsense\n")
    place(site.drop / "a.jpg", picture())
    refused(site, 78, "key")


def test_a_policy_with_a_fault_is_refused_with_its_place(site: Site) -> None:
    site.folder["surprise"] = True
    place(site.drop / "a.jpg", picture())
    refused(site, 78, f"{site.policy_path}:")


def test_a_vault_that_cannot_be_made_is_said_so(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    use(site, tmp_path / "file" / "vault")
    site.write_policy()
    command = [sys.executable, "-m", "secimg_watch", "--policy", str(site.policy_path)]
    made = subprocess.run([*command, "key", "init"], capture_output=True, text=True, check=False)
    assert made.returncode == 73
    assert "cannot be made" in made.stderr
    assert "Traceback" not in made.stderr


def test_a_state_directory_that_cannot_be_made_is_said_so(site: Site, tmp_path: Path) -> None:
    site.make_vaults()
    (tmp_path / "file").touch()
    site.policy["state"] = str(tmp_path / "file" / "state")
    place(site.drop / "a.jpg", picture())
    refused(site, 73, "the state directory")


def test_a_vault_that_may_not_be_written_is_said_so(site: Site) -> None:
    if ROOT:
        pytest.skip("root may write everywhere")
    site.make_vaults()
    site.vault.chmod(0o500)
    place(site.drop / "a.jpg", picture())
    try:
        refused(site, 77, "cannot be written")
    finally:
        site.vault.chmod(0o700)


def test_a_vault_that_is_mounted_read_only_is_said_so(site: Site, small_disk: Path) -> None:
    use(site, small_disk / "vault")
    site.make_vaults()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    place(site.drop / "a.jpg", picture())
    refused(site, 77, "cannot be written")


def test_a_folder_that_may_not_be_written_is_sealed_and_the_refusal_reported(site: Site) -> None:
    if ROOT:
        pytest.skip("root may write everywhere")
    content = place(site.drop / "a.jpg", picture())
    site.drop.chmod(0o500)
    try:
        daemon = site.start()
        wait_until(lambda: site.status()["undeletable"] == 1, "the refusal")
        assert site.status()["health"] == "degraded"
        assert daemon.stop() == 0
        assert site.plaintexts() == [b"a.jpg"]
        assert site.restored() == {b"a.jpg": content}
    finally:
        site.drop.chmod(0o700)


def test_an_inspector_that_dies_again_and_again_holds_up_no_picture(site: Site) -> None:
    daemon = site.start()
    contents = {}
    for number in range(10):
        name = f"{number}.jpg"
        contents[name.encode()] = place(site.drop / name, picture())
        for child in children_of(daemon.process.pid):
            subprocess.run(["kill", "-9", str(child)], check=False, capture_output=True)
    site.wait_until_clear()
    assert daemon.stop() == 0
    assert site.restored() == contents


def children_of(pid: int) -> list[int]:
    """Give the direct children of a process of ours."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    threads = Path(f"/proc/{pid}/task")
    found = text.split()
    for thread in threads.iterdir():
        try:
            found += (thread / "children").read_text().split()
        except OSError:
            continue
    return sorted({int(each) for each in found})
