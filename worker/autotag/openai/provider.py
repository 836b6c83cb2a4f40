"""The client of the OpenAI-compatible API.

Only this package imports the SDK. Other packages call `Provider` and get the types in `records`, or a `TaggingError`.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from types import TracebackType
from typing import IO, Any

import httpx2
import openai
from openai import AsyncOpenAI
from openai._base_client import make_request_options
from openai.types import Model

from autotag.errors import TaggingError
from autotag.openai.errors import NO_SUCH_ROUTE, classified_errors, no_answer
from autotag.openai.headers import read_limits
from autotag.openai.http import make_http
from autotag.openai.output import read_lines
from autotag.openai.records import (
    Completion,
    Delivery,
    ModelList,
    ProviderBatch,
    ProviderFile,
    ProviderModel,
    read_batch,
    read_date,
    read_name,
)  # fmt: skip
from autotag.texts import read_json

#: The lowest speed of an answer, including reasoning. A call gets extra time: its cap divided by this.
MIN_TOKENS_PER_SECOND = 40.0
FLEX_TIMEOUT = 900.0  # seconds; OpenAI recommends it for service_tier flex, which waits for free capacity
LIST_PAGE = 100  # batches per list call; the API's max
CLOCK_SKEW = 600.0  # max difference between the provider's clock and ours; lists are read that much further back


class BadSignature(Exception):
    """The signature of a delivery is wrong, or its timestamp is more than five minutes off."""


def fingerprint(api_key: str, base_url: str) -> str:
    """A hash of address and key that does not reveal the key. When it changes, the question must be proven again."""
    return hashlib.sha256(f"{base_url}\n{api_key}".encode()).hexdigest()[:16]


class Provider:
    """One account at one address. Calls are not retried here: the database decides when to retry.

    Every method that calls the provider raises `TaggingError`, classified by kind, with the ``status`` of the answer.
    """

    def __init__(self, api_key: str, base_url: str, timeout: float) -> None:
        """
        Args:
            api_key: any text for a server without keys.
            base_url: usually ends in ``/v1``.
            timeout: seconds per call; `complete` adds time for the cap.
        """
        self._timeout = timeout
        self._client = AsyncOpenAI(
            api_key=api_key, base_url=base_url, timeout=timeout, max_retries=0, http_client=make_http()
        )

    @property
    def base_url(self) -> str:
        """The API's address, with a slash at the end."""
        return str(self._client.base_url)

    async def __aenter__(self) -> Provider:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    # -- single calls

    async def complete(self, body: dict[str, Any]) -> Completion:
        """Requests one chat completion. ``body``: of `prompt.request_body`."""
        cap = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        timeout = FLEX_TIMEOUT if body.get("service_tier") == "flex" else self._timeout
        options = make_request_options(timeout=timeout + cap / MIN_TOKENS_PER_SECOND)
        with classified_errors():
            # This makes the same request as client.chat.completions.create(), without the SDK's recursive key-renaming
            # pass over the body.
            response = await self._client.post("/chat/completions", cast_to=httpx2.Response, body=body, options=options)
        try:
            completion = read_json(response.content)
        except ValueError:
            raise no_answer() from None
        if not isinstance(completion, dict):
            raise no_answer()
        return Completion(completion, read_limits(response.headers))

    # -- batches

    async def create_batch(self, input_file_id: str, metadata: dict[str, str], keep_files: int | None) -> ProviderBatch:
        """Creates a batch of an uploaded file.

        Args:
            input_file_id: result of `upload_file`.
            metadata: stored with the batch, to find it again.
            keep_files: seconds after which the provider deletes the output; None: the provider supports no expiry.
        """
        with classified_errors():
            return read_batch(
                await self._client.batches.create(
                    input_file_id=input_file_id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata=metadata,
                    output_expires_after=_expiry(keep_files),
                )
            )

    async def batches_since(self, since: float) -> AsyncIterator[ProviderBatch]:
        """Yields the batches created after ``since`` (epoch seconds), newest first. Invalid ones are left out."""
        with classified_errors():
            async for item in self._client.batches.list(limit=LIST_PAGE):
                try:
                    batch = read_batch(item)
                except TaggingError:
                    continue
                if batch.created_at < since - CLOCK_SKEW:
                    return
                yield batch

    async def retrieve_batch(self, batch_id: str) -> ProviderBatch:
        """Gets a batch by its id."""
        with classified_errors():
            return read_batch(await self._client.batches.retrieve(batch_id))

    async def cancel_batch(self, batch_id: str) -> ProviderBatch:
        """Cancels a batch; returns its state. Raises an error if the batch has just ended."""
        with classified_errors():
            return read_batch(await self._client.batches.cancel(batch_id))

    async def has_batches(self) -> bool | None:
        """Whether the provider has a Batch API; None: unknown, because the provider refuses the account.

        Raises:
            TaggingError: the provider is unavailable or busy.
        """
        try:
            with classified_errors():
                await self._client.get("/batches", cast_to=httpx2.Response, options={"params": {"limit": 1}})
        except TaggingError as error:
            if error.status in NO_SUCH_ROUTE:
                return False
            if error.status is None or error.kind in ("transient", "rate_limit"):
                raise
            return None
        return True

    # -- files of batches

    async def upload_file(self, name: str, file: IO[bytes], keep: int | None) -> str:
        """Uploads a batch's input file; returns the file's id.

        Args:
            name: the file's name at the provider.
            file: lines of `prompt.batch_line`.
            keep: seconds after which the provider deletes the file; None: the provider supports no expiry.
        """
        with classified_errors():
            uploaded = await self._client.files.create(file=(name, file), purpose="batch", expires_after=_expiry(keep))
        return uploaded.id

    async def files_since(self, since: float) -> AsyncIterator[ProviderFile]:
        """Yields the input files created after ``since`` (epoch seconds), newest first."""
        with classified_errors():
            async for file in self._client.files.list(purpose="batch"):
                if file.created_at < since - CLOCK_SKEW:
                    return
                yield ProviderFile(file.id, file.filename, file.created_at)

    async def delete_file(self, file_id: str) -> None:
        """Deletes a file. The error has ``status`` 404 if it does not exist."""
        with classified_errors():
            await self._client.files.delete(file_id)

    async def read_file(self, file_id: str) -> AsyncGenerator[bytes, None]:
        """Yields the lines of an output or error file (`output.read_lines`)."""
        with classified_errors():
            async with self._client.files.with_streaming_response.content(file_id) as response:
                async for line in read_lines(response.iter_bytes()):
                    yield line

    # -- models

    async def retrieve_model(self, name: str) -> ProviderModel | None:
        """Gets a model by its name; None if the reply is not a model, because the server does not have this API."""
        with classified_errors():
            raw = await self._client.models.with_raw_response.retrieve(name)
            model: object = raw.parse()
        if not isinstance(model, Model):
            return None
        shutdown = getattr(model, "shutdown_date", None)
        return ProviderModel(shutdown if isinstance(shutdown, str) else None, read_date(raw.headers))

    async def list_models(self) -> ModelList:
        """Lists the models of the account."""
        with classified_errors():
            raw = await self._client.models.with_raw_response.list()
            names = [model.id for model in getattr(raw.parse(), "data", None) or []]
        return ModelList(names, read_date(raw.headers))

    # -- webhooks

    def verify_webhook(self, body: bytes, headers: Mapping[str, str], secret: str) -> Delivery:
        """Verifies and parses a delivery of the webhook.

        Raises:
            BadSignature: the signature is wrong, or the timestamp is more than five minutes off.
            ValueError: a header is missing or too long, the body is not text, or the signed text is not an event.
        """
        try:
            event = self._client.webhooks.unwrap(body, headers, secret=secret)
            batch = read_name(getattr(event.data, "id", None))
            return Delivery(headers["webhook-id"], read_name(event.type), batch)
        except openai.InvalidWebhookSignatureError as error:
            raise BadSignature(str(error)) from None
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(str(error)) from None


def _expiry(seconds: int | None) -> Any:
    """The parameter ``expires_after`` for a number of seconds; omitted for None."""
    return {"anchor": "created_at", "seconds": seconds} if seconds else openai.omit
