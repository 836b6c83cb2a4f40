"""Data from outside (model answers, batch lines, error bodies, headers, image files, webhooks) is either read or
refused with a message, and data that was read can be stored."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from autotag.errors import TaggingError
from autotag.http.webhook import make_app
from autotag.images.prepare import prepare_bytes
from autotag.openai.answers import CAPTION_LENGTH, MAX_ANSWER, TAG_LENGTH, read_completion, read_usage
from autotag.openai.classify import classify_status
from autotag.openai.headers import read_limits
from autotag.openai.output import MAX_LINE_BYTES, read_line, read_lines
from autotag.openai.provider import Provider
from autotag.waits import MAX_RETRY_AFTER
from lab.openai_sim.webhooks import make_secret, sign

text = st.text(max_size=60) | st.sampled_from(
    [
        "\x00",
        "a\x00b",
        "\ud800",
        "<script>alert(1)</script>",
        "'); drop table public.assets; --",
        "‮gnp",
        "𝕿𝖆𝖌",
        "é" * 80,
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
anything = st.recursive(
    scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(text, x, max_size=4), max_leaves=12
)


def mostly(value: Any) -> st.SearchStrategy[Any]:
    """Mostly a strategy's values, at times anything at all."""
    return st.one_of(value, value, value, anything)


def contents() -> st.SearchStrategy[str]:
    tag = st.fixed_dictionaries({"tag": text, "confidence": mostly(st.floats())})
    answer = st.fixed_dictionaries({"caption": mostly(text), "tags": mostly(st.lists(mostly(tag), max_size=15))})
    return st.one_of(mostly(answer).map(json.dumps), text)


usage = st.fixed_dictionaries({}, optional={
    "prompt_tokens": mostly(st.integers()), "completion_tokens": mostly(st.integers()),
    "prompt_tokens_details": mostly(st.fixed_dictionaries({}, optional={"cached_tokens": mostly(st.integers())})),
})  # fmt: skip
message = st.fixed_dictionaries({}, optional={"content": mostly(contents()), "refusal": mostly(st.none())})
choice = st.fixed_dictionaries(
    {"message": mostly(message)},
    optional={"finish_reason": mostly(st.sampled_from(["stop", "length", "content_filter"]))},
)
completions = st.fixed_dictionaries({"choices": mostly(st.lists(mostly(choice), min_size=1, max_size=2))},
                                    optional={"model": mostly(text), "usage": mostly(usage)})  # fmt: skip


def can_be_stored(value: Any) -> None:
    """Postgres takes it as jsonb: UTF-8, no NUL, no number that is none."""
    stored = json.dumps(value, ensure_ascii=False, allow_nan=False)
    stored.encode()
    orjson.dumps(value)
    assert "\\u0000" not in stored


def check_result(result: dict[str, Any], max_tags: int) -> None:
    can_be_stored(result)
    assert 1 <= len(result["tags"]) <= max_tags
    assert set(result["confidence"]) <= set(result["tags"])
    for tag in result["tags"]:
        assert tag.strip() == tag != ""
        assert len(tag) <= TAG_LENGTH
        assert tag.isprintable()
    assert all(0 <= sure <= 1 for sure in result["confidence"].values())
    assert len(result["caption"]) <= CAPTION_LENGTH


def check_error(error: TaggingError, kind: str) -> None:
    can_be_stored(error.as_json())
    assert (error.kind, bool(error.code)) == (kind, True)
    assert error.message.endswith("."), error.message


@settings(max_examples=150)
@given(mostly(completions), st.integers(1, 12))
def test_a_completion_is_tags_or_a_sentence(completion: Any, max_tags: int) -> None:
    if isinstance(completion, dict):  # `Provider.complete` refuses what is not
        counts = read_usage(completion)
        assert counts is None or all(0 <= n <= 10**9 for n in counts.values() if isinstance(n, int))
        try:
            check_result(read_completion(completion, max_tags), max_tags)
        except TaggingError as error:
            can_be_stored(error.as_json())


