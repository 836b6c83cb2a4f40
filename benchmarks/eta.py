"""The accuracy of predicted finish times: replays histories of batches against `autotag.predict_batch`.

A history is a sequence of batches with their actual durations and paces. The bench asks for a prediction when a batch
is submitted and at several shares of its progress. At each of these times the database knows only the batches that have
ended and the progress of those in flight. Recorded histories come from a deployment's table:
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
TYPICAL = 2400.0  # seconds of a batch of 100 images
BAD_DAY, SLOWDOWN = 5, 10.0  # the day, and the factor by which its batches are slower
#: Progress of a batch at which a prediction is made; 0: its submission.
SHARES = (0.0, 0.1, 1 / 3, 0.5, 2 / 3, 0.9)
ONE_THIRD = 1 / 3


@dataclass(frozen=True)
class Batch:
    """The actual course of one batch."""

    images: int
    started: datetime
    seconds: float
    wait: float  # share of its duration before any progress
    bend: float  # 1: even progress; more than 1: slower at first

    def share_at(self, time: datetime) -> float:
        """The share of the batch that is done at a time."""
        age = (time - self.started).total_seconds() / self.seconds
        return float(min(1.0, max(0.0, (age - self.wait) / (1 - self.wait))) ** self.bend)

    def time_at(self, share: float) -> datetime:
        return self.started + timedelta(seconds=self.seconds * (self.wait + (1 - self.wait) * share ** (1 / self.bend)))


@dataclass(frozen=True)
class Prediction:
    """One prediction and the actual duration; in seconds since the submission."""

    share: float
    age: float
    p50: float
    p90: float
    real: float

    @property
    def error(self) -> float:
        """The error of the median, relative to the time left."""
        return abs(self.p50 - self.real) / max(self.real - self.age, 1.0)


def histories() -> dict[str, list[Batch]]:
    """The synthetic histories by name."""
    return {
        "steady": _stream(1, lambda _: 1.0),
        "busy afternoons": _stream(2, lambda at: 1 + 2 * max(0.0, math.sin((at.hour - 9) / 12 * math.pi))),
        "a bad day": _stream(3, lambda at: SLOWDOWN if (at - START).days == BAD_DAY else 1.0),
        "slower every day": _stream(4, lambda at: 1.35 ** (at - START).days),
        "the first hours": _stream(5, lambda _: 1.0)[:12],
    }


def _stream(seed: int, factor: Any) -> list[Batch]:
    rng = random.Random(seed)
    batches, at = [], START
    while (at - START).days < DAYS:
        at += timedelta(seconds=rng.expovariate(PER_DAY / 86_400))
        images = rng.choice((60, 100, 100, 100, 200, 500))
        seconds = TYPICAL * factor(at) * (images / 100) ** 0.3 * math.exp(rng.gauss(0, 0.5))
        batches.append(_batch(rng, images, at, seconds))
    return batches


def _batch(rng: random.Random, images: int, at: datetime, seconds: float) -> Batch:
    return Batch(images, at, min(seconds, 86_000.0), rng.uniform(0.1, 0.5), math.exp(rng.gauss(0, 0.15)))


def _recorded(path: Path) -> list[Batch]:
    """A deployment's recorded batches. Their progress was not recorded, so it is drawn at random."""
    rng = random.Random(6)
    with path.open(newline="") as file:
        rows = [
            _batch(rng, int(row["images"]), datetime.fromisoformat(row["started_at"]), float(row["seconds"]))
            for row in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda batch: batch.started)


def measure(console: Console, recorded: Path | None) -> Result:
    """Replays every history, each with empty tables."""
    chosen = histories() | ({"recorded": _recorded(recorded)} if recorded else {})
    all_predictions: list[Prediction] = []
    details: dict[str, Any] = {}
    with local_postgres(machine_binaries()) as server:
        install_autotag(server)
        with psycopg.connect(server.url(), autocommit=True) as owner:
            for name, batches in chosen.items():
                console.print(f"{name}: {len(batches)} batches …")
                predictions = _replay(owner, batches)
                all_predictions += predictions
                details[name] = _describe(predictions)
    figures = {
        "p90_coverage": Figure(_coverage(all_predictions), 0.85, "higher", maximum=0.95),
        "median_abs_error": Figure(_error(all_predictions), 0.25, "lower"),
    }
    return Result("eta", figures, details)


def _coverage(predictions: list[Prediction]) -> float:
    return sum(prediction.real <= prediction.p90 for prediction in predictions) / len(predictions)


def _error(predictions: list[Prediction]) -> float:
    """The median error of the time left, for batches that are at least a third done."""
    return statistics.median(prediction.error for prediction in predictions if prediction.share >= ONE_THIRD)


def _describe(predictions: list[Prediction]) -> dict[str, Any]:
    shares = sorted({prediction.share for prediction in predictions})
    return {
        "p90_coverage": round(_coverage(predictions), 3),
        "median_abs_error": round(_error(predictions), 3),
        "by share done": {
            f"{share:.2f}": {
                "p90_coverage": round(_coverage(subset), 3),
                "median error of the time left": round(statistics.median(g.error for g in subset), 3),
            }
            for share in shares if (subset := [g for g in predictions if g.share == share])
        },
    }  # fmt: skip


def _replay(owner: psycopg.Connection[Any], batches: list[Batch]) -> list[Prediction]:
    """Replays a history and predicts at every share."""
    owner.execute("truncate autotag.durations, autotag.jobs cascade")
    predictions = []
    in_flight: dict[str, Batch] = {}
    events: list[tuple[datetime, int, str, float]] = []
    for number, batch in enumerate(batches):
        name = str(uuid.UUID(int=number + 1))
        for share in SHARES:
            time = batch.started if share == 0 else batch.time_at(share)
            heapq.heappush(events, (time, number, name, share))
        heapq.heappush(events, (batch.started + timedelta(seconds=batch.seconds), number, name, 2.0))
    while events:
        now, number, name, share = heapq.heappop(events)
        batch = batches[number]
        if share > 1:
            del in_flight[name]
            owner.execute("delete from autotag.jobs where id = %s", (name,))
            owner.execute("insert into autotag.durations (images, started_at, seconds) values (%s, %s, %s)",
                          (batch.images, batch.started, batch.seconds))  # fmt: skip
            continue
        if share == 0:
            in_flight[name] = batch
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
                     other.time_at(0) if other.time_at(0) <= now else None, key)
                    for key, other in in_flight.items()
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
        predictions.append(Prediction(share, (now - batch.started).total_seconds(), row[0], row[1], batch.seconds))
    return predictions
