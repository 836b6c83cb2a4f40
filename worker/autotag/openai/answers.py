"""What of a model's answer is stored, and what is an error.

OpenAI's models keep to the schema. Others put code fences or words around the JSON, think aloud before it, name things
their own way, or say how sure they are in words: whatever a reader would understand is read.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from autotag.db.messages import TagResult, Usage
from autotag.errors import TaggingError, image_error
from autotag.openai.classify import error_in_answer
from autotag.texts import clean_text

TAG_LENGTH = 50  # characters; longer ones are sentences, not tags
CAPTION_LENGTH = 300  # characters; screen readers read alt text in one go
MODEL_LENGTH = 100  # characters of the model's name
TIER_LENGTH = 20  # characters of the service tier's name
MAX_ANSWER = 400_000  # characters of an answer; max_output_tokens is 128,000 at most
MAX_TOKENS = 10_000_000  # of one answer; more is no count of tokens
MAX_TRIES = 200  # places in an answer where a JSON object may begin

#: Words for how sure a model is, as numbers: the middle of what people mean by them.
WORDS = {
    "certain": 0.98, "very high": 0.95, "high": 0.9, "likely": 0.75, "medium": 0.6, "moderate": 0.6, "low": 0.3,
    "unlikely": 0.2, "very low": 0.1,
}  # fmt: skip
TAG_NAMES = ("tag", "name", "label", "value", "text", "keyword")
CONFIDENCE_NAMES = ("confidence", "score", "probability", "certainty", "conf")
CAPTION_NAMES = ("caption", "description", "alt_text", "alt", "summary")
LIST_NAMES = ("tags", "labels", "keywords")
#: Ends that mean that the provider withheld the answer because of what the picture shows (OpenAI, Azure, Gemini).
WITHHELD = re.compile(r"content_filter|safety|recitation|prohibited|blocklist|spii|refusal", re.IGNORECASE)
CUT_OFF = frozenset({"length", "max_tokens", "model_length"})

_THINKING = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z]*\s*(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"\s*(-?\d+(?:[.,]\d+)?)\s*(%)?\s*")


def read_completion(completion: dict[str, Any], max_tags: int) -> TagResult:
    """What is stored of a chat completion. A tag whose confidence the model did not give has none.

    Raises:
        TaggingError: of the image, when the model refused, ran out of tokens or gave nothing that can be read; else of
            the provider, when this is no answer.
    """
    choice, message = _read_choice(completion)
    finish = str(choice.get("finish_reason") or "").lower()
    refusal = message.get("refusal")
    if refusal or WITHHELD.search(finish):
        raise image_error("refused", "The AI declined to describe this image.")
    content = _content(message)
    found = _find_answer(content)
    # An answer that is whole although the model was stopped is an answer.
    if found is None and finish in CUT_OFF:
        raise image_error("answer_too_long", "The AI's answer for this image was cut off.", retry=True)
    if found is None:
        # Words where JSON was asked for: the provider may ignore the format (autotag.reclassify_errors).
        ignored = "response_format" if content.strip() and finish == "stop" else None
        raise image_error("bad_answer", "The AI's answer could not be read.", retry=True, parameter=ignored)
    caption, raw_tags = found
    tags = normalise_tags(raw_tags, max_tags)
    if not tags:
        raise image_error("no_tags", "The AI found nothing to tag in this image.", retry=True)
    return {
        "tags": [tag for tag, _ in tags],
        "confidence": {tag: sure for tag, sure in tags if sure is not None},
        "caption": clean_text(caption[: 2 * CAPTION_LENGTH])[:CAPTION_LENGTH],
        "model": clean_text(str(completion.get("model") or "")[:MODEL_LENGTH]),
    }


def _read_choice(completion: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice and its message.

    Raises:
        TaggingError: of the provider, when there is none: this is no answer of the model.
    """
    error = error_in_answer(completion)
    if error:
        raise error
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict):
        inner = error_in_answer(choice)  # OpenRouter: the provider behind it failed half-way
        if inner:
            raise inner
        message = choice.get("message")
        if isinstance(message, dict):
            return choice, message
        if choice.get("finish_reason"):
            return choice, {}
    feedback = completion.get("promptFeedback")
    if isinstance(feedback, dict) and feedback.get(
        "blockReason"
    ):  # Gemini: the picture was blocked before the model saw it
        raise image_error("refused", "The AI declined to describe this image.")
    raise TaggingError("transient", "provider_error", "The AI service gave no answer.", origin="provider")


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message; of a list of parts, their texts; of a call of a tool, its arguments."""
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


def _find_answer(content: str) -> tuple[str, list[tuple[str, float | None]]] | None:
    """Caption and tags: of the text as a whole, or else of the last JSON object in it that has tags."""
    text = content.removeprefix("\ufeff").strip()
    whole = _parse(text)
    if text[:1] == '"' and text[-1:] == '"':  # JSON as a string of JSON
        with suppress(ValueError):
            text = json.loads(text).strip()
            whole = _parse(text)
    if whole is not None:
        return _read_answer(whole) or (_bare_list(whole) if isinstance(whole, list) else None)
    # What comes before the end of the thinking is not the answer.
    text = re.split(r"</(?:think|thinking|thought|reasoning)>", _THINKING.sub(" ", text), flags=re.IGNORECASE)[-1]
    found = None
    for candidate in [*_FENCE.findall(text), text]:
        for value in _objects(candidate):
            found = _read_answer(value) or found
        if found:
            return found
    return None


def _objects(text: str) -> Iterator[Any]:
    """The JSON values in a text that begin with a brace or a bracket, outermost ones only."""
    whole = _parse(text.strip())
    if whole is not None:
        yield whole
        return
    decoder = json.JSONDecoder()
    at, tries = 0, 0
    while tries < MAX_TRIES and (begin := re.compile(r"[{\[]").search(text, at)):
        tries += 1
        try:
            value, at = decoder.raw_decode(text, begin.start())
            yield value
        except (ValueError, RecursionError):
            at = begin.start() + 1


def _parse(text: str) -> Any:
    """A JSON object or list; also one with the small mistakes that models make; None when it is none."""
    if text[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > 20_000:  # what is that long and broken is no answer worth the work
        return None
    try:
        return json.loads(re.sub(r",(\s*[}\]])", r"\1", text))  # trailing commas
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)  # single quotes: Python's way to write it
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _read_answer(value: Any, depth: int = 0) -> tuple[str, list[tuple[str, float | None]]] | None:
    """Caption and tags of a parsed answer; None when it has no tags. One that is wrapped in another object or in a list
    is taken out of it."""
    if isinstance(value, list) and len(value) == 1 and depth < 3:
        return _read_answer(value[0], depth + 1)
    if not isinstance(value, dict) or isinstance(value.get("properties"), dict):  # a copy of the schema is no answer
        return None
    keys = {str(key).lower().strip(): key for key in value}
    listed = next((value[keys[name]] for name in LIST_NAMES if name in keys), None)
    if listed is None:
        inner = [one for one in value.values() if isinstance(one, dict)]
        return _read_answer(inner[0], depth + 1) if len(inner) == 1 and depth < 3 else None
    tags = _read_tags(listed)
    if tags is None:
        return None
    caption = next((value[keys[name]] for name in CAPTION_NAMES if name in keys), "")
    return caption if isinstance(caption, str) else "", tags


def _bare_list(listed: list[Any]) -> tuple[str, list[tuple[str, float | None]]] | None:
    tags = _read_tags(listed)
    return ("", tags) if tags else None


def _read_tags(listed: Any) -> list[tuple[str, float | None]] | None:
    """(tag, confidence) of a list of objects or strings, of an object from tag to confidence, or of a string with
    commas; else None."""
    if isinstance(listed, dict):
        pairs = list(listed.items())
    elif isinstance(listed, str):
        pairs = [(part, None) for part in re.split(r"[,;\n]", listed[: 20 * TAG_LENGTH]) if part.strip()]
    elif isinstance(listed, list):
        pairs = [pair for pair in (_read_tag(one) for one in listed[:1000]) if pair]
        if listed and not pairs:
            return None
    else:
        return None
    scale = _scale([value for _, value in pairs])
    return [(str(tag), _confidence(value, scale)) for tag, value in pairs[:1000]]


def _read_tag(one: Any) -> tuple[str, Any] | None:
    """The tag, and its confidence as it was given."""
    if isinstance(one, str):
        return one, None
    if isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[0], str):
        return one[0], one[1]
    if not isinstance(one, dict):
        return None
    keys = {str(key).lower().strip(): key for key in one}
    tag = next((one[keys[name]] for name in TAG_NAMES if name in keys and isinstance(one[keys[name]], str)), None)
    if tag is None:
        return None
    return tag, next((one[keys[name]] for name in CONFIDENCE_NAMES if name in keys), None)


def _scale(values: list[Any]) -> float:
    """What confidences are parts of: 1, or 10 or 100 where some are above what rounding explains."""
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
    """0 to 1; None when there is none that can be read."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in WORDS:
            return WORDS[word]
        if "%" in word:
            scale = 1.0
    number = _number(value)
    if number is None or number != number:
        return None
    return round(min(max(number / scale, 0.0), 1.0), 3)


