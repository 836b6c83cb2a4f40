"""Classifies errors of OpenAI-compatible providers into the four error kinds.

Providers describe the same few errors in different words. The rules are tried in order. An error that no rule matches
is ``transient`` and counts as a failure, so it cannot fail an image at once and is not retried endlessly. An error is
of kind ``image`` only if the message is about the image itself or its content. The patterns match the error messages in
tests/cases/provider-errors.jsonl, which also has their sources.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotag.db.messages import Kind, Limits
from autotag.errors import TaggingError
from autotag.openai.headers import (
    read_daily_refusal,
    read_limits,
    reset_wait,
    retry_after_in_message,
)  # fmt: skip
from autotag.redact import redact
from autotag.texts import clean_text, read_json
from autotag.waits import retry_after

DEFAULT_RETRY_AFTER = 1.0  # seconds, if a 429 has no retry-after
MESSAGE_LENGTH = 300  # characters of a provider's message that are kept

#: Error codes of kind ``account`` (OpenAI's guide "Error codes"; Azure's DeploymentNotFound).
ACCOUNT_CODES = frozenset({
    "insufficient_quota", "invalid_api_key", "account_deactivated", "billing_hard_limit_reached", "billing_not_active",
    "model_not_found", "deploymentnotfound", "unsupported_country_region_territory", "access_terminated",
})  # fmt: skip
#: Error codes of kind ``image``: the file cannot be used.
IMAGE_CODES = frozenset({
    "image_parse_error", "invalid_image", "invalid_image_format", "invalid_base64_image", "image_too_large",
    "image_too_small", "invalid_image_url", "unsupported_image_media_type", "image_file_too_large",
})  # fmt: skip
#: Error codes of kind ``image``: a content filter blocked it.
FILTER_CODES = frozenset({
    "image_content_policy_violation", "content_policy_violation", "content_filter", "moderation_blocked",
    "responsibleaipolicyviolation", "safety", "data_inspection_failed",
})  # fmt: skip
TRANSIENT_STATUSES = frozenset({0, 408, 409, 423, 424, 425, 498, 499})

#: How providers say that they do not support a parameter or its value.
_UNSUPPORTED = re.compile(
    r"unsupported|unrecogni[sz]ed|unknown|not supported|no support|unavailable|not available|not permitted|not allowed"
    r"|does ?n[o']t support|do not support|unexpected|extra (inputs|fields)|invalid|deprecated|too (large|big|high)"
    r"|at most"
    r"|must be|cannot be|failed to deserialize|unable to|should be|validation error|constraint", re.IGNORECASE,
)  # fmt: skip
#: The parameters of our requests, and their names in error messages.
_PARAMETERS = (
    ("expires_after", re.compile(r"expires_after|expires after|output_expires", re.IGNORECASE)),
    ("reasoning_effort", re.compile(r"reasoning[_.\s]effort|\breasoning\b.{0,40}\beffort\b", re.IGNORECASE)),
    ("service_tier", re.compile(r"service[_ ]tier", re.IGNORECASE)),
    ("response_format", re.compile(
            r"response_?format|json_schema|json_object|structured[ _]outputs?|json mode"
            r"|specified schema|response_?schema",
            re.IGNORECASE,
        )),
    ("detail", re.compile(r"image_url\.detail|['\"`]detail['\"`]|\bimage detail\b", re.IGNORECASE)),
    ("token_cap", re.compile(r"max_(completion_|output_|new_)?tokens", re.IGNORECASE)),
)  # fmt: skip


@dataclass(frozen=True)
class ErrorDetails:
    """An error of the provider: HTTP status, code (or type), message, and the parameter that it names."""

    status: int
    code: str
    message: str
    parameter: str

    @property
    def text(self) -> str:
        """Code, message and parameter together, for pattern matching."""
        return f"{self.code} {self.message} {self.parameter}"


@dataclass(frozen=True)
class Rule:
    """A pattern, and the kind and code of the errors that match it."""

    kind: Kind
    code: str
    pattern: re.Pattern[str]
    statuses: frozenset[int] | None = None  # None: any


def _rule(kind: Kind, code: str, pattern: str, statuses: set[int] | None = None) -> Rule:
    return Rule(kind, code, re.compile(pattern, re.IGNORECASE | re.DOTALL), frozenset(statuses) if statuses else None)


def _any(*patterns: str) -> str:
    return "|".join(patterns)


#: Tried in this order, the most specific first. Kind ``image`` is only for messages about this image or its content. A
#: message about images in general ("does not support images") is about the model.
RULES = (
    _rule("transient", "file_not_there_yet", r"cannot find file|no such file object"),
    _rule(
        "account",
        "no_vision",
        _any(
            r"(does|do|is|are|was)( not|n't) (currently )?"
            r"(support|accept|allow|have|able|capable|enabled|compiled|include)"
            r".{0,40}(image|vision|multi-?modal)",
            r"image_url.{0,20}(is )?only supported|support(s|ing)? (image|vision) input",
            r"no endpoints found that support image",
            r"(image|vision|multi-?modal)s?( inputs?| content)? ?(is|are) (not (supported|enabled|allowed|available)"
            r"|unsupported|only|disabled)",
            r"not a (multi-?modal|vision) model|text[- ]only model|at most 0 image",
            r"image input is not (supported|enabled)",
            r"mmproj|missing .{0,30}(vision|image) (encoder|projector)",
            # servers whose messages cannot have several parts
            r"content type.{0,20}image_url|content part type.{0,10}image_url|unknown variant [`'\"]image_url",
            r"expected a string|must be a string|should be a valid string|unmarshal array into|item type in content",
            r"images is incompatible",
        ),
    ),
    _rule(
        "image",
        "image_refused",
        _any(
            r"(flagged|blocked|rejected|violat|prohibited|inappropriate).{0,80}(polic|safety|moderat|content|guideline|image)",
            r"content (management )?policy|content.?filter|requires moderation.{0,60}flagged|safety system|inspection",
            r"prohibited_content|content exists risk|敏感内容|违规|不安全",
        ),
    ),
    _rule(
        "account",
        "no_credit",
        _any(
            r"insufficient[_ ](quota|balance|credit|fund)|exceeded your current quota",
            r"(out of|no|not enough|more) credits?\b|credits are depleted|credit balance|spend(ing)? limit",
            r"billing|payment (is )?required|balance is (too low|insufficient)",
            r"can only afford|arrears|overdue|余额不足|充值|欠费",
        ),
    ),
    _rule(
        "account",
        "wrong_key",
        _any(
            r"api[- _]?key|invalid (authentication|token)|unauthori[sz]ed|permission[_ ]denied",
            r"authentication|access token",
            r"organization must be verified|country, region|not supported in your (country|region)",
            r"user location is not supported",
        ),
        {400, 401, 403, 404, 498},
    ),
    _rule(
        "account",
        "unknown_model",
        _any(
            r"(model|deployment|engine).{0,120}(not found|does ?n[o']t exist|not exist|no access|do not have access"
            r"|must be verified|is not supported|not available|unavailable for|decommissioned|deprecated|shut ?down"
            r"|retired"
            r"|not (a )?valid|unknown|is invalid|isn't available)",
            r"(unknown|invalid|no such|unsupported|not a valid) (model|deployment)|try pulling it first|no model",
            r"no (allowed )?(providers|endpoints)( are)? (available|found)|endpoint.{0,80}not running",
            r"unable to access.{0,30}model",
        ),
        {400, 403, 404, 410, 422},
    ),
    _rule(
        "account", "context_too_small", r"context.{0,20}(length|size|window|overflow)|maximum context|exceed_context"
    ),
    _rule(
        "image",
        "image_refused",
        _any(
            r"(invalid|corrupt\w*|damaged|broken|malformed|unreadable|unsupported|empty) (base64 )?(image|picture)\b"
            r"(?!s? (inputs|content|url is only))",
            r"(could not|cannot|can't|unable to|failed to|error) "
            r"(process\w*|decod\w*|read\w*|load\w*|open\w*|pars\w*|identify\w*"
            r"|handl\w*) .{0,30}(image|picture|bitmap)",
            r"image (data|file|content|bytes|is|was|has|size|dimension\w*|format|exceeds|item|too)\b.{0,60}"
            r"(too (large|big|small)|invalid|corrupt|not valid|not a valid|exceed|larger|smaller|unsupported|cannot"
            r"|could not"
            r"|damaged|empty|truncated|maximum)",
            r"image too (large|big|small)|(image|picture).{0,60}aspect ratio",
            r"aspect ratio.{0,60}(must|smaller|exceed|between)",
            r"image length and width|uploaded an unsupported image",
        ),
        {400, 413, 415, 422, 500},
    ),
)


def parse_error(status: int, body: object) -> ErrorDetails:
    """Parses an error body: OpenAI's error object, a list of them, FastAPI's ``detail``, a JSON message, HTML, text, or
    nothing. Secrets are removed."""
    if isinstance(body, list):
        body = body[0] if body else None
    if isinstance(body, str):
        try:
            return parse_error(status, read_json(body)) if body[:1] in "{[" and body else _parse_text(status, body)
        except ValueError:
            return _parse_text(status, body)
    if not isinstance(body, dict):
        return ErrorDetails(status, "", "", "")
    inner = body.get("error")
    if isinstance(inner, str):
        inner = {"message": inner, "code": body.get("code")}
    details: dict[str, Any] = inner if isinstance(inner, dict) else body
    message = details.get("message") or details.get("msg") or details.get("detail") or details.get("error_description")
    parameter = details.get("param") or ""
    if isinstance(message, dict):  # Mistral: FastAPI's error inside
        return parse_error(status, message)
    if isinstance(message, list) and message and isinstance(message[0], dict):  # FastAPI: [{loc, msg, type}]
        parameter = parameter or ".".join(str(part) for part in _list(message[0].get("loc")))
        message = message[0].get("msg")
    metadata = details.get("metadata")  # OpenRouter: the error of the provider behind it
    if isinstance(metadata, dict):
        message = " ".join(str(part) for part in (message, metadata.get("raw"), metadata.get("reasons")) if part)
    codes = [details.get(name) for name in ("code", "type", "status")]
    code = next((code for code in codes if isinstance(code, str) and code and not code.isdigit()), "")
    return ErrorDetails(
        status,
        clean_text(redact(code)[:100]),
        clean_text(redact(str(message or ""))[:2000])[:MESSAGE_LENGTH],
        clean_text(redact(str(parameter))[:200]),
    )


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _parse_text(status: int, text: str) -> ErrorDetails:
    """Parses an error body that is not JSON. HTML tags are removed."""
    visible = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", redact(text)[:5000])
    return ErrorDetails(status, "", clean_text(visible)[:MESSAGE_LENGTH], "")


def error_in_answer(completion: Mapping[str, Any]) -> TaggingError | None:
    """The error in a completion with status 200 and no choices (OpenRouter sends these); None if it has no error."""
    error = completion.get("error")
    if not error or completion.get("choices"):
        return None
    code = error.get("code") if isinstance(error, dict) else None
    status = int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdigit()) else 500
    return classify_status(status if 0 <= status < 1000 else 500, dict(completion), {})


def classify_status(status: int, body: object, headers: Mapping[str, str]) -> TaggingError:
    """Classifies an HTTP status and an error body, of a single call or of a batch line."""
    try:
        details = parse_error(status, body)
    except RecursionError:  # a body that is nested thousands of times
        details = ErrorDetails(status, "", "", "")
    code, lower, message = details.code, details.code.lower(), details.message or details.code or str(status)
    headers = {**_headers_in_body(body), **headers}
    wait = retry_after(headers) or retry_after_in_message(details.message)

    def error(kind: Kind, error_code: str, sentence: str, **more: Any) -> TaggingError:
        options: dict[str, Any] = {"retry_after": wait, **more}
        return TaggingError(kind, error_code, sentence, origin="provider", status=status, **options)

    if lower in FILTER_CODES and status != 429:
        return error("image", "image_refused", f"The AI service refused this image: {message}")
    if lower == "json_validate_failed":  # Groq: the model's answer did not match the schema, but it is billed
        return error("image", "bad_answer", "The AI's answer could not be read.", retry=True)
    if status in (400, 422) and (parameter := _unsupported_parameter(details)):
        return error(
            "account",
            "unsupported_parameter",
            f"The provider does not support this request: {message}",
            parameter=parameter,
            about_request=True,
        )
    if lower in ACCOUNT_CODES:
        return error("account", code, f"The provider refused the account: {message}")
    if (status == 429 and not _is_about_credit(details)) or (status == 402 and wait):
        wait = wait or reset_wait(headers) or DEFAULT_RETRY_AFTER
        limits: Limits = {**read_limits(headers), **read_daily_refusal(details.message)}
        return error("rate_limit", "rate_limited", "The AI service is busy.", limits=limits)
    if status == 413 and (lower == "rate_limit_exceeded" or "per minute" in details.message.lower()):
        # This request alone exceeds the limit per minute. It may fit later, when shorter answers have lowered the
        # learned cap.
        return error(
            "transient", "request_too_large", "The AI service's limit per minute is too small for this request."
        )
    if lower in IMAGE_CODES:
        return error("image", "image_refused", f"The AI service refused this image: {message}")
    for rule in RULES:
        if (rule.statuses is None or status in rule.statuses) and rule.pattern.search(details.text):
            return _error_of_rule(rule, message, code, error)
    if status in TRANSIENT_STATUSES or (status >= 500 and status != 501):
        return error("transient", "provider_error", "The AI service had a problem.")
    if status in (401, 402, 403, 404, 405, 410, 413, 501):
        return error("account", code or f"http_{status}", f"The provider refused the request ({status}): {message}",
                     about_request=status == 413)  # fmt: skip
    return error("transient", "request_refused", f"The AI service refused the request: {message}", about_request=True)


def _headers_in_body(body: object) -> dict[str, str]:
    """The rate-limit headers that OpenRouter repeats in its error: ``{"error": {"metadata": {"headers": {…}}}}``."""
    found: object = body.get("error", body) if isinstance(body, dict) else None
    for name in ("metadata", "headers"):
        found = found.get(name) if isinstance(found, dict) else None
    return {str(name).lower(): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _error_of_rule(rule: Rule, message: str, code: str, error: Any) -> TaggingError:
    result: TaggingError
    if rule.kind == "image":
        result = error("image", rule.code, f"The AI service refused this image: {message}")
    elif rule.kind == "account":
        result = error("account", code or rule.code, f"The provider refused the account: {message}",
                       about_request=rule.code == "context_too_small")  # fmt: skip
    else:
        result = error("transient", rule.code, "The AI service does not know the uploaded file yet.")
    return result


def _is_about_credit(details: ErrorDetails) -> bool:
    """Whether a 429 is about credit. Gemini says "exceeded your current quota" for its limits per minute, too."""
    if details.code.upper() == "RESOURCE_EXHAUSTED" and "credits" not in details.message:
        return False
    return any(rule.code == "no_credit" and rule.pattern.search(details.text) for rule in RULES)


def _unsupported_parameter(details: ErrorDetails) -> str | None:
    """The parameter of our request that a 400 or 422 refuses; None if it names none."""
    if not _UNSUPPORTED.search(details.text):
        return None
    for name, pattern in _PARAMETERS:
        if pattern.search(details.parameter) or pattern.search(details.message):
            return name
    return None
