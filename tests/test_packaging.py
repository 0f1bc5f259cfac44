"""What is installed: the wheel's contents, its metadata, and that it runs from nothing else."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from secimg_watch import __version__

if TYPE_CHECKING:
    from email.message import Message

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=cwd,
        env={"PATH": os.environ.get("PATH", ""), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without the network from a copy of the tree."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the source tree is not there")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("secimg_watch", "config", "systemd", "tests"):
        shutil.copytree(ROOT / name, tree / name)
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=tree)
    assert built.returncode == 0, built.stderr
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Message:
    [path] = [name for name in names if name.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(path).decode())


def test_the_wheel_holds_every_module_and_the_typing_marker(names: set[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "secimg_watch").rglob("*.py")}
    assert modules <= names
    assert "secimg_watch/py.typed" in names


@pytest.mark.parametrize(("source", "target"), [("config", "profiles"), ("systemd", "units")])
def test_the_wheel_holds_profiles_and_units(names: set[str], source: str, target: str) -> None:
    expected = {
        f"secimg_watch/{target}/{path.relative_to(ROOT / source).as_posix()}"
        for path in (ROOT / source).rglob("*")
        if path.is_file()
    }
    assert expected
    assert expected <= names


def test_the_wheel_holds_no_tests_and_no_leftovers(names: set[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in names} == {"secimg_watch"}
    assert not [name for name in names if "test_" in name or "__pycache__" in name]
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def test_the_metadata_agrees_with_the_package(wheel: Path, metadata: Message) -> None:
    assert metadata["Name"] == "secimg-watch"
    assert metadata["Version"] == __version__
    assert wheel.name == f"secimg_watch-{__version__}-py3-none-any.whl"
    assert metadata["License-Expression"] == "MIT"


def test_no_requirement_is_left_without_a_lower_bound(metadata: Message) -> None:
    needed = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert len(needed) == 8
    assert all(">=" in each for each in needed)


def test_the_package_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environ = {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    where = "import secimg_watch; print(secimg_watch.__file__)"
    located = run(sys.executable, "-c", where, cwd=tmp_path, **environ)
    assert located.stdout.startswith(str(tmp_path))
    command = (sys.executable, "-m", "secimg_watch")
    assert run(*command, "--version", cwd=tmp_path, **environ).stdout.split()[-1] == __version__
    made = run(*command, "quickstart", "--setup-only", "mine", cwd=tmp_path, **environ)
    assert made.returncode == 0, made.stderr
    (tmp_path / "mine/drop/a.txt").write_text("no picture")
    policy = tmp_path / "mine/policy.yaml"
    drained = run(*command, "--policy", policy, "drain", cwd=tmp_path, **environ)
    # The inspector's child has to be found in the wheel as well.
    assert (drained.returncode, drained.stdout) == (0, "0 sealed, 0 failed, 0 not ready yet\n")
    why = run(*command, "--policy", policy, "why", "mine/drop/a.txt", cwd=tmp_path, **environ)
    assert "not an image" in why.stdout


def test_the_source_is_one_version_everywhere(tmp_path: Path) -> None:
    told = run(sys.executable, "-m", "secimg_watch", "--version", cwd=tmp_path)
    assert told.stdout.split()[-1] == __version__


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_produced(tmp_path: Path, shell: str) -> None:
    script = Path(sys.executable).with_name("secimg-watch")
    if not script.exists():
        pytest.skip("the command is not installed beside the interpreter")
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("bash is not installed; its version is asked for")
    environ = {"_SECIMG_WATCH_COMPLETE": f"{shell}_source"}
    told = run(script, cwd=tmp_path, **environ)
    assert told.returncode == 0, told.stderr
    assert f"_SECIMG_WATCH_COMPLETE={shell}_complete" in told.stdout


def test_commands_are_completed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("secimg-watch")
    if not script.exists():
        pytest.skip("the command is not installed beside the interpreter")
    environ = {
        "_SECIMG_WATCH_COMPLETE": "bash_complete",
        "COMP_WORDS": "secimg-watch vault ",
        "COMP_CWORD": "2",
    }
    told = run(script, cwd=tmp_path, **environ)
    assert told.stdout.split() == [
        "plain,list",
        "plain,reencrypt",
        "plain,rekey",
        "plain,restore",
        "plain,show",
        "plain,verify",
    ]
