"""Profiles, end to end: an owner's profile reaches the model, and its answer reaches the rows."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from autotag.db import Operator
from autotag.operate.backfill import backfill
from lab.pictures import Drawing
from support import Library, answered_pictures, compress, paid, refused, until, widen, worker


def save(library: Library, **changes: Any) -> int:
    """Saves a version of the workspace's profile, and returns its number."""
    [row] = library.sql("select (autotag.save_profile(%s, %s)).version", library.member.workspace, json.dumps(changes))
    return int(row["version"])


def fields_for(drawings: list[Drawing]) -> list[dict[str, Any]]:
    """Fields whose values follow from the tags of these pictures."""
    some = sorted(set().union(*(drawing.tags for drawing in drawings)))
    return [
        {"name": "seen", "kind": "enum", "values": some[:20], "description": "What is in it"},
        {"name": some[0].replace(" ", "_"), "kind": "boolean"},
        {"name": "count", "kind": "integer"},
        {"name": "note", "kind": "text"},
    ]


def check_fields(library: Library, assets: list[str], fields: list[dict[str, Any]], version: int) -> None:
    rows = library.assets()
    for asset in assets:
        result, drawing = rows[asset]["tagging_result"], library.drawings[asset]
        assert result["profile"] == version
        seen, flag, count, note = (field["name"] for field in fields)
        assert set(result["fields"]) == {seen, flag, count, note}
        values = set(fields[0]["values"])
        assert (
            result["fields"][seen] in values & drawing.tags if values & drawing.tags else result["fields"][seen] is None
        )
        assert result["fields"][flag] is (flag in drawing.tags)
        assert result["fields"][count] == len(drawing.tags)
        assert result["fields"][note] in drawing.tags


async def test_fields_arrive_and_a_change_tags_exactly_the_older_ones_again(library: Library) -> None:
    stack = library.stack
    widen(stack)
    stack.simulator.plan.batch_latency = (1.5, 1.5)
    before = await library.upload(2)
    typed = library.insert(["typed.jpg"])
    library.sql("update public.assets set tags = '{aunt mary}' where id = %s", typed[0])
    upload = library.enqueue(before)
    save(library, instructions="Not for uploads that were made before.")
    async with worker(stack):
        await library.finished(upload)
        assert all("profile" not in library.assets()[asset]["tagging_result"] for asset in before)

        older = await library.upload(60, seed=2)
        fields = fields_for([library.drawings[asset] for asset in older])
        first = save(library, instructions='Name "every" {shape}.\n—', tag_count=4, min_confidence=0.9, fields=fields)
        batch = library.enqueue(older)
        assert batch["strategy"] == "batch"
        await until(lambda: library.sql("select 1 from autotag.batches where state = 'submitted'") != [], "the batch")
        second = save(library, fields=None, tag_count=7)
        await library.finished(batch)
        assert (first, second) == (2, 3)
        check_fields(library, older, fields, first)
        rows = library.assets()
        assert all(set(rows[asset]["tagging_result"]["confidence"].values()) == {0.99, 0.94} for asset in older), (
            "less sure tags are not stored"
        )
        assert all(len(rows[asset]["tags"]) == 2 for asset in older)

        newest = await library.upload(3, seed=3)
        await library.finished(library.enqueue(newest))
        assert {library.assets()[asset]["tagging_result"]["profile"] for asset in newest} == {second}

        # one upload, one prompt; and another upload, another one
        prompts = Counter(entry["prefix"] for entry in paid(stack))
        assert sorted(prompts.values()) == [2, 3, 60]

        asked = len(answered_pictures(stack))
        async with await Operator.connect(stack.database_url()) as operator:
            workspace = library.member.workspace
            told = await operator.preview_backfill(workspace, False, None, 1000, outdated=True)
            done = await backfill(operator, workspace, untagged=False, outdated=True, after=None, limit=1000,
                                  on_progress=lambda *_: None)  # fmt: skip
        assert (told["images"], done.images) == (62, 62)
        await until(lambda: library.sql("select 1 from autotag.jobs where finished_at is null") == [], "the tags")
    assert len(answered_pictures(stack)) == asked + 62
    rows = library.assets()
    assert {rows[asset]["tagging_result"]["profile"] for asset in before + older + newest} == {second}
    assert "fields" not in rows[older[0]]["tagging_result"]
    assert (rows[typed[0]]["tags"], rows[typed[0]]["tagging_result"]) == (["aunt mary"], None)
    assert library.sql("select autotag.preview_backfill(%s, false, null, 1000, true) ->> 'images' as n", workspace) == [
        {"n": "0"}
    ]


async def test_an_answer_to_another_question_is_not_used_again(library: Library) -> None:
    assets = await library.upload(2)
    async with worker(library.stack):
        save(library, instructions="one")
        await library.finished(library.enqueue(assets))
        assert library.enqueue(assets)["skipped"] == 2
        save(library, instructions="two")
        again = library.enqueue(assets)
        assert (again["image_count"], again["skipped"]) == (2, 0)
        await library.finished(again)
        assert library.enqueue(assets)["skipped"] == 2
    assert sorted(Counter(answered_pictures(library.stack)).values()) == [2, 2]


async def test_a_long_prompt_stays_within_the_limits(library: Library) -> None:
    """The prompt takes three times as many tokens as the picture. The estimate is right from the first call on, so the
    provider refuses none."""
    stack = library.stack
    library.sql("create or replace function autotag.vocabulary_for_prompt(p_workspace_id autotag.workspace_id) returns jsonb"
                " language sql stable as $$ select jsonb_agg('word ' || lpad(n::text, 3, '0') order by n) from generate_series(1, 300) n $$")  # fmt: skip
    save(library, vocabulary_mode="prefer", instructions="x" * 500)
    stack.configure(
        chunk_delay="0.01 s",
        realtime_requests_per_minute=10000,
        realtime_tokens_per_minute=10_000_000,
        chunk_max_images=100,
    )
    compress(stack, 20)
    stack.configure(provider_margin="5 s")  # a message takes real time: a quarter of a second, as ever
    stack.simulator.limits = stack.simulator.limits.of(500, 60_000, None, 20)
    library.sql(
        "update autotag.provider_limits set tokens_per_minute = 60000, tokens_left = 60000, requests_per_day = null"
    )
    assets = await library.upload(70)
    async with worker(stack):
        await library.finished(library.enqueue(assets))
    assert refused(stack) == []
    [brief] = library.sql("select * from autotag.briefs")
    most = max(entry["usage"]["total_tokens"] for entry in paid(stack))
    assert most <= brief["tokens_per_image"] <= 1.2 * most, "after 70 answers, what is reserved is what was seen"
    used = [entry["usage"]["prompt_tokens_details"]["cached_tokens"] for entry in paid(stack)]
    assert sum(used) / sum(entry["usage"]["prompt_tokens"] for entry in paid(stack)) > 0.5
