"""The time that mixes of uploads take under tier-1 limits, compared with the theoretical minimum and with peers.

All figures come from the simulator's request log; for autotag, an image ends when its row is committed, which is later.
Times are in seconds of simulated time: with ``speed`` 6, a minute passes in ten real seconds for the provider, for
autotag's clock, for latencies and for the peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

from autotag.db import Question
from autotag.http.serve import serve
from autotag.images.prepare import prepare_bytes
from autotag.images.sent import data_url
from autotag.openai.prompt import request_body
from benchmarks import bound, peers
from benchmarks.bound import Upload
from benchmarks.report import Figure, Result
from lab.openai_sim.app import Plan, Simulator
from lab.openai_sim.limits import Limits
from lab.pictures import Drawing, draw
from lab.postgres import free_port, install_autotag, local_postgres, machine_binaries
from lab.stack import HOST, Stack, local_stack, worker_process

DEFAULT_MODEL = "gpt-6-luna"  # the default of autotag.settings
MODEL = "gpt-4o-mini"  # an image has 2,833 tokens, so that tier 1's token limit applies
LATENCY = (2.0, 5.0)  # seconds
MAX_RATIO = 4.0  # times the minimum; a peer is stopped then, and its unfinished images count as finished
WARM_UP = 12  # images
SETTLE = 2.0  # real seconds after the warm-up, in which buckets refill and connections close
MIXES: dict[str, list[Upload]] = {
    "10 × 15": [Upload(w, 15) for w in range(10)],
    "45 + 9 × 3": [Upload(0, 45), *(Upload(w, 3) for w in range(1, 10))],
    "100 × 3": [Upload(w, 3) for w in range(100)],
    "10 × 15 over a minute": [Upload(w, 15, at=6.0 * w) for w in range(10)],
}
MIXED_SIZES = "45 + 9 × 3"
SINGLE_UPLOAD = [Upload(0, 3)]  # a small upload with nothing else running
LEARNING_IMAGES = 200  # images of mixed shapes from which autotag learns the tokens per image
MEASURED_IMAGES = 100  # images after them, whose use is compared with the reservation


@dataclass(frozen=True)
class Run:
    """One system with one mix; times in seconds of simulated time."""

    system: str
    mix: str
    seconds: float
    ratio: float
    http_429: int
    mean: float  # from a workspace's upload to its last tag
    worst: float
    jain: float  # Jain's fairness index of the workspaces' shares; 1 is perfectly even
    min_share: float  # the lowest share of a workspace; a share is fair finish ÷ finish, at most 1
    small_upload_slowdown: float | None  # the slowest small upload's time, relative to running alone
    overhead: float  # largest time of a workspace minus its slowest call
    accepted: list[float]  # times at which the provider accepted the calls
    unfinished: int  # images that a peer had not finished when it was stopped


async def measure(
    console: Console,
    *,
    speed: float,
    only: Sequence[str] = (),
    without_peers: bool = False,
    picture: Path | None = None,
) -> Result:
    """Runs all mixes with autotag and the peers; saves a plot of the first mix as ``picture``."""
    mixes = {name: mix for name, mix in MIXES.items() if not only or name in only}
    drawings = list(draw(max(sum(u.images for u in mix) for mix in mixes.values()) + WARM_UP))
    runs: list[Run] = []
    if not without_peers:
        await asyncio.to_thread(peers.litellm_python)
    with local_postgres(machine_binaries()) as postgres:
        install_autotag(postgres)
        async with local_stack(postgres, plan=_plan(speed)) as stack:
            alone = await _autotag(stack, "alone", SINGLE_UPLOAD, drawings, speed, 0.0)
        console.print(f"autotag: token reservation after {LEARNING_IMAGES} images of mixed shapes …")
        async with local_stack(postgres, plan=_plan(speed)) as stack:
            reservation = await _reservation(stack, speed)
        for name, mix in mixes.items():
            console.print(f"{name}: autotag …")
            async with local_stack(postgres, plan=_plan(speed)) as stack:
                runs.append(await _autotag(stack, name, mix, drawings, speed, alone.overhead))
            for peer in {} if without_peers else peers.PEERS:
                console.print(f"{name}: {peer} …")
                runs.append(await _peer(peer, name, mix, drawings, speed))
    if picture:
        draw_admissions(runs, picture)
    ours = [run for run in runs if run.system == "autotag"]
    figures = {
        "worst_ratio": Figure(max(run.ratio for run in ours), 1.05, "lower"),
        "http_429": Figure(sum(run.http_429 for run in ours) + reservation["http_429"], 0, "lower"),
        "reserved_vs_used": Figure(reservation["ratio"], 1.2, "lower"),
    }
    slowdowns = [run.small_upload_slowdown for run in ours if run.small_upload_slowdown is not None]
    if slowdowns:
        figures["small_upload_slowdown"] = Figure(max(slowdowns), 1.5, "lower")
    return Result(
        "makespan", figures, {"speed": speed, "runs": [_rounded(run) for run in runs], "reservation": reservation}
    )


async def _reservation(stack: Stack, speed: float) -> dict[str, float]:
    """The tokens that autotag reserves for an image of the default model, compared with the tokens that it uses.

    Returns:
        ``{reserved, used, cap, metered (counted by the provider at admission), ratio, http_429}``; tokens per image.
    """
    stack.compress(speed)
    stack.configure(realtime_requests_per_minute=10_000, realtime_tokens_per_minute=10**9)
    stack.configure(broadcast_interval=f"{speed} s", provider_margin=f"{0.25 * speed} s")
    drawings = list(draw(LEARNING_IMAGES + MEASURED_IMAGES, seed=7))
    database = stack.database_url()
    environment = {**stack.worker_environment(), "AUTOTAG_SLOTS": "400", "AUTOTAG_LOG_LEVEL": "error"}
    with open("/dev/null", "wb") as log, stack.configured(model=DEFAULT_MODEL):  # noqa: ASYNC230
        async with worker_process(environment, log):
            await _tag_in_fives(stack, drawings[:LEARNING_IMAGES])
            with psycopg.connect(database, autocommit=True) as owner:
                row = owner.execute("select tokens_per_image, output_tokens from autotag.provider_limits").fetchone()
            await _tag_in_fives(stack, drawings[LEARNING_IMAGES:])
    assert row is not None
    calls = [entry for entry in stack.simulator.request_log if entry["path"].endswith("/completions")]
    measured = [entry for entry in calls if entry["status"] == 200][-MEASURED_IMAGES:]
    used = statistics.mean(entry["usage"]["total_tokens"] for entry in measured)
    return {
        "reserved": row[0], "used": round(used, 1), "cap": row[1],
        "metered": round(statistics.mean(entry["tokens"] for entry in measured), 1),
        "ratio": round(row[0] / used, 3), "http_429": sum(entry["status"] == 429 for entry in calls),
    }  # fmt: skip


async def _tag_in_fives(stack: Stack, drawings: Sequence[Drawing]) -> None:
    """Tags the pictures in uploads of five, each in a new workspace."""
    uploads = [await _store(stack, drawings[i : i + 5]) for i in range(0, len(drawings), 5)]
    jobs = [await asyncio.to_thread(_enqueue, stack.database_url(), assets) for assets in uploads]
    await _ends(stack.database_url(), dict(enumerate(jobs)), 0.0, 1.0)


def _rounded(run: Run) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(run).items() if k != "accepted"}


def _plan(speed: float) -> Plan:
    return Plan(latency=(LATENCY[0] / speed, LATENCY[1] / speed), speed=speed)


def _latencies(count: int, speed: float) -> list[float]:
    """The latencies that the simulator draws, in the order of accepted calls."""
    rng = Simulator(_plan(speed)).rng
    return [rng.uniform(*_plan(speed).latency) * speed for _ in range(count)]


def _evaluate(
    system: str, name: str, mix: Sequence[Upload], owners: dict[frozenset[str], int], simulator: Simulator,
    started: float, speed: float, ends: dict[int, float] | None = None, alone: float = 0.0,
    max_seconds: float | None = None,
) -> Run:  # fmt: skip
    """Computes the figures of a run from the simulator's request log.

    Args:
        system: autotag or a peer.
        name: of the mix.
        mix: the uploads.
        owners: workspace by the tags of a picture.
        simulator: the provider.
        started: epoch seconds of the start.
        speed: factor by which time is compressed.
        ends: finish of each workspace; None: its last answer.
        alone: overhead of a single small upload, in seconds.
        max_seconds: time at which a peer was stopped; None: the run had to finish.
    """
    calls = [entry for entry in simulator.request_log if entry["path"].endswith("/completions")]
    answered = [entry for entry in calls if entry["status"] == 200]
    done: dict[int, float] = {}
    slowest: dict[int, float] = {}
    for entry in answered:
        owner = owners[frozenset(entry["tags"])]
        done[owner] = max(done.get(owner, 0.0), (entry["done"] - started) * speed)
        slowest[owner] = max(slowest.get(owner, 0.0), (entry["done"] - entry["at"]) * speed)
    images = sum(upload.images for upload in mix)
    unfinished = images - len(answered)
    assert max_seconds or not unfinished, f"{system}, {name}: {len(answered)} of {images} images were answered"
    ends = ends or done
    if max_seconds and unfinished:
        counts = Counter(owners[frozenset(entry["tags"])] for entry in answered)
        ends |= {u.workspace: max_seconds for u in mix if counts[u.workspace] < u.images}
    durations = {upload.workspace: ends[upload.workspace] - upload.at for upload in mix}
    small = [u.workspace for u in mix if u.images == 3] if name == MIXED_SIZES else []
    slowdowns = [durations[w] / (slowest.get(w, LATENCY[1]) + alone) for w in small]
    latencies = _latencies(images, speed)
    sizes = [float(entry["tokens"]) for entry in sorted(answered, key=lambda entry: entry["at"])]
    sizes += [bound.Limits().tokens_per_call] * (images - len(sizes))
    minimum = bound.minimum(mix, bound.Limits(), latencies, sizes)
    fair = bound.fair_finishes(mix, bound.Limits(), latencies, sizes)
    shares = [min(1.0, fair[w] / ends[w]) for w in ends]
    return Run(
        system, name, max(ends.values()), max(ends.values()) / minimum, sum(entry["status"] == 429 for entry in calls),
        statistics.mean(durations.values()), max(durations.values()),
        sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares)), min(shares),
        max(slowdowns) if slowdowns else None, max(durations[w] - slowest.get(w, 0.0) for w in durations),
        sorted((entry["at"] - started) * speed for entry in answered), unfinished,
    )  # fmt: skip


def _shares(mix: Sequence[Upload], drawings: Sequence[Drawing]) -> list[Sequence[Drawing]]:
    """Distributes the pictures over the uploads."""
    shares, start = [], 0
    for upload in mix:
        shares.append(drawings[start : start + upload.images])
        start += upload.images
    return shares


async def _autotag(
    stack: Stack, name: str, mix: Sequence[Upload], drawings: Sequence[Drawing], speed: float, alone: float
) -> Run:
    shares = _shares(mix, drawings)
    owners = {d.tags: u.workspace for u, share in zip(mix, shares, strict=True) for d in share}
    database = stack.database_url()
    with psycopg.connect(stack.database_url("supabase_admin"), autocommit=True) as owner:
        owner.execute("truncate autotag.jobs, autotag.workspaces, autotag.workers, autotag.windows cascade")
        owner.execute("update autotag.provider_limits set refilled_at = '-infinity', blocked_until = '-infinity'")
    # A call's way to the provider takes real time, which is not compressed, so scale the margin up to keep it.
    stack.compress(speed)
    stack.configure(realtime_requests_per_minute=10_000, realtime_tokens_per_minute=10**9)  # only tier 1 applies
    stack.configure(model=MODEL, broadcast_interval=f"{speed} s", provider_margin=f"{0.25 * speed} s")
    uploads = [await _store(stack, share) for share in shares]
    log = open("/dev/null", "wb")  # noqa: ASYNC230, SIM115 (closed below)
    environment = {**stack.worker_environment(), "AUTOTAG_SLOTS": "400", "AUTOTAG_LOG_LEVEL": "error"}
    async with worker_process(environment, log):
        await _warm_up(stack, database, drawings[-WARM_UP:])
        stack.simulator.request_log.clear()
        stack.simulator.rng.seed(stack.simulator.plan.seed)
        stack.simulator.limits = Limits.of(500, 200_000, 10_000, speed)
        started = time.time()

        async def enqueue(upload: Upload, assets: list[str]) -> tuple[int, str]:
            await asyncio.sleep(max(0.0, started + upload.at / speed - time.time()))
            return upload.workspace, await asyncio.to_thread(_enqueue, database, assets)

        jobs = dict(await asyncio.gather(*(enqueue(u, a) for u, a in zip(mix, uploads, strict=True))))
        ends = await _ends(database, jobs, started, speed)
    log.close()
    return _evaluate("autotag", name, mix, owners, stack.simulator, started, speed, ends, alone)


async def _store(stack: Stack, share: Sequence[Drawing]) -> list[str]:
    """Stores the files and inserts the rows of one upload."""
    member = stack.add_member()
    bucket = stack.storage().from_("assets")
    paths = []
    for drawing in share:
        paths.append(f"{member.workspace}/{uuid.uuid4()}-{drawing.name}")
        await bucket.upload(paths[-1], drawing.data, {"content-type": drawing.content_type})
    with psycopg.connect(stack.database_url(), autocommit=True) as owner:
        rows = owner.execute(
            "insert into public.assets (workspace_id, storage_path)"
            " select %s, p from unnest(%s::text[]) p returning id::text",
            (member.workspace, paths),
        ).fetchall()
    return [row[0] for row in rows]


def _enqueue(database: str, assets: list[str]) -> str:
    with psycopg.connect(database, autocommit=True) as connection:
        row = connection.execute("select (public.enqueue_tagging(%s::uuid[])).job_id::text", (assets,)).fetchone()
    assert row is not None
    return str(row[0])


async def _warm_up(stack: Stack, database: str, drawings: Sequence[Drawing]) -> None:
    """Tags a small upload, as a running service has done before, and then refills every bucket."""
    assets = await _store(stack, drawings)
    job = await asyncio.to_thread(_enqueue, database, assets)
    await _ends(database, {0: job}, 0.0, 1.0)
    await asyncio.sleep(SETTLE)
    with psycopg.connect(database, autocommit=True) as owner:
        owner.execute("update autotag.provider_limits set refilled_at = '-infinity'")


async def _ends(database: str, jobs: dict[int, str], started: float, speed: float) -> dict[int, float]:
    """Waits for all jobs; returns the simulated seconds from the start to the commit of each workspace's last image."""
    statement = (
        "select id::text, extract(epoch from timestamptz '2026-01-01' + (finished_at - timestamptz '2026-01-01') / %s)"
        " from autotag.jobs where id = any (%s::uuid[]) and finished_at is not null"
    )
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        while True:
            rows = await (await connection.execute(statement, (speed, list(jobs.values())))).fetchall()
            if len(rows) == len(jobs):
                times = {str(job): (float(at) - started) * speed for job, at in rows}
                return {workspace: times[job] for workspace, job in jobs.items()}
            await asyncio.sleep(0.1)


