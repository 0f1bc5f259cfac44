"""The command line. Only here does the program exit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from secimg_watch import __version__
from secimg_watch.cli import (
    auditing,
    crashtest,
    keys,
    oneoff,
    rekeying,
    running,
    setup,
    terminal,
    vaults,
)
from secimg_watch.cli.app import PATH, App
from secimg_watch.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="secimg-watch")
@click.option(
    "--policy",
    "policy_path",
    type=PATH,
    help="Policy file. Default: $SECIMG_WATCH_POLICY, then the user's, then /etc/secimg-watch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("-v", "--verbose", count=True, help="Say more; -vv shows where errors come from.")
@click.pass_context
def cli(context: click.Context, policy_path: Path | None, verbose: int, *, as_json: bool) -> None:
    """Seal every picture that arrives in a folder into an encrypted vault.

    Exit codes: 0 ok, 1 some items failed, 64 usage, 65 bad or tampered data, 66 no input,
    73 cannot create, 74 input/output, 75 try again, 77 permission, 78 configuration or key.
    """
    context.obj = App(policy_path, as_json, verbose)


for command in (
    setup.quickstart,
    setup.init,
    setup.check,
    running.run,
    running.drain,
    running.status,
    running.why,
    running.jobs,
    vaults.vault,
    keys.key,
    auditing.audit,
    crashtest.crash_test,
    oneoff.encrypt,
    oneoff.decrypt,
):
    cli.add_command(command)

for command in (rekeying.vault_rekey, rekeying.vault_reencrypt):
    vaults.vault.add_command(command)

_ABORTED = 130  # as a shell reports a program that SIGINT ended


def main() -> None:
    """Run the command line. click's own words and exit code for wrong usage become ours."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(UsageError.exit_code) from None
    except click.ClickException as error:
        sentence = error.format_message().removesuffix(".")
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "secimg-watch"
        wrong = UsageError(sentence[:1].lower() + sentence[1:], hint=f"{command} --help")
        terminal.complain(wrong)
        raise SystemExit(wrong.exit_code) from None
    except click.Abort:
        raise SystemExit(_ABORTED) from None
