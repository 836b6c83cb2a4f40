"""``autotag doctor``: checks an installation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autotag.cli.console import cell, say_json
from autotag.cli.options import PROVIDER_AND_STORAGE, WORKER_URL, Json, help_end, read_settings
from autotag.config import DoctorSettings
from autotag.doctor.findings import Finding, worst_level
from autotag.observability.logs import configure_logs

EXIT_CODES = {"ok": 0, "skipped": 0, "warning": 1, "error": 2}  # by the worst finding
HELP_END = help_end(
    environment=(WORKER_URL, *PROVIDER_AND_STORAGE),
    exit_codes={0: "every check is ok", 1: "warnings", 2: "errors, or a wrong option or setting"},
    examples=["autotag doctor", "autotag doctor --json | jq '.findings[] | select(.level != \"ok\")'"],
)
MAX_FINDING = 1000  # characters of a message and of a fix
STYLES = {"ok": "green", "skipped": "cyan", "warning": "yellow", "error": "red"}


TryWrite = Annotated[
    bool, typer.Option("--try-write", help="Write tags to one row and take it back, also if your triggers run then.")
]


def doctor(try_write: TryWrite = False, as_json: Json = False) -> None:
    """Check the whole installation, and print a fix for everything that is wrong.

    Run it where the worker runs, with the worker's environment: it tries the
    database, Realtime, Storage and the AI provider from there. It costs nothing.
    It writes tags to one row in a transaction that is rolled back, unless
    triggers of yours would run: what they do outside the database would stay.
    """
    from autotag.doctor.examine import examine

    settings = read_settings(DoctorSettings)
    configure_logs("error", "console")
    findings = asyncio.run(examine(settings, try_write=try_write))
    worst = worst_level(findings)
    if as_json:
        say_json({"worst": worst, "findings": [finding.__dict__ for finding in findings]})
    else:
        Console().print(table_of(findings))
    raise typer.Exit(EXIT_CODES[worst])


def table_of(findings: Sequence[Finding]) -> Table:
    """A row for each finding, with its fix below its message."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("check", "", "finding"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        text = cell(finding.message, length=MAX_FINDING)
        if finding.fix:
            text = Text.assemble(text, "\n", cell(f"→ {finding.fix}", "bold", MAX_FINDING))
        table.add_row(cell(finding.check), Text(finding.level, STYLES[finding.level]), text)
    return table
