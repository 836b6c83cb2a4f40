"""A worker's Prometheus metrics: its own, and the database's metrics of the whole system.

Dashboards sum a worker's own metrics over the workers. The database's metrics (`_SYSTEM`) are the same from every
worker, so dashboards take their maximum.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from autotag.db.messages import BatchAnswer, Report, Usage
from autotag.db.operator_messages import Metrics

SAMPLE_INTERVAL = 5.0  # seconds between queries of the database; scrapes in between get the last result
READ_TIMEOUT = 5.0  # seconds for such a query

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

CLAIMS = Counter(
    "autotag_claims",
    "Claims of single calls, by the limit that they reached.",
    ["bound"],
    registry=REGISTRY,
)
CLAIMED = Counter("autotag_images_claimed", "Images released to this worker.", registry=REGISTRY)
ANSWERED = Counter(
    "autotag_images_answered", "Images by the outcome of their call or batch line (tagged, or the kind of error).",
    ["lane", "outcome"], registry=REGISTRY,
)  # fmt: skip
TOKENS = Counter("autotag_tokens", "Tokens that the provider billed.", ["lane", "type"], registry=REGISTRY)
TOKEN_KINDS: tuple[Literal["input", "cached", "cache_write", "output", "reasoning"], ...] = (
    "input", "cached", "cache_write", "output", "reasoning",
)  # fmt: skip
IN_FLIGHT = Gauge("autotag_in_flight", "Single calls (realtime) or batches in progress.", ["lane"], registry=REGISTRY)
#: The phases of a single call. waited: from the upload to the claim; fetched: fetching and preparing the image; called:
#: the call to the provider; settled: from the call of `settle` to its commit.
SECONDS = Histogram(
    "autotag_stage_seconds", "Seconds that an image of a single call spent in each stage.", ["stage"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800), registry=REGISTRY,
)  # fmt: skip
BATCH_SECONDS = Histogram(
    "autotag_batch_step_seconds", "Seconds that this worker took to submit or harvest a batch.", ["step"],
    buckets=(0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600), registry=REGISTRY,
)  # fmt: skip
DELIVERED = Counter(
    "autotag_outbox_messages_delivered", "Broadcasts sent over HTTP, where realtime.send() does not exist.",
    ["result"], registry=REGISTRY,
)  # fmt: skip

SHUTDOWN_DAYS = "autotag_model_shutdown_days"
#: Values of ``autotag.metrics()``: the key, and the metric's name and help.
_SYSTEM = (
    ("queued", "autotag_queue_images", "Images that wait for a single call."),
    ("queued_workspaces", "autotag_queue_workspaces", "Workspaces with images that wait for a single call."),
    (
        "oldest_queued",
        "autotag_queue_oldest_seconds",
        "Age of the oldest upload with images that wait for a single call.",
    ),
    ("delayed", "autotag_queue_retry_images", "Images that wait for a retry."),
    ("live", "autotag_live_images", "Images being tagged, in either lane."),
    ("work", "autotag_work_images", "Images that a worker could process now; KEDA scales by this."),
    ("oldest_batch", "autotag_batch_oldest_seconds", "Age of the oldest batch that has not ended."),
    ("requests_left", "autotag_provider_requests_left", "Requests left in the mirror of the provider's bucket."),
    ("requests_per_minute", "autotag_provider_requests_per_minute", "The provider's limit of requests."),
    ("tokens_left", "autotag_provider_tokens_left", "Tokens left in the mirror of the provider's bucket."),
    ("tokens_per_minute", "autotag_provider_tokens_per_minute", "The provider's limit of tokens."),
    (
        "blocked_seconds",
        "autotag_provider_blocked_seconds",
        "Seconds until calls continue after a 429.",
    ),
    ("account_error", "autotag_provider_account_error", "1 while tagging is paused; see autotag status."),
    ("workers", "autotag_workers", "Workers with a lease."),
    ("outbox", "autotag_outbox_messages", "Broadcasts that have not left the database."),
    (
        "oldest_message",
        "autotag_outbox_oldest_seconds",
        "Age of the oldest message in the outbox.",
    ),
    ("unstored", "autotag_unstored_images", "Images whose outcome waits for your table's row."),
    (
        "oldest_unstored",
        "autotag_unstored_oldest_seconds",
        "Age of the oldest outcome that waits for your table's row.",
    ),
    ("images_today", "autotag_images_today", "Images tagged since midnight UTC."),
    (
        "cost_today",
        "autotag_cost_today_dollars",
        "Cost of answers since midnight UTC, by the prices in autotag.models; see autotag_unpriced_answers_today.",
    ),
    ("unpriced_today", "autotag_unpriced_answers_today", "Answers since midnight UTC whose cost is unknown."),
)


@contextmanager
def timed(histogram: Histogram, label: str) -> Iterator[None]:
    """Observes the duration of the block in seconds, also if it fails."""
    started = time.perf_counter()
    try:
        yield
    finally:
        histogram.labels(label).observe(time.perf_counter() - started)


def count_answers(lane: str, reports: Iterable[Report] | Iterable[BatchAnswer]) -> None:
    """Counts the outcomes and tokens of reports to `Database.settle` or `Database.batch_answers`."""
    outcomes, usages = Counts[str](), list[Usage]()
    for report in reports:
        error = report.get("error")
        outcomes[error["kind"] if error else "tagged"] += 1
        if usage := report.get("usage"):
            usages.append(usage)
    for outcome, images in outcomes.items():
        ANSWERED.labels(lane, outcome).inc(images)
    if usages:
        for kind in TOKEN_KINDS:
            TOKENS.labels(lane, kind).inc(sum(usage[kind] for usage in usages))


class SystemMetrics(Collector):
    """The database's metrics, read at most every `SAMPLE_INTERVAL` seconds however often they are scraped."""

    def __init__(self, read: Callable[[], Awaitable[Metrics]]) -> None:
        self._read = read
        self._values: Mapping[str, Any] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()  # concurrent scrapes share one query and one connection

    async def is_paused(self) -> bool:
        """Whether tagging is paused, because the provider or Storage refuses the account.

        Raises:
            psycopg.Error, psycopg_pool.PoolTimeout, TimeoutError: the database did not answer.
        """
        await self._refresh()
        return bool(self._values["account_error"])

    async def _refresh(self) -> None:
        async with asyncio.timeout(READ_TIMEOUT), self._reading:
            if time.monotonic() - self._read_at >= SAMPLE_INTERVAL:
                self._values, self._read_at = await self._read(), time.monotonic()

    async def scrape(self) -> bytes:
        """All metrics in Prometheus' text format.

        Raises:
            psycopg.Error, psycopg_pool.PoolTimeout, TimeoutError: the database did not answer.
        """
        await self._refresh()
        registry = CollectorRegistry()
        registry.register(REGISTRY)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for key, name, text in _SYSTEM:
            yield GaugeMetricFamily(name, text, value=float(self._values.get(key) or 0))
        days = self._values.get("shutdown_days")
        if days is not None:
            yield GaugeMetricFamily(
                SHUTDOWN_DAYS, "Days until the model shuts down; absent: no shutdown date is known.", value=days
            )
        batches = GaugeMetricFamily("autotag_batches", "Batches that have not ended, by state.", labels=["state"])
        for state, count in self._values.get("batches", {}).items():
            batches.add_metric([state], count)
        yield batches
