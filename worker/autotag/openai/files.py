"""The files of batches at OpenAI: uploaded, and deleted when nobody needs them any more."""

from __future__ import annotations

from typing import IO, Any

import openai
import structlog
from openai import AsyncOpenAI

from autotag.db import Batch, Database
from autotag.openai import provider

CLOCK_SKEW = 600.0  # seconds that the provider's clock may be off ours when its lists are read back to a moment

log = structlog.get_logger(__name__)


class Files:
    """The files of one organisation."""

    def __init__(self, db: Database, client: AsyncOpenAI) -> None:
        self._db = db
        self._client = client

    async def upload(self, batch: Batch, file: IO[bytes]) -> str:
        """The id of a batch's input file."""
        uploaded = await self._client.files.create(
            file=(name_of(batch), file),
            purpose="batch",
            expires_after=expiry(batch),
        )
        return uploaded.id

    async def delete_leftovers(self, batch: Batch) -> None:
        """Deletes input files of this batch whose upload nobody lived to write down."""
        async for file in self._client.files.list(purpose="batch"):
            if file.created_at < batch.since - CLOCK_SKEW:
                return
            if file.filename == name_of(batch):
                await self._client.files.delete(file.id)
                log.info("leftover_file_deleted", batch=batch.batch, file=file.id)

    async def delete(self, file_ids: list[str]) -> None:
        """Deletes files that nobody needs any more, as far as the provider lets us now."""
        deleted = []
        for file_id in file_ids:
            try:
                await self._client.files.delete(file_id)
            except openai.NotFoundError:
                pass
            except openai.APIError as error:
                log.warning("file_not_deleted", file=file_id, error=type(error).__name__)
                wait = provider.classify(error).retry_after
                if not wait:
                    continue
                # The next look deletes the rest, not before the provider said.
                await self._db.poll_trouble({"kind": "transient", "retry_after": wait})
                break
            deleted.append(file_id)
        if deleted:
            await self._db.files_deleted(deleted)


def expiry(batch: Batch) -> Any:
    """When the provider deletes a file that nobody has deleted before."""
    return {"anchor": "created_at", "seconds": batch.keep_files} if batch.keep_files else openai.omit


def name_of(batch: Batch) -> str:
    """The name under which the input file of a batch is uploaded."""
    return f"autotag-{batch.batch}.jsonl"
