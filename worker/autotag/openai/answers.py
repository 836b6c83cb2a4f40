"""Parses a model's answer: the result that is stored, or an error.

OpenAI's models follow the schema. Other models wrap the JSON in code fences or text, write their reasoning before it,
use other field names, or give confidences as words. The parser accepts all of these.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from autotag.db.messages import Field, TagResult, Usage
from autotag.errors import TaggingError, image_error
from autotag.openai.classify import error_in_answer
from autotag.openai.fields import read_fields
from autotag.tags import normalise
from autotag.texts import clean_text

TAG_LENGTH = 50  # max characters; longer ones are sentences, not tags
CAPTION_LENGTH = 300  # max characters; screen readers cannot pause within alt text
MODEL_LENGTH = 100  # max characters of the model's name
TIER_LENGTH = 20  # max characters of the service tier's name
MAX_ANSWER = 400_000  # characters of an answer; max_output_tokens is at most 128,000
MAX_TOKENS = 10_000_000  # of one answer; larger numbers are not token counts
MAX_STARTS = 200  # positions in an answer that are tried as the start of a JSON object
MAX_REPAIRED = 20_000  # characters; longer invalid JSON is not repaired, because a repair takes several passes
MAX_LISTED = 1000  # tags of an answer that are read

#: Words that models give as confidences, and the middle of the range that each word means.
CONFIDENCE_WORDS = {
    "certain": 0.98, "very high": 0.95, "high": 0.9, "likely": 0.75, "medium": 0.6, "moderate": 0.6, "low": 0.3,
    "unlikely": 0.2, "very low": 0.1,
}  # fmt: skip
TAG_NAMES = ("tag", "name", "label", "value", "text", "keyword")
CONFIDENCE_NAMES = ("confidence", "score", "probability", "certainty", "conf")
CAPTION_NAMES = ("caption", "description", "alt_text", "alt", "summary")
LIST_NAMES = ("tags", "labels", "keywords")
#: Finish reasons of a content filter (OpenAI, Azure, Gemini).
WITHHELD = re.compile(r"content_filter|safety|recitation|prohibited|blocklist|spii|refusal", re.IGNORECASE)
CUT_OFF = frozenset({"length", "max_tokens", "model_length"})

#: Caption, tags with their confidences, and the object that has the fields.
Answer = tuple[str, list[tuple[str, float | None]], Any]

_THINKING = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z]*\s*(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"\s*(-?\d+(?:[.,]\d+)?)\s*(%)?\s*")


def read_completion(
    completion: dict[str, Any], max_tags: int, fields: Sequence[Field] = (), *, may_be_empty: bool = False
) -> TagResult:
    """Parses a chat completion into the result that is stored. Confidences that the model did not give are left out.
    fields: the requested fields. may_be_empty: an answer without tags is valid (`prompt.may_be_empty`).

    Raises:
        TaggingError: ``image`` if the model refused, ran out of tokens or gave an unusable answer; otherwise an error
            of the provider, if the completion has no answer.
    """
    choice, message = _read_choice(completion)
    finish = str(choice.get("finish_reason") or "").lower()
    refusal = message.get("refusal")
    if refusal or (finish != "stop" and WITHHELD.search(finish)):
        raise image_error("refused", "The AI declined to describe this image.")
    content = _content(message)
    answer = _find_answer(content)
    # A model that was stopped may already have completed its answer. Then the answer is used.
    if answer is None and finish in CUT_OFF:
        raise image_error("answer_too_long", "The AI's answer for this image was cut off.", retry=True)
    if answer is None:
        # Text instead of JSON: the provider may ignore response_format (autotag.reclassify_errors).
        ignored = "response_format" if content.strip() and finish == "stop" else None
        raise image_error("bad_answer", "The AI's answer could not be read.", retry=True, parameter=ignored)
    caption, raw_tags, raw_fields = answer
    tags = normalise_tags(raw_tags, max_tags)
    if not tags and not may_be_empty:
        raise image_error("no_tags", "The AI found nothing to tag in this image.", retry=True)
    result: TagResult = {
        "tags": [tag for tag, _ in tags],
        "confidence": {tag: confidence for tag, confidence in tags if confidence is not None},
        "caption": clean_text(caption[: 2 * CAPTION_LENGTH])[:CAPTION_LENGTH],
        "model": clean_text(str(completion.get("model") or "")[:MODEL_LENGTH]),
    }
    if fields:
        result["fields"] = read_fields(raw_fields, fields)
    return result


def _read_choice(completion: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice and its message.

    Raises:
        TaggingError: the provider's error, if the completion has no choice.
    """
    error = error_in_answer(completion)
    if error:
        raise error
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict):
        inner = error_in_answer(choice)  # OpenRouter: the provider behind it failed during the answer
        if inner:
            raise inner
        message = choice.get("message")
        if isinstance(message, dict):
            return choice, message
        if choice.get("finish_reason"):
            return choice, {}
    feedback = completion.get("promptFeedback")
    if isinstance(feedback, dict) and feedback.get("blockReason"):  # Gemini's filter blocked the request
        raise image_error("refused", "The AI declined to describe this image.")
    raise TaggingError("transient", "provider_error", "The AI service gave no answer.", origin="provider")


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, the texts of its parts, or the arguments of its first tool call."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(
            str(p.get("text") or "") for p in content if isinstance(p, dict) and p.get("type", "text") == "text"
        )
    if not content and isinstance(message.get("tool_calls"), list) and message["tool_calls"]:
        call = message["tool_calls"][0]
        function = call.get("function") if isinstance(call, dict) else None
        content = function.get("arguments") if isinstance(function, dict) else None
        content = json.dumps(content) if isinstance(content, dict) else content
    return content if isinstance(content, str) and len(content) <= MAX_ANSWER else ""


