"""How far predictions can be believed: histories of batches are replayed against `autotag.predict_batch`.

Each history is a stream of batches with their true lengths and paces. At their submission and on their way the
database is asked what it predicts, knowing only what it would know then: the batches that have ended, and how far
those in flight are. Recorded histories come from a deployment's own table:
``copy (select images, started_at, seconds from autotag.durations) to stdout csv header``.
"""

from __future__ import annotations

import csv
import heapq
import math
import random
import statistics
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console

from benchmarks.report import Figure, Result
from lab.postgres import install_autotag, local_postgres, machine_binaries

START = datetime(2026, 3, 1, tzinfo=UTC)
DAYS, PER_DAY = 8, 40
TYPICAL = 2400.0  # seconds, of a batch of 100 images
BAD_DAY, SLOWER = 5, 10.0
#: Shares of a batch at which it is looked at; a batch that has not moved has 0.
LOOKS = (0.0, 0.1, 1 / 3, 0.5, 2 / 3, 0.9)
A_THIRD = 1 / 3


@dataclass(frozen=True)
class Batch:
    """One batch as it really went."""

    images: int
    started: datetime
    seconds: float
    wait: float  # share of its length before anything moved
    bend: float  # 1: even progress; more: slow at first

    def share_at(self, moment: datetime) -> float:
        """How much is done."""
        age = (moment - self.started).total_seconds() / self.seconds
        return float(min(1.0, max(0.0, (age - self.wait) / (1 - self.wait))) ** self.bend)

    def moment_of(self, share: float) -> datetime:
        return self.started + timedelta(seconds=self.seconds * (self.wait + (1 - self.wait) * share ** (1 / self.bend)))


@dataclass(frozen=True)
class Guess:
    """One prediction and what came of it; seconds."""

    share: float
    age: float
    p50: float
    p90: float
    real: float

    @property
    def error(self) -> float:
        """Of the time left."""
        return abs(self.p50 - self.real) / max(self.real - self.age, 1.0)


def histories() -> dict[str, list[Batch]]:
    """The synthetic ones, by name."""
    return {
        "steady": _stream(1, lambda _: 1.0),
        "busy afternoons": _stream(2, lambda at: 1 + 2 * max(0.0, math.sin((at.hour - 9) / 12 * math.pi))),
        "a bad day": _stream(3, lambda at: SLOWER if (at - START).days == BAD_DAY else 1.0),
        "slower every day": _stream(4, lambda at: 1.35 ** (at - START).days),
        "the first hours": _stream(5, lambda _: 1.0)[:12],
    }


def _stream(seed: int, factor: Any) -> list[Batch]:
    dice = random.Random(seed)
    batches, at = [], START
    while (at - START).days < DAYS:
        at += timedelta(seconds=dice.expovariate(PER_DAY / 86_400))
        images = dice.choice((60, 100, 100, 100, 200, 500))
        seconds = TYPICAL * factor(at) * (images / 100) ** 0.3 * math.exp(dice.gauss(0, 0.5))
        batches.append(_batch(dice, images, at, seconds))
    return batches


def _batch(dice: random.Random, images: int, at: datetime, seconds: float) -> Batch:
    return Batch(images, at, min(seconds, 86_000.0), dice.uniform(0.1, 0.5), math.exp(dice.gauss(0, 0.15)))


def _recorded(path: Path) -> list[Batch]:
    """A deployment's own batches; how they went on the way is not recorded and made up."""
    dice = random.Random(6)
    with path.open(newline="") as file:
        rows = [
            _batch(dice, int(row["images"]), datetime.fromisoformat(row["started_at"]), float(row["seconds"]))
            for row in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda batch: batch.started)


