"""README and docs: every command, sample and table in them is true of this version."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import tomllib
from contextlib import chdir
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import pytest
import yaml
from click.testing import CliRunner
from daemon import DEADLINE, LINUX, wait_until
from PIL import Image

from secimg_watch import __version__, container, errors, settle
from secimg_watch.cli import cli
from secimg_watch.cli.app import App
from secimg_watch.policy import parse_policy, schema
from secimg_watch.recipients import format_recipient, generate_identity, recipient_of
from secimg_watch.records import ObjectId
from secimg_watch.report import FolderReport

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent.parent
PACKAGE = HERE / "secimg_watch"
README = HERE / "README.md"
PAGES = [README, HERE / "CHANGELOG.md", *sorted((HERE / "docs").glob("*.md"))]
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())
OBJECT = ObjectId("0123456789abcdef" * 2)
BLANK = """\
version: 1
state: /var/lib/secimg-watch
vaults: {main: {path: /srv/vault}}
folders: [{path: /srv/scans}]
"""


class Block(NamedTuple):
    """A fenced block, and where it stands."""

    page: str
    line: int
    kind: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Block(page.name, text[: match.start()].count("\n") + 1, match[1], match[2])


def blocks(*kinds: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{block.page}:{block.line}")
        for page in PAGES
        for block in blocks_of(page)
        if block.kind in kinds
    ]


def marked(page: str, name: str) -> str:
    """Give what stands between two markers of that name."""
    found = re.search(
        rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", (HERE / page).read_text(), re.DOTALL
    )
    assert found, f"{page} has no part {name}"
    return found[1]


def section(page: str, title: str) -> str:
    text = (HERE / page).read_text()
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no section {title}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Give the cells of the first table in a text, without its heading."""
    found = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found, "there is no table"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def bare(cell: str) -> str:
    return cell.strip("`")


