"""``autotag status``: shows the whole system."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext, suppress
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from autotag.cli.console import say_json
from autotag.cli.database import run_as_operator
from autotag.cli.options import WORKER_URL, Json, help_end
from autotag.cli.screen import render
from autotag.config import DoctorSettings
from autotag.db import Operator

REFRESH = 2.0  # seconds between two refreshes of --watch
HELP_END = help_end(
    environment=[WORKER_URL],
    examples=["autotag status --watch", "autotag status --json | jq .queue"],
)
Watch = Annotated[bool, typer.Option("--watch", "-w", help=f"Refresh every {REFRESH:g} seconds until Ctrl-C.")]


def status(watch: Watch = False, as_json: Json = False) -> None:
    """Show uploads, batches, limits, workers, errors and today's cost.

    For each upload and batch it shows the time left, and for each limit how much
    is used. With --json it prints one object; with --json --watch one object per
    line.
    """
    if watch:
        with suppress(KeyboardInterrupt):
            run_as_operator(lambda operator: _show_forever(operator, as_json), DoctorSettings)
        return
    current = run_as_operator(lambda operator: operator.status(), DoctorSettings)
    if as_json:
        say_json(current)
    else:
        Console().print(render(current))


async def _show_forever(operator: Operator, as_json: bool) -> None:
    console = Console()
    on_screen = console.is_terminal and not as_json
    with Live(console=console, screen=True, auto_refresh=False) if on_screen else nullcontext() as live:
        while True:
            current = await operator.status()
            if as_json:
                say_json(current)
            elif live:
                live.update(render(current), refresh=True)
            else:
                console.print(render(current))
            await asyncio.sleep(REFRESH)
