"""The operator's commands: ``status``, ``enqueue``, ``usage``, ``watch``."""

from __future__ import annotations

import asyncio
import csv
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, TypeVar

import psycopg
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from autotag.cli.backfill import Backfill, backfill
from autotag.cli.console import Json, cell, fail, read_settings, say, say_json
from autotag.cli.follow import CannotFollow, follow
from autotag.cli.money import dollars, plain, round_dollars
from autotag.cli.screen import duration, render
from autotag.config import DoctorSettings
from autotag.db import Operator, Refused
from autotag.texts import printable, spreadsheet_cell

T = TypeVar("T")

app = typer.Typer()

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it until Ctrl-C.")]
Workspace = Annotated[str, typer.Option("--workspace", help="The workspace's id.")]
REFRESH = 2.0  # seconds between looks of --watch
#: Columns of ``autotag usage`` and their headings in its table.
USAGE = {
    "user_id": "user", "day": "day", "model": "model", "service_tier": "tier", "images": "images",
    "requests": "answers", "input_tokens": "input", "cached_tokens": "cached", "cache_write_tokens": "written",
    "output_tokens": "output", "reasoning_tokens": "reasoning", "cost": "cost",
}  # fmt: skip
TEXTS = ("user_id", "day", "model", "service_tier")
VALUES_SHOWN, VALUE_SHOWN = 20, 100  # values of a broadcast, and characters of each, that ``watch`` shows
PRINTED_WIDTH = 180  # columns of a table that goes to a file or a pipe


def operate(work: Callable[[Operator], Awaitable[T]]) -> T:
    """Runs an operator's command on one connection; what can be wrong with that is one sentence.

    Raises:
        typer.Exit: it has been said.
    """
    settings = read_settings(DoctorSettings, {})

    async def run() -> T:
        async with await Operator.connect(str(settings.database_url)) as operator:
            return await work(operator)

    try:
        return asyncio.run(run())
    except psycopg.OperationalError:
        raise fail("the database did not answer; check DATABASE_URL, its password, and the network.") from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise fail(f"{error.diag.message_primary}; grant the login role autotag_operator.") from None
    except (psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName):
        raise fail("this database has no autotag of this version; apply its migrations (autotag migrate).") from None
    except psycopg.errors.InvalidTextRepresentation as error:
        raise fail(f"{error.diag.message_primary}.", 2) from None
    except Refused as refused:
        raise fail(f"{refused} {refused.hint or ''}".strip()) from None


@app.command()
def status(watch: Watch = False, as_json: Json = False) -> None:
    """Show uploads, batches with their time left, limits and how full they are, workers, errors and cost today.

    Reads DATABASE_URL. With --watch it goes on every two seconds; with --json it prints one object (with both, one
    a line).
    """

    async def once(operator: Operator) -> dict[str, Any]:
        return await operator.status()

    async def forever(operator: Operator) -> None:
        with Live(console=Console(), screen=not as_json, auto_refresh=False) as live:
            while True:
                seen = await operator.status()
                if as_json:
                    say_json(seen)
                else:
                    live.update(render(seen), refresh=True)
                await asyncio.sleep(REFRESH)

    if watch:
        with suppress(KeyboardInterrupt):
            operate(forever)
        return
    seen = operate(once)
    if as_json:
        say_json(seen)
    else:
        Console().print(render(seen))


