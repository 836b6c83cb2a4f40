"""Submits batches: builds the input file, uploads it, and creates the batch.

Each step is recorded before the next one starts, so that another worker can continue.
"""

from __future__ import annotations

import asyncio
import tempfile
from typing import IO

import structlog

from autotag.db import Batch, Database, DatabaseSettings, Image, NotHeld, Question
from autotag.db.messages import BatchAnswer, BatchNote, Brief, Sought
from autotag.errors import TaggingError
from autotag.images.load import Images
from autotag.images.sent import data_url, max_side
from autotag.openai.prompt import batch_line, custom_id, request_body
from autotag.openai.provider import Provider
from autotag.openai.records import ProviderBatch
from autotag.turns import Turns
from autotag.worker.files import Files, input_file_name
from autotag.worker.harvest import store_answers
from autotag.worker.show import BatchStages
from autotag.worker.slots import BatchSlots

PAGE_SIZE = 100  # images that are loaded from the database and fetched together
MAX_IN_MEMORY = 8_000_000  # bytes of an input file; a larger one is written to disk
METADATA_KEY = "autotag_batch"

log = structlog.get_logger(__name__)


class Submitter:
    """Submits batches."""

    def __init__(
        self,
        db: Database,
        images: Images,
        provider: Provider,
        files: Files,
        slots: BatchSlots,
        stages: BatchStages,
        *,
        fetches: int,
    ) -> None:
        """
        Args:
            db: the database.
            images: loads the images.
            provider: runs the batches.
            files: deletes files of batches.
            slots: the slots of the batch lane; a busy step gives up its slot while it waits.
            stages: shows the stage of a submitted batch.
            fetches: max images that are fetched concurrently, for all batches.
        """
        self._db = db
        self._images = images
        self._provider = provider
        self._files = files
        self._slots = slots
        self._stages = stages
        self._fetches = Turns(fetches, share=True)

    async def submit(self, batch: Batch, settings: DatabaseSettings) -> None:
        """Submits a batch, starting at the step that its state names.

        Raises:
            TaggingError: an error of the provider or of Storage.
            NotHeld: another worker holds the batch now.
        """
        input_file_id = batch.input_file_id
        if batch.state == "creating":
            created = await self._find(batch)
            if created:
                await self._submitted(batch, created, created.input_file_id)
                log.info("batch_adopted", batch=batch.batch, openai_batch=created.id)
                return
            if batch.cancelled:
                await self._slots.retry(lambda: self._db.batch_finish(batch))
                return
        else:
            if batch.state == "uploading":
                await self._files.delete_unrecorded([Sought(batch.batch, batch.since)])
            input_file_id = await self._build_and_upload(batch, settings)
        if input_file_id is None:
            await self._slots.retry(
                lambda: self._db.batch_finish(batch)
            )  # no image could be prepared, so there is nothing to submit
            return
        created = await self._provider.create_batch(input_file_id, {METADATA_KEY: batch.batch}, batch.keep_files)
        await self._submitted(batch, created, input_file_id)
        log.info("batch_submitted", batch=batch.batch, openai_batch=created.id, images=batch.image_count)

    async def _submitted(self, batch: Batch, created: ProviderBatch, input_file_id: str) -> None:
        await self._slots.retry(lambda: self._db.batch_submitted(batch, created.id, created.status, input_file_id))
        self._stages.show([batch.batch])

    async def _find(self, batch: Batch) -> ProviderBatch | None:
        """The batch at the provider with this row's id in its metadata, if an earlier attempt created it; otherwise
        None."""
        async for found in self._provider.batches_since(batch.since):
            if found.metadata.get(METADATA_KEY) == batch.batch and found.status != "failed":
                return found
        return None

    async def _build_and_upload(self, batch: Batch, settings: DatabaseSettings) -> str | None:
        """Builds and uploads the input file; returns its id, or None if no image could be prepared."""
        await self._slots.retry(lambda: self._db.batch_step(batch, "preparing"))
        with tempfile.SpooledTemporaryFile(max_size=MAX_IN_MEMORY) as file:
            if not await self._build(batch, settings, file):
                return None
            await self._slots.retry(lambda: self._db.batch_step(batch, "uploading"))
            file.seek(0)
            uploaded = await self._provider.upload_file(input_file_name(batch.batch), file, batch.keep_files)
        try:
            await self._slots.retry(lambda: self._db.batch_step(batch, "creating", uploaded))
        except NotHeld:
            await self._files.delete([uploaded])  # the batch was cancelled meanwhile
            raise
        return uploaded

    async def _build(self, batch: Batch, settings: DatabaseSettings, file: IO[bytes]) -> int:
        """Writes one line per image, in the order of the tasks; returns the number of lines.

        Images that fail are reported at once. Images that do not fit into the file become another batch.
        """
        brief = await self._db.briefs.get(batch.brief)
        lines, last = 0, 0
        while page := await self._page(batch, last):
            notes: list[BatchNote] = []
            results = await asyncio.gather(*(self._line(image, settings.question, brief, notes) for image in page))
            failed: list[BatchAnswer] = [
                {"task": image.task, "error": line.as_json()}
                for image, line in zip(page, results, strict=True)
                if isinstance(line, TaggingError)
            ]
            if failed:
                await self._report(batch, failed)
            if notes:
                await self._note(batch, notes)
            for image, line in zip(page, results, strict=True):
                if isinstance(line, TaggingError):
                    continue
                if lines and file.tell() + len(line) > settings.batch_max_bytes:
                    await self._split(batch, last)
                    return lines
                file.write(line)
                lines += 1
                last = image.task
            last = page[-1].task
        return lines

    async def _page(self, batch: Batch, last: int) -> list[Image]:
        return await self._slots.retry(lambda: self._db.batch_images(batch, last, PAGE_SIZE))

    async def _report(self, batch: Batch, failed: list[BatchAnswer]) -> None:
        await self._slots.retry(lambda: store_answers(self._db, batch, failed))

    async def _note(self, batch: Batch, notes: list[BatchNote]) -> None:
        await self._slots.retry(lambda: self._db.note_images(batch, notes))

    async def _split(self, batch: Batch, last: int) -> None:
        await self._slots.retry(lambda: self._db.batch_split(batch, last))

    async def _line(
        self, image: Image, question: Question, brief: Brief | None, notes: list[BatchNote]
    ) -> bytes | TaggingError:
        try:
            side = max_side(question.image_detail, question.image_side)
            prepared = await self._images.load(image, side, self._fetches)
        except TaggingError as error:
            if error.kind == "account":
                raise
            return error
        if prepared.notes:
            notes.append({"task": image.task, "image": prepared.notes})
        return batch_line(custom_id(image), request_body(question, data_url(prepared.jpeg), image.cap, brief))