# -- the pages themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    kinds = {block.kind for block in blocks_of(page)}
    assert kinds <= {"console", "sh", "yaml", "ini", "python", "text"}
    assert page.read_text().count("\n```") == 2 * len(list(blocks_of(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_that_is_named_exists(page: Path) -> None:
    for name in re.findall(r"`([a-z_]+\.py)`", page.read_text()):
        assert (PACKAGE / name).exists(), name


def test_the_changelog_lists_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (HERE / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == __version__


# -- commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/secimg-watch quickstart DIR",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
    ],
)
def test_the_readme_gives_the_two_commands_alone_on_their_lines(command: str) -> None:
    assert command in README.read_text().splitlines()


@pytest.mark.skipif(not LINUX, reason="the commands are for bash")
@pytest.mark.parametrize("block", blocks("sh", "console"))
def test_every_command_is_one_that_bash_can_read(block: Block) -> None:
    commands = "\n".join(commands_in(block))
    subprocess.run(["bash", "-n"], input=commands, text=True, check=True)


@pytest.mark.parametrize("block", blocks("sh", "console"))
def test_every_call_of_the_program_is_one_that_it_understands(block: Block) -> None:
    for call in calls("\n".join(commands_in(block))):
        understand(call)


def test_every_call_in_running_text_is_one_that_the_program_understands() -> None:
    found = 0
    for page in PAGES:
        for call in re.findall(r"`(secimg-watch [^`]+)`", page.read_text()):
            understand(shlex.split(call)[1:])
            found += 1
    assert found > 5


def commands_in(block: Block) -> list[str]:
    lines = block.text.splitlines()
    if block.kind == "sh":
        return lines
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def calls(text: str) -> Iterator[list[str]]:
    """Give the arguments of every call of the program, however it is prefixed."""
    for line in text.splitlines():
        for part in re.split(r"&&|\|\||[|;&]", line):
            words = shlex.split(part, comments=True) if part.count('"') % 2 == 0 else []
            prefixed = words[:1] in (["runuser"], ["systemd-run"])
            for place, word in enumerate(words if prefixed else words[:1]):
                if word.endswith("bin/secimg-watch") or (place == 0 and word == "secimg-watch"):
                    yield words[place + 1 :]
                    break


def understand(arguments: list[str]) -> None:
    """Parse a call down to the last option, without running it."""
    command: click.Command = cli
    parent = None
    rest = arguments
    while True:
        name = command.name or "secimg-watch"
        context = command.make_context(name, list(rest), parent=parent, obj=App())
        if not isinstance(command, click.Group):
            return
        _, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command, parent = found, context


def test_the_check_of_calls_refuses_what_the_program_does_not_know() -> None:
    line = "cd /opt/secimg-watch && .venv/bin/secimg-watch quickstart ~/secimg-watch"
    assert list(calls(line)) == [["quickstart", "~/secimg-watch"]]
    for wrong in (["bogus"], ["vault", "bogus"], ["vault", "list", "--bogus"], ["why"]):
        with pytest.raises(click.UsageError):
            understand(wrong)


def test_the_readme_shows_the_help_as_it_is() -> None:
    shown = marked("README.md", "help")
    arguments = {"prog_name": "secimg-watch", "terminal_width": 80}
    helped = CliRunner().invoke(cli, ["--help"], **arguments)  # type: ignore[arg-type]
    assert shown == f"```text\n{helped.output}```\n"


@pytest.mark.skipif(not LINUX, reason="the completion is bash's")
def test_the_completion_line_gives_bash_a_completion(tmp_path: Path) -> None:
    [line] = [
        command
        for block in blocks_of(README)
        if block.kind == "sh"
        for command in commands_in(block)
        if "_COMPLETE" in command
    ]
    done = subprocess.run(
        ["bash", "-c", f"{line}\ncomplete -p secimg-watch"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("secimg-watch\n")


# -- samples -----------------------------------------------------------------------------------


def filled(text: str) -> str:
    """Put a public key wherever a sample leaves it out for its length."""
    return re.sub(
        r"secimg-recipient-1:\.\.\.",
        lambda _: format_recipient(recipient_of(generate_identity())),
        text,
    )


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_policy_sample_is_valid(block: Block) -> None:
    sample = yaml.safe_load(filled(block.text))
    whole = sample if "version" in sample else yaml.safe_load(BLANK) | sample
    policy = parse_policy(yaml.safe_dump(whole), f"{block.page}:{block.line}")
    assert len(policy.folders) == len(whole["folders"])


@pytest.mark.parametrize("block", blocks("ini"))
def test_every_drop_in_fits_the_unit_and_the_policy_beside_it(block: Block) -> None:
    drop_in = configparser.RawConfigParser(strict=True)
    drop_in.optionxform = str  # type: ignore[assignment,method-assign]
    drop_in.read_string(block.text)
    service = dict(drop_in["Service"])
    name, _, source = service["LoadCredentialEncrypted"].partition(":")
    sample = next(b for b in blocks_of(HERE / "docs" / block.page) if b.kind == "yaml")
    policy = parse_policy(filled(sample.text), block.page)
    assert name == policy.key.name.replace("/", ".")
    assert os.path.isabs(source)
    written = {str(policy.vaults["main"].path), *(str(f.path) for f in policy.folders)}
    assert set(service["ReadWritePaths"].split()) == written
    unit = (HERE / "systemd" / "secimg-watch.service").read_text()
    assert f"StateDirectory={policy.state.name}\n" in unit
    assert re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE) == ["CAP_LEASE"]
    assert "ExecStart=/opt/secimg-watch/bin/secimg-watch --policy /etc/secimg-watch/" in unit


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_sample_runs(block: Block, tmp_path: Path) -> None:
    Image.radial_gradient("L").save(tmp_path / "example.png")
    with chdir(tmp_path):
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {})
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "example.png").read_bytes()


def test_the_classic_calls_stand_in_the_readme_word_for_word() -> None:
    [sample] = [block.text for block in blocks_of(README) if block.kind == "python"]
    for line in (
        'image_data = image_to_bytes("example.png")',
        "encrypted_data, tag, iv, salt = encrypt_image(image_data, password)",
        "decrypted = decrypt_image(encrypted_data, tag, iv, salt, password)",
        'bytes_to_image(decrypted, "out.png")',
    ):
        assert line in sample.splitlines()


# -- tables ------------------------------------------------------------------------------------


def test_the_exit_codes_are_those_of_the_errors() -> None:
    listed = {
        int(code): set(re.findall(r"`(\w+)`", names))
        for code, names, _ in rows(section("docs/operations.md", "Exit codes"))
    }
    real: dict[int, set[str]] = {0: set(), 1: set(), 130: set()}
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.SecimgError):
            real.setdefault(error.exit_code, set()).add(error.__name__)
    assert listed == real


