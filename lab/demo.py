"""The demo: four uploads through all four strategies, watched live, verified image by image."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from realtime import AsyncRealtimeClient
from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from autotag.http.serve import serve as serve_app
from lab import ending
from lab.openai_sim.app import Plan
from lab.page import address, make_page
from lab.pictures import Drawing, draw
from lab.postgres import free_port, install_autotag, local_postgres
from lab.project import ProjectError, project_variables
from lab.stack import HOST, Stack, local_stack, supabase_stack, worker_process
from lab.uploads import Upload, enqueue, files_of, upload, verify

UPLOADS = (3, 30, 120, 300)  # one for each strategy
STAGES = ("queued", "preparing", "submitted", "processing", "completing", "completed", "failed")
LOOK_EVERY = 0.25  # seconds between looks at the jobs
EVENTS_WAIT = 5.0  # seconds that the last broadcast may take after the last job
PICTURE_WIDTH = 100  # columns
GIVE_UP = 24 * 3600.0  # seconds; with --openai a batch may take its day


async def watch(uploads: list[Upload], workers: list[Process], live: Live | None) -> RenderableType:
    """Looks at the jobs until all are finished; the table as it was when most was going on."""
    liveliest, most = table(uploads), 0
    deadline = time.monotonic() + GIVE_UP
    while not all(one.seconds is not None for one in uploads):
        if time.monotonic() > deadline:
            raise TimeoutError("The uploads did not finish within a day.")
        if all(worker.returncode is not None for worker in workers):
            raise RuntimeError("Every worker has ended; what it said is above.")
        for one in uploads:
            if one.seconds is None:
                answer = await one.client.rpc("tagging_job", {"job_id": one.job_id}).execute()
                one.observe(answer.data)  # type: ignore[arg-type]
        shown = table(uploads)
        going_on = sum(bool(count) for one in uploads for count in one.state["stages"].values())
        if going_on > most:
            liveliest, most = shown, going_on
        if live:
            live.update(shown, refresh=True)
        await asyncio.sleep(LOOK_EVERY)
    return liveliest


def table(uploads: list[Upload]) -> RenderableType:
    """The uploads as a live table."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, justify in (("images", "right"), ("strategy", "left"), ("progress", "left"), ("", "right")):
        shown.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    shown.add_column("stages", min_width=12)
    shown.add_column("time left", justify="right", no_wrap=True)
    colours = {"completed": "green", "failed": "red", "processing": "cyan", "completing": "cyan"}
    for one in uploads:
        counts = one.state.get("stages", {})
        stages = "  ".join(
            f"[{colours.get(stage, 'default')}]{counts[stage]}\N{NO-BREAK SPACE}{stage}[/]"
            for stage in STAGES
            if counts.get(stage)
        )
        progress = int(one.state.get("progress", 0))
        left = time_left(one.state.get("eta")) if one.seconds is None else f"done in {one.seconds:.1f} s"
        bar = ProgressBar(100, progress, width=10)
        shown.add_row(str(len(one.assets)), one.strategy, bar, f"{progress}%", stages, left)
    return shown


def time_left(eta: str | None) -> str:
    """An ETA as people say it."""
    if not eta:
        return ""
    seconds = (datetime.fromisoformat(eta) - datetime.now(UTC)).total_seconds()
    if seconds <= 0:
        return "any moment"
    return f"~{seconds:.0f} s" if seconds < 90 else f"~{seconds / 60:.0f} min"


@contextlib.asynccontextmanager
async def batch_updates(stack: Stack) -> AsyncIterator[list[str]]:
    """The OpenAI batch ids that an anonymous Realtime client hears of on ``batch-updates``."""
    heard: list[str] = []
    client = AsyncRealtimeClient(f"{stack.supabase_url}/realtime/v1", stack.anon_key)
    await client.connect()
    channel = client.channel("batch-updates")
    channel.on_broadcast("batch-complete", lambda message: heard.append(message["payload"]["batch_id"]))
    joined = asyncio.Event()
    await channel.subscribe(lambda state, _: joined.set() if state.value == "SUBSCRIBED" else None)
    async with asyncio.timeout(10):
        await joined.wait()
    try:
        yield heard
    finally:
        await client.close()


