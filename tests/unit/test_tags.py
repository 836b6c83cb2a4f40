"""Which parts of a model's answer are stored, and which answers are errors."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotag.db import Question
from autotag.errors import TaggingError
from autotag.openai.answers import TAG_LENGTH, normalise_tags, read_completion, read_usage
from autotag.openai.output import read_line
from autotag.openai.prompt import batch_line, request_body
from autotag.tags import normalise
from autotag.texts import JOINERS

QUESTION = Question(1, "gpt-6-luna", "low", 10, "English", reasoning_effort="none")


def completion(content: object, finish: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {"model": "m", "choices": [{"index": 0, "finish_reason": finish, "message": message}]}


def answer(**changes: Any) -> str:
    return json.dumps({"caption": "A cat.", "tags": [{"tag": "Cat", "confidence": 0.9}], **changes})


def test_a_good_answer() -> None:
    assert read_completion(completion(answer()), 10) == {
        "tags": ["cat"], "confidence": {"cat": 0.9}, "caption": "A cat.", "model": "m",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given_completion", "code", "retry"),
    [
        (completion(None, refusal="No."), "refused", False),
        (completion(None, finish="content_filter"), "refused", False),
        (completion('{"caption": "A c', finish="length"), "answer_too_long", True),
        (completion("", finish="length"), "answer_too_long", True),
        (completion("A cat."), "bad_answer", True),
        (completion(None), "bad_answer", True),
        (completion(answer(tags=17)), "bad_answer", True),
        (completion(answer(tags=[])), "no_tags", True),
        (completion(answer(tags=[{"tag": " \u200b ", "confidence": 1}])), "no_tags", True),
    ],
)
def test_answers_of_no_use_are_errors_of_the_image(given_completion: dict[str, Any], code: str, retry: bool) -> None:
    with pytest.raises(TaggingError) as caught:
        read_completion(given_completion, 10)
    assert (caught.value.kind, caught.value.code, caught.value.retry) == ("image", code, retry)


@pytest.mark.parametrize("nothing", [{}, {"choices": []}, {"choices": [None]}, {"choices": "none"}, {"choices": [{}]}])
def test_what_is_no_answer_at_all_is_not_the_images_fault(nothing: dict[str, Any]) -> None:
    with pytest.raises(TaggingError) as caught:
        read_completion(nothing, 10)
    assert (caught.value.kind, caught.value.origin) == ("transient", "provider")


def test_tags_are_trimmed_folded_deduplicated_limited_and_sorted() -> None:
    tags = [
        (" Sea ", 0.5),
        ("SEA", 0.8),
        ("#Straße", 0.9),
        ("x" * 51, 1.0),
        ("", 1.0),
        ("big\n sky", 7.0),
        ("dim", -1.0),
    ]
    assert normalise_tags(tags, 3) == [("big sky", 1.0), ("straße", 0.9), ("sea", 0.8)]


def test_a_tag_with_a_long_description_is_the_tag() -> None:
    said = "ein gebäude für heu und stroh, oft aus holz, mit großen toren"
    tags = [(f"Scheune: {said}", 0.9), (f"Kuh ({said})", 0.8), (said, 0.7), (f"{said}: x", 0.6)]
    assert normalise_tags(tags, 9) == [("scheune", 0.9), ("kuh", 0.8)]


@given(st.lists(st.tuples(st.text(max_size=80), st.floats()), max_size=40), st.integers(1, 20))
def test_whatever_the_model_says_postgres_can_store_it(tags: list[tuple[str, float]], most: int) -> None:
    normal = normalise_tags(tags, most)
    assert len(normal) <= most
    assert len({tag for tag, _ in normal}) == len(normal)
    for tag, confidence in normal:
        assert 0 < len(tag) <= TAG_LENGTH
        assert tag == normalise(tag), "it is stored the same however often it passes"
        assert "\0" not in tag
        tag.encode()
        assert 0 <= confidence <= 1


@pytest.mark.parametrize(
    ("given_tag", "stored"),
    [
        # lower case, not case folding
        ("Straße", "straße"), ("WEIß", "weiß"), ("Zürich", "zürich"), ("ΣΊΣΥΦΟΣ", "σίσυφος"), ("ÉTÉ", "été"), ("Ёлка", "ёлка"),
        ("İstanbul", "istanbul"), ("ŞİRİN", "şirin"), ("Ａ", "a"), ("ﬁre", "fire"), ("a\u0301rbol", "árbol"), ("Ⅳ", "iv"),
        # joiners where a reader sees them, and nowhere else
        ("می\u200cخواهم", "می\u200cخواهم"), ("क्\u200dष", "क्\u200dष"), ("ക്\u200d", "ക്"), ("👩\u200d👧", "👩\u200d👧"),
        ("❤️\u200d🔥", "❤️\u200d🔥"), ("👩🏽\u200d🚀", "👩🏽\u200d🚀"), ("c\u200dat", "cat"), ("Auf\u200clage", "auflage"),
        ("\u200dcat\u200c", "cat"), ("x\u202ey", "xy"), ("co\u00adoperate", "cooperate"),
        # names
        ("C#", "c#"), ("c#,", "c#"), ("C++", "c++"), (".NET", ".net"), ("Node.js", "node.js"), ("it's", "it's"), ("Don’t", "don’t"),
        ("rock'n'roll", "rock'n'roll"), ("l’été", "l’été"), ("R&D", "r&d"), ("100%", "100%"), ("TCP/IP", "tcp/ip"), ("T-shirt", "t-shirt"),
        ("@home", "@home"), ("$100", "$100"), ("<3", "<3"), ("cat (animal)", "cat (animal)"), ("(a) b (c)", "(a) b (c)"),
        ("日本語・英語", "日本語・英語"), ("กรุงเทพฯ", "กรุงเทพฯ"), ("ק״ג", "ק״ג"),
        # punctuation around a tag
        ("#hashtag", "hashtag"), ("#C#", "c#"), ("東京。", "東京"), ("「東京」", "東京"), ("«chat»", "chat"), ("“cat”", "cat"), ("¿qué?", "qué"),
        ("(cat)", "cat"), ("[cat]", "cat"), ("cat)", "cat"), ("**cat**", "cat"), ("_cat_", "cat"), ("`cat`", "cat"), ("- cat", "cat"),
        ("• cat", "cat"), ("—cat—", "cat"), ("...cat", "cat"), ("cat…", "cat"), ("U.S.A.", "u.s.a"), ("'90s", "90s"), ("猫、", "猫"),
        # nothing
        ("", ""), (" ", ""), ("#", ""), ("...", ""), ("«»", ""), ("\u200d", ""), ("-", ""), (":)", ""),
    ],
)  # fmt: skip
def test_a_tag_in_any_language_is_stored_as_a_reader_would_write_it(given_tag: str, stored: str) -> None:
    assert normalise(given_tag) == stored
    assert normalise(stored) == stored


def test_a_caption_keeps_its_joiners() -> None:
    caption = "می\u200cخواهم 👩\u200d👧 c\u200dat"
    assert read_completion(completion(answer(caption=caption)), 10)["caption"] == "می\u200cخواهم 👩\u200d👧 cat"


@given(st.text(max_size=60))
def test_a_tag_is_the_same_in_capitals_and_with_punctuation_around(text: str) -> None:
    tag = normalise(text)
    assert normalise(tag) == tag
    assert normalise(f"“{tag}”,") == tag
    assert all(unicodedata.category(c)[0] != "C" or c in JOINERS for c in tag)


def test_the_request_asks_for_a_strict_schema() -> None:
    body = request_body(QUESTION, "data:image/jpeg;base64,AA==", 400)
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert body["messages"][1]["content"][1]["image_url"] == {"url": "data:image/jpeg;base64,AA==", "detail": "low"}

    def check(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object":
                assert node["additionalProperties"] is False
                assert set(node["required"]) == set(node["properties"])
            for value in node.values():
                check(value)

    check(schema["schema"])


def test_usage() -> None:
    usage = {"prompt_tokens": 600, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 100}}
    nothing = {"cached": 0, "cache_write": 0, "reasoning": 0, "model": None, "tier": None}
    assert read_usage({"usage": usage}) == {**nothing, "input": 600, "cached": 100, "output": 50}
    details = {
        "prompt_tokens_details": {"cached_tokens": 128, "cache_write_tokens": 40, "image_tokens": 300},
        "completion_tokens_details": {"reasoning_tokens": 30},
    }
    full = {"usage": {**usage, **details}, "model": "gpt-6-luna-2026-10-01", "service_tier": "flex"}
    assert read_usage(full) == {
        "input": 600, "cached": 128, "cache_write": 40, "output": 50, "reasoning": 30,
        "model": "gpt-6-luna-2026-10-01", "tier": "flex",
    }  # fmt: skip
    assert read_usage({}) is None
    assert read_usage({"usage": {"prompt_tokens": 0, "completion_tokens": 0}}) is None, "no figures are no usage"


def test_a_batch_line_is_one_line() -> None:
    line = batch_line("17", request_body(QUESTION, "data:image/jpeg;base64,AA==", 400))
    assert line.count(b"\n") == 1
    assert json.loads(line)["custom_id"] == "17"


def output_line(**changes: Any) -> bytes:
    response = {"status_code": 200, "body": completion(answer())}
    return json.dumps({"custom_id": "17", "response": response, "error": None, **changes}).encode()


def test_lines_of_a_batchs_output() -> None:
    good = read_line(output_line(), 10)
    assert good is not None
    assert (good["task"], good["result"]["caption"]) == (17, "A cat.")
    for changes, kind in (
        ({"response": {"status_code": 0, "body": None}}, "transient"),
        ({"response": {"status_code": 500, "body": {"error": {"code": "server_error"}}}}, "transient"),
        ({"response": {"status_code": 429, "body": {"error": {"code": "rate_limit_exceeded"}}}}, "rate_limit"),
        ({"response": {"status_code": 400, "body": {"error": {"code": "invalid_image", "message": "bad"}}}}, "image"),
        ({"response": None, "error": {"code": "batch_expired", "message": "expired"}}, "transient"),
    ):
        failed = read_line(output_line(**changes), 10)
        assert failed is not None
        assert failed["error"]["kind"] == kind


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b"null", b"17", b'{"custom_id": "x"}', b'{"custom_id": "-1"}', b'{"custom_id": null}',
     b'{"custom_id": "99999999999999999999"}', b'{"response": {}}', b'{"custom_id": "1", "response": []}', b"\xff\xfe"],
)  # fmt: skip
def test_rubbish_in_a_batchs_output_is_no_answer(line: bytes) -> None:
    answer_or_none = read_line(line, 10)
    assert answer_or_none is None or answer_or_none["error"]["kind"] == "transient"
