"""Real answers of other providers and models: each line of tests/cases is classified and read as the line says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotag.errors import TaggingError
from autotag.openai.answers import read_completion
from autotag.openai.classify import classify_status

CASES = Path(__file__).parents[1] / "cases"


def cases(name: str) -> list[Any]:
    lines = [json.loads(line) for line in (CASES / name).read_text().splitlines()]
    return [pytest.param(case, id=case["case"][:60]) for case in lines]


@pytest.mark.parametrize("case", cases("provider-errors.jsonl"))
def test_an_error_is_sorted_by_whose_fault_it_is(case: dict[str, Any]) -> None:
    error = classify_status(case["status"], case["body"], case.get("headers") or {})
    assert error.kind in case["kind"].split("|"), (error.code, error.message)
    if "parameter" in case:
        assert error.parameter == case["parameter"]
    assert error.message
    assert error.message.isprintable()


@pytest.mark.parametrize("case", cases("model-answers.jsonl"))
def test_an_answer_is_read_as_a_reader_would(case: dict[str, Any]) -> None:
    try:
        result = read_completion(case["completion"], 10)
        got = "OK"
    except TaggingError as error:
        got, result = f"{error.kind}:{error.code}", {}
    wanted = case["want"].split("|")
    assert any(got == want or (want.endswith(":*") and got.startswith(want[:-1])) for want in wanted), got
    if got == "OK":
        assert "dog" in result["tags"] or "dog" not in json.dumps(case["completion"])
        assert all(0 <= sure <= 1 for sure in result["confidence"].values())
        assert set(result["confidence"]) <= set(result["tags"])
        assert "wrong" not in result["tags"]


WORDS = st.lists(
    st.sampled_from(
        [
            "the",
            "request",
            "is",
            "not",
            "valid",
            "error",
            "failed",
            "while",
            "processing",
            "your",
            "input",
            "something",
            "went",
            "wrong",
            "try",
            "again",
            "later",
            "quota",
            "tokens",
            "server",
            "upstream",
            "gateway",
            "parameter",
            "value",
            "field",
            "unknown",
            "internal",
            "badly",
            "please",
            "contact",
            "support",
            "42",
            "null",
        ]
    ),
    max_size=12,
).map(" ".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["error", "message", "code", "type", "detail", "param", "status", "msg", "loc", "errors", "metadata", "x"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.integers(0, 599), JSON)
def test_no_error_that_does_not_name_the_picture_is_its_fault(status: int, body: Any) -> None:
    """An unknown error body neither fails an image at once nor lets it be retried for ever without counting."""
    error = classify_status(status, body, {})
    assert error.kind != "image"
    if error.kind == "rate_limit":
        assert status in (402, 429), "only who asks to wait is waited for without counting"


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(st.sampled_from(["choices", "error", "usage", "model", "id", "object", "detail"]), JSON | st.lists(
    st.fixed_dictionaries({}, optional={
        "message": JSON | st.fixed_dictionaries({"content": JSON | st.text(max_size=40)}),
        "finish_reason": st.sampled_from(["stop", "length", "error", "eos", "", None]), "error": JSON}), max_size=2)))  # fmt: skip
def test_no_answer_of_any_shape_fails_an_image_at_once(completion: dict[str, Any]) -> None:
    assert not ends_its_image(completion), "it gets another try"


def ends_its_image(completion: dict[str, Any]) -> bool:
    try:
        read_completion(completion, 10)
    except TaggingError as error:
        return error.kind == "image" and not error.retry
    return False