async def _peer(peer: str, name: str, mix: Sequence[Upload], drawings: Sequence[Drawing], speed: float) -> Run:
    question = Question(0, MODEL, "low", 10, "English")
    shares = _shares(mix, drawings)
    owners = {d.tags: u.workspace for u, share in zip(mix, shares, strict=True) for d in share}
    jobs = [
        peers.Job(
            upload.at,
            [request_body(question, data_url(prepare_bytes(d.data, 512, 10**9).jpeg), 400) for d in share],
            int(bound.Limits().tokens_per_call),
        )
        for upload, share in zip(mix, shares, strict=True)
    ]
    simulator, port = Simulator(_plan(speed)), free_port()
    async with serve(simulator.app(), HOST, port):
        started = time.time()
        max_seconds = MAX_RATIO * bound.minimum(mix, bound.Limits(), _latencies(sum(u.images for u in mix), speed))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max_seconds / speed):
                await peers.PEERS[peer](f"http://{HOST}:{port}/v1", simulator.plan.key, jobs, speed)
    first = min(entry["at"] for entry in simulator.request_log)
    return _evaluate(peer, name, mix, owners, simulator, max(started, first), speed, max_seconds=max_seconds)


def draw_admissions(runs: Sequence[Run], picture: Path) -> None:
    """Plots the accepted calls of the first mix over time, with the theoretical maximum."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "autotag"
    from matplotlib import pyplot as plt

    name = runs[0].mix
    best = bound.admissions(MIXES[name], bound.Limits())
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.fill_between(best, range(1, len(best) + 1), step="post", color="#d9d9d9", label="at most, by any schedule")
    for run, colour in zip(
        (r for r in runs if r.mix == name), ("#0a7d4b", "#c2410c", "#1d4ed8", "#7e22ce"), strict=False
    ):
        axes.step(run.accepted, range(1, len(run.accepted) + 1), where="post", color=colour, label=run.system)
    axes.set_xlabel("seconds since the uploads")
    axes.set_ylabel("calls accepted by the provider")
    axes.set_title(f"{name} images at tier 1")
    axes.set_xlim(0, 2 * best[-1])  # slower systems are cut off
    axes.set_ylim(0)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


def show(console: Console, result: Result) -> None:
    """Prints the runs as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("mix", "system", "÷ minimum", "429s", "mean s", "worst s", "Jain", "min share", "small upload ×"):
        table.add_column(column, justify="left" if column in ("mix", "system") else "right")
    for run in result.details["runs"]:
        slowdown = "" if run["small_upload_slowdown"] is None else f"{run['small_upload_slowdown']:.2f}"
        ratio = f"{'≥ ' if run['unfinished'] else ''}{run['ratio']:.3f}"
        table.add_row(run["mix"], run["system"], ratio, str(run["http_429"]), f"{run['mean']:.1f}",
                      f"{run['worst']:.1f}", f"{run['jain']:.3f}", f"{run['min_share']:.2f}", slowdown)  # fmt: skip
    console.print(table)
