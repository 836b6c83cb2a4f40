"""The command ``autotag compare``."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from autotag.cli.console import Json, fail, read_settings, say, say_json
from autotag.cli.operate import Workspace, Yes, operate
from autotag.compare.ask import Comparison, Sample
from autotag.compare.figures import model_name, price, render, summarise
from autotag.compare.page import make_page
from autotag.config import Settings
from autotag.db import Operator
from autotag.db.operator_messages import ComparisonPreview
from autotag.images.load import Images
from autotag.openai.provider import Provider
from autotag.texts import printable

PAGE = Path("comparison.html")
STOPPED = "stopped by Ctrl-C."
INTERRUPTED = 130  # exit code: what shells expect after Ctrl-C
#: What a call waits for, by ``reason`` of ``autotag.admit_comparison``; other words are shown as they are.
WAITS = {
    "retry_after": "the provider asks to wait", "live": "live uploads go first",
    "provider": "the provider's limit a minute is used up", "window": "the workspace's limit a minute is used up",
}  # fmt: skip

Model = Annotated[str, typer.Option("--model", help="The model to ask.")]
Effort = Annotated[str | None, typer.Option("--effort", help="Its reasoning effort [default: of its row in models].")]
Sampled = Annotated[
    int, typer.Option("--sample", min=1, max=1000, help="So many images, spread over all that have tags.")
]
Page = Annotated[
    Path | None, typer.Option("--html", dir_okay=False, help=f"The page to write [default: {PAGE}; with --json: none].")
]


def compare(
    model: Model, workspace: Workspace, effort: Effort = None, sample: Sampled = 50, html: Page = None,
    yes: Yes = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Ask another model about images that have tags, and show what a move to it would bring.

    Nothing of yours changes: no tags, no stages, no upload. It asks within all limits and quotas and behind live
    uploads, and what it used is recorded. Reads the same environment as the worker. Ctrl-C ends it with what there is.
    """
    settings = read_settings(Settings, {})
    page = html or (None if as_json else PAGE)
    if page and not (os.access(page.parent, os.W_OK) and (not page.exists() or os.access(page, os.W_OK))):
        raise fail(f"{page} cannot be written; name another file with --html.", 2)
    preview = operate(lambda operator: operator.preview_comparison(workspace, model, effort, sample))
    if not as_json:
        question = preview["question"]
        cost = f"about {price(preview['cost'])}" if preview["cost"] is not None else "at an unknown cost"
        say(f"{preview['images']:,} images for {model_name(model, question['reasoning_effort'])}, {cost}.")
        if not yes:
            typer.confirm("Ask?", abort=True)
    try:
        run = operate(lambda operator: _run(operator, settings, workspace, preview, sample, page is not None, as_json))
    except KeyboardInterrupt:
        raise fail("stopped at once; calls that were in flight are not in the usage.", INTERRUPTED) from None
    figures = summarise(run.outcomes, preview, run.question, run.stopped)
    if as_json:
        say_json(figures)
    else:
        Console().print(render(figures))
    if page:
        _write(page, make_page(figures, run.outcomes))
        say(f"{page} shows every picture with both answers.", err=as_json)
    if run.stopped:
        asked = figures["sample"] - figures["not_asked"]
        code = INTERRUPTED if run.stopped == STOPPED else 1
        raise fail(f"ended after {asked} of {figures['sample']} images: {run.stopped}", code)


def _write(page: Path, text: str) -> None:
    try:
        page.write_text(text)
    except OSError as error:
        raise fail(f"{page} cannot be written: {error.strerror}.") from None


async def _run(
    operator: Operator, settings: Settings, workspace: str, preview: ComparisonPreview, sample: int, thumbnails: bool,
    quiet: bool,
) -> Comparison:  # fmt: skip
    """Asks; the first Ctrl-C lets what is in flight finish, the second does not."""
    chosen = [Sample(**one) for one in await operator.comparison_sample(workspace, sample)]
    console = Console(stderr=True)
    bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), console=console,
                   disable=quiet or not console.is_terminal)  # fmt: skip
    shown = bar.add_task("asking", total=len(chosen))
    last: str | None = None

    def told(done: int, waits: str | None) -> None:
        nonlocal last
        waits = printable(WAITS.get(waits, waits)) if waits else None
        bar.update(shown, completed=done, description=f"waiting: {waits}" if waits else "asking")
        if waits and waits != last and bar.disable:  # nobody sees the bar
            say(f"waiting: {waits}", err=True)
        last = waits or last

    key, images = settings.openai_api_key.get_secret_value(), _images(settings)
    loop = asyncio.get_running_loop()
    async with Provider(key, settings.openai_base_url, settings.call_timeout) as provider, images:
        comparison = Comparison(operator, provider, images, workspace, preview["question"], told, thumbnails=thumbnails)

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            comparison.stop(STOPPED)

        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            with bar:
                await comparison.run(chosen)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
    return comparison


def _images(settings: Settings) -> Images:
    return Images(
        supabase_url=settings.supabase_url, supabase_key=settings.secret_key(), hosts=settings.image_hosts,
        max_bytes=settings.image_max_bytes, max_pixels=settings.image_max_pixels,
    )  # fmt: skip
