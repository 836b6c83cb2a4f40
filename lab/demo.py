"""The demo: tags four uploads, one per strategy, shows their progress live and verifies every image."""

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
from realtime import AsyncRealtimeClient, BroadcastPayload
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
from lab.uploads import Upload, enqueue, files_of, make_upload, verify

UPLOADS = (3, 30, 120, 300)  # images; one upload for each strategy
STAGES = ("queued", "preparing", "submitted", "processing", "completing", "completed", "failed")
POLL_INTERVAL = 0.25  # seconds
MAX_EVENT_WAIT = 5.0  # seconds from the end of the last job to the last broadcast
PICTURE_WIDTH = 100  # columns
TIMEOUT = 24 * 3600.0  # seconds; with --openai a batch may take a day


async def watch(uploads: list[Upload], workers: list[Process], live: Live | None) -> RenderableType:
    """Polls the jobs until all have finished. Returns the table of the moment when the most stages had images."""
    busiest, max_active = table(uploads), 0
    deadline = time.monotonic() + TIMEOUT
    while not all(upload.seconds is not None for upload in uploads):
        if time.monotonic() > deadline:
            raise TimeoutError("The uploads did not finish within a day.")
        if all(worker.returncode is not None for worker in workers):
            raise RuntimeError("Every worker has ended. Their error messages are above.")
        for upload in uploads:
            if upload.seconds is None:
                answer = await upload.client.rpc("tagging_job", {"job_id": upload.job_id}).execute()
                upload.observe(answer.data)  # type: ignore[arg-type]
        rendered = table(uploads)
        active_stages = sum(bool(count) for upload in uploads for count in upload.state["stages"].values())
        if active_stages > max_active:
            busiest, max_active = rendered, active_stages
        if live:
            live.update(rendered, refresh=True)
        await asyncio.sleep(POLL_INTERVAL)
    return busiest


def table(uploads: list[Upload]) -> RenderableType:
    """The uploads as a live table."""
    rendered = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, justify in (("images", "right"), ("strategy", "left"), ("progress", "left"), ("", "right")):
        rendered.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    rendered.add_column("stages", min_width=12)
    rendered.add_column("time left", justify="right", no_wrap=True)
    colours = {"completed": "green", "failed": "red", "processing": "cyan", "completing": "cyan"}
    for upload in uploads:
        counts = upload.state.get("stages", {})
        stages = "  ".join(
            f"[{colours.get(stage, 'default')}]{counts[stage]}\N{NO-BREAK SPACE}{stage}[/]"
            for stage in STAGES
            if counts.get(stage)
        )
        progress = int(upload.state.get("progress", 0))
        remaining = time_left(upload.state.get("eta")) if upload.seconds is None else f"done in {upload.seconds:.1f} s"
        bar = ProgressBar(100, progress, width=10)
        rendered.add_row(str(len(upload.assets)), upload.strategy, bar, f"{progress}%", stages, remaining)
    return rendered


def time_left(eta: str | None) -> str:
    """The time left until an ETA, for people."""
    if not eta:
        return ""
    seconds = (datetime.fromisoformat(eta) - datetime.now(UTC)).total_seconds()
    if seconds <= 0:
        return "now"
    return f"~{seconds:.0f} s" if seconds < 90 else f"~{seconds / 60:.0f} min"


@contextlib.asynccontextmanager
async def batch_updates(stack: Stack) -> AsyncIterator[list[str]]:
    """The OpenAI batch ids that an anonymous Realtime client receives on ``batch-updates``; the list grows."""
    batch_ids: list[str] = []

    def hear(message: BroadcastPayload) -> None:
        if batch_id := message["payload"]["batch_id"]:  # none: an upload ended without a batch
            batch_ids.append(batch_id)

    client = AsyncRealtimeClient(f"{stack.supabase_url}/realtime/v1", stack.anon_key)
    await client.connect()
    channel = client.channel("batch-updates")
    channel.on_broadcast("batch-complete", hear)
    joined = asyncio.Event()
    await channel.subscribe(lambda state, _: joined.set() if state.value == "SUBSCRIBED" else None)
    async with asyncio.timeout(10):
        await joined.wait()
    try:
        yield batch_ids
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
    """Runs the demo and returns its summary."""
    groups = list(groups_of(console, folder))
    async with contextlib.AsyncExitStack() as cleanup:
        stack = await start_stack(console, cleanup, project)
        environment = stack.worker_environment()
        if real_openai:
            environment |= {"OPENAI_API_KEY": os.environ["OPENAI_API_KEY"]}
            environment["OPENAI_BASE_URL"] = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
        else:
            # The simulator's batches take seconds instead of hours, so poll every second.
            cleanup.enter_context(stack.configured(batch_poll_interval="1 s", batch_seconds=15))
        # Workers share the demo's stderr, so that the user sees why a worker cannot work.
        environment |= {"AUTOTAG_LOG_LEVEL": "error", "AUTOTAG_LOG_FORMAT": "console"}
        processes = [await cleanup.enter_async_context(worker_process(environment)) for _ in range(workers)]
        batch_ids = await cleanup.enter_async_context(batch_updates(stack))

        with console.status(f"Uploading {sum(map(len, groups))} images…"):
            uploads = [await make_upload(stack, group, i + 1) for i, group in enumerate(groups)]
        await asyncio.gather(*(enqueue(upload) for upload in uploads))
        live = Live(table(uploads), console=console, auto_refresh=False) if not quiet else None
        with live or contextlib.nullcontext():
            busiest = await watch(uploads, processes, live)
        await count_events(stack, uploads, batch_ids)
        for upload in uploads:
            await verify(upload, check_tags=not folder and not real_openai)
        summary = {
            "uploads": [upload.summary() for upload in uploads],
            "http_429": sum(entry.get("status") == 429 for entry in stack.simulator.request_log),
        }
        report(console, uploads, summary, batch_ids)
        if picture:
            draw_terminal(picture, busiest, uploads, summary, batch_ids)
        if serve:
            await keep_serving(console, stack)
    return summary


