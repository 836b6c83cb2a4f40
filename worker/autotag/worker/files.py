"""The files of batches at the provider: their names and their deletion."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from autotag.db import Database
from autotag.db.messages import Sought
from autotag.errors import TaggingError
from autotag.openai.errors import NO_SUCH_ROUTE
from autotag.openai.provider import Provider

log = structlog.get_logger(__name__)


class Files:
    """Deletes files of batches, and reports the deleted ones to the database."""

    def __init__(self, db: Database, provider: Provider) -> None:
        self._db = db
        self._provider = provider

    async def delete_unrecorded(self, batches: Sequence[Sought]) -> None:
        """Deletes the input files of these batches whose upload was not recorded, because the worker ended first.

        Raises:
            TaggingError: the provider returned an error.
        """
        names = {input_file_name(batch.id): batch.id for batch in batches}
        files = self._provider.files_since(min(batch.since for batch in batches))
        # list all files before deleting any: each page of the list begins after a file of the previous page, which must
        # still exist
        for file in [file async for file in files if file.name in names]:
            try:
                await self._provider.delete_file(file.id)
            except TaggingError as error:
                if error.status != 404:
                    raise
            log.info("unrecorded_file_deleted", batch=names[file.name], file=file.id)

    async def delete_of_ended(self, batches: Sequence[Sought]) -> None:
        """Deletes unrecorded input files of batches that have ended, and reports that. If the provider refuses to list
        or delete files, it is not asked again.

        Raises:
            TaggingError: the provider is unavailable or busy; a later poll deletes them.
        """
        if not batches:
            return
        try:
            await self.delete_unrecorded(batches)
        except TaggingError as error:
            if error.status not in (403, *NO_SUCH_ROUTE):
                raise
            log.warning("files_not_listed", batches=[batch.id for batch in batches], error=error.code)
        await self._db.files_deleted([], [batch.id for batch in batches])

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
                    # The provider asks to wait. The next poll happens after that wait and deletes the rest.
                    await self._db.report_poll_failure({"kind": "transient", "retry_after": error.retry_after})
                    break
            deleted.append(file_id)
        if deleted:
            await self._db.files_deleted(deleted)


def input_file_name(batch: str) -> str:
    """The name of a batch's input file at the provider. batch: its id in the database."""
    return f"autotag-{batch}.jsonl"
