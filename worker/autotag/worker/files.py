"""The files of batches at the provider: named, and deleted when nobody needs them any more."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from autotag.db import Batch, Database
from autotag.errors import TaggingError
from autotag.openai.provider import Provider

log = structlog.get_logger(__name__)


class Files:
    """Deletes files of batches, and tells the database which are gone."""

    def __init__(self, db: Database, provider: Provider) -> None:
        self._db = db
        self._provider = provider

    async def delete_leftovers(self, batch: Batch) -> None:
        """Deletes input files of this batch whose upload nobody lived to write down.

        Raises:
            TaggingError: the provider did not let us.
        """
        async for file in self._provider.files_since(batch.since):
            if file.name == input_file_name(batch):
                await self._provider.delete_file(file.id)
                log.info("leftover_file_deleted", batch=batch.batch, file=file.id)

    async def delete(self, file_ids: Sequence[str]) -> None:
        """Deletes files that nobody needs any more, as far as the provider lets us now."""
        deleted = []
        for file_id in file_ids:
            try:
                await self._provider.delete_file(file_id)
            except TaggingError as error:
                if error.status != 404:
                    log.warning("file_not_deleted", file=file_id, error=error.code)
                    if not error.retry_after:
                        continue
                    # The next look deletes the rest, not before the provider said.
                    await self._db.report_poll_failure({"kind": "transient", "retry_after": error.retry_after})
                    break
            deleted.append(file_id)
        if deleted:
            await self._db.files_deleted(deleted)


def input_file_name(batch: Batch) -> str:
    """The name under which the input file of a batch is uploaded."""
    return f"autotag-{batch.batch}.jsonl"
