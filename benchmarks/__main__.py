"""The command behind scripts/bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console

from benchmarks import (
    batch,
    bulk,
    chaos,
    day,
    engine,
    eta,
    flood,
    growth,
    images,
    limiter,
    makespan,
    neighbours,
    push,
    soak,
)  # fmt: skip
from benchmarks.report import Result
from lab.ending import exit_on_signals, run

app = typer.Typer(no_args_is_help=True, add_completion=False)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON in the last line of stdout.")]


@app.callback()
def main() -> None:
    """Benchmarks of autotag. Most figures are ratios of two measurements in the same run."""
    exit_on_signals()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for the result


def show_result(result: Result, console: Console, as_json: bool, *, details: bool = False) -> None:
    """Prints the figures and, if wanted, the details. The exit code does not depend on whether the targets were met."""
    if details:
        console.print_json(data=result.details)
    result.show(console)
    if as_json:
        print(result.as_json(), flush=True)


@app.command("makespan")
def makespan_command(
    as_json: Json = False,
    scale: Annotated[float, typer.Option(min=1, help="Factor by which limits and latencies are sped up.")] = 2,
    mix: Annotated[
        list[str] | None, typer.Option(help=f"Run only this mix; may be repeated. Mixes: {', '.join(makespan.MIXES)}.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Also run three other rate limiters for comparison.")] = True,
    picture: Annotated[Path | None, typer.Option(help="Save a plot of the first mix as this SVG file.")] = None,
) -> None:
    """Time to finish mixes of uploads under tier-1 limits, relative to the theoretical minimum, and the 429s."""
    console = Console(stderr=True)
    work = makespan.measure(console, speed=scale, only=mix or (), without_peers=not peers, picture=picture)
    result = run(work)
    makespan.show(console, result)
    show_result(result, console, as_json)


@app.command("engine")
def engine_command(as_json: Json = False) -> None:
    """Throughput of the engine relative to empty jobs of PgQueuer, pick-up latency, and throughput of workers."""
    console = Console(stderr=True)
    show_result(run(engine.measure(console)), console, as_json, details=True)


@app.command("limiter")
def limiter_command(as_json: Json = False) -> None:
    """Throughput of check_rate_limit relative to a one-row UPDATE, and of the libraries limits and pyrate-limiter."""
    console = Console(stderr=True)
    result = limiter.measure(console)
    show_result(result, console, as_json, details=True)


@app.command("bulk")
def bulk_command(as_json: Json = False) -> None:
    """Seconds of enqueueing, cancelling and retrying 50,000 images, under a statement timeout of 8 s."""
    console = Console(stderr=True)
    show_result(bulk.measure(console), console, as_json, details=True)


@app.command("growth")
def growth_command(as_json: Json = False) -> None:
    """Latency of a claim with 1,000,000 queued tasks relative to 10,000."""
    console = Console(stderr=True)
    result = growth.measure(console)
    show_result(result, console, as_json, details=True)


@app.command("batch")
def batch_command(as_json: Json = False) -> None:
    """Memory and speed of a batch of 50,000 images, its linearity, and a plain script for comparison."""
    console = Console(stderr=True)
    result = run(batch.measure(console))
    show_result(result, console, as_json, details=True)


@app.command("eta")
def eta_command(
    as_json: Json = False,
    recorded: Annotated[
        Path | None,
        typer.Option(help="Also replay recorded batches: a CSV of autotag.durations with a header.", exists=True),
    ] = None,
) -> None:
    """Accuracy of predicted finish times over replayed histories: coverage of the p90, error of the median."""
    console = Console(stderr=True)
    result = eta.measure(console, recorded)
    show_result(result, console, as_json, details=True)


@app.command("flood")
def flood_command(
    as_json: Json = False,
    seconds: Annotated[
        float, typer.Option(min=3, help="Seconds of each phase; two phases have the flood and two do not.")
    ] = 60,
) -> None:
    """Health check latency, tagging rate and log volume of a worker while its ports are flooded."""
    console = Console(stderr=True)
    show_result(run(flood.measure(console, seconds=seconds)), console, as_json, details=True)


@app.command("push")
def push_command(as_json: Json = False) -> None:
    """Latency from commit to the callback in supabase-js, and from the provider's answer to the committed tags."""
    console = Console(stderr=True)
    result = run(push.measure(console))
    show_result(result, console, as_json, details=True)


@app.command("images")
def images_command(as_json: Json = False) -> None:
    """Memory of a worker that gets hostile files, and processor time of photographs relative to Pillow alone."""
    console = Console(stderr=True)
    show_result(run(images.measure(console)), console, as_json, details=True)


@app.command("chaos")
def chaos_command(
    as_json: Json = False,
    minutes: Annotated[float, typer.Option(min=0, help="Minimum duration; the run also needs at least 60 kills.")] = 5,
    seed: Annotated[int, typer.Option(help="Random seed for the kills and faults.")] = 1,
    workers: Annotated[int, typer.Option(min=2, max=8, help="Number of workers that are killed in parallel.")] = 3,
) -> None:
    """Violations of autotag's promises while workers are killed, the provider fails and Postgres restarts."""
    console = Console(stderr=True)
    show_result(run(chaos.measure(console, minutes=minutes, seed=seed, workers=workers)), console, as_json)


@app.command("neighbours")
def neighbours_command(
    as_json: Json = False,
    seconds: Annotated[float, typer.Option(min=5, help="Seconds of each phase.")] = 60,
    pairs: Annotated[
        int, typer.Option(min=1, help="Pairs of phases: one with friendly and one with hostile neighbours.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Random seed for the traffic, the kills and the cut connections.")] = 1,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Run only the hostilities whose name contains this; may be repeated. 'none': only friends."),
    ] = None,
) -> None:
    """Latency of quiet tenants beside hostile ones relative to friendly ones, and violations of autotag's promises."""
    console = Console(stderr=True)
    work = neighbours.measure(console, seconds=seconds, pairs=pairs, seed=seed, kinds=neighbours.find_kinds(kind))
    show_result(run(work), console, as_json, details=True)


@app.command("soak")
def soak_command(
    as_json: Json = False,
    minutes: Annotated[float, typer.Option(min=0.5, help="Duration in minutes.")] = 60,
    seed: Annotated[int, typer.Option(help="Random seed for the faults.")] = 1,
) -> None:
    """Growth of memory and tables, and lost images, over a long run with restarts and faults."""
    console = Console(stderr=True)
    show_result(run(soak.measure(console, minutes=minutes, seed=seed)), console, as_json, details=True)


@app.command("day")
def day_command(
    as_json: Json = False,
    images: Annotated[int, typer.Option(min=1000, help="Total number of images.")] = 1_000_000,
    workspaces: Annotated[int, typer.Option(min=1, help="Number of workspaces.")] = 10_000,
    minutes: Annotated[float, typer.Option(min=0.5, help="Real minutes that the day takes.")] = 30,
    workers: Annotated[int, typer.Option(min=1, max=20, help="Number of worker processes.")] = 3,
) -> None:
    """A day of uploads in compressed time: database cost per image, table sizes, and waiting times."""
    console = Console(stderr=True)
    work = day.measure(console, images=images, workspaces=workspaces, minutes=minutes, workers=workers)
    result = run(work)
    day.show(console, result)
    show_result(result, console, as_json, details=True)


if __name__ == "__main__":
    app(prog_name="scripts/bench")
