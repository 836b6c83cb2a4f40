"""Groups of conditions, containment, and the limit of rows, which work as in PostgREST."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from support import Library

NAMES = ["a", "b, c", 'd "e"', "f"]
TAGS: list[list[str] | None] = [["beach", "dog"], ["dog"], ['say "hi"', "beach"], None]


@pytest.fixture
def rows(library: Library) -> Library:
    for name, tags in zip(NAMES, TAGS, strict=True):
        library.sql("insert into public.assets (workspace_id, image_url, tags) values (%s, %s, %s)",
                    library.member.workspace, name, tags)  # fmt: skip
    return library


async def get(library: Library, **query: str) -> httpx.Response:
    headers = {"apikey": library.stack.anon_key, "authorization": f"Bearer {library.member.token}"}
    async with httpx.AsyncClient(base_url=library.stack.supabase_url) as client:
        return await client.get("/rest/v1/assets", params=query, headers=headers)


async def test_groups_and_containment(rows: Library) -> None:
    cases: dict[tuple[str, str], str] = {
        ("or", "(image_url.eq.a,image_url.eq.f)"): "af",
        ("or", '(image_url.eq."b, c",image_url.eq.f)'): "bf",
        ("or", r'(image_url.eq."d \"e\"")'): "d",
        ("or", "(image_url.lt.b,and(image_url.gte.f,tags.is.null))"): "af",
        ("and", "(image_url.gt.a,or(tags.is.null,tags.cs.{beach}))"): "df",
        ("not.or", "(image_url.eq.a,not.and(image_url.gt.a,tags.is.null))"): "f",
        ("or", "(tags.cs.{beach,dog},image_url.in.(f))"): "af",
        ("tags", "cs.{beach}"): "ad",
        ("tags", r'cs.{"say \"hi\""}'): "d",
        ("tags", "ov.{dog,cat}"): "ab",
        ("tags", "cd.{dog}"): "b",
        ("tags", "not.cs.{dog}"): "d",
        ("tags", "eq.{dog}"): "b",
    }
    for (name, value), wanted in cases.items():
        answer = await get(rows, select="image_url", order="image_url", **{name: value})
        assert answer.status_code == 200, (name, value, answer.text)
        found: list[dict[str, Any]] = answer.json()
        assert "".join(row["image_url"][0] for row in found) == wanted, (name, value)


@pytest.mark.parametrize("value", ["image_url.eq.a", "(image_url)", "(and(image_url.eq.a)", "(" * 99 + ")" * 99])
async def test_groups_that_are_none(rows: Library, value: str) -> None:
    answer = await get(rows, **{"or": value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] == "PGRST100"


async def test_an_answer_has_a_thousand_rows_at_most(library: Library) -> None:
    library.sql(
        "insert into public.assets (workspace_id, image_url) select %s, 'u' from generate_series(1, 1001)",
        library.member.workspace,
    )
    for query in ({}, {"limit": "5000"}):
        answer = await get(library, select="id", **query)
        assert len(answer.json()) == 1000
        assert answer.headers["content-range"] == "0-999/*"
    assert len((await get(library, select="id", offset="1000")).json()) == 1
