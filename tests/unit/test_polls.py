"""Polls and cancellations of the batches in flight: an error costs one batch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, cast

import psycopg
import pytest
from openai.types import Batch as ListedBatch

from autotag.db import BatchClaim, DatabaseSettings, Question
from autotag.db.messages import ErrorReport, PolledBatch, Sought
from autotag.errors import TaggingError
from autotag.openai.records import ProviderBatch, ProviderFile, read_batch
from autotag.worker.files import Files
from autotag.worker.poll import MAX_POLLED, Poller

SETTINGS = DatabaseSettings(Question(1, "m", "low", 10, "English"), 1000)
IDS = [f"batch_{i}" for i in range(2 * MAX_POLLED + 5)]
ODD = IDS[3]


def running(name: str) -> ProviderBatch:
    return ProviderBatch(name, "in_progress", 1, {}, "file-1", None, None, 10, 5, None)


class FakeProvider:
    """Lists and retrieves batches, and raises the errors that the test wants."""

    def __init__(self, listed: list[str]) -> None:
        self.listed = listed
        self.files: list[str] = []
        self.list_error: TaggingError | None = None
        self.delete_errors: dict[str, TaggingError] = {}
        self.retrieve_errors: dict[str, TaggingError] = {}
        self.cancel_errors: dict[str, TaggingError] = {}
        self.calls: list[str] = []

    async def batches_since(self, _: float) -> AsyncIterator[ProviderBatch]:
        self.calls.append("list")
        for name in self.listed:
            yield running(name)
        if self.list_error:
            raise self.list_error

    async def retrieve_batch(self, name: str) -> ProviderBatch:
        self.calls.append(f"retrieve {name}")
        if name in self.retrieve_errors:
            raise self.retrieve_errors[name]
        return running(name)

    async def cancel_batch(self, name: str) -> ProviderBatch:
        self.calls.append(f"cancel {name}")
        if name in self.cancel_errors:
            raise self.cancel_errors[name]
        return replace(running(name), status="cancelling")

    async def delete_file(self, name: str) -> None:
        self.calls.append(f"delete {name}")
        if name in self.delete_errors:
            raise self.delete_errors[name]

    async def files_since(self, _: float) -> AsyncIterator[ProviderFile]:
        for number, name in enumerate(self.files):
            yield ProviderFile(f"file-{number}", name, 1)
        if self.list_error:
            raise self.list_error


class FakeDatabase:
    """Collects reports. A report with a batch in `refused` raises an error."""

    def __init__(self) -> None:
        self.refused: dict[tuple[str, str], Exception] = {}
        self.states: dict[str, str] = {}
        self.failures: list[ErrorReport] = []
        self.gone: list[str] = []

    async def record_poll(self, polled: list[PolledBatch]) -> list[str]:
        for batch in polled:
            if error := self.refused.get((batch["id"], batch["status"])):
                raise error
        self.states |= {batch["id"]: batch["status"] for batch in polled}
        return []

    async def report_poll_failure(self, error: ErrorReport) -> None:
        self.failures.append(error)

    async def files_deleted(self, files: list[str], batches: Sequence[str] = ()) -> None:
        self.gone += [*files, *batches]


class NoStages:
    def show(self, _: object) -> None:
        pass


def poller(provider: FakeProvider, db: FakeDatabase) -> Poller:
    given: Any = (cast("Any", db), cast("Any", provider))
    return Poller(*given, Files(*given), cast("Any", NoStages()))


async def poll(provider: FakeProvider, db: FakeDatabase, files: Sequence[str] = ()) -> None:
    claim = BatchClaim([], None, SETTINGS, poll=[Sought(name, 0) for name in IDS], files=list(files))
    await poller(provider, db).poll(claim)


async def test_what_the_provider_says_of_a_cancelled_batch_is_reported_at_once() -> None:
    """A batch that has just ended, or whose cancellation fails, does not prevent the other cancellations."""
    provider, db = FakeProvider(IDS), FakeDatabase()
    provider.cancel_errors = {
        IDS[0]: TaggingError("transient", "http_500", "m", status=500),
        IDS[1]: TaggingError("image", "conflict", "m", status=409),
        IDS[4]: TaggingError("rate_limit", "rate_limited", "m", status=429, retry_after=5),
    }
    await poller(provider, db).cancel(IDS[:6])
    assert provider.calls == [f"cancel {name}" for name in IDS[:5]], "after retry-after, no more calls"
    assert db.states == dict.fromkeys(IDS[2:4], "cancelling")
    assert [error["retry_after"] for error in db.failures] == [5]


@pytest.mark.parametrize("status", [200, 400, 401, 409, 500, None])
async def test_a_batch_that_cannot_be_read_costs_no_other(status: int | None) -> None:
    provider, db = FakeProvider([name for name in IDS if name != ODD]), FakeDatabase()
    kind: Any = "account" if status == 401 else "transient"
    provider.retrieve_errors[ODD] = TaggingError(kind, "code", "m", status=status)
    await poll(provider, db, files=["file-1"])
    assert db.states == {name: "unread" if name == ODD else "in_progress" for name in IDS}
    assert len(db.failures) == (status is None), "only a provider that cannot be reached fails the poll"
    assert ("delete file-1" in provider.calls) == (status is not None)


async def test_a_provider_that_refuses_the_account_fails_the_poll_and_no_batch() -> None:
    provider, db = FakeProvider([]), FakeDatabase()
    provider.list_error = TaggingError("account", "no_route", "m", status=404)
    provider.retrieve_errors = {name: TaggingError("account", "bad_key", "m", status=401) for name in IDS}
    await poll(provider, db)
    assert (db.states, len(provider.calls), [error["code"] for error in db.failures]) == ({}, 2, ["bad_key"])


async def test_a_provider_that_asks_to_wait_keeps_what_it_had_said() -> None:
    """States that were read before are reported, and the next poll begins with other batches."""
    first = set()
    for _ in range(20):
        provider, db = FakeProvider(IDS[:5]), FakeDatabase()
        wait = TaggingError("rate_limit", "rate_limited", "m", status=429, retry_after=3)
        provider.retrieve_errors = dict.fromkeys(IDS, wait)
        await poll(provider, db)
        assert set(db.states) == set(IDS[:5])
        assert [error["retry_after"] for error in db.failures] == [3]
        first.add(provider.calls[1])
    assert len(first) > 1


UNRECORDED = [Sought("one", 5), Sought("two", 9)]
BUSY = TaggingError("rate_limit", "rate_limited", "m", status=429, retry_after=3)
GONE = TaggingError("account", "http_404", "m", status=404)


@pytest.mark.parametrize(
    ("listing", "deleting", "gone", "failures"),
    [
        (None, None, ["one", "two"], 0),
        (None, GONE, ["one", "two"], 0),
        (BUSY, None, [], 1),
        (None, BUSY, [], 1),
        (TaggingError("transient", "provider_unreachable", "m"), None, [], 1),
        (TaggingError("account", "bad_key", "m", status=401), None, [], 1),
        *(
            (TaggingError("account", "x", "m", status=status), None, ["one", "two"], 0)
            for status in (403, 404, 405, 501)
        ),
    ],
)
async def test_files_that_nobody_recorded_are_deleted_by_name(
    listing: TaggingError | None, deleting: TaggingError | None, gone: list[str], failures: int
) -> None:
    """Only files with these batches' names are deleted. A provider that cannot list files is not asked again, one that
    is busy at a later poll."""
    provider, db = FakeProvider(IDS), FakeDatabase()
    provider.files = ["autotag-two.jsonl", "autotag-three.jsonl", "two.jsonl", "autotag-one.jsonl", "autotag-two.jsonl"]
    provider.list_error = listing
    provider.delete_errors = {"file-0": deleting} if deleting else {}
    await poller(provider, db).poll(BatchClaim([], None, SETTINGS, unrecorded=UNRECORDED))
    assert (db.gone, len(db.failures)) == (gone, failures)
    if listing is None and deleting is not BUSY:
        assert provider.calls == ["delete file-0", "delete file-3", "delete file-4"]


@pytest.mark.parametrize("error", [psycopg.errors.DivisionByZero("x"), TypeError("surrogates not allowed")])
async def test_a_report_that_raises_costs_its_batch(error: Exception) -> None:
    provider, db = FakeProvider(IDS), FakeDatabase()
    db.refused[ODD, "in_progress"] = error
    await poll(provider, db)
    assert db.states == {name: "unread" if name == ODD else "in_progress" for name in IDS}
    db.refused[ODD, "unread"] = error
    db.states.clear()
    await poll(provider, db)
    assert set(db.states) == set(IDS) - {ODD}


COUNTS = {"total": 10, "completed": 4, "failed": 1}


@pytest.mark.parametrize(
    ("counts", "read"),
    [
        (COUNTS, (10, 5)), (None, (0, 0)), ({}, (0, 0)), ({**COUNTS, "completed": None}, (10, 1)),
        ({**COUNTS, "failed": "x"}, (10, 4)), ("many", (0, 0)), ([1], (0, 0)), ({**COUNTS, "total": 1.5}, (0, 5)),
    ],
)  # fmt: skip
def test_odd_counts_are_none(counts: object, read: tuple[int, int]) -> None:
    listed = ListedBatch.construct(
        id="batch_1", status="in_progress", created_at=1, input_file_id="f", request_counts=counts
    )
    batch = read_batch(listed)
    assert (batch.total, batch.done) == read


@pytest.mark.parametrize("odd", [{"created_at": None}, {"errors": "failed"}, {"errors": {"data": 7}}])
def test_what_is_no_batch_is_an_error_of_this_answer(odd: dict[str, Any]) -> None:
    fields = {"id": "batch_1", "status": "failed", "created_at": 1, "input_file_id": "f", **odd}
    with pytest.raises(TaggingError) as raised:
        read_batch(ListedBatch.construct(**fields))
    assert raised.value.status == 200