def measure(console: Console, recorded: Path | None) -> Result:
    """Replays every history in a database of its own."""
    chosen = histories() | ({"recorded": _recorded(recorded)} if recorded else {})
    everything: list[Guess] = []
    details: dict[str, Any] = {}
    with local_postgres(machine_binaries()) as server:
        install_autotag(server)
        with psycopg.connect(server.url(), autocommit=True) as owner:
            for name, batches in chosen.items():
                console.print(f"{name}: {len(batches)} batches …")
                guesses = _replay(owner, batches)
                everything += guesses
                details[name] = _describe(guesses)
    figures = {
        "p90_coverage": Figure(_coverage(everything), 0.85, "higher", most=0.95),
        "median_abs_error": Figure(_error(everything), 0.25, "lower"),
    }
    return Result("eta", figures, details)


def _coverage(guesses: list[Guess]) -> float:
    return sum(guess.real <= guess.p90 for guess in guesses) / len(guesses)


def _error(guesses: list[Guess]) -> float:
    """The median error of the time left, of batches that are a third through."""
    return statistics.median(guess.error for guess in guesses if guess.share >= A_THIRD)


def _describe(guesses: list[Guess]) -> dict[str, Any]:
    looks = sorted({guess.share for guess in guesses})
    return {
        "p90_coverage": round(_coverage(guesses), 3),
        "median_abs_error": round(_error(guesses), 3),
        "by share done": {
            f"{share:.2f}": {
                "p90_coverage": round(_coverage(some), 3),
                "median error of the time left": round(statistics.median(g.error for g in some), 3),
            }
            for share in looks if (some := [g for g in guesses if g.share == share])
        },
    }  # fmt: skip


def _replay(owner: psycopg.Connection[Any], batches: list[Batch]) -> list[Guess]:
    """Plays a history; asks at every look."""
    owner.execute("truncate autotag.durations, autotag.jobs cascade")
    guesses = []
    flying: dict[str, Batch] = {}
    events: list[tuple[datetime, int, str, float]] = []
    for number, batch in enumerate(batches):
        name = str(uuid.UUID(int=number + 1))
        for share in LOOKS:
            moment = batch.started if share == 0 else batch.moment_of(share)
            heapq.heappush(events, (moment, number, name, share))
        heapq.heappush(events, (batch.started + timedelta(seconds=batch.seconds), number, name, 2.0))
    while events:
        now, number, name, share = heapq.heappop(events)
        batch = batches[number]
        if share > 1:
            del flying[name]
            owner.execute("delete from autotag.jobs where id = %s", (name,))
            owner.execute("insert into autotag.durations (images, started_at, seconds) values (%s, %s, %s)",
                          (batch.images, batch.started, batch.seconds))  # fmt: skip
            continue
        if share == 0:
            flying[name] = batch
            owner.execute("insert into autotag.jobs (id, workspace_id, strategy, image_count, created_at)"
                          " values (%s, %s, 'batch', %s, %s)", (name, name, batch.images, now))  # fmt: skip
            owner.execute(
                "insert into autotag.batches (id, job_id, workspace_id, ordinal, image_count, state, submitted_at,"
                " created_at, request_total) values (%s, %s, %s, 1, %s, 'submitted', %s, %s, %s)",
                (name, name, name, batch.images, now, now, batch.images),
            )
        with owner.cursor() as cursor:
            cursor.executemany(
                "update autotag.batches set request_done = %s, running_at = %s where id = %s",
                [
                    (int(other.share_at(now) * other.images),
                     other.moment_of(0) if other.moment_of(0) <= now else None, key)
                    for key, other in flying.items()
                ],
            )  # fmt: skip
        row = owner.execute(
            "select p.p50, p.p90 from autotag.batches b, autotag.predict_batch(b.image_count, b.submitted_at, %s,"
            " b.running_at, b.request_done::float / b.request_total, b.id) p where b.id = %s",
            (now, name),
        ).fetchone()
        assert row is not None
        if share == 0:
            owner.execute("update autotag.batches set predicted_seconds = %s where id = %s", (row[0], name))
        guesses.append(Guess(share, (now - batch.started).total_seconds(), row[0], row[1], batch.seconds))
    return guesses
