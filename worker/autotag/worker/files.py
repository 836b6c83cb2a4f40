"""The files of batches at the provider: their names and their deletion."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from autotag.db import Batch, Database
from autotag.errors import TaggingError
from autotag.openai.provider import Provider

log = structlog.get_logger(__name__)


class Files:
    """Deletes files of batches, and reports the deleted ones to the database."""

    def __init__(self, db: Database, provider: Provider) -> None:
        self._db = db
        self._provider = provider

    async def delete_leftovers(self, batch: Batch) -> None:
        """Deletes input files of this batch whose upload was not recorded, because the worker ended before.

        Raises:
            TaggingError: the provider returned an error.
        """
        async for file in self._provider.files_since(batch.since):
            if file.name == input_file_name(batch):
                await self._provider.delete_file(file.id)
                log.info("leftover_file_deleted", batch=batch.batch, file=file.id)

    async def delete(self, file_ids: Sequence[str]) -> None:
        """Deletes files. Those that the provider does not delete now are left for a later poll."""
        deleted = []
        for file_id in file_ids:
            try:
                await self._provider.delete_file(file_id)
            except TaggingError as error:
                if error.status != 404:
                    log.warning("file_not_deleted", file=file_id, error=error.code)
                    if not error.retry_after:
                        continue
                    # The provider asks to wait: the next poll, after that wait, deletes the rest.
                    await self._db.report_poll_failure({"kind": "transient", "retry_after": error.retry_after})
                    break
            deleted.append(file_id)
        if deleted:
            await self._db.files_deleted(deleted)


def input_file_name(batch: Batch) -> str:
    """The name of a batch's input file at the provider."""
    return f"autotag-{batch.batch}.jsonl"