def test_the_status_fields_are_those_of_the_report() -> None:
    listed = [bare(row[0]) for row in rows(section("docs/operations.md", "Status"))]
    assert listed == [field.name for field in fields(FolderReport)]


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("Top level", ""),
        ("vaults", "Vault"),
        ("key", "Key"),
        ("folders", "Folder"),
        ("limits", "Limits"),
    ],
)
def test_the_policy_tables_give_every_key_with_its_default(title: str, model: str) -> None:
    described = schema()["$defs"][model] if model else schema()
    listed = {bare(row[0]): bare(row[1]) for row in rows(section("docs/policy.md", title))}
    assert set(listed) == set(described["properties"])
    for key, part in described["properties"].items():
        if key in described.get("required", ()):
            assert listed[key] == "required", key
        elif "$ref" in part:
            assert listed[key] == "see below", key
        elif "default" in part:
            default = part["default"]
            shown = default if isinstance(default, str) else json.dumps(default)
            assert listed[key] == shown, key


def test_the_layers_are_those_of_the_contract() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    shown = marked("docs/architecture.md", "layers")
    assert shown == "```text\n" + "\n".join(layers) + "\n```\n"


def test_the_stages_are_the_records_in_their_order() -> None:
    page = (HERE / "docs/architecture.md").read_text()
    [path] = [b.text.strip() for b in blocks_of(HERE / "docs/architecture.md") if "->" in b.text]
    stages = path.split(" -> ")
    source = (PACKAGE / "records.py").read_text()
    defined = re.findall(r"^class (\w+)", source, re.MULTILINE)
    assert stages[0] == "Arrival"
    assert set(stages) <= set(defined)
    assert [bare(row[0]) for row in rows(page)] == stages


def test_the_dependencies_are_those_of_the_project() -> None:
    project = PROJECT["project"]
    wanted = {
        "Runtime": project["dependencies"],
        **{
            f"Extra `{extra}`": requirements
            for extra, requirements in project["optional-dependencies"].items()
        },
    }
    for title, requirements in wanted.items():
        listed = [bare(row[0]) for row in rows(section("docs/dependencies.md", title))]
        assert listed == requirements


def test_every_door_imports_its_dependency() -> None:
    modules = {"pillow": "PIL", "pyyaml": "yaml", "pillow-heif": "pillow_heif"}
    for title in ("Runtime", "Extra `heif`"):
        for requirement, door, _ in rows(section("docs/dependencies.md", title)):
            name = bare(requirement).partition(">=")[0]
            place = PACKAGE / bare(door)
            files = sorted(place.glob("*.py")) if place.is_dir() else [place]
            source = "".join(file.read_text() for file in files)
            wanted = rf'(import|from|import_module\(")\s*{modules.get(name, name)}\b'
            assert re.search(wanted, source), requirement


