"""The OpenAI-compatible API: single calls, and what its errors and headers mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import httpx2
import openai
from openai import AsyncOpenAI, DefaultAioHttpClient

from autotag.errors import TaggingError, image_error
from autotag.tags import clean_text

DEFAULT_RETRY_AFTER = 1.0  # seconds, when a 429 does not say
MOST_RETRY_AFTER = 120.0  # seconds; compatible servers have sent nonsense

#: Error codes that concern the account and not this call (OpenAI's guide "Error codes").
ACCOUNT_CODES = frozenset({
    "insufficient_quota", "invalid_api_key", "account_deactivated", "billing_hard_limit_reached",
    "billing_not_active", "model_not_found",
})  # fmt: skip
#: Error codes of a 400 that concern the picture.
IMAGE_CODES = frozenset({
    "image_parse_error", "invalid_image", "invalid_image_format", "invalid_base64_image", "image_too_large",
    "image_content_policy_violation", "content_policy_violation", "invalid_image_url",
})  # fmt: skip

_COUNT = re.compile(r"[0-9]{1,10}")


def make_client(api_key: str, base_url: str, timeout: float) -> AsyncOpenAI:
    """A client that does not retry by itself: when to try again is the database's decision."""
    http = DefaultAioHttpClient()  # its pool costs the same however many connections are in it; httpx's does not
    return AsyncOpenAI(api_key=api_key, base_url=base_url, timeout=timeout, max_retries=0, http_client=http)


async def complete(client: AsyncOpenAI, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One chat completion: its JSON, and the limits that its headers tell (see `read_limits`).

    Raises:
        TaggingError: whatever went wrong, sorted by kind.
    """
    try:
        # As client.chat.completions.create() sends it, but for that one's search for keys to rename in the body.
        response = await client.post("/chat/completions", cast_to=httpx2.Response, body=body)
    except openai.APIError as error:
        raise classify(error) from error
    try:
        completion = response.json()
    except ValueError:
        raise TaggingError("transient", "bad_answer", "The AI's answer could not be read.") from None
    if not isinstance(completion, dict):
        raise TaggingError("transient", "bad_answer", "The AI's answer could not be read.")
    return completion, read_limits(response.headers)


def read_limits(headers: Mapping[str, str]) -> dict[str, Any]:
    """What answers say about the provider's bucket, as ``autotag.observe_provider`` takes it.

    Compatible servers leave headers out or send zeros and words: only sensible numbers are passed on.
    """
    names = {
        "requests_limit": "x-ratelimit-limit-requests", "requests_left": "x-ratelimit-remaining-requests",
        "tokens_limit": "x-ratelimit-limit-tokens", "tokens_left": "x-ratelimit-remaining-tokens",
    }  # fmt: skip
    seen: dict[str, Any] = {}
    for name, header in names.items():
        value = headers.get(header, "")
        if _COUNT.fullmatch(value) and (int(value) > 0 or name.endswith("left")) and int(value) < 2**31:
            seen[name] = int(value)
    # A remaining without its limit is a stray: zeros were seen from servers that do not meter at all.
    return {k: v for k, v in seen.items() if k.endswith("limit") or k.replace("left", "limit") in seen}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the provider asks to wait, if it says so in a way that makes sense."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 < seconds < float("inf"):
            return min(seconds, MOST_RETRY_AFTER)
    return None


def classify(error: openai.APIError) -> TaggingError:
    """Sorts an error of the SDK into the kinds that the database knows."""
    if not isinstance(error, openai.APIStatusError):
        # Timeouts, resets, and answers that are no HTTP.
        return TaggingError("transient", "provider_unreachable", "The AI service could not be reached.")
    return classify_status(error.status_code, error.body, error.response.headers)


def classify_status(status: int, body: object, headers: Mapping[str, str]) -> TaggingError:
    """The same for a status and an error body, as they also stand in the lines of a batch."""
    details = body if isinstance(body, dict) else {}
    inner = details.get("error")
    details = inner if isinstance(inner, dict) else details
    code = clean_text(str(details.get("code") or details.get("type") or "")[:100])
    message = clean_text(str(details.get("message") or "")[:1000])[:300]
    if status in (401, 403) or code in ACCOUNT_CODES or (status == 404 and "model" in message.lower()):
        return TaggingError("account", code or f"http_{status}", f"OpenAI refused the account: {message or status}")
    if status == 429:
        wait = retry_after(headers) or DEFAULT_RETRY_AFTER
        return TaggingError(
            "rate_limit", "rate_limited", "The AI service is busy.", retry_after=wait, limits=read_limits(headers)
        )
    if status in (0, 408, 409) or status >= 500:
        return TaggingError(
            "transient", "provider_error", "The AI service had a problem.", retry_after=retry_after(headers)
        )
    if "cannot find file" in message.lower():
        # Said for a moment right after an upload, before every server knows the file.
        return TaggingError("transient", "file_not_there_yet", "The AI service does not know the uploaded file yet.")
    if code in IMAGE_CODES or "image" in message.lower():
        return image_error("image_refused", f"The AI service refused this image: {message or code}")
    return image_error("request_refused", f"The AI service refused the request: {message or code or status}")
