"""Measures how long the images of a quiet tenant take beside hostile neighbours, compared with friendly ones.

Phases with friendly and with hostile neighbours (`lab.chaos.hostilities`) alternate. Both kinds of phase have the same
number of neighbours, uploads, killed workers and broken connections, drawn from the same random numbers. At the end,
the auditor compares the ledger of all uploads with the database, the provider's request log and the broadcasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psycopg
import typer
from rich.console import Console

from benchmarks.report import Figure, Result, quantile
from lab.chaos.crew import Crew
from lab.chaos.forks import fork_server
from lab.chaos.hostile_triggers import ALL_KINDS
from lab.chaos.hostile_uploads import Storm
from lab.chaos.hostilities import Friendly, Hostility, happen_often, wait_for
from lab.chaos.tenants import Project, Tenant, open_project, widen
from lab.machine import processor_time
from lab.pictures import Drawing, draw
from lab.postgres import install_autotag, local_postgres, machine_binaries
from lab.proxy import Proxy
from lab.stack import local_stack

WORKERS = 2
QUIET = 4  # quiet tenants
QUIET_PAUSE = 1.2  # mean seconds between two uploads of a quiet tenant
QUIET_SIZES = (1, 1, 1, 1, 2, 2, 3, 4, 8, 20)  # images of an upload; the last size is sent in a batch
FILES, QUIET_FILES = 10, 30  # pictures of each tenant
SHRINK = 6  # the pictures are small, so that their preparation does not decide how long an image takes
PAUSE = (2.0, 20.0)  # seconds between two actions of a neighbour
#: Seconds between two kills. A kill delays its worker's images until the lease ends. With fewer kills, that is about
#: one upload in a hundred, and chance decides whether the p99 is such an upload (0.9 to 4.3 s for the same friendly
#: phase).
KILL_EVERY = (5.0, 11.0)
CUT_EVERY = (0.8, 2.2)  # seconds
POLL = 0.05  # seconds
LEASE = 6.0  # seconds until the work of a killed worker continues
DRAIN = 90.0  # seconds after a phase in which all its uploads must end
FIRST = 1.0  # seconds between the workers' start and a phase
#: The share of the machine's processor time that friendly neighbours may take. Hostile ones take more. On a machine
#: that is always busy, the result would show that, not who waits for whom.
BUSY = 0.5
TRIAL = 10.0  # seconds of friendly traffic that show how busy the machine is


@dataclass
class Phase:
    """The measurements of one phase."""

    hostile: bool
    seconds: list[float] = field(default_factory=list)  # from the call of enqueue_tagging to the last tags of an upload
    calm: list[float] = field(default_factory=list)  # the same for uploads during which no worker was dead
    drained: float | None = None  # seconds until all uploads had ended; None: some did not
    busy: float = 0.0  # share of the machine's processor time during its traffic

    def as_json(self) -> dict[str, Any]:
        """For the details."""
        return {
            "neighbours": "hostile" if self.hostile else "friendly", "uploads": len(self.seconds),
            "p50": round(quantile(self.seconds, 0.5), 3), "p99": round(quantile(self.seconds, 0.99), 3),
            "slowest": round(max(self.seconds), 3), "calm p99": round(quantile(self.calm or [0.0], 0.99), 3),
            "busy": round(self.busy, 2),
            "drained after": None if self.drained is None else round(self.drained, 1),
        }  # fmt: skip


@dataclass
class Watched:
    """An upload of a quiet tenant whose images are not all tagged."""

    began: float  # of time.monotonic()
    epoch: float
    left: set[str]


class Street:
    """One project, its tenants and its workers."""

    def __init__(self, project: Project, crew: Crew, seed: int) -> None:
        self._project, self._crew, self._seed = project, crew, seed
        self._drawings = draw(10_000, seed, SHRINK)
        self.quiet: list[Tenant] = []
        self.hostile: list[Hostility] = []
        self.friendly: list[Hostility] = []
        self.phases: list[Phase] = []
        self.pace = 1.0  # factor by which all pauses of tenants are longer
        self.troubles: list[str] = []  # errors of the tenants' own calls
        self._watched: list[Watched] = []

    async def move_in(self, kinds: Sequence[type[Hostility]]) -> None:
        """Creates the tenants and their pictures."""
        self.quiet = [await self._make(QUIET_FILES) for _ in range(QUIET)]
        for kind in kinds or ALL_KINDS:
            self.hostile.append(kind(await self._make(FILES)) if kinds else Friendly(await self._make(FILES), kind))
            self.friendly.append(Friendly(await self._make(FILES), kind))
        for hostility in self.hostile:
            await hostility.install()

    async def _make(self, files: int) -> Tenant:
        drawings: list[Drawing] = list(islice(self._drawings, files))
        tenant = Tenant(self._project, random.Random(f"{self._seed} {len(self.quiet)} {len(self.hostile)}"))
        await tenant.store(drawings)
        return tenant

    async def find_pace(self) -> None:
        """Makes the tenants slower until friendly ones leave enough of the machine's processor time."""
        for _ in range(5):
            trial = await self.phase(0, TRIAL, hostile=False)
            if trial.busy <= BUSY:
                return
            self.pace *= trial.busy / BUSY

    async def phase(self, number: int, seconds: float, *, hostile: bool) -> Phase:
        """Makes traffic for a time, then waits until all uploads have ended."""
        phase = Phase(hostile)
        ending = asyncio.Event()
        # Both phases of a pair draw the same random numbers.
        neighbours = self.hostile if hostile else self.friendly
        rngs = [random.Random(f"{self._seed} {number // 2} {place}") for place in range(len(neighbours))]
        watching = asyncio.create_task(self._watch(phase))
        work = [
            *(self._live(neighbour, rng, ending) for neighbour, rng in zip(neighbours, rngs, strict=True)),
            *(self._upload_quietly(tenant, random.Random(f"{number // 2} {i}"), ending)
              for i, tenant in enumerate(self.quiet)),
            self._break(random.Random(f"{self._seed} {number // 2} breaks"), ending),
        ]  # fmt: skip
        tasks = [asyncio.create_task(job) for job in work]
        before = processor_time()
        await asyncio.sleep(seconds)
        used, all_of_it = (now - then for now, then in zip(processor_time(), before, strict=True))
        phase.busy = used / all_of_it
        ending.set()
        await asyncio.gather(*tasks)
        phase.drained = await self._drain()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        phase.seconds += [time.monotonic() - upload.began for upload in self._watched]  # those that never ended
        self._watched.clear()
        return phase

    async def _drain(self) -> float | None:
        began = time.monotonic()
        while time.monotonic() < began + DRAIN:
            with contextlib.suppress(psycopg.Error):
                if not await self._project.live():
                    return time.monotonic() - began
            await asyncio.sleep(0.1)
        return None

    # -- the neighbours

    async def _live(self, neighbour: Hostility, rng: random.Random, ending: asyncio.Event) -> None:
        """Runs one neighbour until the phase ends."""
        if isinstance(neighbour, Friendly) and neighbour.images >= Storm.images:
            await self._spread(neighbour, ending)
        else:
            pause = (PAUSE[0] * self.pace, PAUSE[1] * self.pace)
            await happen_often(neighbour, rng, ending, pause=pause, on_error=self.troubles.append)

    async def _spread(self, neighbour: Hostility, ending: asyncio.Event) -> None:
        """Uploads as many images as a storm, but gradually."""
        for _ in range(neighbour.images // 10):
            await neighbour.tenant.upload(10)
            if await wait_for(ending, 0.4 * self.pace):
                return
        await ending.wait()

    async def _break(self, rng: random.Random, ending: asyncio.Event) -> None:
        """Kills workers and breaks connections."""

        async def often(every: tuple[float, float], what: Any) -> None:
            while not await wait_for(ending, rng.uniform(*every)):
                await what()

        async def kill() -> None:
            self._crew.kill(rng)

        async def cut() -> None:
            await self._crew.cut(rng)

        await asyncio.gather(often(KILL_EVERY, kill), often(CUT_EVERY, cut))

    # -- the quiet tenants

    async def _upload_quietly(self, tenant: Tenant, rng: random.Random, ending: asyncio.Event) -> None:
        tenant.rng = rng
        uploads: set[asyncio.Task[None]] = set()
        while not await wait_for(ending, rng.expovariate(1 / QUIET_PAUSE) * self.pace):
            task = asyncio.create_task(self._upload_one(tenant, rng.choice(QUIET_SIZES)))
            uploads.add(task)
            task.add_done_callback(uploads.discard)
        await asyncio.gather(*uploads)

    async def _upload_one(self, tenant: Tenant, size: int) -> None:
        try:
            assets = await tenant.insert(tenant.choose(size))
            self._watched.append(Watched(time.monotonic(), time.time(), set(assets)))
            await tenant.enqueue(assets)
        except psycopg.Error as error:
            self.troubles.append(f"quiet tenant: {type(error).__name__}: {str(error).splitlines()[0]}")

    async def _watch(self, phase: Phase) -> None:
        """Records when the last image of each quiet upload has its tags."""
        while True:
            await asyncio.sleep(POLL)
            waiting = [asset for upload in self._watched for asset in upload.left]
            if not waiting:
                continue
            with contextlib.suppress(psycopg.Error):
                rows = await self._project.execute(
                    "select id::text from public.assets where id = any (%s::uuid[]) and tagging_stage = 'completed'",
                    waiting,
                )
                now, done = time.monotonic(), {row[0] for row in rows}
                for upload in self._watched:
                    upload.left -= done
                    if not upload.left:
                        phase.seconds.append(now - upload.began)
                        if not any(upload.epoch - LEASE < kill < time.time() for kill in self._crew.kills):
                            phase.calm.append(now - upload.began)
                self._watched = [upload for upload in self._watched if upload.left]


def find_kinds(names: Sequence[str] | None) -> list[type[Hostility]]:
    """The hostilities whose names contain one of these names; all if there are no names.

    Raises:
        typer.BadParameter: no hostility matches.
    """
    found = [kind for kind in ALL_KINDS if not names or any(name in kind.name for name in names)]
    if not found and names != ["none"]:
        raise typer.BadParameter("The kinds are: " + "; ".join(kind.name for kind in ALL_KINDS))
    return found


async def measure(
    console: Console, *, seconds: float, pairs: int, seed: int, kinds: Sequence[type[Hostility]]
) -> Result:
    """Runs ``pairs`` times two phases of ``seconds``.

    Args:
        console: for progress.
        seconds: the length of each phase.
        pairs: pairs of phases.
        seed: seed of the traffic and of the faults.
        kinds: the hostilities, with a tenant for each. If there are none, all phases are friendly, and the ratios show
            how far measurements of the same thing differ.
    """
    log = Path(tempfile.mkdtemp(prefix="autotag-neighbours-")) / "workers.log"
    with local_postgres(machine_binaries()) as server:
        install_autotag(server)
        async with local_stack(server) as stack, open_project(stack) as project, fork_server() as forks:
            stack.simulator.plan.latency, stack.simulator.plan.batch_latency = (0.1, 0.3), (0.3, 0.8)
            widen(stack)
            proxy = Proxy(stack.database_url())
            crew = Crew(forks, project, log, WORKERS, proxy)
            street = Street(project, crew, seed)
            await street.move_in(kinds)
            async with proxy.serve(), project.ticks(), crew.work():
                await asyncio.sleep(FIRST)
                await street.find_pace()
                console.print(f"pauses are {street.pace:.2f} times as long")
                for number in range(2 * pairs):
                    # The order ABBA, so that a machine that slows down does not favour one kind.
                    hostile = (number % 4) in (1, 2)
                    phase = await street.phase(number, seconds * street.pace, hostile=hostile)
                    street.phases.append(phase)
                    console.print(phase.as_json())
                    if phase.drained is None:
                        break  # its unfinished uploads would disturb the following phases
            violations = await asyncio.to_thread(crew.audit)
            happened = {hostility.name: await hostility.happened() for hostility in street.hostile}
    return evaluate(street, crew, violations, happened)


def evaluate(street: Street, crew: Crew, violations: list[str], happened: dict[str, int]) -> Result:
    """The figures and their details."""
    friendly, hostile = ([p for p in street.phases if p.hostile is kind] for kind in (False, True))
    figures = {
        "quiet_p99_ratio": Figure(_ratio(hostile, friendly, 0.99), 1.5, "lower"),
        "violations": Figure(len(violations), 0, "lower"),
        "hostilities": Figure(sum(count > 0 for count in happened.values()), 12, "higher"),
        "kills_and_cuts": Figure(crew.breaks.total(), 200, "higher"),
    }
    kinds: dict[str, int] = defaultdict(int)
    for sentence in violations:
        kinds[_kind(sentence)] += 1
    details = {
        "quiet_p50_ratio": round(_ratio(hostile, friendly, 0.5), 3),
        # without uploads that may have waited for the lease of a dead worker
        "calm_p99_ratio": round(_ratio(hostile, friendly, 0.99, calm=True), 3),
        **_noise(hostile, friendly), "pace": round(street.pace, 2),
        "phases": [phase.as_json() for phase in street.phases],
        "happened": happened, "broken": dict(crew.breaks), "kinds of violations": dict(kinds),
        "violations": violations[:40], "troubles of tenants": street.troubles[:20],
    }  # fmt: skip
    return Result("neighbours", figures, details)


def _ratio(hostile: list[Phase], friendly: list[Phase], share: float, *, calm: bool = False) -> float:
    """The ratio hostile ÷ friendly of a quantile over all uploads of all phases of each kind."""
    values = [[s for p in phases for s in (p.calm if calm else p.seconds)] for phases in (hostile, friendly)]
    above, below = (quantile(seconds, share) if seconds else 0.0 for seconds in values)
    return above / below if below else 0.0


def _noise(hostile: list[Phase], friendly: list[Phase]) -> dict[str, Any]:
    """How far the ratio of the p99 can be off: a bootstrap over uploads, and friendly phases compared."""
    rng = random.Random(1)
    drawn = sorted(
        _ratio(
            [Phase(True, rng.choices(p.seconds, k=len(p.seconds))) for p in hostile],
            [Phase(False, rng.choices(p.seconds, k=len(p.seconds))) for p in friendly],
            0.99,
        )
        for _ in range(500)
    )
    p99 = [quantile(phase.seconds, 0.99) for phase in friendly]
    return {
        "p99 ratio, 90 % interval": [round(drawn[25], 2), round(drawn[474], 2)],
        "p99 of friendly phases, largest ÷ smallest": round(max(p99) / min(p99), 2),
    }


def _kind(sentence: str) -> str:
    """The kind of a violation: its sentence without names."""
    if sentence.startswith("the picture of"):
        return "a picture was paid for too often"
    return " ".join(word for word in sentence.split() if not any(c.isdigit() for c in word))[:70]
