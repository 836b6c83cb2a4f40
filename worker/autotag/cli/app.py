"""The command ``autotag``: its subcommands, each from a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

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
from autotag.cli.console import tame_libraries

app = typer.Typer(
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
