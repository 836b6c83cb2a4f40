"""Builds the simulator's completions and their usage."""

from __future__ import annotations

import json
import random
import secrets
import time
from typing import Any

from lab.openai_sim.completion_request import CompletionRequest
from lab.openai_sim.faults import AnswerVariant
from lab.openai_sim.models import CHARACTERS_PER_TOKEN, dollars, text_tokens
from lab.openai_sim.plan import Plan
from lab.openai_sim.vision import Picture

CACHED_FROM = 1024  # tokens of an identical prefix
CACHED_STEP = 128  # tokens
CACHED_FOR = 300.0  # seconds since the last use


class PromptCache:
    """The prompt prefixes of the last minutes, as OpenAI keeps them: at least five minutes after the last use."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}

    def use(self, request: CompletionRequest) -> tuple[int, int]:
        """Tokens of this prompt that are read from the cache and written to the cache."""
        if request.prefix_tokens < CACHED_FROM:
            return 0, 0
        now = time.monotonic()
        last = self._used.get(request.prefix)
        self._used[request.prefix] = now
        if last is not None and now - last < CACHED_FOR:
            return request.prefix_tokens // CACHED_STEP * CACHED_STEP, 0
        return 0, request.prefix_tokens


def draw_reasoning_tokens(effort: str | None, picture: str, plan: Plan) -> int:
    """Reasoning tokens for a picture (given by its digest); the same picture, effort and seed give the same number."""
    low, high = plan.reasoning_tokens.get(effort or "none", (0, 0))
    return random.Random(f"{picture} {effort} {plan.seed}").randint(low, high)


def complete(
    request: CompletionRequest, picture: Picture | None, *, reasoning: int = 0, cache: PromptCache | None = None,
    variant: AnswerVariant | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A chat completion.

    Args:
        request: the checked request.
        picture: what the simulator recognised in its picture.
        reasoning: reasoning tokens.
        cache: the account's prompt cache; None: nothing is cached.
        variant: how the answer differs from a good one (see `Fault.answer`).
    """
    if variant == "error_in_200":
        return {"id": None, "choices": None, "error": {"message": "Provider returned error", "code": 429}}
    content, refusal, finish = _content(picture, variant, request.schema)
    content, finish, output, reasoning = _within_cap(request.cap, reasoning, content, refusal, finish)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal, "annotations": []}
    choices: list[dict[str, Any]] = [{"index": 0, "finish_reason": finish, "logprobs": None, "message": message}]
    if variant == "empty_choices":
        choices = []
    elif variant == "safety":
        choices = [{"finish_reason": "content_filter: SAFETY", "index": 0}]
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion", "created": int(time.time()),
        "model": request.model.dated, "service_tier": request.tier, "choices": choices,
        "usage": _usage(request, output, reasoning, *(cache.use(request) if cache else (0, 0))),
    }  # fmt: skip


def log_fields(request: CompletionRequest, answer: dict[str, Any], *, batch: bool = False) -> dict[str, Any]:
    """The fields that an answered request adds to its entry in the request log."""
    usage = answer.get("usage")
    cost = dollars(request.model.name, usage, request.tier, batch) if usage and request.model.prices else None
    return {
        "model": request.model.dated, "effort": request.effort, "cap": request.cap, "tier": request.tier,
        "format": request.format, "prefix": request.prefix, "tokens": request.metered, "usage": usage,
        "dollars": None if cost is None else str(cost),
    }  # fmt: skip


def _content(picture: Picture | None, variant: AnswerVariant | None, schema: str) -> tuple[str | None, str | None, str]:
    """Content, refusal and finish_reason of an answer before the cap is applied."""
    match variant:
        case "refusal":
            return None, "I'm sorry, I can't help with that.", "stop"
        case "content_filter":
            return None, None, "content_filter"
        case "null_content":
            return None, None, "stop"
        case "no_json":
            return "I see a picture.", None, "stop"
    content = json.dumps(_tagging(picture, variant) | _fields(picture, schema), ensure_ascii=False)
    match variant:
        case "length":
            return content[:20], None, "length"
        case "fence":
            content = f"```json\n{content}\n```"
        case "text_around":
            content = f"Here are the tags for your image:\n\n{content}\n\nLet me know if you need more."
        case "bom":
            content = f"\ufeff{content}"
        case "thinking":
            content = f'<think> maybe {{"tags": ["wrong"]}} … no, look again. </think>\n{content}'
    return content, None, "stop"


def _tagging(picture: Picture | None, variant: AnswerVariant | None) -> dict[str, Any]:
    """The JSON object in a model's answer."""
    tags = picture.tags if picture else ()
    if variant == "bad_schema":
        return {"seen": list(tags)}
    kind = f"A {tags[4]} picture, " if len(tags) > 4 else "A picture: "
    caption = f"{kind}{', '.join(tags[:4])}." if tags else "There is no picture."
    if variant == "no_tags":
        return {"caption": caption, "tags": []}
    if variant == "string_tags":
        return {"caption": caption, "tags": [tag.title() for tag in tags]}
    listed = [{"tag": tag.title(), "confidence": _confidence(i, variant)} for i, tag in enumerate(tags)]
    return {"caption": caption, "tags": listed, **({"mood": "calm"} if variant == "extra_key" else {})}


def _fields(picture: Picture | None, schema: str) -> dict[str, Any]:
    """The fields that a strict schema asks for, by what is in the picture: an enum is the first of its values that is a
    tag, a boolean whether its name is one, an integer the number of tags, and a text the most important tag."""
    asked = json.loads(schema)["properties"].get("fields") if schema else None
    if not asked:
        return {}
    tags = picture.tags if picture else ()
    values: dict[str, Any] = {}
    for name, field in asked["properties"].items():
        kind = field["anyOf"][0]
        values[name] = (
            next((value for value in kind["enum"] if value in tags), None) if "enum" in kind
            else name in tags if kind["type"] == "boolean" else len(tags) if kind["type"] == "integer"
            else next(iter(tags), None)
        )  # fmt: skip
    return {"fields": values}


def _confidence(position: int, variant: AnswerVariant | None) -> float | str:
    """The confidence of the tag at a position; the first tag has the highest."""
    confidence = max(0.0, round(0.99 - 0.05 * position, 2))
    if variant == "word_confidence":
        return "high"
    return round(100 * confidence) if variant == "percent" else confidence


def _within_cap(
    cap: int | None, reasoning: int, content: str | None, refusal: str | None, finish: str
) -> tuple[str | None, str, int, int]:
    """Cuts an answer to its cap. Returns content, finish_reason, completion tokens, and their reasoning tokens."""
    visible = text_tokens(len(content or refusal or ""))
    if cap is None or reasoning + visible <= cap:
        output = reasoning + visible + 1  # the end-of-answer token
        return content, finish, output if cap is None else min(output, cap), reasoning
    left = max(0, cap - reasoning)
    if content is not None:
        content, finish = content[: left * CHARACTERS_PER_TOKEN], "length"
    return content, finish, cap, min(reasoning, cap)


def _usage(request: CompletionRequest, output: int, reasoning: int, cached: int, written: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    writes = {"cache_write_tokens": written} if request.model.writes_cache else {}
    return {
        "prompt_tokens": request.prompt_tokens, "completion_tokens": output,
        "total_tokens": request.prompt_tokens + output,
        "prompt_tokens_details": {
            "cached_tokens": cached, **writes, "image_tokens": request.image_tokens, "text_tokens": request.text_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": reasoning, "audio_tokens": 0, "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }  # fmt: skip
