"""How long mixes of uploads take under tier-1 limits, against the theoretical minimum and against peers.

Everything is judged by the provider's book (and, for autotag, by the moment its rows were committed, which is
later). Times are reported in the limits' own seconds: with ``speed`` 6 a minute of limits passes in ten seconds,
for the provider, for autotag's clock, for latencies and for the peers alike.
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

from autotag.http.serve import serve
from autotag.images.prepare import data_url, prepare
from autotag.openai.prompt import Question, request_body
from benchmarks import bound, peers
from benchmarks.bound import Upload
from benchmarks.report import Figure, Result
from lab.openai_sim.app import Plan, Simulator
from lab.openai_sim.limits import Limits
from lab.pictures import Drawing, draw
from lab.postgres import free_port, install_autotag, local_postgres, machine_binaries
from lab.stack import HOST, Stack, local_stack, worker_process

DEFAULT_MODEL = "gpt-6-luna"  # of autotag.settings
MODEL = "gpt-4o-mini"  # its 2,833 tokens an image are what makes tier 1 bind
LATENCY = (2.0, 5.0)  # seconds
PATIENCE = 4.0  # times the minimum: a peer that takes longer is stopped, and what it has not done counts as done then
WARM_UP = 12  # images
SETTLE = 2.0  # real seconds between runs, for buckets and connections to come to rest
MIXES: dict[str, list[Upload]] = {
    "10 × 15": [Upload(w, 15) for w in range(10)],
    "elephant and mice": [Upload(0, 45), *(Upload(w, 3) for w in range(1, 10))],
    "100 × 3": [Upload(w, 3) for w in range(100)],
    "10 × 15 over a minute": [Upload(w, 15, at=6.0 * w) for w in range(10)],
}
MICE = "elephant and mice"
ALONE = [Upload(0, 3)]  # a mouse by itself
LEARNED_AFTER = 200  # images of mixed shapes, as in the promise
LEARNED_FROM = 100  # the images after them, by which what is reserved is judged


@dataclass(frozen=True)
class Run:
    """One system with one mix; seconds of the limits' time."""

    system: str
    mix: str
    seconds: float
    ratio: float
    http_429: int
    mean: float  # completion per workspace, from its arrival
    worst: float
    jain: float  # Jain's index of what each workspace got of its fair share; 1 is perfectly even
    least_share: float  # the worst-off workspace's: fair finish ÷ finish, at most 1
    mice_slowdown: float | None  # the slowest of the small ones ÷ what it needs when it is alone
    overhead: float  # of the workspace that was done last: what its slowest call does not explain
    accepted: list[float]  # when the provider accepted each call
    unfinished: int  # images that a peer had not done when it was stopped


async def measure(
    console: Console,
    *,
    speed: float,
    only: Sequence[str] = (),
    without_peers: bool = False,
    picture: Path | None = None,
) -> Result:
    """All mixes with autotag and the peers; ``picture`` gets a plot of the first mix."""
    mixes = {name: mix for name, mix in MIXES.items() if not only or name in only}
    drawings = list(draw(max(sum(u.images for u in mix) for mix in mixes.values()) + WARM_UP))
    runs: list[Run] = []
    if not without_peers:
        await asyncio.to_thread(peers.litellm_python)
    with local_postgres(machine_binaries()) as postgres:
        install_autotag(postgres)
        async with local_stack(postgres, plan=_plan(speed)) as stack:
            alone = await _autotag(stack, "alone", ALONE, drawings, speed, 0.0)
        console.print("what is reserved, after 200 images of mixed shapes …")
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
    slowdowns = [run.mice_slowdown for run in ours if run.mice_slowdown is not None]
    if slowdowns:
        figures["mice_slowdown"] = Figure(max(slowdowns), 1.5, "lower")
    return Result(
        "makespan", figures, {"speed": speed, "runs": [_rounded(run) for run in runs], "reservation": reservation}
    )