@app.command()
def enqueue(
    workspace: Workspace,
    untagged: Annotated[bool, typer.Option(help="Leave out images that have tags.")] = True,
    limit: Annotated[int, typer.Option(min=1, max=10_000_000, help="At most so many images.")] = 10_000_000,
    after: Annotated[str | None, typer.Option(help="Go on after this image: an earlier run names it.")] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Tag images that are there already; says what it will cost and how long it takes before it starts.

    Run it again at any time: what is being tagged is left out, and with --untagged what has tags too.
    """
    preview = operate(lambda operator: operator.preview_backfill(workspace, untagged, after, limit))
    if not as_json:
        say(f"{preview['images']:,} images, {_about(preview)}, about {duration(preview['seconds'])}.")
    if preview["images"] and not yes and not as_json:
        typer.confirm("Start?", abort=True)
    bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                   TimeRemainingColumn(), console=Console(stderr=True), disable=as_json)  # fmt: skip
    with bar:
        task = bar.add_task("enqueued", total=preview["images"])

        def told(done: Backfill, waiting: str | None) -> None:
            state = f"waiting: {printable(waiting)}" if waiting else "enqueued"
            bar.update(task, completed=done.images, description=state)

        done = operate(
            lambda operator: backfill(operator, workspace, untagged=untagged, after=after, limit=limit, told=told)
        )
    if as_json:
        say_json({"images": done.images, "jobs": done.jobs, "last": done.last, "predicted": preview})
    else:
        say(f"{done.images:,} images in {done.jobs} uploads. `autotag status --watch` shows them.")


def _about(preview: dict[str, Any]) -> str:
    """What a preview says of the cost."""
    if preview["cost"] is None:
        return f"cost unknown (autotag.models has no price for {preview['model']})"
    return f"about {dollars(preview['cost'])}"


@app.command()
def usage(
    workspace: Workspace,
    since: Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="First day (UTC).")] = datetime(1970, 1, 1),
    until: Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="Last day (UTC).")] = datetime(9999, 12, 31),
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header.")] = False,
    as_json: Json = False,
) -> None:
    """Show who used how much of a workspace: images, answers, tokens and dollars, by user, day, model and service tier.

    A cost is unknown when the model has no price in autotag.models: an empty cell in CSV, null in JSON.
    """
    rows = operate(lambda operator: operator.usage(workspace, since.date(), until.date()))
    if as_json:
        say_json([_rounded(row) for row in rows])
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, list(USAGE))
        writer.writeheader()
        writer.writerows(csv_row(row) for row in rows)
    else:
        _print_usage(rows)


def csv_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of usage as CSV has it: texts that no spreadsheet takes for formulas; an unknown cost is an empty cell."""
    texts = {name: spreadsheet_cell(row[name]) for name in TEXTS if row.get(name) is not None}
    return {**row, **texts, "cost": None if row["cost"] is None else plain(row["cost"])}


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose cost is a number of a sensible length, or None: unknown."""
    return {**row, "cost": None if row["cost"] is None else float(round_dollars(row["cost"]))}


def _print_usage(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column, heading in USAGE.items():
        table.add_column(heading, justify="left" if column in TEXTS else "right", no_wrap=column != "model")
    for row in rows:
        cost = "unknown" if row["cost"] is None else dollars(row["cost"])
        shown = {name: "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
                 for name, value in row.items()} | {"cost": cost}  # fmt: skip
        table.add_row(*(cell(shown[column]) for column in USAGE))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PRINTED_WIDTH)
    console.print(table)
    unknown = sorted({str(row["model"]) for row in rows if row["cost"] is None})
    if unknown:
        console.print(cell(
            f"Unknown: autotag.models has no price for {', '.join(unknown)}, or the provider named no tokens."
        ))  # fmt: skip


def describe_payload(payload: dict[str, Any]) -> str:
    """What a broadcast carries; anybody with the publishable key may have sent it."""
    return " ".join(
        f"{printable(name, VALUE_SHOWN)}={printable(value, VALUE_SHOWN)}"
        for name, value in list(payload.items())[:VALUES_SHOWN] if value is not None
    )  # fmt: skip


@app.command()
def watch(
    workspace: Annotated[str | None, typer.Option("--workspace", help="Follow its private topic as well.")] = None,
    as_json: Json = False,
) -> None:
    """Follow the Realtime topics that browsers follow; one line a message, until Ctrl-C.

    Reads SUPABASE_URL and SUPABASE_SECRET_KEY.
    """
    settings = read_settings(DoctorSettings, {})
    key = settings.secret_key()
    if not settings.supabase_url or not key:
        raise fail("SUPABASE_URL and SUPABASE_SECRET_KEY are not both set.", 2)

    def told(topic: str, event: str, payload: dict[str, Any]) -> None:
        if as_json:
            say_json({"topic": topic, "event": event, "payload": payload})
        else:
            say(f"{datetime.now():%H:%M:%S}  {topic:<45}  {event:<14}  {describe_payload(payload)}")
        sys.stdout.flush()

    try:
        asyncio.run(follow(settings.supabase_url, key, workspace, told))
    except KeyboardInterrupt:
        return
    except CannotFollow as error:
        raise fail(str(error)) from None
