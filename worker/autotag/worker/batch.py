"""OpenAI Batches: build, upload, create; poll; harvest.

A batch is in a worker's hands twice: until OpenAI has it, and when OpenAI is done with it. In between it is a
row that a poll looks at. Every step is written down before the next, so that another worker can go on.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from typing import IO, Any

import httpx2
import openai
import psycopg
import structlog
from openai import AsyncOpenAI
from openai.types import Batch as OpenAIBatch

from autotag.db import Batch, BatchClaim, Database, Image, NotHeld
from autotag.errors import TaggingError
from autotag.images.prepare import LARGEST_SIDE, Images, data_url
from autotag.observability.metrics import BATCH_SECONDS, IN_FLIGHT, count_answers, timed
from autotag.openai import provider
from autotag.openai.files import CLOCK_SKEW, Files, expiry
from autotag.openai.output import describe, read_line, read_lines
from autotag.openai.prompt import Question, batch_line, request_body
from autotag.redact import said
from autotag.worker.wake import Wake

PAGE = 100  # images looked up and fetched together
ANSWERS = 500  # answers stored in one call
SPOOL = 8_000_000  # bytes of an input file kept in memory before it goes to disk
SEEN = 10  # batches told of in one call
LIST_PAGE = 100  # batches in one list call: the API's most
METADATA_KEY = "autotag_batch"
#: What a server without files and batches answers when it is asked for them.
NO_SUCH_ROUTE = (404, 405, 501)
CLAIM_RETRY = 1.0  # seconds after a claim that failed

log = structlog.get_logger(__name__)


class BatchLane:
    """The lane of one worker."""

    def __init__(
        self,
        db: Database,
        wake: Wake,
        images: Images,
        client: AsyncOpenAI,
        *,
        slots: int,
        fetches: int,
        max_bytes: int,
    ) -> None:
        self._db = db
        self._wake = wake
        self._images = images
        self._client = client
        self._files = Files(db, client)
        self._slots = slots
        self._fetches = asyncio.Semaphore(fetches)
        self._max_bytes = max_bytes
        self._hands: dict[asyncio.Task[None], Batch] = {}
        IN_FLIGHT.labels("batch").set_function(lambda: len(self._hands))

    async def run(self, deadline: float) -> None:
        """Until the worker stops; then at most ``deadline`` seconds more for what is in hand."""
        polling: asyncio.Task[None] | None = None
        while not self._wake.stop.is_set():
            try:
                claim = await self._db.claim_batches(self._slots - len(self._hands))
            except psycopg.Error as error:
                log.error("claim_batches_failed", error=said(error))
                await self._wake.pause(CLAIM_RETRY)
                await self._db.release_unheld(batches=[batch.batch for batch in self._hands.values()])
                continue
            for batch in claim.batches:
                task = asyncio.create_task(self._work(batch, claim.question))
                self._hands[task] = batch
                task.add_done_callback(self._free_hand)
            if (claim.poll or claim.files or claim.look_up) and (polling is None or polling.done()):
                polling = asyncio.create_task(self._look(claim))
            full = len(self._hands) >= self._slots
            await self._wake.wait("batch", None if full else claim.wait)
        if polling:
            polling.cancel()
        if self._hands:
            await asyncio.wait(self._hands, timeout=deadline)
            rest = list(self._hands)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    def _free_hand(self, task: asyncio.Task[None]) -> None:
        self._hands.pop(task)
        self._wake.notify("batch")

    async def _work(self, batch: Batch, question: Question) -> None:
        """Takes one batch as far as it goes now; trouble is reported to the database, which decides."""
        logger = log.bind(batch=batch.batch, openai_batch=batch.openai_batch_id)
        try:
            try:
                if batch.state == "harvesting":
                    with timed(BATCH_SECONDS, "harvest"):
                        await self._harvest(batch, question)
                    logger.info("batch_harvested")
                else:
                    with timed(BATCH_SECONDS, "submit"):
                        await self._submit(batch, question)
            except openai.APIError as error:
                raise _classify(error) from None
        except NotHeld:
            logger.warning("batch_not_held")
        except TaggingError as error:
            logger.error("batch_trouble", kind=error.kind, code=error.code, message=error.message)
            await self._report_trouble(batch, error)
        except Exception as error:
            # A defect of ours, or a disk that is full: the batch goes back and is tried again, with delays
            # that grow, instead of staying in a hand that will never move.
            logger.exception("batch_failed")
            await self._report_trouble(batch, TaggingError("transient", "internal_error", type(error).__name__))

    async def _report_trouble(self, batch: Batch, error: TaggingError) -> None:
        try:
            await self._db.batch_trouble(batch, error.as_json())
        except NotHeld:
            log.warning("batch_not_held", batch=batch.batch)

    # -- until OpenAI has it

    async def _submit(self, batch: Batch, question: Question) -> None:
        input_file_id = batch.input_file_id
        if batch.state == "creating":
            created = await self._find(batch)
            if created:
                await self._db.batch_submitted(batch, created.id, created.status, created.input_file_id)
                log.info("batch_adopted", batch=batch.batch, openai_batch=created.id)
                return
            if batch.cancelled:
                await self._db.batch_finish(batch)
                return
        else:
            if batch.state == "uploading":
                await self._files.delete_leftovers(batch)
            input_file_id = await self._build_and_upload(batch, question)
        if input_file_id is None:
            await self._db.batch_finish(batch)  # no image could be prepared: nothing to submit
            return
        created = await self._create(batch, input_file_id)
        await self._db.batch_submitted(batch, created.id, created.status, input_file_id)
        log.info("batch_submitted", batch=batch.batch, openai_batch=created.id, images=batch.image_count)

    async def _create(self, batch: Batch, input_file_id: str) -> OpenAIBatch:
        return await self._client.batches.create(
            input_file_id=input_file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={METADATA_KEY: batch.batch},
            output_expires_after=expiry(batch),
        )

    async def _find(self, batch: Batch) -> OpenAIBatch | None:
        """The batch at OpenAI that carries this row's id, if it was created after all."""
        async for found in self._newest_batches(batch.since):
            if (found.metadata or {}).get(METADATA_KEY) == batch.batch and found.status != "failed":
                return found
        return None

    async def _newest_batches(self, since: float) -> AsyncIterator[OpenAIBatch]:
        """OpenAI's batches from the newest to the first that was created before ``since`` (epoch seconds)."""
        async for batch in self._client.batches.list(limit=LIST_PAGE):
            if batch.created_at < since - CLOCK_SKEW:
                return
            yield batch

    async def _build_and_upload(self, batch: Batch, question: Question) -> str | None:
        """The id of the uploaded input file; None when no image could be prepared."""
        await self._db.batch_step(batch, "preparing")
        with tempfile.SpooledTemporaryFile(max_size=SPOOL) as file:
            if not await self._build(batch, question, file):
                return None
            await self._db.batch_step(batch, "uploading")
            file.seek(0)
            uploaded = await self._files.upload(batch, file)
        try:
            await self._db.batch_step(batch, "creating", uploaded)
        except NotHeld:
            await self._files.delete([uploaded])  # cancelled meanwhile
            raise
        return uploaded

    async def _build(self, batch: Batch, question: Question, file: IO[bytes]) -> int:
        """Writes a line per image, in order; how many. Images that fail are reported at once."""
        lines, last = 0, 0
        while page := await self._db.batch_images(batch, last, PAGE):
            made = await asyncio.gather(*(self._line(image, question) for image in page))
            failed = [
                {"task": image.task, "error": line.as_json()}
                for image, line in zip(page, made, strict=True)
                if isinstance(line, TaggingError)
            ]
            if failed:
                await self._db.batch_answers(batch, failed)
            for image, line in zip(page, made, strict=True):
                if isinstance(line, TaggingError):
                    continue
                if lines and file.tell() + len(line) > self._max_bytes:
                    await self._db.batch_split(batch, last)
                    return lines
                file.write(line)
                lines += 1
                last = image.task
            last = page[-1].task
        return lines

    async def _line(self, image: Image, question: Question) -> bytes | TaggingError:
        async with self._fetches:
            try:
                jpeg = await self._images.load(image, LARGEST_SIDE[question.image_detail])
            except TaggingError as error:
                if error.kind == "account":
                    raise
                return error
            return batch_line(str(image.task), request_body(question, data_url(jpeg), image.cap))

    # -- while OpenAI has it

    async def _look(self, claim: BatchClaim) -> None:
        """Looks at all batches in flight, with as few list calls as they need, and tells the database."""
        try:
            for batch_id in claim.cancel:
                await self._cancel(batch_id)
            if claim.poll:
                seen = await self._see(claim.poll)
                for first in range(0, len(seen), SEEN):
                    await self._db.batches_seen(seen[first : first + SEEN])
            await self._files.delete(claim.files)
            if claim.look_up:
                await self._look_up(claim.look_up)
        except openai.APIError as error:
            trouble = provider.classify(error)
            log.warning("poll_failed", kind=trouble.kind, code=trouble.code, message=trouble.message)
            await self._db.poll_trouble(trouble.as_json())

    async def _see(self, wanted: dict[str, float]) -> list[dict[str, Any]]:
        """What OpenAI says of batches (ids and the moments before which they were not created)."""
        seen = {}
        try:
            async for batch in self._newest_batches(min(wanted.values())):
                if batch.id in wanted:
                    seen[batch.id] = describe(batch)
                    if len(seen) == len(wanted):
                        break
        except openai.NotFoundError:
            log.warning("batches_not_listed", hint="The provider has no list of batches; each is asked for by itself.")
        for batch_id in wanted.keys() - seen.keys():  # not in the list: its clock is off, or the batch is gone
            try:
                seen[batch_id] = describe(await self._client.batches.retrieve(batch_id))
            except (openai.NotFoundError, openai.PermissionDeniedError):
                log.warning("batch_gone", openai_batch=batch_id)
                seen[batch_id] = {"id": batch_id, "status": "gone"}
        return list(seen.values())

    async def _look_up(self, model: str) -> None:
        """Asks the provider when the model shuts down and whether it has a Batch API; what it leaves out we do too.

        Raises:
            openai.APIError: it has no answer at the moment: it is asked again in ten minutes.
        """
        facts: dict[str, Any] = {"model": model}
        try:
            found = await self._client.models.retrieve(model)
            facts["shutdown_date"] = getattr(found, "shutdown_date", None)
        except openai.APIStatusError as error:
            if provider.classify(error).kind in ("transient", "rate_limit"):
                raise
            log.info("model_not_described", model=model, status=error.status_code)
        try:
            await self._client.get("/batches", cast_to=httpx2.Response, options={"params": {"limit": 1}})
            facts["batches"] = True
        except openai.APIStatusError as error:
            if error.status_code in NO_SUCH_ROUTE:
                facts["batches"] = False
            elif provider.classify(error).kind in ("transient", "rate_limit"):
                raise
        notice = await self._db.provider_checked(facts)
        if notice:
            log.warning("model_shuts_down", message=notice)

    async def _cancel(self, batch_id: str) -> None:
        """Asks OpenAI to stop a batch; one that has just ended cannot be, and the look at it says so.

        Raises:
            openai.APIError: the provider asks to wait.
        """
        try:
            await self._client.batches.cancel(batch_id)
        except openai.APIError as error:
            if provider.classify(error).retry_after:
                raise
            log.warning("batch_not_cancelled", openai_batch=batch_id, error=type(error).__name__)

    # -- when OpenAI is done with it

    async def _harvest(self, batch: Batch, question: Question) -> None:
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                await self._store(batch, question, file_id)
        await self._db.batch_finish(batch)
        # Whoever looks at OpenAI next deletes what is left, should this process not live to do it.
        await self._files.delete([f for f in (batch.input_file_id, batch.output_file_id, batch.error_file_id) if f])

    async def _store(self, batch: Batch, question: Question, file_id: str) -> None:
        """Stores a file's answers page by page; the database works on one page while the next is read."""
        storing: asyncio.Task[None] | None = None
        try:
            async for page in self._answers(batch, question, file_id):
                count_answers("batch", page)
                if storing:
                    await storing
                storing = asyncio.create_task(self._store_page(batch, page))
            if storing:
                await storing
        finally:
            if storing and not storing.done():
                storing.cancel()

    async def _store_page(self, batch: Batch, page: list[dict[str, Any]]) -> None:
        stored = await self._db.batch_answers(batch, page)
        for notice in stored.notices:
            log.warning(notice["event"], notice=notice["notice"])

    async def _answers(self, batch: Batch, question: Question, file_id: str) -> AsyncIterator[list[dict[str, Any]]]:
        """Pages of a file's answers, as ``autotag.batch_answers`` takes them; what is no answer is counted."""
        page: list[dict[str, Any]] = []
        unreadable = 0
        async with self._client.files.with_streaming_response.content(file_id) as response:
            async for line in read_lines(response.iter_bytes()):
                answer = read_line(line, question.max_tags)
                if answer is None:
                    unreadable += 1
                    continue
                page.append(answer)
                if len(page) >= ANSWERS:
                    yield page
                    page = []
        if page:
            yield page
        if unreadable:
            log.warning("batch_lines_unreadable", batch=batch.batch, file=file_id, lines=unreadable)


def _classify(error: openai.APIError) -> TaggingError:
    """What an error of the files and batches means: like any other, but a route that is missing is a missing Batch API.
    A file or batch that is missing is named in the message."""
    found = provider.classify(error)
    if (
        isinstance(error, openai.APIStatusError) and error.status_code in NO_SUCH_ROUTE and found.kind == "account"
        and not any(word in found.message.lower() for word in ("file-", "batch_"))
    ):  # fmt: skip
        return TaggingError("account", "no_batch_api", "The provider has no Batch API.", origin="provider")
    return found
