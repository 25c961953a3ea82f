"""The command line: ``p2pfl VERB``.

Errors are one readable line. Exit code 2 is the user's mistake, 1 a run that failed.
"""

from __future__ import annotations

import sys
from typing import TextIO, cast

import typer
from rich.console import Console

from p2pfl.cli import churn, keys, topology
from p2pfl.cli.fleet import down, logs, status, up
from p2pfl.cli.lists import algorithms, experiments, topologies
from p2pfl.cli.output import Output
from p2pfl.cli.peer import peer
from p2pfl.cli.predict import predict
from p2pfl.cli.report import report
from p2pfl.cli.run import run
from p2pfl.cli.show import partition_show, version
from p2pfl.cli.sweep import sweep
from p2pfl.cli.terminal import dealt_with, end_at_once, perhaps_closed, tidy_up_first
from p2pfl.errors import P2pflError, RunError, UserError, short_of_memory

app = typer.Typer(
    help="Decentralised learning: peers train on their own data and average, with no server.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(run)
app.command()(sweep)
app.command()(peer)
for verb in (up, status, logs, down):
    app.command()(verb)
app.command()(report)
app.command()(predict)
for listing in (experiments, topologies, algorithms):
    app.command()(listing)

surveying = typer.Typer(help="Look at topologies.", no_args_is_help=True, rich_markup_mode=None)
surveying.command("show")(topology.show)
surveying.command("compare")(topology.compare)
app.add_typer(surveying, name="topology")

partition = typer.Typer(help="Look at partitions.", no_args_is_help=True, rich_markup_mode=None)
partition.command("show")(partition_show)
app.add_typer(partition, name="partition")

churning = typer.Typer(help="Look at churn scripts.", no_args_is_help=True, rich_markup_mode=None)
churning.command("show")(churn.show)
app.add_typer(churning, name="churn")

keyring = typer.Typer(
    help="Keys, and whose are allowed.", no_args_is_help=True, rich_markup_mode=None
)
for key_verb in (keys.new, keys.show, keys.allow, keys.revoke):
    keyring.command()(key_verb)
app.add_typer(keyring, name="keys")

app.callback(invoke_without_command=True, no_args_is_help=True)(version)


def main() -> None:
    """Run the command line, and turn errors into one line and an exit code."""
    end_at_once()
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, Output(sys.stdout))
    try:
        with short_of_memory():
            app()
    except UserError as error:
        _fail(error, 2)
    except P2pflError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail(RunError("interrupted"), 130)
    finally:
        dealt_with()
        tidy_up_first()


def _fail(error: Exception, code: int) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    with perhaps_closed():
        console.print(f"p2pfl: {error}", markup=False)
    sys.exit(code)
