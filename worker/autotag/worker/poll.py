"""Polls the provider: the batches in flight, files to delete, and facts about the model and the API."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence

import structlog

from autotag.db import CALL_ERRORS, BatchClaim, Database
from autotag.db.messages import PolledBatch, ProviderFacts, Sought
from autotag.errors import TaggingError
from autotag.openai.provider import Provider
from autotag.openai.records import ProviderBatch
from autotag.redact import safe_message
from autotag.worker.files import Files
from autotag.worker.show import BatchStages

MAX_POLLED = 10  # batches per call of record_poll, which locks their uploads

log = structlog.get_logger(__name__)


class Poller:
    """Does the provider calls that a claim asks for, besides submitting and harvesting."""

    def __init__(self, db: Database, provider: Provider, files: Files, stages: BatchStages) -> None:
        self._db = db
        self._provider = provider
        self._files = files
        self._stages = stages

    async def poll(self, claim: BatchClaim) -> None:
        """Polls the batches in flight, deletes files, and checks the model, as far as the claim asks for it.

        Reports results and errors to the database. An error ends only its own batch or step, unless the provider asks
        to wait, cannot be reached, or refuses the account.
        """
        await self._take_steps(
            lambda: self._poll_batches(claim.poll),
            lambda: self._files.delete(claim.files),
            lambda: self._files.delete_of_ended(claim.unrecorded),
            lambda: self._check_model(claim.look_up),
        )

    async def cancel(self, batch_ids: Sequence[str]) -> None:
        """Cancels batches while a poll may be running, because somebody waits for it. Errors are reported like those of
        a poll."""
        await self._take_steps(lambda: self._cancel(batch_ids))

    async def _take_steps(self, *steps: Callable[[], Awaitable[None]]) -> None:
        for step in steps:
            try:
                await step()
            except TaggingError as error:
                log.warning("poll_failed", kind=error.kind, code=error.code, message=error.message)
                try:
                    await self._db.report_poll_failure(error.as_json())
                except CALL_ERRORS as problem:
                    log.error("failure_not_reported", error=safe_message(problem))
                if _stops(error):
                    return
            except Exception:  # the next poll repeats this step
                log.exception("poll_failed")

    async def _poll_batches(self, submitted: Sequence[Sought]) -> None:
        """Reports the current states of batches, with as few list calls as possible.

        Raises:
            TaggingError: the provider's error ends the poll. The states that were read before are reported.
        """
        if not submitted:
            return
        polled = await self._list(submitted)
        await self._report(polled)
        # not listed: the provider's clock is off, or the batch is gone
        missing = list({batch.id for batch in submitted} - {batch["id"] for batch in polled})
        # so that each is read sooner or later, even if the provider always asks to wait after a few
        random.shuffle(missing)
        stopped: TaggingError | None = None
        retrieved: list[PolledBatch] = []
        for batch_id in missing:
            try:
                retrieved.append(await self._retrieve(batch_id))
            except TaggingError as error:
                log.warning("batch_unread", openai_batch=batch_id, code=error.code, message=error.message)
                if error.retry_after or (error.kind == "account" and not polled and not retrieved):
                    stopped = error
                    break
                retrieved.append({"id": batch_id, "status": "unread"})
                if error.status is None:
                    stopped = error
                    break
        await self._report(retrieved)
        if stopped:
            raise stopped

    async def _list(self, submitted: Sequence[Sought]) -> list[PolledBatch]:
        """The states of those batches that the provider lists."""
        polled: dict[str, PolledBatch] = {}
        ids = {batch.id for batch in submitted}
        try:
            async for batch in self._provider.batches_since(min(batch.since for batch in submitted)):
                if batch.id in ids:
                    polled[batch.id] = polled_batch(batch)
                    if len(polled) == len(ids):
                        break
        except TaggingError as error:
            if error.status not in (200, 404):
                raise
            log.warning("batches_not_listed", hint="The provider cannot list batches, so each is requested by its id.")
        return list(polled.values())

    async def _retrieve(self, batch_id: str) -> PolledBatch:
        """The state of one batch."""
        try:
            return polled_batch(await self._provider.retrieve_batch(batch_id))
        except TaggingError as error:
            if error.status not in (403, 404):
                raise
            log.warning("batch_not_found", openai_batch=batch_id)
            return {"id": batch_id, "status": "gone"}

    async def _report(self, polled: Sequence[PolledBatch]) -> None:
        """Reports states. If a report raises an error, each of its batches is reported alone. If one raises again, it
        is reported as unread, so that it ends after a while."""
        for first in range(0, len(polled), MAX_POLLED):
            part = list(polled[first : first + MAX_POLLED])
            if await self._record(part):
                continue
            for batch in part:
                if not await self._record([batch]):
                    await self._record([{"id": batch["id"], "status": "unread"}])

    async def _record(self, polled: list[PolledBatch]) -> bool:
        """Reports states in one call; returns whether that worked."""
        try:
            self._stages.show(await self._db.record_poll(polled))
            return True
        except (*CALL_ERRORS, TypeError, ValueError) as error:  # the last two: the report cannot be sent as JSON
            log.error("poll_not_recorded", batches=[batch["id"] for batch in polled], error=safe_message(error))
            return False

    async def _check_model(self, model: str | None) -> None:
        """Reports the model's shutdown date and whether there is a Batch API, if the provider answers these questions.

        Raises:
            TaggingError: the provider is unavailable or busy; the check is repeated in ten minutes.
        """
        if model is None:
            return
        facts: ProviderFacts = {"model": model}
        try:
            details = await self._provider.retrieve_model(model)
            facts["shutdown_date"] = details.shutdown_date if details else None
        except TaggingError as error:
            if error.status is None or error.kind in ("transient", "rate_limit"):
                raise
            log.info("model_not_described", model=model, status=error.status)
        batches = await self._provider.has_batches()
        if batches is not None:
            facts["batches"] = batches
        notice = await self._db.provider_checked(facts)
        if notice:
            log.warning("model_shutdown_announced", message=notice)

    async def _cancel(self, batch_ids: Sequence[str]) -> None:
        """Cancels batches, and reports their new states.

        Raises:
            TaggingError: the provider asks to wait; the next poll cancels the others.
        """
        for batch_id in batch_ids:
            try:
                cancelled = await self._provider.cancel_batch(batch_id)
            except TaggingError as error:  # the batch may just have ended; then the next poll reports that
                if error.retry_after or error.status is None:
                    raise
                log.warning("batch_not_cancelled", openai_batch=batch_id, error=error.code)
            else:
                await self._report([polled_batch(cancelled)])


def _stops(error: TaggingError) -> bool:
    """Whether the rest of the poll would also fail."""
    return bool(error.retry_after) or error.status is None or error.kind == "account"


def polled_batch(batch: ProviderBatch) -> PolledBatch:
    """Converts a batch to the form that ``autotag.record_poll`` expects."""
    fault = batch.fault
    return {
        "id": batch.id,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "total": batch.total,
        "done": batch.done,
        "error_code": fault.code if fault else None,
        "error": fault.message if fault else None,
        "error_kind": fault.kind if fault else None,
    }