def test_the_core_table_is_the_layout_of_the_core() -> None:
    table = rows(marked("docs/format.md", "core"))
    end = 0
    for offset, length, _ in table:
        assert int(offset) == end
        end += int(length)
    assert end == container.CORE_SIZE
    core = container.Core(1096, 73, OBJECT, b"v" * 16).pack()
    at = {name.split(",")[0].split(" `")[0]: int(offset) for offset, _, name in table}
    assert core.startswith(bytes.fromhex(re.findall(r"`([0-9a-f ]+)`", table[0][2])[0]))
    assert core[at["version"]] == container.VERSION
    assert core[at["length of the sealed META"] :][:4] == (1096).to_bytes(4, "big")
    assert core[at["length of the sealed PREVIEW"] :][:4] == (73).to_bytes(4, "big")
    assert core[at["object id"] :][:16] == bytes.fromhex(OBJECT)
    assert core[at["vault id; zeros where the object belongs to no vault"] :] == b"v" * 16


def test_the_slot_table_gives_the_lengths_of_the_slots() -> None:
    wrap = container.Wrap(b"s" * 32, b"c" * 32, b"w" * 48)
    slots = (
        container.KeyringSlot(b"i" * 16, wrap),
        container.Argon2idSlot(b"i" * 16, 8192, 1, 1, b"p" * 32, wrap),
        container.Pbkdf2Slot(b"i" * 16, 100_000, b"p" * 32, wrap),
        container.RecipientSlot(b"i" * 16, b"r" * container.SEALED_ROOT, wrap),
    )
    table = [
        (int(kind), int(length)) for kind, length, _ in rows(marked("docs/format.md", "slots"))
    ]
    assert table == [(slot.pack()[0], len(slot.pack())) for slot in slots]


def test_the_metadata_table_lists_the_fields_in_the_order_of_their_tags() -> None:
    table = [(int(tag), bare(name)) for tag, name, _ in rows(marked("docs/format.md", "meta"))]
    assert table == list(enumerate((field.name for field in fields(container.Meta)), start=1))


def test_the_derivation_labels_are_those_in_use() -> None:
    label = re.compile(r'"(secimg-watch/v1/[\w-]+)\\0"')
    used = {
        found
        for module in ("seal.py", "slots.py", "recipients.py")
        for found in label.findall((PACKAGE / module).read_text())
    }
    assert used
    assert set(label.findall((HERE / "docs/format.md").read_text())) == used


def test_the_documented_defaults_of_proofs_are_those_in_force() -> None:
    text = section("docs/policy.md", "folders")
    assert f"unchanged for {settle.QUIET_LOCAL:.0f} s" in text
    assert f"on network file systems {settle.QUIET_REMOTE:.0f} s" in text
    assert f"left alone for {settle.EMPTY_GRACE:.0f} s" in text


# -- the tour ----------------------------------------------------------------------------------

