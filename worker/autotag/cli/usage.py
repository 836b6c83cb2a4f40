"""``autotag usage``: shows the usage of a workspace by user, day and model."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from autotag.cli.console import cell, fail, say, say_json
from autotag.cli.database import check_workspace, run_as_operator
from autotag.cli.errors import WRONG_USAGE
from autotag.cli.options import OPERATOR_URL, Json, Workspace, help_end
from autotag.db.operator_messages import UsageRow
from autotag.money import dollars, plain, round_dollars
from autotag.texts import spreadsheet_cell

#: The columns, and their headings in the table.
COLUMNS = {
    "user_id": "user", "day": "day", "model": "model", "service_tier": "tier", "images": "images",
    "requests": "answers", "input_tokens": "input", "cached_tokens": "cached", "cache_write_tokens": "written",
    "output_tokens": "output", "reasoning_tokens": "reasoning", "cost": "cost",
}  # fmt: skip
TEXTS = ("user_id", "day", "model", "service_tier")
#: The columns that are left out on a narrow terminal, least important first.
LEAST_IMPORTANT = (
    "cache_write_tokens", "cached_tokens", "reasoning_tokens", "requests", "service_tier", "output_tokens",
    "input_tokens", "model",
)  # fmt: skip
PIPED_WIDTH = 180  # columns of a table that goes to a file or a pipe
FIRST_DAY, LAST_DAY = datetime(1970, 1, 1), datetime(9999, 12, 31)
HELP_END = help_end(
    environment=[OPERATOR_URL],
    examples=["autotag usage --workspace <id> --since 2026-12-01", "autotag usage --workspace <id> --csv > usage.csv"],
)

Since = Annotated[
    datetime,
    typer.Option(formats=["%Y-%m-%d"], metavar="DAY", show_default=False, help="First day (UTC), as 2026-12-01."),
]
Until = Annotated[
    datetime,
    typer.Option(formats=["%Y-%m-%d"], metavar="DAY", show_default=False, help="Last day (UTC), as 2026-12-31."),
]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV with a header instead of a table.")]


def usage(
    workspace: Workspace,
    since: Since = FIRST_DAY,
    until: Until = LAST_DAY,
    as_csv: Csv = False,
    as_json: Json = False,
) -> None:
    """Show images, answers, tokens and dollars by user, day, model and tier.

    The cost is unknown while the model has no price in autotag.models: then the
    cell is empty in CSV, and null in JSON.
    """
    if as_csv and as_json:
        raise fail("--csv and --json exclude each other; name one.", WRONG_USAGE)
    if since > until:
        raise fail("--since is after --until, so there are no days between them; swap them.", WRONG_USAGE)
    rows = run_as_operator(lambda operator: operator.usage(workspace, since.date(), until.date()))
    if not rows:
        check_workspace(workspace, stop=False)
    if as_json:
        say_json([_json_row(row) for row in rows])
    elif as_csv:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(COLUMNS))
        writer.writeheader()
        writer.writerows(csv_row(row) for row in rows)
        typer.echo(table.getvalue().encode(), nl=False)  # UTF-8, whatever the terminal's encoding is
    elif not rows:
        say("This workspace has no usage on these days.")
    else:
        _print_table(rows)


def csv_row(row: UsageRow) -> dict[str, object]:
    """A row for CSV. Spreadsheets do not run its texts as formulas, and an unknown cost is an empty cell."""
    texts = {name: spreadsheet_cell(value) for name, value in row.items() if name in TEXTS and value is not None}
    return {**row, **texts, "cost": None if row["cost"] is None else plain(row["cost"])}


def _json_row(row: UsageRow) -> dict[str, object]:
    """A row for JSON: its cost has at most eight decimals, or is None."""
    return {**row, "cost": None if row["cost"] is None else float(round_dollars(row["cost"]))}


def _print_table(rows: Sequence[UsageRow]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column, heading in COLUMNS.items():
        table.add_column(heading, justify="left" if column in TEXTS else "right", no_wrap=column != "model")
    for row in rows:
        table.add_row(*(cell(text) for text in _table_row(row)))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPED_WIDTH)
    left_out = _fit(table, console)
    console.print(table)
    if left_out:
        console.print(cell(f"For want of room without: {', '.join(left_out)}. --csv and --json have all."))
    unpriced = sorted({row["model"] for row in rows if row["cost"] is None})
    if unpriced:
        console.print(cell(
            f"Unknown: autotag.models has no price for {', '.join(unpriced)}, or the provider reported no tokens."
        ))  # fmt: skip


def _fit(table: Table, console: Console) -> list[str]:
    """Removes the least important columns until the table fits the terminal; returns their headings."""
    left_out = []
    for name in LEAST_IMPORTANT:
        if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
            break
        heading = COLUMNS[name]
        table.columns = [column for column in table.columns if column.header != heading]
        left_out.append(heading)
    return left_out


def _table_row(row: UsageRow) -> list[str]:
    """The texts of a row, in the order of `COLUMNS`."""
    texts = {name: "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
             for name, value in row.items()}  # fmt: skip
    texts["cost"] = "unknown" if row["cost"] is None else dollars(row["cost"])
    return [texts[column] for column in COLUMNS]
