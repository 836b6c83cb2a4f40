"""What the simulator answers about a picture, and what it bills for it."""

from __future__ import annotations

import json
import random
import secrets
import time
from typing import Any

from lab.openai_sim.asked import Asked
from lab.openai_sim.faults import Answer
from lab.openai_sim.models import CHARACTERS_PER_TOKEN, dollars, text_tokens
from lab.openai_sim.plan import Plan
from lab.openai_sim.vision import Picture

CACHED_FROM = 1024  # tokens of an identical prefix
CACHED_STEP = 128  # tokens


class PromptCache:
    """Which beginnings of prompts were seen; nothing is forgotten."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def use(self, asked: Asked) -> tuple[int, int]:
        """Tokens of this prompt that are read from the cache, and that are written to it."""
        if asked.prefix_tokens < CACHED_FROM:
            return 0, 0
        if asked.prefix in self._seen:
            return asked.prefix_tokens // CACHED_STEP * CACHED_STEP, 0
        self._seen.add(asked.prefix)
        return 0, asked.prefix_tokens


def think(effort: str | None, picture: str, plan: Plan) -> int:
    """Tokens of thinking about a picture: the same for the same picture (a digest), effort and seed."""
    fewest, most = plan.thinking.get(effort or "none", (0, 0))
    return random.Random(f"{picture} {effort} {plan.seed}").randint(fewest, most)


def complete(
    asked: Asked, picture: Picture | None, *, thought: int = 0, cache: PromptCache | None = None,
    wrong: Answer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A chat completion.

    Args:
        asked: the request.
        picture: what it shows.
        thought: tokens of thinking.
        cache: the account's prompt cache; without one nothing is cached.
        wrong: a way to be of no use, or to have another form (see `Fault.answer`).
    """
    if wrong == "error_in_200":
        return {"id": None, "choices": None, "error": {"message": "Provider returned error", "code": 429}}
    content, refusal, finish = _said(picture, wrong)
    content, finish, output, thought = _within_cap(asked.cap, thought, content, refusal, finish)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal, "annotations": []}
    choices: list[dict[str, Any]] = [{"index": 0, "finish_reason": finish, "logprobs": None, "message": message}]
    if wrong == "empty_choices":
        choices = []
    elif wrong == "safety":
        choices = [{"finish_reason": "content_filter: SAFETY", "index": 0}]
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion", "created": int(time.time()),
        "model": asked.model.dated, "service_tier": asked.tier, "choices": choices,
        "usage": _usage(asked, output, thought, *(cache.use(asked) if cache else (0, 0))),
    }  # fmt: skip


def note(asked: Asked, answer: dict[str, Any], *, batch: bool = False) -> dict[str, Any]:
    """What the book keeps of an answered request."""
    usage = answer.get("usage")
    cost = dollars(asked.model.name, usage, asked.tier, batch) if usage and asked.model.prices else None
    return {
        "model": asked.model.dated, "effort": asked.effort, "cap": asked.cap, "tier": asked.tier,
        "format": asked.format, "tokens": asked.metered, "usage": usage, "dollars": None if cost is None else str(cost),
    }  # fmt: skip


def _said(picture: Picture | None, wrong: Answer | None) -> tuple[str | None, str | None, str]:
    """Content, refusal and finish_reason of an answer without a cap."""
    match wrong:
        case "refusal":
            return None, "I'm sorry, I can't help with that.", "stop"
        case "content_filter":
            return None, None, "content_filter"
        case "null_content":
            return None, None, "stop"
        case "no_json":
            return "I see a picture.", None, "stop"
    content = json.dumps(_tagged(picture, wrong))
    match wrong:
        case "length":
            return content[:20], None, "length"
        case "fence":
            content = f"```json\n{content}\n```"
        case "words_around":
            content = f"Here are the tags for your image:\n\n{content}\n\nLet me know if you need more."
        case "bom":
            content = f"\ufeff{content}"
        case "thinking":
            content = f'<think> maybe {{"tags": ["wrong"]}} … no, look again. </think>\n{content}'
    return content, None, "stop"


def _tagged(picture: Picture | None, wrong: Answer | None) -> dict[str, Any]:
    """The object that a model answers with."""
    tags = picture.tags if picture else ()
    if wrong == "bad_schema":
        return {"seen": list(tags)}
    caption = f"A {tags[4]} picture, {', '.join(tags[:4])}." if tags else "There is no picture."
    if wrong == "no_tags":
        return {"caption": caption, "tags": []}
    if wrong == "string_tags":
        return {"caption": caption, "tags": [tag.title() for tag in tags]}
    listed = [{"tag": tag.title(), "confidence": _confidence(i, wrong)} for i, tag in enumerate(tags)]
    return {"caption": caption, "tags": listed, **({"mood": "calm"} if wrong == "extra_key" else {})}


def _confidence(place: int, wrong: Answer | None) -> float | str:
    """How sure the answer is of its tag at a place, the first being the surest."""
    sure = round(0.99 - 0.05 * place, 2)
    if wrong == "word_confidence":
        return "high"
    return round(100 * sure) if wrong == "percent" else sure


def _within_cap(
    cap: int | None, thought: int, content: str | None, refusal: str | None, finish: str
) -> tuple[str | None, str, int, int]:
    """Cuts an answer to its cap: content, finish_reason, completion tokens, and those of them that are thinking."""
    visible = text_tokens(len(content or refusal or ""))
    if cap is None or thought + visible <= cap:
        output = thought + visible + 1  # the end of the answer is a token too
        return content, finish, output if cap is None else min(output, cap), thought
    left = max(0, cap - thought)
    if content is not None:
        content, finish = content[: left * CHARACTERS_PER_TOKEN], "length"
    return content, finish, cap, min(thought, cap)


def _usage(asked: Asked, output: int, thought: int, cached: int, written: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    writes = {"cache_write_tokens": written} if asked.model.writes_cache else {}
    return {
        "prompt_tokens": asked.prompt_tokens, "completion_tokens": output,
        "total_tokens": asked.prompt_tokens + output,
        "prompt_tokens_details": {
            "cached_tokens": cached, **writes, "image_tokens": asked.image_tokens, "text_tokens": asked.text_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": thought, "audio_tokens": 0, "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }  # fmt: skip