HOME = "/home/ann"
PICTURES = {"passport.jpg": "JPEG", "map.png": "PNG", "garden.png": "PNG"}
# What differs from run to run, and what takes its place on both sides.
CHANGING = (
    (r"\b[0-9a-f]{32}\b", "OBJECT-ID"),
    (r"^[0-9a-f]{12}\b", "OBJECT"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", "TIME"),
    (r"\b\d+(\.\d+)? (B|KiB|MiB)\b", "SIZE"),
    (r"\(pid \d+\)", "(pid PID)"),
    (r"^(inspector ).*", r"\1CONFINEMENT"),
    (r"^(in clear for) median \S+, 95 % below \S+, longest \S+$", r"\1 DWELL"),
    (r"\((native|poll)\)$", "(MODE)"),
)


def environment(home: Path) -> dict[str, str]:
    """Give a clean environment in which the program can be called by its name."""
    tools = home / "bin"
    tools.mkdir(exist_ok=True)
    program = tools / "secimg-watch"
    call = f"{shlex.quote(sys.executable)} -c {shlex.quote(_CALL)}"
    program.write_text(f'#!/bin/sh\nexec {call} "$@"\n')
    program.chmod(0o755)
    path = f"{tools}:/usr/local/bin:/usr/bin:/bin"
    # HOME is the only place that it may find anything in; no session bus, so no keyring.
    return {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8", "TZ": "UTC"}


_CALL = (
    f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.argv[0] = 'secimg-watch'; "
    "from secimg_watch.cli import main; main()"
)


def plain(text: str, home: str = HOME) -> list[str]:
    """Give the lines of an output with single blanks, and names for what changes."""
    lines = []
    for raw in text.replace(home, HOME).splitlines():
        line = re.sub(r"\s+", " ", raw).strip()
        for pattern, name in CHANGING:
            line = re.sub(pattern, name, line)
        lines.append(line)
    return lines


class Tour:
    """The commands of the README, one after the other, in one home directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environ = environment(home)
        self.service: subprocess.Popen[bytes] | None = None

    def run(self, command: str) -> list[str]:
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            self.environ[name] = value.replace("~", str(self.home))
            return []
        if command.endswith(" &"):
            self.start(command.removesuffix(" &"))
            return []
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.home,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return plain(done.stdout, str(self.home))

    def start(self, command: str) -> None:
        with (self.home / "log").open("wb") as log:
            self.service = subprocess.Popen(
                shlex.split(f"exec {command}")[1:],
                executable=self.home / "bin" / "secimg-watch",
                cwd=self.home,
                env=self.environ,
                stdout=log,
                stderr=log,
            )

    def has_sealed(self, count: int) -> bool:
        """Whether the running service says so, and has nothing left to do."""
        try:
            now = json.loads((self.home / "album/state/status.json").read_text())
        except (OSError, ValueError):
            return False
        [folder] = now["folders"]
        busy = folder["waiting"] or folder["queued"]
        return folder["sealed"] == count and not busy and bool(now["inspector"])

    def stop(self) -> int | None:
        if self.service is None:
            return None
        self.service.send_signal(signal.SIGTERM)
        return self.service.wait(DEADLINE)


def steps(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Give each command of a session with the lines that it is said to print."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, plain(output)


def assert_same(command: str, printed: list[str], shown: list[str]) -> None:
    # Two workers seal at the same time: whichever is done first is listed first.
    if command.endswith("vault list"):
        printed, shown = sorted(printed), sorted(shown)
    assert len(printed) == len(shown), (command, printed)
    for real, line in zip(printed, shown, strict=True):
        if line.endswith(" ..."):
            assert real.startswith(line.removesuffix("...")), command
        else:
            assert real == line, command


@pytest.mark.skipif(not LINUX, reason="the service's home is Linux")
def test_the_tour_prints_what_the_readme_says(tmp_path: Path) -> None:
    home = tmp_path.resolve()
    (home / "Pictures").mkdir()
    for name, kind in PICTURES.items():
        Image.radial_gradient("L").resize((640, 480) if kind == "JPEG" else (256, 256)).save(
            home / "Pictures" / name, kind
        )
    (home / "Pictures/notes.txt").write_text("not a picture\n")
    tour = Tour(home)
    sessions = [block for block in blocks_of(README) if block.kind == "console"]
    assert len(sessions) == 6
    try:
        for session in sessions:
            for command, shown in steps(session):
                if command.endswith("secimg-watch status"):
                    wait_until(lambda: tour.has_sealed(3), "the service seals the third picture")
                assert_same(command, tour.run(command), shown)
    finally:
        code = tour.stop()
    assert code == 0, (home / "log").read_text()
    for name in ("passport.jpg", "map.png"):
        original = (home / "Pictures" / name).read_bytes()
        assert (home / "restored" / name).read_bytes() == original
        assert (home / "rescued" / name).read_bytes() == original


def test_a_difference_between_tour_and_readme_is_noticed() -> None:
    shown = plain(textwrap.dedent("a  b\nserver (pid 12)\n"))
    assert shown == ["a b", "server (pid PID)"]
    with pytest.raises(AssertionError):
        assert_same("x", ["a c", "server (pid PID)"], shown)
    with pytest.raises(AssertionError):
        assert_same("x", shown[:1], shown)
    assert_same("secimg-watch vault list", shown[::-1], shown)
