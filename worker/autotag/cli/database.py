"""The connection of the commands that look at an installed schema."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from autotag.cli.errors import explain_errors
from autotag.cli.options import read_settings
from autotag.config import DoctorSettings
from autotag.db import Operator

T = TypeVar("T")


def run_as_operator(work: Callable[[Operator], Awaitable[T]]) -> T:
    """Runs ``work`` on one connection to ``DATABASE_URL``.

    Raises:
        typer.Exit: the database cannot be used, or refuses. The message has been printed.
    """
    settings = read_settings(DoctorSettings)

    async def run() -> T:
        async with await Operator.connect(str(settings.database_url)) as operator:
            return await work(operator)

    with explain_errors("autotag_operator"):
        return asyncio.run(run())
