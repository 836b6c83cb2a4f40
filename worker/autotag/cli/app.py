"""The command ``autotag``: its subcommands, each from a module of its own.

The clients of OpenAI, Realtime and HTTP take longer to import than everything else. So a command imports them when
it runs, and the others start without them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import autotag
from autotag.cli import (
    compare,
    doctor,
    enqueue,
    init,
    migrate,
    profile,
    status,
    uninstall,
    usage,
    vocabulary,
    watch,
    worker,
)  # fmt: skip
from autotag.cli.console import note_json, output, tame_libraries, wrong_usage_as_json


class Commands(TyperGroup):
    """The group of all commands. It explains output that cannot be written and, with ``--json``, wrong options."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> Any:
        """Runs a command."""
        # The parser can fail before the callback of `--json` runs. The callback corrects this if `--json` was a value.
        note_json("--json" in (sys.argv[1:] if args is None else args))
        with output():
            return super().main(args, *more, **named)

    def make_context(self, *args: Any, **named: Any) -> Any:
        """Parses the options before the command's name."""
        with wrong_usage_as_json():
            return super().make_context(*args, **named)

    def invoke(self, ctx: Any) -> Any:
        """Parses a command's options, and runs it."""
        with wrong_usage_as_json():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    epilog="Start with: autotag init. Read more with: autotag COMMAND --help.",
)
#: Heading in the list of commands -> the commands, each with the end of its help page.
COMMANDS: dict[str, list[tuple[Callable[..., None], str]]] = {
    "Install": [
        (init.init, init.HELP_END), (migrate.migrate, migrate.HELP_END), (doctor.doctor, doctor.HELP_END),
        (uninstall.uninstall, uninstall.HELP_END),
    ],
    "Run": [(worker.worker, worker.HELP_END)],
    "Operate": [
        (status.status, status.HELP_END), (enqueue.enqueue, enqueue.HELP_END), (usage.usage, usage.HELP_END),
        (watch.watch, watch.HELP_END), (compare.compare, compare.HELP_END), (profile.profile, profile.HELP_END),
        (vocabulary.vocabulary, vocabulary.HELP_END),
    ],
}  # fmt: skip
for heading, commands in COMMANDS.items():
    for command, help_end in commands:
        app.command(command.__name__.removesuffix("_command"), rich_help_panel=heading, epilog=help_end)(command)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Tag every image of a Supabase project with a vision model."""
    tame_libraries()
    if version:
        typer.echo(autotag.__version__)
        raise typer.Exit


if __name__ == "__main__":
    app()