def normalise_tags(tags: list[tuple[str, float | None]], max_tags: int) -> list[tuple[str, float | None]]:
    """Trimmed, case-folded, each once, length-limited; surest first, those without a confidence in the order given."""
    best: dict[str, float | None] = {}
    for tag, confidence in tags:
        name = clean_text(tag).casefold().strip(" #,.;:\"'")
        sure = None
        if confidence is not None:
            sure = round(min(max(confidence, 0.0), 1.0), 3) if confidence == confidence else 0.0  # NaN is no confidence
        if name and len(name) <= TAG_LENGTH:
            known = best.get(name)
            best[name] = sure if known is None else max(known, sure or 0.0)
    return sorted(best.items(), key=lambda item: -(item[1] if item[1] is not None else 0.5))[:max_tags]


def read_usage(completion: Mapping[str, Any]) -> Usage | None:
    """The provider's own figures of usage; None: there are none."""
    usage = completion.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens_details")
    output = usage.get("completion_tokens_details")
    prompt, output = prompt if isinstance(prompt, dict) else {}, output if isinstance(output, dict) else {}
    read = _tokens(usage.get("prompt_tokens"))
    if not read and not _tokens(usage.get("completion_tokens")):
        return None
    return {
        "input": read,
        "cached": min(read, _tokens(prompt.get("cached_tokens"))),
        "cache_write": min(read, _tokens(prompt.get("cache_write_tokens"))),
        "output": _tokens(usage.get("completion_tokens")),
        "reasoning": _tokens(output.get("reasoning_tokens")),
        "model": _name(completion.get("model"), MODEL_LENGTH),
        "tier": _name(completion.get("service_tier"), TIER_LENGTH),
    }


def _name(value: object, length: int) -> str | None:
    return clean_text(value[:length]) or None if isinstance(value, str) else None


def _tokens(value: object) -> int:
    """A count of tokens; 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS else 0