async def run(
    console: Console,
    *,
    folder: Path | None,
    serve: bool,
    real_openai: bool,
    project: Mapping[str, str] | None,
    workers: int,
    picture: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    """The whole demo; its summary."""
    groups = list(groups_of(console, folder))
    async with contextlib.AsyncExitStack() as cleanup:
        stack = await started(console, cleanup, project)
        environment = stack.worker_environment()
        if real_openai:
            environment |= {"OPENAI_API_KEY": os.environ["OPENAI_API_KEY"]}
            environment["OPENAI_BASE_URL"] = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
        else:
            # The simulator's batches take seconds, not hours: look at them as often.
            cleanup.enter_context(stack.configured(batch_poll_interval="1 s", batch_seconds=15))
        # Workers share our stderr: what keeps them from working has to be seen.
        environment |= {"AUTOTAG_LOG_LEVEL": "error", "AUTOTAG_LOG_FORMAT": "console"}
        processes = [await cleanup.enter_async_context(worker_process(environment)) for _ in range(workers)]
        heard = await cleanup.enter_async_context(batch_updates(stack))

        with console.status(f"Uploading {sum(map(len, groups))} images…"):
            uploads = [await upload(stack, group, i + 1) for i, group in enumerate(groups)]
        await asyncio.gather(*(enqueue(one) for one in uploads))
        live = Live(table(uploads), console=console, auto_refresh=False) if not quiet else None
        with live or contextlib.nullcontext():
            liveliest = await watch(uploads, processes, live)
        await count_events(stack, uploads, heard)
        for one in uploads:
            await verify(one, knowable=not folder and not real_openai)
        summary = {
            "uploads": [one.summary() for one in uploads],
            "http_429": sum(entry.get("status") == 429 for entry in stack.simulator.book),
        }
        report(console, uploads, summary, heard)
        if picture:
            paint(picture, liveliest, uploads, summary, heard)
        if serve:
            await keep_serving(console, stack)
    return summary


def groups_of(console: Console, folder: Path | None) -> Iterator[Sequence[Drawing]]:
    """The files of each upload."""
    if folder:
        files = files_of(folder)
        if not files:
            raise typer.BadParameter(f"{folder} holds no files.")
        yield files
        return
    with console.status("Drawing 453 pictures…"):
        drawings = iter(list(draw(sum(UPLOADS))))
    for count in UPLOADS:
        yield list(itertools.islice(drawings, count))


async def started(console: Console, cleanup: contextlib.AsyncExitStack, project: Mapping[str, str] | None) -> Stack:
    """The stack: a project's, or one of our own."""
    plan = Plan(batch_latency=(4, 8))
    if project:
        return await cleanup.enter_async_context(supabase_stack(project, plan=plan))
    with console.status("Starting Postgres, the Supabase edge and the OpenAI simulator…"):
        postgres = cleanup.enter_context(local_postgres())
        await asyncio.to_thread(install_autotag, postgres)
        return await cleanup.enter_async_context(local_stack(postgres, plan=plan))


def paint(
    picture: Path, liveliest: RenderableType, uploads: list[Upload], summary: dict[str, Any], heard: list[str]
) -> None:
    """Draws what the terminal has shown."""
    paper = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO())
    paper.print("[bold green]$[/] ./scripts/demo", highlight=False)
    paper.print(liveliest)
    paper.print("[dim]a few seconds later[/]")
    paper.print(table(uploads))
    report(paper, uploads, summary, heard)
    paper.save_svg(str(picture), title="autotag")


async def count_events(stack: Stack, uploads: list[Upload], heard: list[str]) -> None:
    """Waits for the broadcasts still on their way, and counts them for each upload."""
    expected = sum(one.batches for one in uploads)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(EVENTS_WAIT):
            while len(heard) < expected:  # noqa: ASYNC110 (the list is filled by a callback)
                await asyncio.sleep(0.05)
    for one in uploads:
        answer = await one.client.rpc("tagging_job", {"job_id": one.job_id}).execute()
        one.observe(answer.data)  # type: ignore[arg-type]
        mine = {batch["batch_id"] for batch in one.state["batches"]}
        one.events = sum(batch_id in mine for batch_id in heard)