async def _reservation(stack: Stack, speed: float) -> dict[str, float]:
    """What the default model's images reserve of a minute's tokens, and what they use by the provider's book.

    Returns:
        ``{reserved, used (tokens an image), cap, metered (what the provider counted at admission), ratio, http_429}``.
    """
    stack.compress(speed)
    stack.configure(realtime_requests_per_minute=10_000, realtime_tokens_per_minute=10**9)
    stack.configure(broadcast_interval=f"{speed} s", provider_margin=f"{0.25 * speed} s")
    drawings = list(draw(LEARNED_AFTER + LEARNED_FROM, seed=7))
    database = stack.database_url()
    environment = {**stack.worker_environment(), "AUTOTAG_SLOTS": "400", "AUTOTAG_LOG_LEVEL": "error"}
    with open("/dev/null", "wb") as log, stack.configured(model=DEFAULT_MODEL):  # noqa: ASYNC230
        async with worker_process(environment, log):
            await _tag_in_fives(stack, drawings[:LEARNED_AFTER])
            with psycopg.connect(database, autocommit=True) as owner:
                row = owner.execute("select tokens_per_image, output_tokens from autotag.provider_limits").fetchone()
            await _tag_in_fives(stack, drawings[LEARNED_AFTER:])
    assert row is not None
    calls = [entry for entry in stack.simulator.request_log if entry["path"].endswith("/completions")]
    judged = [entry for entry in calls if entry["status"] == 200][-LEARNED_FROM:]
    used = statistics.mean(entry["usage"]["total_tokens"] for entry in judged)
    return {
        "reserved": row[0], "used": round(used, 1), "cap": row[1],
        "metered": round(statistics.mean(entry["tokens"] for entry in judged), 1),
        "ratio": round(row[0] / used, 3), "http_429": sum(entry["status"] == 429 for entry in calls),
    }  # fmt: skip


async def _tag_in_fives(stack: Stack, drawings: Sequence[Drawing]) -> None:
    """Uploads of five images, each of a workspace of its own, until all are tagged."""
    uploads = [await _store(stack, drawings[i : i + 5]) for i in range(0, len(drawings), 5)]
    jobs = [await asyncio.to_thread(_enqueue, stack.database_url(), assets) for assets in uploads]
    await _ends(stack.database_url(), dict(enumerate(jobs)), 0.0, 1.0)


def _rounded(run: Run) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(run).items() if k != "accepted"}


def _plan(speed: float) -> Plan:
    return Plan(latency=(LATENCY[0] / speed, LATENCY[1] / speed), speed=speed)


def _latencies(count: int, speed: float) -> list[float]:
    """What the simulator draws for the k-th call it accepts."""
    dice = Simulator(_plan(speed)).random
    return [dice.uniform(*_plan(speed).latency) * speed for _ in range(count)]


def _judge(
    system: str, name: str, mix: Sequence[Upload], owners: dict[frozenset[str], int], simulator: Simulator,
    started: float, speed: float, ends: dict[int, float] | None = None, alone: float = 0.0,
    longest: float | None = None,
) -> Run:  # fmt: skip
    """Reads the provider's book."""
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
    assert longest or not unfinished, f"{system}, {name}: {len(answered)} of {images} images were answered"
    ends = ends or done
    if longest and unfinished:
        counts = Counter(owners[frozenset(entry["tags"])] for entry in answered)
        ends |= {u.workspace: longest for u in mix if counts[u.workspace] < u.images}
    took = {upload.workspace: ends[upload.workspace] - upload.at for upload in mix}
    small = [u.workspace for u in mix if u.images == 3] if name == MICE else []
    mice = [took[w] / (slowest.get(w, LATENCY[1]) + alone) for w in small]
    latencies = _latencies(images, speed)
    sizes = [float(entry["tokens"]) for entry in sorted(answered, key=lambda entry: entry["at"])]
    sizes += [bound.Limits().tokens_per_call] * (images - len(sizes))
    least = bound.minimum(mix, bound.Limits(), latencies, sizes)
    fair = bound.fair_finishes(mix, bound.Limits(), latencies, sizes)
    shares = [min(1.0, fair[w] / ends[w]) for w in ends]
    return Run(
        system, name, max(ends.values()), max(ends.values()) / least, sum(entry["status"] == 429 for entry in calls),
        statistics.mean(took.values()), max(took.values()),
        sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares)), min(shares),
        max(mice) if mice else None, max(took[w] - slowest.get(w, 0.0) for w in took),
        sorted((entry["at"] - started) * speed for entry in answered), unfinished,
    )  # fmt: skip


def _shares(mix: Sequence[Upload], drawings: Sequence[Drawing]) -> list[Sequence[Drawing]]:
    """Each upload's pictures; no picture is in two."""
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
        owner.execute(
            "truncate autotag.jobs, autotag.workspaces, autotag.workers, public.workspace_rate_limits cascade"
        )
        owner.execute("update autotag.provider_limits set refilled_at = '-infinity', blocked_until = '-infinity'")
    # What a message takes from here to the provider is real time, which is not compressed; so the margin is not.
    stack.compress(speed)
    stack.configure(realtime_requests_per_minute=10_000, realtime_tokens_per_minute=10**9)  # tier 1 is what binds
    stack.configure(model=MODEL, broadcast_interval=f"{speed} s", provider_margin=f"{0.25 * speed} s")
    uploads = [await _store(stack, share) for share in shares]
    log = open("/dev/null", "wb")  # noqa: ASYNC230, SIM115 (closed below)
    environment = {**stack.worker_environment(), "AUTOTAG_SLOTS": "400", "AUTOTAG_LOG_LEVEL": "error"}
    async with worker_process(environment, log):
        await _warm_up(stack, database, drawings[-WARM_UP:])
        stack.simulator.request_log.clear()
        stack.simulator.random.seed(stack.simulator.plan.seed)
        stack.simulator.limits = Limits.of(500, 200_000, 10_000, speed)
        started = time.time()

        async def enqueue(upload: Upload, assets: list[str]) -> tuple[int, str]:
            await asyncio.sleep(max(0.0, started + upload.at / speed - time.time()))
            return upload.workspace, await asyncio.to_thread(_enqueue, database, assets)

        jobs = dict(await asyncio.gather(*(enqueue(u, a) for u, a in zip(mix, uploads, strict=True))))
        ends = await _ends(database, jobs, started, speed)
    log.close()
    return _judge("autotag", name, mix, owners, stack.simulator, started, speed, ends, alone)