def _find_answer(content: str) -> Answer | None:
    """Caption, tags and fields: from the whole text as JSON, or else from the last JSON object with tags in it."""
    text = content.removeprefix("\ufeff").strip()
    whole = _parse(text)
    if text[:1] == '"' and text[-1:] == '"':  # JSON inside a JSON string
        with suppress(ValueError):
            text = json.loads(text).strip()
            whole = _parse(text)
    if whole is not None:
        return _read_answer(whole) or (_bare_list(whole) if isinstance(whole, list) else None)
    # The answer comes after the reasoning.
    text = re.split(r"</(?:think|thinking|thought|reasoning)>", _THINKING.sub(" ", text), flags=re.IGNORECASE)[-1]
    found = None
    for candidate in [*_FENCE.findall(text), text]:
        for value in _objects(candidate):
            found = _read_answer(value) or found
        if found:
            return found
    return None


def _objects(text: str) -> Iterator[Any]:
    """Yields the outermost JSON objects and lists in a text."""
    whole = _parse(text.strip())
    if whole is not None:
        yield whole
        return
    decoder = json.JSONDecoder()
    at, starts = 0, 0
    while starts < MAX_STARTS and (begin := re.compile(r"[{\[]").search(text, at)):
        starts += 1
        try:
            value, at = decoder.raw_decode(text, begin.start())
            yield value
        except (ValueError, RecursionError):
            at = begin.start() + 1


def _parse(text: str) -> Any:
    """Parses a JSON object or list, also with the syntax errors that models often make; otherwise None."""
    if text[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > MAX_REPAIRED:
        return None
    try:
        return json.loads(re.sub(r",(\s*[}\]])", r"\1", text))  # trailing commas
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)  # single quotes: Python's syntax
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _read_answer(value: Any, depth: int = 0) -> Answer | None:
    """Caption, tags and fields of a parsed answer; None if it has no tags. It may be nested in an object or a list."""
    if isinstance(value, list) and len(value) == 1 and depth < 3:
        return _read_answer(value[0], depth + 1)
    if not isinstance(value, dict) or isinstance(value.get("properties"), dict):  # a copy of the schema
        return None
    keys = {str(key).lower().strip(): key for key in value}
    listed = next((value[keys[name]] for name in LIST_NAMES if name in keys), None)
    if listed is None:
        inner = [item for item in value.values() if isinstance(item, dict)]
        return _read_answer(inner[0], depth + 1) if len(inner) == 1 and depth < 3 else None
    tags = _read_tags(listed)
    if tags is None:
        return None
    caption = next((value[keys[name]] for name in CAPTION_NAMES if name in keys), "")
    # A model that does not follow the schema may write the fields beside the tags.
    return caption if isinstance(caption, str) else "", tags, value.get("fields", value)


def _bare_list(listed: list[Any]) -> Answer | None:
    tags = _read_tags(listed)
    return ("", tags, None) if tags else None


