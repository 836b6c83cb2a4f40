"""The connection of the commands that look at an installed schema."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from autotag.cli.console import fail, say
from autotag.cli.errors import FAILED, explain_errors
from autotag.cli.options import read_settings
from autotag.config import DoctorSettings, OperatorSettings
from autotag.db import Operator

T = TypeVar("T")


def run_as_operator(work: Callable[[Operator], Awaitable[T]], kind: type[DoctorSettings] = OperatorSettings) -> T:
    """Runs ``work`` on one connection to ``DATABASE_URL``.

    Args:
        work: gets the connection.
        kind: its role is named in messages about ``DATABASE_URL`` and about missing rights.

    Raises:
        typer.Exit: the database cannot be used, or refuses. The message has been printed.
    """
    settings = read_settings(kind)

    async def run() -> T:
        async with await Operator.connect(str(settings.database_url)) as operator:
            return await work(operator)

    with explain_errors(kind.role):
        return asyncio.run(run())


def check_workspace(workspace: str | None, *, stop: bool) -> None:
    """Prints a message if nothing in the database belongs to a workspace, because its id may be mistyped.

    Args:
        workspace: its id; None: all workspaces, which are always known.
        stop: end the command. Otherwise only warn, because a new workspace may get settings before its first image.

    Raises:
        typer.Exit: the workspace is unknown, or the database cannot be used. The message has been printed.
    """
    if workspace is None or run_as_operator(lambda operator: operator.knows_workspace(workspace)):
        return
    message = f"Unknown workspace {workspace}: no image, upload or setting belongs to it"
    if stop:
        raise fail(f"{message}; check --workspace.", FAILED)
    say(f"{message} yet; check --workspace.", err=True)
