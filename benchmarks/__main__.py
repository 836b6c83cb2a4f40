"""The command behind scripts/bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import batch, chaos, day, engine, eta, flood, growth, limiter, makespan, push, soak
from benchmarks.report import Result
from lab.ending import exit_on_signals, run

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measures autotag, as ratios in one run.")
Json = Annotated[bool, typer.Option("--json", help="Print the result as the last line of stdout, as JSON.")]


@app.callback()
def main() -> None:
    """Measures autotag, as ratios in one run."""
    exit_on_signals()


def finish(result: Result, console: Console, as_json: bool, *, details: bool = False) -> None:
    """Shows the figures (and the details); the exit code says that it ran, not whether a bar was met."""
    if details:
        console.print_json(data=result.details)
    result.show(console)
    if as_json:
        print(result.as_json(), flush=True)


@app.command("makespan")
def makespan_command(
    as_json: Json = False,
    scale: Annotated[float, typer.Option(min=1, help="How much faster limits, windows and latencies pass.")] = 2,
    mix: Annotated[list[str] | None, typer.Option(help=f"Only this mix: {', '.join(makespan.MIXES)}.")] = None,
    peers: Annotated[bool, typer.Option(help="Also run what people use instead.")] = True,
    picture: Annotated[Path | None, typer.Option(help="Draw the first mix's admissions into this SVG file.")] = None,
) -> None:
    """Time to finish mixes of uploads under tier-1 limits ÷ the theoretical minimum, and 429s; next to three peers."""
    console = Console(stderr=True)
    work = makespan.measure(console, speed=scale, only=mix or (), without_peers=not peers, picture=picture)
    result = run(work)
    makespan.show(console, result)
    finish(result, console, as_json)


@app.command("engine")
def engine_command(as_json: Json = False) -> None:
    """20,000 images through the engine ÷ 20,000 empty jobs through PgQueuer; pick-up; what one worker can do."""
    console = Console(stderr=True)
    finish(run(engine.measure(console)), console, as_json, details=True)


@app.command("limiter")
def limiter_command(as_json: Json = False) -> None:
    """check_rate_limit ÷ a one-row UPDATE under pgbench, in four settings; next to limits and pyrate-limiter."""
    console = Console(stderr=True)
    result = limiter.measure(console)
    finish(result, console, as_json, details=True)


@app.command("growth")
def growth_command(as_json: Json = False) -> None:
    """Latency of a claim with 1,000,000 tasks queued ÷ with 10,000."""
    console = Console(stderr=True)
    result = growth.measure(console)
    finish(result, console, as_json, details=True)


@app.command("batch")
def batch_command(as_json: Json = False) -> None:
    """50,000 lines built, uploaded, downloaded and stored: memory, speed, linearity; next to the plain way."""
    console = Console(stderr=True)
    result = run(batch.measure(console))
    finish(result, console, as_json, details=True)


@app.command("eta")
def eta_command(
    as_json: Json = False,
    recorded: Annotated[
        Path | None,
        typer.Option(help="Also replay these durations: CSV of autotag.durations with a header.", exists=True),
    ] = None,
) -> None:
    """Predicted against real finish over replayed histories: how often p90 holds, and how far the median is off."""
    console = Console(stderr=True)
    result = eta.measure(console, recorded)
    finish(result, console, as_json, details=True)


@app.command("flood")
def flood_command(
    as_json: Json = False,
    seconds: Annotated[
        float, typer.Option(min=3, help="Of each phase; there are two with the flood and two without.")
    ] = 60,
) -> None:
    """A worker whose ports are flooded: its health check, its rate of tagging against the same without, and its log."""
    console = Console(stderr=True)
    finish(run(flood.measure(console, seconds=seconds)), console, as_json, details=True)


@app.command("push")
def push_command(as_json: Json = False) -> None:
    """Commit → callback in supabase-js under Node and in a page, and the provider's answer → tags committed."""
    console = Console(stderr=True)
    result = run(push.measure(console))
    finish(result, console, as_json, details=True)


@app.command("chaos")
def chaos_command(
    as_json: Json = False,
    minutes: Annotated[float, typer.Option(min=0, help="Go on for so long, and for at least 60 kills.")] = 5,
    seed: Annotated[int, typer.Option(help="Which deaths and faults come when.")] = 1,
    workers: Annotated[int, typer.Option(min=2, max=8, help="Workers dying at the same time.")] = 3,
) -> None:
    """Violations found by comparing three books while workers die, the provider fails and Postgres restarts."""
    console = Console(stderr=True)
    finish(run(chaos.measure(console, minutes=minutes, seed=seed, workers=workers)), console, as_json)


@app.command("soak")
def soak_command(
    as_json: Json = False,
    minutes: Annotated[float, typer.Option(min=0.5, help="How long.")] = 60,
    seed: Annotated[int, typer.Option(help="Which faults come when.")] = 1,
) -> None:
    """Memory and tables over a long run with restarts and faults, and what was lost in it."""
    console = Console(stderr=True)
    finish(run(soak.measure(console, minutes=minutes, seed=seed)), console, as_json, details=True)


@app.command("day")
def day_command(
    as_json: Json = False,
    images: Annotated[int, typer.Option(min=1000, help="Of all uploads together.")] = 1_000_000,
    workspaces: Annotated[int, typer.Option(min=1)] = 10_000,
    minutes: Annotated[float, typer.Option(min=0.5, help="How long the day takes.")] = 30,
    workers: Annotated[int, typer.Option(min=1, max=20, help="Processes.")] = 3,
) -> None:
    """A day of uploads in compressed time: the database's costs, table sizes, and how long who waits."""
    console = Console(stderr=True)
    work = day.measure(console, images=images, workspaces=workspaces, minutes=minutes, workers=workers)
    result = run(work)
    day.show(console, result)
    finish(result, console, as_json, details=True)


if __name__ == "__main__":
    app()