def _read_tags(listed: Any) -> list[tuple[str, float | None]] | None:
    """Pairs (tag, confidence), read from a list of objects or strings, an object of confidences by tag, or a string
    with commas. None: it is something else."""
    if isinstance(listed, dict):
        pairs = list(listed.items())
    elif isinstance(listed, str):
        pairs = [(part, None) for part in re.split(r"[,;\n]", listed[: 20 * TAG_LENGTH]) if part.strip()]
    elif isinstance(listed, list):
        pairs = [pair for pair in (_read_tag(item) for item in listed[:MAX_LISTED]) if pair]
        if listed and not pairs:
            return None
    else:
        return None
    if all(isinstance(tag, str) and type(value) is float and 0 <= value <= 1 for tag, value in pairs):  # the schema
        return pairs[:MAX_LISTED]
    scale = _scale([value for _, value in pairs])
    return [(str(tag), _confidence(value, scale)) for tag, value in pairs[:MAX_LISTED]]


def _read_tag(item: Any) -> tuple[str, Any] | None:
    """The tag, and its confidence in the form that the model gave; None if the item is not a tag."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, dict) and len(item) == 2 and isinstance(item.get("tag"), str) and "confidence" in item:
        return item["tag"], item["confidence"]  # as the schema asks for
    if isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str):
        return item[0], item[1]
    if not isinstance(item, dict):
        return None
    keys = {str(key).lower().strip(): key for key in item}
    tag = next((item[keys[name]] for name in TAG_NAMES if name in keys and isinstance(item[keys[name]], str)), None)
    if tag is None:
        return None
    return tag, next((item[keys[name]] for name in CONFIDENCE_NAMES if name in keys), None)


def _scale(values: list[Any]) -> float:
    """The max of the model's scale of confidences: 1, or 10 or 100 if any is 2 or more. 1.x may be a rounding error."""
    numbers = [v for v in (_number(value) for value in values) if v is not None and math.isfinite(v)]
    top = max(numbers, default=0.0)
    return 1.0 if top < 2 else 10.0 if top <= 10 else 100.0


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value) if abs(value) < 1e9 else None
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value[:40])):
        number = float(match[1].replace(",", "."))
        return number / 100 if match[2] else number
    return None


def _confidence(value: Any, scale: float) -> float | None:
    """A confidence from 0 to 1; None if it is missing or unreadable."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in CONFIDENCE_WORDS:
            return CONFIDENCE_WORDS[word]
        if "%" in word:
            scale = 1.0
    number = _number(value)
    if number is None or math.isnan(number):
        return None
    return round(min(max(number / scale, 0.0), 1.0), 3)


def normalise_tags(tags: list[tuple[str, float | None]], max_tags: int) -> list[tuple[str, float | None]]:
    """Normalises tags, drops duplicates and long ones, sorts by confidence, and keeps at most ``max_tags``.

    A tag without a confidence is sorted as 0.5. Tags with equal confidences keep the model's order.
    """
    best: dict[str, float | None] = {}
    for tag, confidence in tags:
        name = normalise(tag)
        if len(name) > TAG_LENGTH:  # the model may have copied the tag's description from the prompt
            name = normalise(re.split(r": | \(", name, maxsplit=1)[0])
        value = None
        if confidence is not None:
            value = 0.0 if math.isnan(confidence) else round(min(max(confidence, 0.0), 1.0), 3)
        if name and len(name) <= TAG_LENGTH:
            other = best.get(name)
            best[name] = value if other is None else max(other, value or 0.0)
    return sorted(best.items(), key=lambda item: -(item[1] if item[1] is not None else 0.5))[:max_tags]


def read_usage(completion: Mapping[str, Any]) -> Usage | None:
    """The provider's usage figures; None if they are missing."""
    usage = completion.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens_details")
    output = usage.get("completion_tokens_details")
    prompt, output = prompt if isinstance(prompt, dict) else {}, output if isinstance(output, dict) else {}
    prompt_tokens = _tokens(usage.get("prompt_tokens"))
    if not prompt_tokens and not _tokens(usage.get("completion_tokens")):
        return None
    return {
        "input": prompt_tokens,
        "cached": min(prompt_tokens, _tokens(prompt.get("cached_tokens"))),
        "cache_write": min(prompt_tokens, _tokens(prompt.get("cache_write_tokens"))),
        "output": _tokens(usage.get("completion_tokens")),
        "reasoning": _tokens(output.get("reasoning_tokens")),
        "model": _name(completion.get("model"), MODEL_LENGTH),
        "tier": _name(completion.get("service_tier"), TIER_LENGTH),
    }


def _name(value: object, length: int) -> str | None:
    return clean_text(value[:length]) or None if isinstance(value, str) else None


def _tokens(value: object) -> int:
    """A token count; 0 if the value is implausible."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS else 0