@settings(max_examples=150)
@given(
    st.one_of(
        st.binary(max_size=200),
        mostly(st.fixed_dictionaries({
            "custom_id": mostly(st.integers(1, 10**6).map(str)),
            "response": mostly(st.fixed_dictionaries({"status_code": mostly(st.just(200)), "body": mostly(completions)})),
        }, optional={"error": anything})).map(lambda line: json.dumps(line).encode()),
    )
)  # fmt: skip
@example(b'{"custom_id": 1e999}')
@example(b"[" * 100_000)
@example(b'{"custom_id": "1", "response": {"status_code": 1e999}}')
def test_a_batch_line_is_an_answer_or_nothing(line: bytes) -> None:
    answer = read_line(line, 10)
    if answer is not None:
        can_be_stored(answer)
        assert 0 < answer["task"] < 2**63
        assert ("result" in answer) != ("error" in answer)


async def test_a_line_without_end_is_cut_and_the_next_is_read() -> None:
    async def chunks() -> Any:
        for _ in range(160):
            yield b"x" * 65_536  # 10 MB
        yield b'x\n{"custom_id": "7"}\n'

    lines = [line async for line in read_lines(chunks())]
    assert len(lines) == 2
    assert len(lines[0]) <= MAX_LINE_BYTES + 65_536
    assert read_line(lines[0], 10) is None
    assert lines[1] == b'{"custom_id": "7"}'


@pytest.mark.parametrize("size", [MAX_ANSWER + 1, 10_000_000])
def test_an_answer_of_ten_megabytes_is_refused_at_once(size: int) -> None:
    answer = {
        "choices": [{"message": {"content": json.dumps({"caption": "é" * size, "tags": []}, ensure_ascii=False)}}]
    }
    with pytest.raises(TaggingError) as caught:
        read_completion(answer, 10)
    assert (caught.value.code, caught.value.retry) == ("bad_answer", True)


@settings(max_examples=150)
@given(st.integers(0, 999), anything, st.dictionaries(st.sampled_from(
    ["retry-after", "retry-after-ms", "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests",
     "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens"]), text | st.integers().map(str) | st.floats().map(str)))  # fmt: skip
@example(429, None, {"x-ratelimit-limit-requests": "²", "x-ratelimit-limit-tokens": "9" * 5000})
def test_an_error_of_the_provider_is_of_one_of_four_kinds(status: int, body: Any, headers: dict[str, str]) -> None:
    error = classify_status(status, body, headers)
    can_be_stored(error.as_json())
    assert error.kind in ("transient", "rate_limit", "account", "image")
    assert error.retry_after is None or 0 < error.retry_after <= MAX_RETRY_AFTER
    assert all(isinstance(n, int) and 0 <= n < 2**31 for n in read_limits(headers).values())


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 48), 60).convert("RGB").save(out, kind)
    return out.getvalue()


SEEDS = [picture(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SEEDS) | st.binary(max_size=300),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=12),
    st.none() | st.integers(0, 4000),
)
def test_an_image_file_becomes_a_small_jpeg_or_a_sentence(
    data: bytes, flips: list[tuple[int, int]], cut: int | None
) -> None:
    damaged = bytearray(data)
    for place, value in flips:
        if place < len(damaged):
            damaged[place] = value
    try:
        jpeg = prepare_bytes(bytes(damaged[:cut]), 512, 100_000_000).jpeg
    except TaggingError as error:
        check_error(error, "image")
        return
    made = Image.open(io.BytesIO(jpeg))
    assert (made.format, made.mode) == ("JPEG", "RGB")
    assert max(made.size) <= 512


SECRET = make_secret()


@settings(max_examples=80, deadline=None)
@given(
    st.binary(max_size=300) | mostly(st.fixed_dictionaries({
        "type": mostly(st.just("batch.completed")), "data": mostly(st.fixed_dictionaries({"id": mostly(text)})),
        "id": text, "created_at": st.integers(0, 2**31), "object": st.just("event"),
    })).map(lambda event: json.dumps(event).encode()),
    st.booleans(),
    st.dictionaries(st.sampled_from(["webhook-id", "webhook-timestamp", "webhook-signature"]),
                    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20), max_size=3),
)  # fmt: skip
async def test_a_webhook_is_taken_or_refused(body: bytes, signed: bool, headers: dict[str, str]) -> None:
    taken: list[tuple[str, str, str]] = []

    async def receive(*delivery: str) -> str:
        can_be_stored(delivery)
        taken.append(delivery)  # type: ignore[arg-type]
        return "accepted"

    app = make_app(Provider("none", "http://none.invalid/v1", 1), SECRET, receive)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
        answer = await client.post("/webhooks/openai", content=body, headers=sign(SECRET, body) if signed else headers)
    assert answer.status_code in ((204, 400) if signed else (400,))
    assert (answer.status_code == 204) == bool(taken)
