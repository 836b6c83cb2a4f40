"""The main job, end to end on real Postgres: every strategy tags the right rows and reports it."""

from __future__ import annotations

from collections import Counter, defaultdict
from decimal import Decimal

import pytest

from support import Library, answered_pictures, audit, worker

STAGES = ["queued", "preparing", "submitted", "processing", "completing", "completed"]


@pytest.mark.parametrize(
    ("images", "strategy", "batches"), [(3, "realtime", 0), (12, "realtime-chunked", 0), (60, "batch", 1)]
)
async def test_every_picture_gets_its_own_tags_and_is_paid_once(
    library: Library, images: int, strategy: str, batches: int
) -> None:
    assets = await library.upload(images)
    async with worker(library.stack):
        told = library.enqueue(assets)
        assert (told["strategy"], told["image_count"], told["skipped"], told["batches"]) == (
            strategy,
            images,
            0,
            batches,
        )
        [job] = await library.finished(told)
    assert (job["completed"], job["failed"], job["progress"], job["error"]) == (images, 0, 100, None)
    assert job["stages"] == {**dict.fromkeys(STAGES, 0), "completed": images, "failed": 0}
    library.check_tags()
    assert set(Counter(answered_pictures(library.stack)).values()) == {1}
    assert len(answered_pictures(library.stack)) == images
    audit(library.stack)


async def test_300_images_are_three_batches_of_100_with_an_express_lane(library: Library) -> None:
    stack = library.stack
    stack.simulator.plan.batch_latency = (3.0, 3.0)
    assets = await library.upload(300)
    async with worker(stack):
        told = library.enqueue(assets)
        assert (told["strategy"], told["batches"]) == ("batch-parallel", 3)
        await library.finished(told)
    batches = library.sql("select id, image_count, express_count, state from autotag.batches order by ordinal")
    assert [batch["image_count"] for batch in batches] == [100, 100, 100]
    assert [batch["express_count"] for batch in batches] == [5, 0, 0]
    assert [batch["state"] for batch in batches] == ["done"] * 3
    at_openai = stack.simulator.batches.describe_all()
    assert sorted(batch["request_counts"]["completed"] for batch in at_openai) == [95, 100, 100]
    assert {batch["metadata"]["autotag_batch"] for batch in at_openai} == {str(batch["id"]) for batch in batches}
    library.check_tags()
    # The express images are single calls, answered before any batch was done.
    first = stack.simulator.request_log
    calls = [entry for entry in first if entry["method"] == "POST" and entry["path"] == "/v1/chat/completions"]
    assert len(calls) == 5
    assert len(answered_pictures(stack)) == 300
    told_complete = library.sql(
        "select payload ->> 'batch_id' as batch_id from realtime.messages"
        " where event = 'batch-complete' and topic = 'batch-updates' and not private and payload ->> 'batch_id' is not null"
    )
    assert Counter(row["batch_id"] for row in told_complete) == {batch["id"]: 1 for batch in at_openai}
    audit(stack)


async def test_public_messages_name_no_tenant(library: Library) -> None:
    assets = await library.upload(60)
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
    public = library.sql("select topic, event, payload from realtime.messages where not private")
    assert [(row["topic"], row["event"]) for row in public] == [("batch-updates", "batch-complete")]
    assert set(public[0]["payload"]) == {"id", "batch_id"}


async def test_stages_move_forward_and_progress_never_goes_down(library: Library) -> None:
    stack = library.stack
    stack.simulator.plan.latency = (3, 3)  # a call that is answered before its stage is reported skips it
    library.sql(
        "create table public.seen (i bigint generated always as identity, asset_id uuid, stage text, progress int)"
    )
    library.sql("""
        create function public.note() returns trigger language plpgsql security definer as $$ begin
          insert into public.seen (asset_id, stage, progress) values (new.id, new.tagging_stage, new.tagging_progress);
          return null; end $$""")
    library.sql("create trigger note after update on public.assets for each row execute function public.note()")
    assets = await library.upload(60)
    async with worker(stack):
        await library.finished(library.enqueue(assets))
    passes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for row in library.sql("select * from public.seen order by i"):
        passes[str(row["asset_id"])].append((row["stage"], row["progress"]))
    assert len(passes) == 60
    for seen in passes.values():
        ranks = [STAGES.index(stage) for stage, _ in seen]
        assert ranks == sorted(ranks), f"stages went back: {seen}"
        progress = [percent for _, percent in seen]
        assert progress == sorted(progress), f"progress went down: {seen}"
        assert (seen[0], seen[-1]) == (("queued", 0), ("completed", 100))
    lines = [seen for asset, seen in passes.items() if asset not in assets[:5]]
    assert all("submitted" in {stage for stage, _ in seen} for seen in lines), lines[0]
    express = [passes[asset] for asset in assets[:5]]
    assert all("processing" in {stage for stage, _ in seen} for seen in express)


async def test_members_hear_progress_and_the_end_of_their_jobs(library: Library) -> None:
    assets = await library.upload(12)
    async with worker(library.stack):
        told = library.enqueue(assets)
        await library.finished(told)
    # As they were written, which is under the job's lock; inserted_at is when a transaction began, before it waited for it.
    messages = library.sql("select topic, event, payload from realtime.messages where private order by tableoid, ctid")
    assert {row["topic"] for row in messages} == {f"tagging:{library.member.workspace}"}
    progress = [row["payload"]["progress"] for row in messages if row["event"] == "job-progress"]
    assert progress
    assert progress == sorted(progress)
    ends = [row["payload"] for row in messages if row["event"] == "job-complete"]
    assert [(end["job_id"], end["completed"], end["failed"]) for end in ends] == [(told["job_id"], 12, 0)]


async def test_usage_is_what_the_provider_billed(library: Library) -> None:
    assets = await library.upload(60)
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
    rows = library.sql("select * from public.tagging_usage(%s)", library.member.workspace)
    # 5 express images at the full price, 55 lines of a batch at half of it
    assert {(r["service_tier"], r["images"], r["requests"]) for r in rows} == {("default", 5, 5), ("batch", 55, 55)}
    assert {str(r["user_id"]) for r in rows} == {library.member.user}
    book = [entry for entry in library.stack.simulator.request_log if entry.get("usage")]
    assert {r["model"] for r in rows} == {entry["model"] for entry in book}
    assert sum(r["cost"] for r in rows) == sum(Decimal(entry["dollars"]) for entry in book), (
        "by the provider's own prices"
    )


async def test_two_workers_share_an_upload_without_paying_twice(library: Library) -> None:
    assets = await library.upload(40)
    library.sql("update autotag.settings set realtime_requests_per_minute = 1000, realtime_tokens_per_minute = 1000000")
    async with worker(library.stack, slots=3), worker(library.stack, slots=3):
        await library.finished(library.enqueue(assets))
    library.check_tags()
    assert len(answered_pictures(library.stack)) == 40
    audit(library.stack)
