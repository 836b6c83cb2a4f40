"""``autotag compare``: asks another model about images that have tags."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from autotag.cli.console import cell, count, fail, say, say_json
from autotag.cli.database import check_workspace, run_as_operator
from autotag.cli.errors import FAILED, INTERRUPTED, WRONG_USAGE
from autotag.cli.options import (
    EXIT_CODES,
    OPERATOR_URL,
    PROVIDER_AND_STORAGE,
    JsonWithYes,
    Workspace,
    Yes,
    help_end,
    read_settings,
)
from autotag.compare.figures import lines, model_name, price, summarise
from autotag.compare.page import make_page
from autotag.config import CompareSettings, Settings
from autotag.db import Operator
from autotag.db.messages import Brief
from autotag.db.operator_messages import ComparisonPreview
from autotag.db.readers import make
from autotag.texts import printable

if TYPE_CHECKING:
    from autotag.compare.ask import Comparison

DEFAULT_PAGE = Path("comparison.html")
STOPPED = "stopped by Ctrl-C."
STOPPING = "Ctrl-C: finishing the calls in flight. Ctrl-C again stops at once."
#: Why a call waits, by ``reason`` of ``autotag.admit_comparison``. Other reasons are shown as they are.
WAITS = {
    "retry_after": "the provider asks to wait", "live": "live uploads go first",
    "provider": "the provider's limit per minute is used up", "window": "the workspace's limit per minute is used up",
}  # fmt: skip
HELP_END = help_end(
    environment=(OPERATOR_URL, *PROVIDER_AND_STORAGE),
    exit_codes=EXIT_CODES | {1: "failed or ended early; the message says why", INTERRUPTED: "stopped by Ctrl-C"},
    examples=[
        "autotag compare --workspace <id> --model gpt-6-luna --effort low",
        "autotag compare --workspace <id> --model gpt-6-luna --sample 200 --yes --json",
    ],
)

Model = Annotated[str, typer.Option("--model", metavar="NAME", help="The model to ask.")]
Effort = Annotated[
    str | None,
    typer.Option("--effort", metavar="LEVEL", help="Its reasoning effort. Default: that of its row in autotag.models."),
]
SampleSize = Annotated[
    int,
    typer.Option(
        "--sample", metavar="NUMBER", min=1, max=1000, help="Number of images, spread evenly over all that have tags."
    ),
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", dir_okay=False,
        help=f"Where to write the page. Default: {DEFAULT_PAGE}; with --json there is no page.",
    ),
]  # fmt: skip


def compare(
    workspace: Workspace,
    model: Model,
    effort: Effort = None,
    sample: SampleSize = 50,
    html: Page = None,
    yes: Yes = False,
    as_json: JsonWithYes = False,
) -> None:
    """Ask another model about images that have tags, and show the differences.

    Asks what the images would be asked: with the workspace's profile and
    vocabulary. Changes none of your tags. It respects all limits and quotas, lets live
    uploads go first, and records its usage. Writes a page with every image and
    both answers. Ctrl-C ends it early and shows the answers so far.
    """
    settings = read_settings(CompareSettings)
    page = html or (None if as_json else DEFAULT_PAGE)
    if page and not (os.access(page.parent, os.W_OK) and (not page.exists() or os.access(page, os.W_OK))):
        raise fail(f"{page} cannot be written; name another file with --html.", WRONG_USAGE)
    check_workspace(workspace, stop=True)
    preview = run_as_operator(lambda operator: operator.preview_comparison(workspace, model, effort, sample))
    if as_json and not yes:
        say_json({"predicted": preview, "started": False})
        raise fail("Nothing was asked: it costs what `predicted` says. Add --yes to start.", WRONG_USAGE)
    if not as_json:
        _announce(model, preview, ask=not yes)
    try:
        comparison = run_as_operator(
            lambda operator: _ask(operator, settings, workspace, preview, sample, page is not None, as_json)
        )
    except KeyboardInterrupt:
        raise fail("Stopped at once; the usage lacks the calls that were in flight.", INTERRUPTED) from None
    figures = summarise(comparison.outcomes, preview, comparison.question, comparison.stopped)
    if as_json:
        say_json(figures)
    else:
        Console().print(render(figures))
    if page:
        _write(page, make_page(figures, comparison.outcomes))
        say(f"{page} shows every image with both answers.", err=as_json)
    if comparison.stopped:
        asked = figures["sample"] - figures["not_asked"]
        code = INTERRUPTED if comparison.stopped == STOPPED else FAILED
        raise fail(f"Ended after {asked} of {figures['sample']} images: {comparison.stopped}", code)


def _announce(model: str, preview: ComparisonPreview, *, ask: bool) -> None:
    """Prints what a comparison will cost, and asks whether to start.

    Raises:
        typer.Abort: the answer is no.
    """
    name = model_name(model, preview["question"]["reasoning_effort"])
    cost = f"about {price(preview['cost'])}" if preview["cost"] is not None else "at an unknown cost"
    say(f"{count(preview['images'], 'image')} for {name}, {cost}.")
    if ask:
        typer.confirm("Start?", abort=True)


def _write(page: Path, text: str) -> None:
    try:
        page.write_text(text, "utf-8")
    except OSError as error:
        raise fail(f"{page} cannot be written ({error.strerror}).", FAILED) from None


async def _ask(
    operator: Operator, settings: Settings, workspace: str, preview: ComparisonPreview, sample: int, thumbnails: bool,
    quiet: bool,
) -> Comparison:  # fmt: skip
    """Asks about a sample, with a progress bar. The first Ctrl-C lets the calls in flight finish, the second does not.

    Raises:
        KeyboardInterrupt: the second Ctrl-C.
    """
    from autotag.compare.ask import open_comparison

    chosen = await operator.comparison_sample(workspace, sample)
    console = Console(stderr=True)
    bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), console=console,
                   disable=quiet or not console.is_terminal)  # fmt: skip
    loop = asyncio.get_running_loop()
    on_progress = _progress_shower(bar, len(chosen))
    brief = make(Brief, preview["brief"]) if preview["brief"] else None
    async with open_comparison(
        operator, settings, workspace, preview["question"], brief, on_progress, thumbnails=thumbnails
    ) as comparison:

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            comparison.stop(STOPPED)
            console.print(STOPPING, highlight=False)

        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            with bar:
                await comparison.run(chosen)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
    return comparison


def _progress_shower(bar: Progress, total: int) -> Callable[[int, str | None], None]:
    """Returns the function that shows the progress of a comparison: in the bar or, without a bar, each new wait as a
    line."""
    task = bar.add_task("asking", total=total)
    last: str | None = None

    def show_progress(done: int, waits_for: str | None) -> None:
        nonlocal last
        reason = printable(WAITS.get(waits_for, waits_for)) if waits_for else None
        bar.update(task, completed=done, description=f"waiting: {reason}" if reason else "asking")
        if reason and reason != last and bar.disable:
            say(f"waiting: {reason}", err=True)
        last = reason or last

    return show_progress


# -- the figures as tables


def render(figures: dict[str, Any]) -> RenderableType:
    """The figures (as `autotag.compare.figures.summarise` returns them) for a terminal."""
    new = model_name(figures["model"], figures["reasoning_effort"])
    current = model_name(figures["current_model"], figures["current_reasoning_effort"])
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for column in ("", new, current):
        table.add_column(cell(column))
    for line in lines(figures):
        table.add_row(*map(cell, line))
    parts: list[RenderableType] = [table]
    for failure in figures["failures"]:
        parts.append(cell(f"{failure['images']} × {failure['code']}: {failure['message']}", "yellow"))
    if figures["added"] or figures["missing"]:
        parts += [Text(), _table_of_tags(figures["added"], figures["missing"])]
    if figures["shutdown_date"]:
        parts += [Text(), cell(f"{figures['model']} shuts down on {figures['shutdown_date']}.", "yellow")]
    return Group(*parts)


def _table_of_tags(added: Sequence[Mapping[str, Any]], missing: Sequence[Mapping[str, Any]]) -> Table:
    """The tags that only one side has, side by side."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for heading in ("only the new answers have", "only the stored tags have"):
        table.add_column(heading)
        table.add_column("images", justify="right")
    for number in range(max(len(added), len(missing))):
        row: list[Text] = []
        for tags in (added, missing):
            entry = tags[number] if number < len(tags) else {"tag": "", "images": ""}
            row += [cell(entry["tag"]), cell(entry["images"])]
        table.add_row(*row)
    return table
