"""``drain``: take everything that is ready, and say by the exit code whether anything is left."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cli_runner import INSPECTED, Box, check_complaint, contents, make_box, picture, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the service is for POSIX systems")

FIELDS = {
    "audit",
    *("sealed", "failed", "not_ready", "running", "pid", "written", "key"),
    *("inspector", "warnings", "folders"),
}


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return make_box(tmp_path, **INSPECTED)


def test_an_empty_folder_is_0(box: Box) -> None:
    outcome = box("drain")
    assert (outcome.code, outcome.out, outcome.err) == (
        0,
        "0 sealed, 0 failed, 0 not ready yet\n",
        "",
    )


def test_everything_that_is_ready_is_sealed_and_gone(box: Box) -> None:
    for number in range(5):
        (box.drop / f"{number}.png").write_bytes(picture())
    outcome = box("drain")
    assert (outcome.code, outcome.out) == (0, "5 sealed, 0 failed, 0 not ready yet\n")
    assert contents(box.drop) == {}
    assert len(box.objects()) == 5


def test_only_the_pictures_of_this_run_are_counted(box: Box) -> None:
    for colour in ("red", "blue"):
        (box.drop / "a.png").write_bytes(picture(colour))
        assert box("drain").out == "1 sealed, 0 failed, 0 not ready yet\n"


def test_what_the_policy_leaves_is_0(box: Box) -> None:
    (box.drop / "a.txt").write_text("no picture")
    (box.drop / "a.png.part").write_bytes(picture())
    outcome = box("--json", "drain")
    assert outcome.code == 0
    [folder] = outcome.json()["folders"]
    assert (folder["left"], folder["temporary"]) == (1, 1)
    assert contents(box.drop).keys() == {"a.txt", "a.png.part"}


def test_what_failed_is_1(tmp_path: Path) -> None:
    box = make_box(tmp_path, not_image="quarantine")
    (box.drop / "a.txt").write_text("no picture")
    (box.drop / "a.png").write_bytes(picture())
    outcome = box("drain")
    assert (outcome.code, outcome.out) == (1, "1 sealed, 1 failed, 0 not ready yet\n")


@pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux's")
def test_what_is_still_being_written_is_75_and_untouched(box: Box) -> None:
    (box.drop / "done.png").write_bytes(picture())
    script = "import sys; f = open(sys.argv[1], 'wb'); print('x', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, box.drop / "half.png"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"x\n"
        (box.drop / "half.png").write_bytes(b"half")
        outcome = box("drain")
        writer.kill()
    assert (outcome.code, outcome.out) == (75, "1 sealed, 0 failed, 1 not ready yet\n")
    assert contents(box.drop) == {"half.png": b"half"}


def test_a_folder_that_is_gone_is_75_and_named(box: Box) -> None:
    box.drop.rmdir()
    outcome = box("drain")
    assert outcome.code == 75
    assert f"folder {box.drop}: gone" in outcome.err
    assert not box.drop.exists()


def test_a_vault_that_is_not_there_is_75_and_not_made(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.make_key()
    (box.drop / "a.png").write_bytes(picture())
    sentence = check_complaint(box("drain"), 75)
    assert str(box.vault) in sentence
    assert not box.vault.exists()
    assert contents(box.drop).keys() == {"a.png"}


def test_a_full_vault_is_75_and_loses_nothing(tmp_path: Path) -> None:
    full = {"vaults": {"main": {"path": str(tmp_path / "vault"), "min_free": "1000TB"}}}
    box = make_box(tmp_path, more=full)
    (box.drop / "a.png").write_bytes(picture())
    outcome = box("drain")
    assert outcome.code == 75
    assert outcome.out.startswith("0 sealed, 0 failed, 1 not ready yet\n")
    assert list(contents(box.drop).values()) == [picture()]
    box.write_policy()
    assert box("drain").out == "1 sealed, 0 failed, 0 not ready yet\n"
    assert contents(box.drop) == {}


def test_a_state_directory_that_cannot_be_made_is_73(box: Box) -> None:
    box.state.write_text("a file")
    check_complaint(box("drain"), 73)


def test_the_result_alone_goes_to_standard_output(box: Box) -> None:
    (box.drop / "a.png").write_bytes(picture())
    outcome = box("-v", "--json", "drain")
    assert outcome.code == 0
    result = outcome.json()
    assert result.keys() == FIELDS
    assert (result["sealed"], result["failed"], result["not_ready"]) == (1, 0, 0)
    assert "sealed object" in outcome.err


def test_no_name_of_a_file_is_logged(box: Box) -> None:
    for name in ("confidential.png", "confidential.txt"):
        (box.drop / name).write_bytes(picture() if name.endswith("png") else b"text")
    assert "confidential" not in box("-v", "drain").err


def test_beside_a_running_service_a_drain_is_75(box: Box) -> None:
    service = box.cli.start("--policy", box.policy, "run")
    try:
        wait_until(lambda: (box.state / "status.json").exists() or service.poll() is not None)
        outcome = box("drain")
        check_complaint(outcome, 75)
        assert "secimg-watch status" in outcome.err
        assert service.poll() is None
    finally:
        service.terminate()
        _, err = service.communicate()
    assert service.returncode == 0, err


def test_two_drains_at_once_seal_everything_once(box: Box) -> None:
    for number in range(10):
        (box.drop / f"{number}.png").write_bytes(picture(size=(50 + number, 50)))
    drains = [box.cli.start("--policy", box.policy, "drain") for _ in range(2)]
    for drain in drains:
        drain.communicate()
    codes = [drain.returncode for drain in drains]
    assert set(codes) <= {0, 75}
    assert 0 in codes
    assert contents(box.drop) == {}
    assert len(box.objects()) == 10
