"""The OpenAI-compatible API. This package alone imports the SDK: all others call `Provider`, and get types of our own
(`records`) or a `TaggingError`."""

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

#: The slowest pace at which an answer may come, reasoning included: an answer with a large cap gets more time.
TOKENS_PER_SECOND = 40.0
FLEX_TIMEOUT = 900.0  # seconds: OpenAI's advice for service_tier flex, which answers when there is room
LIST_PAGE = 100  # batches in one list call: the API's most
CLOCK_SKEW = 600.0  # seconds that the provider's clock may be off ours when its lists are read back to a moment


class BadSignature(Exception):
    """A delivery is not signed with the secret, or not of the last five minutes."""


def fingerprint(api_key: str, base_url: str) -> str:
    """Stands for an address and a key, and tells nothing of the key: another one has to prove that it works."""
    return hashlib.sha256(f"{base_url}\n{api_key}".encode()).hexdigest()[:16]


class Provider:
    """One account at one address. No call is made again by itself: when to try again is the database's decision.

    Every method that asks the provider raises `TaggingError`, sorted by kind, with the ``status`` of the answer.
    """

    def __init__(self, api_key: str, base_url: str, timeout: float) -> None:
        """
        Args:
            api_key: any word for a server that has no keys.
            base_url: most end in ``/v1``.
            timeout: seconds that a call may take; a single call gets more for a large cap (`complete`).
        """
        self._timeout = timeout
        self._client = AsyncOpenAI(
            api_key=api_key, base_url=base_url, timeout=timeout, max_retries=0, http_client=make_http()
        )

    @property
    def base_url(self) -> str:
        """Its address, which ends in a slash."""
        return str(self._client.base_url)

    async def __aenter__(self) -> Provider:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    # -- single calls

    async def complete(self, body: dict[str, Any]) -> Completion:
        """One chat completion (`prompt.request_body`)."""
        cap = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        patience = FLEX_TIMEOUT if body.get("service_tier") == "flex" else self._timeout
        options = make_request_options(timeout=patience + cap / TOKENS_PER_SECOND)
        with classified_errors():
            # As client.chat.completions.create() sends it, but without the SDK's recursive key-renaming pass over the
            # body.
            response = await self._client.post("/chat/completions", cast_to=httpx2.Response, body=body, options=options)
        try:
            completion = response.json()
        except ValueError:
            raise no_answer() from None
        if not isinstance(completion, dict):
            raise no_answer()
        return Completion(completion, read_limits(response.headers))

    # -- batches

    async def create_batch(self, input_file_id: str, metadata: dict[str, str], keep_files: int | None) -> ProviderBatch:
        """A batch of an uploaded file.

        Args:
            input_file_id: of `upload_file`.
            metadata: what it is found by.
            keep_files: seconds after which the provider deletes its output; None: it takes no expiry.
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
        """The batches from the newest to the first that was created before ``since`` (epoch seconds)."""
        with classified_errors():
            async for batch in self._client.batches.list(limit=LIST_PAGE):
                if batch.created_at < since - CLOCK_SKEW:
                    return
                yield read_batch(batch)

    async def retrieve_batch(self, batch_id: str) -> ProviderBatch:
        """A batch by its id."""
        with classified_errors():
            return read_batch(await self._client.batches.retrieve(batch_id))

    async def cancel_batch(self, batch_id: str) -> None:
        """Asks to stop a batch; one that has just ended cannot be."""
        with classified_errors():
            await self._client.batches.cancel(batch_id)

    async def has_batches(self) -> bool | None:
        """Whether there is a Batch API; None: it does not say, because it refuses everything.

        Raises:
            TaggingError: there is no answer at the moment.
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
        """Uploads a batch's input; its id.

        Args:
            name: its name there.
            file: lines of `prompt.batch_line`.
            keep: seconds after which the provider deletes it; None: it takes no expiry.
        """
        with classified_errors():
            uploaded = await self._client.files.create(file=(name, file), purpose="batch", expires_after=_expiry(keep))
        return uploaded.id

    async def files_since(self, since: float) -> AsyncIterator[ProviderFile]:
        """Input files from the newest to the first that was created before ``since`` (epoch seconds)."""
        with classified_errors():
            async for file in self._client.files.list(purpose="batch"):
                if file.created_at < since - CLOCK_SKEW:
                    return
                yield ProviderFile(file.id, file.filename, file.created_at)

    async def delete_file(self, file_id: str) -> None:
        """Deletes a file; one that is gone has ``status`` 404."""
        with classified_errors():
            await self._client.files.delete(file_id)

    async def read_file(self, file_id: str) -> AsyncGenerator[bytes, None]:
        """The lines of an output or error file, as `output.read_lines` has them."""
        with classified_errors():
            async with self._client.files.with_streaming_response.content(file_id) as response:
                async for line in read_lines(response.iter_bytes()):
                    yield line

    # -- models

    async def retrieve_model(self, name: str) -> ProviderModel | None:
        """A model by its name; None: what answers there is no such API."""
        with classified_errors():
            raw = await self._client.models.with_raw_response.retrieve(name)
            model: object = raw.parse()
        if not isinstance(model, Model):
            return None
        ends = getattr(model, "shutdown_date", None)
        return ProviderModel(ends if isinstance(ends, str) else None, read_date(raw.headers))

    async def list_models(self) -> ModelList:
        """The models of the account."""
        with classified_errors():
            raw = await self._client.models.with_raw_response.list()
            names = [one.id for one in getattr(raw.parse(), "data", None) or []]
        return ModelList(names, read_date(raw.headers))

    # -- webhooks

    def verify_webhook(self, body: bytes, headers: Mapping[str, str], secret: str) -> Delivery:
        """A delivery that the provider has signed.

        Raises:
            BadSignature: it is not signed with the secret, or not of the last five minutes.
            ValueError: a header is missing or too long, the body is no text, or the signed text is no event.
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
    """When the provider deletes a file that nobody has deleted before."""
    return {"anchor": "created_at", "seconds": seconds} if seconds else openai.omit
