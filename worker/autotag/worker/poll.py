"""Looks at the provider: what has become of the batches in flight, and what the provider says of itself."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from autotag.db import BatchClaim, Database
from autotag.db.messages import PolledBatch, ProviderFacts, Submitted
from autotag.errors import TaggingError
from autotag.openai.provider import Provider
from autotag.openai.records import ProviderBatch
from autotag.worker.files import Files

SEEN = 10  # batches told of in one call

log = structlog.get_logger(__name__)


class Poller:
    """Does at the provider what a claim asks for beside the batches in hand."""

    def __init__(self, db: Database, provider: Provider, files: Files) -> None:
        self._db = db
        self._provider = provider
        self._files = files

    async def look(self, claim: BatchClaim) -> None:
        """Looks at all batches in flight, with as few list calls as they need, and tells the database."""
        try:
            for batch_id in claim.cancel:
                await self._cancel(batch_id)
            if claim.poll:
                seen = await self._see(claim.poll)
                for first in range(0, len(seen), SEEN):
                    await self._db.record_poll(seen[first : first + SEEN])
            await self._files.delete(claim.files)
            if claim.look_up:
                await self._look_up(claim.look_up)
        except TaggingError as error:
            log.warning("poll_failed", kind=error.kind, code=error.code, message=error.message)
            await self._db.report_poll_failure(error.as_json())

    async def _see(self, wanted: Sequence[Submitted]) -> list[PolledBatch]:
        """What the provider says of batches."""
        seen: dict[str, PolledBatch] = {}
        ids = {batch.id for batch in wanted}
        try:
            async for batch in self._provider.batches_since(min(batch.since for batch in wanted)):
                if batch.id in ids:
                    seen[batch.id] = polled_batch(batch)
                    if len(seen) == len(ids):
                        break
        except TaggingError as error:
            if error.status != 404:
                raise
            log.warning("batches_not_listed", hint="The provider has no list of batches; each is asked for by itself.")
        for batch_id in ids - seen.keys():  # not in the list: its clock is off, or the batch is gone
            try:
                seen[batch_id] = polled_batch(await self._provider.retrieve_batch(batch_id))
            except TaggingError as error:
                if error.status not in (403, 404):
                    raise
                log.warning("batch_gone", openai_batch=batch_id)
                seen[batch_id] = {"id": batch_id, "status": "gone"}
        return list(seen.values())

    async def _look_up(self, model: str) -> None:
        """Asks the provider when the model shuts down and whether it has a Batch API; what it leaves out we do too.

        Raises:
            TaggingError: it has no answer at the moment: it is asked again in ten minutes.
        """
        facts: ProviderFacts = {"model": model}
        try:
            found = await self._provider.retrieve_model(model)
            facts["shutdown_date"] = found.shutdown_date if found else None
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
        """Asks the provider to stop a batch; one that has just ended cannot be, and the look at it says so.

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
    """A batch at the provider as ``autotag.record_poll`` takes it."""
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
