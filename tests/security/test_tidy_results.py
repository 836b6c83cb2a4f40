"""A worker's result that is only looked at is stored as if it had been taken apart."""

from __future__ import annotations

import json
import random
from typing import Any

import psycopg
import pytest

from lab.postgres import LocalPostgres

#: Each is one that clean_result() changes, so it may not pass as tidy.
UNTIDY: list[dict[str, Any]] = [
    {"tags": [" "], "confidence": {" ": 1}}, {"tags": [" a  b "], "confidence": {" a  b ": 1}},
    {"tags": ["a  b"], "confidence": {"a  b": 1}}, {"tags": [" a"], "confidence": {" a": 1}}, {"tags": ["a "], "confidence": {"a ": 1}},
    {"tags": ["a, "], "confidence": {"a, ": 1}}, {"tags": ["b", "a, "], "confidence": {"a, ": 1, "b": 1}},
    {"tags": ["a", "a"], "confidence": {"a": 1}}, {"tags": ["a", "b", "a"], "confidence": {"a": 1, "b": 1}},
    {"tags": ["a"], "confidence": {"a": 1, "b": 1}}, {"tags": ["a"], "confidence": {"b": 1}}, {"tags": [], "confidence": {"b": 1}},
    {"tags": ["a", "a"], "confidence": {"a": 1, "b": 1}}, {"tags": ["a"], "confidence": {"a": 2}}, {"tags": ["a"], "confidence": {"a": "1"}},
    {"tags": ["a"], "confidence": {"a": 1}, "caption": " c"}, {"tags": ["a"], "confidence": {"a": 1}, "caption": "c  d"},
    {"tags": ["a"], "confidence": {"a": 1}, "model": "m "}, {"tags": [""], "confidence": {"": 1}}, {"tags": [1], "confidence": {}},
]  # fmt: skip
TIDY: list[dict[str, Any]] = [
    {"tags": ["a", "big dog", "NULL", "été", "a,b", "{x}"],
     "confidence": {"a": 1, "big dog": 0.5, "NULL": 0, "été": 0.25, "a,b": 0.125, "{x}": 1}},
    {"tags": [], "confidence": {}}, {"tags": ["a"], "confidence": {"a": 0.5}, "caption": "A dog, seen from: above."},
]  # fmt: skip
WORDS = ("a", "b", "big dog", " ", "", " a", "a ", "a  b", "a,", "a, b", "a, ", ",", "]", "[x]", "{x}", "}", ": 2", "a: 1", "NULL", '"', "\\", "x" * 50,
         "x" * 51, "\u202e", "\u00a0", "\t", "été", None, 1, ["a"], {"a": 1}, True)  # fmt: skip
NUMBERS = (0, 1, 0.5, 1e-7, 1.5, -0.5, "0.5", None, [1], 0.125)


def whole(result: dict[str, Any]) -> dict[str, Any]:
    return {"caption": "c", "model": "m", **result}


def some(random_: random.Random) -> dict[str, Any]:
    tags = [random_.choice(WORDS) for _ in range(random_.randrange(4))]
    if random_.random() < 0.5:  # mostly right
        tags = [word for word in tags if isinstance(word, str) and word == word.strip()]
    sure = {
        tag: random_.choice(NUMBERS[:4] if random_.random() < 0.8 else NUMBERS) for tag in tags if isinstance(tag, str)
    }
    if random_.random() < 0.2:
        sure[str(random_.choice(WORDS))] = 0.5
    result: dict[str, Any] = {"tags": tags, "confidence": sure}
    if random_.random() < 0.2:
        result[random_.choice(("caption", "model", "more"))] = random_.choice(WORDS)
    return whole(result)


@pytest.fixture
def cleaned(postgres: LocalPostgres, database: str) -> Any:
    """A function: (tidy, as it is stored, as it would be stored if it were taken apart) of each result."""

    def clean(results: list[dict[str, Any]]) -> list[tuple[bool, Any, Any]]:
        told = [json.dumps(result) for result in results]
        with psycopg.connect(postgres.url("supabase_admin", database)) as connection:
            rows = connection.execute(
                "select r.canonical, a.result, autotag.clean_result(r.result)"
                " from unnest(%(told)s::jsonb[], autotag.canonical_results(%(told)s::jsonb[])) with ordinality r (result, canonical, i)"
                " join autotag.read_answers((select jsonb_agg(jsonb_build_object('task', 1, 'result', t) order by n)"
                "   from unnest(%(told)s::jsonb[]) with ordinality u (t, n)), 1000) a on a.place = r.i order by r.i",
                {"told": told},
            ).fetchall()
        return [(tidy, as_is, apart) for tidy, as_is, apart in rows]

    return clean


def test_what_passes_is_what_would_be_stored_anyway(cleaned: Any) -> None:
    random_ = random.Random(20)
    results = [*map(whole, UNTIDY), *map(whole, TIDY), *(some(random_) for _ in range(20_000))]
    passed = 0
    for result, (tidy, as_is, apart) in zip(results, cleaned(results), strict=True):
        assert as_is == apart, result
        passed += tidy
    assert 2000 < passed < 18_000


def test_what_has_to_be_changed_does_not_pass(cleaned: Any) -> None:
    assert [tidy for tidy, _, _ in cleaned([*map(whole, UNTIDY)])] == [False] * len(UNTIDY)
    assert [tidy for tidy, _, _ in cleaned([*map(whole, TIDY)])] == [True] * len(TIDY)
