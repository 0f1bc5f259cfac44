"""Several folders and vaults in one service: each gets what is its own, and none waits."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from daemon import LINUX, ROOT, Site, files_below, picture, place, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not LINUX, reason="the service is Linux's")


def add_folder(site: Site, name: str, vault: str) -> Path:
    path = site.top / name
    path.mkdir()
    folder: dict[str, Any] = {"path": str(path), "vault": vault, "settle": "0s"}
    site.policy["folders"].append(folder)
    return path


def add_vault(site: Site, name: str, path: Path) -> None:
    site.policy["vaults"][name] = {"path": str(path), "min_free": "0B"}


def restored_from(site: Site, vault: str) -> dict[bytes, bytes]:
    target = site.top / f"restored from {vault}"
    site.ask("vault", "restore", "--all", "--vault", vault, "--to", str(target))
    return {name: file.read_bytes() for name, file in files_below(target).items()}


def test_each_picture_goes_to_the_vault_of_its_folder(site: Site) -> None:
    second = site.top / "second vault"
    add_vault(site, "second", second)
    scans = add_folder(site, "scans", "second")
    photos = add_folder(site, "photos", "main")
    daemon = site.start()
    expected: dict[str, dict[bytes, bytes]] = {"main": {}, "second": {}}
    for number in range(10):
        for folder, vault in ((site.drop, "main"), (scans, "second"), (photos, "main")):
            name = f"{folder.name} {number}.png"
            expected[vault][name.encode()] = place(folder / name, picture("PNG"))
    for folder in (site.drop, scans, photos):
        site.wait_until_clear(folder)
    assert daemon.stop() == 0
    assert len(site.objects()) == 20
    assert len(site.objects(second)) == 10
    assert [restored_from(site, vault) for vault in expected] == list(expected.values())
    sources = {(entry["source"], entry["name"].rsplit(" ")[0]) for entry in site.listed()}
    assert sources == {(str(f), f.name) for f in (site.drop, scans, photos)}
    assert [site.status(n)["sealed"] for n in range(3)] == [10, 10, 10]


def test_a_folder_that_is_gone_does_not_hold_up_the_others(site: Site) -> None:
    other = add_folder(site, "other", "main")
    site.start()
    shutil.rmtree(site.drop)
    wait_until(lambda: site.status(0)["health"] == "gone", "the loss to be noticed")
    for number in range(5):
        place(other / f"{number}.jpg", picture())
    site.wait_until_clear(other)
    wait_until(lambda: site.status(1)["health"] == "ok", "ok")
    wait_until(lambda: site.status(0)["health"] == "gone", "gone")


def test_a_vault_that_is_not_there_pauses_only_its_own_folders(site: Site) -> None:
    second = site.top / "second vault"
    add_vault(site, "second", second)
    scans = add_folder(site, "scans", "second")
    site.make_vaults()
    second.rename(site.top / "away")
    site.launch().wait_for_notice("READY=1")
    place(scans / "a.jpg", picture())
    content = place(site.drop / "b.jpg", picture())
    site.wait_until_clear()
    wait_until(lambda: site.status(1)["health"] == "paused", "the pause")
    wait_until(lambda: site.status(0)["health"] == "ok", "the other folder's health")
    assert list(files_below(scans)) == [b"a.jpg"]
    (site.top / "away").rename(second)
    site.wait_until_clear(scans)
    wait_until(lambda: site.status(1)["health"] == "ok", "the end of the pause")
    assert content in site.restored().values()
    assert len(site.objects(second)) == 1


def test_a_full_vault_pauses_only_the_folders_that_use_it(site: Site) -> None:
    if not ROOT:
        pytest.skip("only root can mount")
    disk = site.top / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        add_vault(site, "small", disk / "vault")
        scans = add_folder(site, "scans", "small")
        photos = add_folder(site, "photos", "small")
        daemon = site.start()
        place(scans / "huge.jpg", picture(padding=20_000_000))
        wait_until(lambda: site.status(1)["health"] == "paused", "the pause")
        assert site.status(2)["health"] in {"paused", "ok"}
        for number in range(5):
            place(site.drop / f"{number}.jpg", picture())
        site.wait_until_clear()
        wait_until(lambda: site.status(0)["health"] == "ok", "ok")
        place(photos / "small.jpg", picture())
        site.wait_until_clear(photos)
        assert daemon.stop() == 0
        assert len(site.objects()) == 5
        assert [n.endswith(b"huge.jpg") for n in files_below(scans)] == [True]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_the_same_name_in_two_folders_makes_two_objects(site: Site) -> None:
    other = add_folder(site, "other", "main")
    site.start()
    contents = {place(folder / "a.jpg", picture()) for folder in (site.drop, other)}
    site.wait_until_clear()
    site.wait_until_clear(other)
    assert set(site.restored().values()) == contents


def test_a_storm_in_one_folder_does_not_keep_another_waiting(site: Site) -> None:
    other = add_folder(site, "other", "main")
    site.folder["exclude"] = ["*.noise"]
    site.start()
    place(other / "first.jpg", picture())
    site.wait_until_clear(other)
    for number in range(2_000):
        os.close(os.open(site.drop / f"{number}.noise", os.O_WRONLY | os.O_CREAT))
    place(other / "second.jpg", picture())
    site.wait_until_clear(other)
    assert len(site.objects()) == 2