async def _store(stack: Stack, share: Sequence[Drawing]) -> list[str]:
    """Files and rows of one upload."""
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
        row = connection.execute("select public.enqueue_tagging(%s::uuid[]) ->> 'job_id'", (assets,)).fetchone()
    assert row is not None
    return str(row[0])


async def _warm_up(stack: Stack, database: str, drawings: Sequence[Drawing]) -> None:
    """A small upload ahead of time, as a service that runs has had; then every bucket is full again."""
    assets = await _store(stack, drawings)
    job = await asyncio.to_thread(_enqueue, database, assets)
    await _ends(database, {0: job}, 0.0, 1.0)
    await asyncio.sleep(SETTLE)
    with psycopg.connect(database, autocommit=True) as owner:
        owner.execute("update autotag.provider_limits set refilled_at = '-infinity'")


async def _ends(database: str, jobs: dict[int, str], started: float, speed: float) -> dict[int, float]:
    """When each workspace's job was committed as finished, seconds of the limits' time after the start."""
    statement = (
        "select id::text, extract(epoch from timestamptz '2026-01-01' + (finished_at - timestamptz '2026-01-01') / %s)"
        " from autotag.jobs where id = any (%s::uuid[]) and finished_at is not null"
    )
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        while True:
            rows = await (await connection.execute(statement, (speed, list(jobs.values())))).fetchall()
            if len(rows) == len(jobs):
                moments = {str(job): (float(at) - started) * speed for job, at in rows}
                return {workspace: moments[job] for workspace, job in jobs.items()}
            await asyncio.sleep(0.1)


async def _peer(peer: str, name: str, mix: Sequence[Upload], drawings: Sequence[Drawing], speed: float) -> Run:
    question = Question(0, MODEL, "low", 10, "English")
    shares = _shares(mix, drawings)
    owners = {d.tags: u.workspace for u, share in zip(mix, shares, strict=True) for d in share}
    jobs = [
        peers.Job(
            upload.at,
            [request_body(question, data_url(prepare(d.data, 512, 10**8)), 400) for d in share],
            int(bound.Limits().tokens_per_call),
        )
        for upload, share in zip(mix, shares, strict=True)
    ]
    simulator, port = Simulator(_plan(speed)), free_port()
    async with serve(simulator.app(), HOST, port):
        started = time.time()
        longest = PATIENCE * bound.minimum(mix, bound.Limits(), _latencies(sum(u.images for u in mix), speed))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest / speed):
                await peers.PEERS[peer](f"http://{HOST}:{port}/v1", simulator.plan.key, jobs, speed)
    first = min(entry["at"] for entry in simulator.request_log)
    return _judge(peer, name, mix, owners, simulator, max(started, first), speed, longest=longest)


def draw_admissions(runs: Sequence[Run], picture: Path) -> None:
    """Accepted calls over time of the first mix, next to the most that any schedule could have had accepted."""
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
    axes.set_xlim(0, 2 * best[-1])  # who is slower than that leaves the picture
    axes.set_ylim(0)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


def show(console: Console, result: Result) -> None:
    """The runs as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("mix", "system", "÷ minimum", "429s", "mean s", "worst s", "Jain", "least share", "mice ×"):
        table.add_column(column, justify="left" if column in ("mix", "system") else "right")
    for run in result.details["runs"]:
        mice = "" if run["mice_slowdown"] is None else f"{run['mice_slowdown']:.2f}"
        ratio = f"{'≥ ' if run['unfinished'] else ''}{run['ratio']:.3f}"
        table.add_row(run["mix"], run["system"], ratio, str(run["http_429"]), f"{run['mean']:.1f}",
                      f"{run['worst']:.1f}", f"{run['jain']:.3f}", f"{run['least_share']:.2f}", mice)  # fmt: skip
    console.print(table)
