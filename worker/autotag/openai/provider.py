"""The OpenAI-compatible API: single calls, and whose fault its errors are."""

from __future__ import annotations

import hashlib
import ssl
from typing import Any, cast

import httpx2
import openai
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai._base_client import make_request_options

from autotag.errors import TaggingError
from autotag.openai.classify import classify_status
from autotag.openai.headers import read_limits

#: The slowest pace at which an answer may come, reasoning included: an answer with a large cap gets more time.
TOKENS_PER_SECOND = 40.0
FLEX_TIMEOUT = 900.0  # seconds: OpenAI's advice for service_tier flex, which answers when there is room


def make_client(api_key: str, base_url: str, timeout: float) -> AsyncOpenAI:
    """A client that does not retry by itself: when to try again is the database's decision."""
    http = DefaultAioHttpClient()  # its pool costs the same however many connections are in it; httpx's does not
    return AsyncOpenAI(api_key=api_key, base_url=base_url, timeout=timeout, max_retries=0, http_client=http)


def fingerprint(api_key: str, base_url: str) -> str:
    """Stands for an address and a key, and tells nothing of the key: another one has to prove that it works."""
    return hashlib.sha256(f"{base_url}\n{api_key}".encode()).hexdigest()[:16]


async def complete(client: AsyncOpenAI, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One chat completion: its JSON, and the limits that its headers tell (see `headers.read_limits`).

    Raises:
        TaggingError: whatever went wrong, sorted by kind.
    """
    cap = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    patience = FLEX_TIMEOUT if body.get("service_tier") == "flex" else float(cast("float", client.timeout))
    options = make_request_options(timeout=patience + cap / TOKENS_PER_SECOND)
    try:
        # As client.chat.completions.create() sends it, but without the SDK's recursive key-renaming pass over the body.
        response = await client.post("/chat/completions", cast_to=httpx2.Response, body=body, options=options)
    except openai.APIError as error:
        raise classify(error) from None  # traces and logs need not repeat the provider's own words
    unreadable = TaggingError("transient", "provider_error", "The AI service gave no answer.", origin="provider")
    try:
        completion = response.json()
    except ValueError:
        raise unreadable from None
    if not isinstance(completion, dict):
        raise unreadable
    return completion, read_limits(response.headers)


def classify(error: openai.APIError) -> TaggingError:
    """Sorts an error of the SDK into the kinds that the database knows."""
    if isinstance(error, openai.APIStatusError):
        return classify_status(error.status_code, _body(error), error.response.headers)
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, ssl.SSLError):
        reason = reason.__cause__ or reason.__context__
    if isinstance(error, openai.APITimeoutError):
        return TaggingError(
            "transient", "provider_unreachable", "The AI service could not be reached in time.", origin="provider"
        )
    # Resets, answers that are no HTTP; a certificate nobody trusts will not be better in a minute.
    message = "The AI service's certificate cannot be trusted." if reason else "The AI service could not be reached."
    return TaggingError("account" if reason else "transient", "provider_unreachable", message, origin="provider")


def _body(error: openai.APIStatusError) -> object:
    """The whole body where the SDK found no error object in it."""
    return error.body if error.body is not None else error.response.text