def groups_of(console: Console, folder: Path | None) -> Iterator[Sequence[Drawing]]:
    """The files of each upload."""
    if folder:
        files = files_of(folder)
        if not files:
            raise typer.BadParameter(f"{folder} contains no files.")
        yield files
        return
    with console.status("Drawing 453 pictures…"):
        drawings = iter(list(draw(sum(UPLOADS))))
    for count in UPLOADS:
        yield list(itertools.islice(drawings, count))


async def start_stack(console: Console, cleanup: contextlib.AsyncExitStack, project: Mapping[str, str] | None) -> Stack:
    """The stack of a Supabase project, or a local one."""
    plan = Plan(batch_latency=(4, 8))
    if project:
        return await cleanup.enter_async_context(supabase_stack(project, plan=plan))
    with console.status("Starting Postgres, the Supabase edge and the OpenAI simulator…"):
        postgres = cleanup.enter_context(local_postgres())
        # people who try the gallery may edit its vocabulary
        await asyncio.to_thread(install_autotag, postgres, editors="members")
        return await cleanup.enter_async_context(local_stack(postgres, plan=plan))


def draw_terminal(
    picture: Path, busiest: RenderableType, uploads: list[Upload], summary: dict[str, Any], batch_ids: list[str]
) -> None:
    """Draws the terminal's output as an SVG."""
    terminal = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO())
    terminal.print("[bold green]$[/] ./scripts/demo", highlight=False)
    terminal.print(busiest)
    terminal.print("[dim]a few seconds later[/]")
    terminal.print(table(uploads))
    report(terminal, uploads, summary, batch_ids)
    terminal.save_svg(str(picture), title="autotag")


async def count_events(stack: Stack, uploads: list[Upload], batch_ids: list[str]) -> None:
    """Waits for the last broadcasts and counts those of each upload."""
    expected = sum(upload.batches for upload in uploads)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(MAX_EVENT_WAIT):
            while len(batch_ids) < expected:  # noqa: ASYNC110 (the list is filled by a callback)
                await asyncio.sleep(0.05)
    for upload in uploads:
        answer = await upload.client.rpc("tagging_job", {"job_id": upload.job_id}).execute()
        upload.observe(answer.data)  # type: ignore[arg-type]
        own_batches = {batch["batch_id"] for batch in upload.state["batches"]}
        upload.events = sum(batch_id in own_batches for batch_id in batch_ids)


def report(console: Console, uploads: list[Upload], summary: dict[str, Any], batch_ids: list[str]) -> None:
    """Prints the result for people."""
    for upload in uploads:
        for name, sentence in upload.failures:
            console.print(f"[red]✗[/] {name.split('-', 1)[-1]}: {sentence}")
    images = sum(len(upload.assets) for upload in uploads)
    done = sum(upload.state["completed"] for upload in uploads)
    verified = [upload.verified for upload in uploads if upload.verified is not None]
    firsts = [upload.first_result for upload in uploads if upload.first_result is not None]
    lines = [f"[bold]{done}[/] of {images} images tagged"]
    if verified:
        lines[0] += f", [bold]{sum(verified)}[/] with the correct tags"
    if firsts:
        lines.append(f"every upload had its first tags within [bold]{max(firsts):.1f}[/] s")
    lines.append(f"[bold]{len(batch_ids)}[/] batch-complete broadcasts received by a Realtime client")
    lines.append(f"[bold]{summary['http_429']}[/] responses from the provider were 429")
    for line in lines:
        console.print(line, highlight=False)


async def keep_serving(console: Console, stack: Stack) -> None:
    """Prints the addresses and keys, and serves the gallery until Ctrl-C, SIGTERM or SIGHUP."""
    member, other = stack.add_member("yours"), stack.add_member("another user's")
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
        console.print("The gallery of your workspace (open it in two windows to see both update live):")
        console.print(address(page, member), soft_wrap=True, highlight=False)
        console.print("The gallery of another workspace, which does not see your images:")
        console.print(address(page, other), soft_wrap=True, highlight=False)
        console.print("Everything keeps running until you press Ctrl-C.")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


def main(
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Tag the files in this folder as one upload.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON in the last line of stdout.")
    ] = False,
    serve: Annotated[
        bool, typer.Option(help="Keep everything running afterwards, with a gallery to upload images to.")
    ] = False,
    openai: Annotated[
        bool, typer.Option(help="Use the real OpenAI API instead of the simulator. Needs OPENAI_API_KEY.")
    ] = False,
    supabase: Annotated[
        bool,
        typer.Option(help="Use the stack of 'supabase start', or the variables of 'supabase status -o env' if set."),
    ] = False,
    workers: Annotated[int, typer.Option(min=1, max=16, help="Number of worker processes.")] = 1,
    picture: Annotated[Path | None, typer.Option(help="Also save the terminal output as this SVG file.")] = None,
) -> None:
    """Tags four uploads of 3, 30, 120 and 300 images, one for each strategy, entirely on this machine."""
    if openai and not os.environ.get("OPENAI_API_KEY"):
        typer.secho("demo: --openai needs the environment variable OPENAI_API_KEY.", err=True, fg=typer.colors.RED)
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
    all_finished = all(u["completed"] + u["failed"] == u["images"] for u in summary["uploads"])
    all_verified = all(
        u["verified"] in (None, u["images"]) and u["batch_complete_events"] == u["batches"] for u in summary["uploads"]
    )
    if not all_finished or not all_verified:
        sys.exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(prog_name="scripts/demo")
