"""Polls the provider: the batches in flight, files to delete, and facts about the model and the API."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from autotag.db import BatchClaim, Database
from autotag.db.messages import PolledBatch, ProviderFacts, Submitted
from autotag.errors import TaggingError
from autotag.openai.provider import Provider
from autotag.openai.records import ProviderBatch
from autotag.worker.files import Files
from autotag.worker.show import BatchStages

MAX_POLLED = 10  # batches per record_poll, which locks their uploads

log = structlog.get_logger(__name__)


class Poller:
    """Does the provider calls that a claim asks for, besides submitting and harvesting."""

    def __init__(self, db: Database, provider: Provider, files: Files, stages: BatchStages) -> None:
        self._db = db
        self._provider = provider
        self._files = files
        self._stages = stages

    async def poll(self, claim: BatchClaim) -> None:
        """Cancels batches, polls those in flight, deletes files, and checks the model, as far as the claim asks for it.

        Results and errors are reported to the database.
        """
        try:
            await self._poll(claim)
        except Exception:  # the next poll does what this one did not
            log.exception("poll_failed")

    async def _poll(self, claim: BatchClaim) -> None:
        try:
            for batch_id in claim.cancel:
                await self._cancel(batch_id)
            if claim.poll:
                polled = await self._poll_batches(claim.poll)
                for first in range(0, len(polled), MAX_POLLED):
                    self._stages.show(await self._db.record_poll(polled[first : first + MAX_POLLED]))
            await self._files.delete(claim.files)
            if claim.look_up:
                await self._check_model(claim.look_up)
        except TaggingError as error:
            log.warning("poll_failed", kind=error.kind, code=error.code, message=error.message)
            await self._db.report_poll_failure(error.as_json())

    async def _poll_batches(self, submitted: Sequence[Submitted]) -> list[PolledBatch]:
        """The current state of batches, with as few list calls as possible."""
        polled: dict[str, PolledBatch] = {}
        ids = {batch.id for batch in submitted}
        try:
            async for batch in self._provider.batches_since(min(batch.since for batch in submitted)):
                if batch.id in ids:
                    polled[batch.id] = polled_batch(batch)
                    if len(polled) == len(ids):
                        break
        except TaggingError as error:
            if error.status != 404:
                raise
            log.warning("batches_not_listed", hint="The provider cannot list batches, so each is requested by its id.")
        for batch_id in ids - polled.keys():  # not listed: the provider's clock is off, or the batch is gone
            try:
                polled[batch_id] = polled_batch(await self._provider.retrieve_batch(batch_id))
            except TaggingError as error:
                if error.status not in (403, 404):
                    raise
                log.warning("batch_gone", openai_batch=batch_id)
                polled[batch_id] = {"id": batch_id, "status": "gone"}
        return list(polled.values())

    async def _check_model(self, model: str) -> None:
        """Reports the model's shutdown date and whether there is a Batch API, as far as the provider answers.

        Raises:
            TaggingError: the provider is unavailable or busy; the check is repeated in ten minutes.
        """
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
            log.warning("model_shuts_down", message=notice)

    async def _cancel(self, batch_id: str) -> None:
        """Cancels a batch. If it has just ended, cancelling fails, and the poll reports its end.

        Raises:
            TaggingError: the provider asks to wait.
        """
        try:
            await self._provider.cancel_batch(batch_id)
        except TaggingError as error:
            if error.retry_after:
                raise
            log.warning("batch_not_cancelled", openai_batch=batch_id, error=error.code)


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