def report(console: Console, uploads: list[Upload], summary: dict[str, Any], heard: list[str]) -> None:
    """What came of it, for people."""
    for one in uploads:
        for name, sentence in one.failures:
            console.print(f"[red]✗[/] {name.split('-', 1)[-1]}: {sentence}")
    images = sum(len(one.assets) for one in uploads)
    done = sum(one.state["completed"] for one in uploads)
    verified = [one.verified for one in uploads if one.verified is not None]
    firsts = [one.first_result for one in uploads if one.first_result is not None]
    lines = [f"[bold]{done}[/] of {images} images tagged"]
    if verified:
        lines[0] += f", [bold]{sum(verified)}[/] verified against what was drawn"
    if firsts:
        lines.append(f"first tags of an upload after [bold]{max(firsts):.1f}[/] s at the latest")
    lines.append(f"[bold]{len(heard)}[/] batch-complete broadcasts received by a Realtime client")
    lines.append(f"[bold]{summary['http_429']}[/] answers of the provider were 429")
    for line in lines:
        console.print(line, highlight=False)


async def keep_serving(console: Console, stack: Stack) -> None:
    """Prints where everything is, serves the gallery, and keeps it all up until Ctrl-C (or SIGTERM, or SIGHUP)."""
    member, other = stack.add_member("yours"), stack.add_member("somebody else's")
    port = free_port()
    for name, value in (
        ("SUPABASE_URL", stack.supabase_url), ("SUPABASE_ANON_KEY", stack.anon_key),
        ("SUPABASE_SECRET_KEY", stack.secret_key), ("DATABASE_URL", stack.database_url()),
        ("OPENAI_BASE_URL", stack.openai_url), ("OPENAI_API_KEY", stack.openai_key),
        ("WORKSPACE_ID", member.workspace), ("MEMBER_TOKEN", member.token),
    ):  # fmt: skip
        console.print(f"export {name}={value}", soft_wrap=True, highlight=False)
    page = f"http://{HOST}:{port}"
    async with serve_app(make_page(stack), HOST, port):
        console.print("The gallery, for you (open it twice: both windows follow) and for another workspace:")
        for who in (member, other):
            console.print(address(page, who), soft_wrap=True, highlight=False)
        console.print("Everything stays up until you press Ctrl-C.")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


def main(
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Tag the files of this folder, as one upload.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the summary as the last line of stdout, as JSON.")
    ] = False,
    serve: Annotated[bool, typer.Option(help="Keep everything up, with a gallery to try it in.")] = False,
    openai: Annotated[bool, typer.Option(help="Use the real API with OPENAI_API_KEY.")] = False,
    supabase: Annotated[
        bool, typer.Option(help="Use the stack of supabase start (or the variables of supabase status -o env).")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, max=16, help="Worker processes.")] = 1,
    picture: Annotated[Path | None, typer.Option(help="Also draw the terminal into this SVG file.")] = None,
) -> None:
    """Tags four uploads (3, 30, 120 and 300 images) through all four strategies, on this machine alone."""
    if openai and not os.environ.get("OPENAI_API_KEY"):
        typer.secho("demo: --openai needs OPENAI_API_KEY in the environment.", err=True, fg=typer.colors.RED)
        raise typer.Exit(2)
    console = Console(stderr=json_)
    try:
        project = project_variables() if supabase else None
    except ProjectError as error:
        typer.secho(f"demo: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None
    job = run(
        console, folder=images, serve=serve, real_openai=openai, project=project, workers=workers, picture=picture,
        quiet=json_,
    )  # fmt: skip
    summary = ending.run(job)
    if json_:
        print(json.dumps(summary), flush=True)
    ended = all(u["completed"] + u["failed"] == u["images"] for u in summary["uploads"])
    right = all(
        u["verified"] in (None, u["images"]) and u["batch_complete_events"] == u["batches"] for u in summary["uploads"]
    )
    if not ended or not right:
        sys.exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(prog_name="scripts/demo")
