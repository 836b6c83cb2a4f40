"""Quotas of images and dollars, for a day or a month, by workspace and by user."""

from __future__ import annotations

import dataclasses
import json
import random
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from lab.openai_sim.faults import Fault
from sealing import jobs, seal
from support import PATIENCE, Library, audit, until, worker


def allow(library: Library, **quota: Any) -> None:
    quota = {"scope": "workspace", "period": "day", **quota}
    library.sql(
        f"insert into autotag.quotas ({', '.join(quota)}) values ({', '.join(['%s'] * len(quota))})", *quota.values()
    )


def rows(library: Library, count: int) -> list[str]:
    return library.insert([f"{uuid.uuid4()}.jpg" for _ in range(count)])


def refused(library: Library, images: int) -> dict[str, Any]:
    with pytest.raises(psycopg.Error) as caught:
        library.enqueue(rows(library, images))
    assert caught.value.diag.sqlstate == "PT429"
    detail: dict[str, Any] = json.loads(caught.value.diag.message_detail or "")
    assert detail["code"] == "quota_exceeded"
    assert detail["retry_after"] > 0
    return detail | {"message": caught.value.diag.message_primary}


def test_a_daily_quota_counts_what_is_in_flight(library: Library) -> None:
    allow(library, max_images=10)
    library.enqueue(rows(library, 6))
    told = refused(library, 5)
    assert (told["images_left"], told["left"], told["maximum"]) == (4, 4, 10)
    assert told["message"] == "The daily quota of this workspace allows 4 more images today."
    library.enqueue(rows(library, 4))
    assert refused(library, 1)["images_left"] == 0
    assert library.sql("select count(*) as n from autotag.jobs") == [{"n": 2}], "nothing is stored of what was refused"


def test_uploads_at_the_same_time_cannot_overshoot(library: Library) -> None:
    allow(library, max_images=20)
    uploads = [rows(library, 3) for _ in range(12)]

    with ThreadPoolExecutor(12) as pool:
        fitted = sum(pool.map(lambda assets: accepted(library, assets), uploads))
    assert fitted == 6, "6 × 3 fit into 20"


async def test_what_fails_or_is_cancelled_is_free_again(library: Library) -> None:
    allow(library, max_images=10)
    told = library.enqueue(rows(library, 10))
    assert refused(library, 1)["images_left"] == 0
    library.rpc("public.cancel_tagging", told["job_id"])
    assert library.enqueue(rows(library, 10))["image_count"] == 10


async def test_what_was_used_counts_until_the_period_ends(library: Library) -> None:
    allow(library, max_images=5)
    allow(library, period="month", max_images=7)
    assets = await library.upload(4)
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
    assert refused(library, 2)["period"] == "day"
    library.sql("update autotag.usage set day = day - 1 where extract(day from day) > 1")
    today = library.sql("select extract(day from (now() at time zone 'utc'))::int as d")[0]["d"]
    if today > 1:  # yesterday is of the same month
        told = refused(library, 4)
        assert (told["period"], told["images_left"]) == ("month", 3)
        assert library.enqueue(rows(library, 3))["image_count"] == 3


def test_the_quota_that_names_the_user_or_the_workspace_counts(library: Library) -> None:
    other = Library(library.stack)
    allow(library, max_images=2)  # every workspace
    allow(library, max_images=6, workspace_id=library.member.workspace)
    allow(library, max_images=3, scope="user")  # every user
    assert refused(other, 3)["scope"] == "workspace"
    assert refused(library, 4)["scope"] == "user"
    allow(library, max_images=None, scope="user", user_id=library.member.user)
    assert library.enqueue(rows(library, 6))["image_count"] == 6
    assert refused(library, 1)["scope"] == "workspace"


def test_one_users_quota_is_not_the_others(library: Library) -> None:
    allow(library, max_images=3, scope="user")
    second = Library(library.stack, library.stack.add_member(workspace=library.member.workspace))
    library.enqueue(rows(library, 3))
    refused(library, 1)
    assert second.enqueue(rows(second, 3))["image_count"] == 3


async def test_money_is_counted_as_the_provider_bills_it(library: Library) -> None:
    """The estimated cost is reserved, and then replaced by the real cost."""
    [each] = library.sql("select autotag.expected_cost(null, true) as c")
    allow(library, max_cost=each["c"] * 4)
    assets = await library.upload(4)
    told = library.enqueue(assets)
    assert refused(library, 1)["quota"] == "cost"
    async with worker(library.stack):
        await library.finished(told)
    [used] = library.sql("select sum(cost) as c from autotag.usage")
    [left] = library.sql("select available from autotag.quotas_left(%s, null)", library.member.workspace)
    assert Decimal(left["available"]) == each["c"] * 4 - used["c"]
    assert used["c"] < each["c"] * 4, "the estimate is on the safe side"


def test_no_quota_no_limit_and_nonsense_is_refused(library: Library) -> None:
    assert library.enqueue(rows(library, 50))["image_count"] == 50
    for wrong in ({"max_images": -1}, {"scope": "planet"}, {"period": "hour"}, {"user_id": library.member.user}):
        with pytest.raises(psycopg.errors.CheckViolation):
            allow(library, **wrong)


async def test_in_automatic_mode_the_rest_waits_until_the_quota_renews(library: Library) -> None:
    library.stack.configure(upload_quiet="0.1 s")
    library.sql("select autotag.set_automatic(true)")
    allow(library, max_images=3)
    files = await library.upload_files(5)
    library.insert([path for path, _ in files])
    async with worker(library.stack):
        await until(lambda: sum(a["tagging_stage"] == "completed" for a in library.assets().values()) == 3, "three")
        await until(lambda: library.sql("select 1 from autotag.uploads where seal_at > now() + interval '30 s'") != [],
                    "the rest to wait")  # fmt: skip
    assert library.sql("select count(*) as n from autotag.arrivals") == [{"n": 2}]


def test_what_was_billed_counts_whatever_came_of_it(library: Library) -> None:
    """Unusable answers cost as much as usable ones, so retries count in a quota."""
    allow(library, max_images=3)
    library.sql(
        "insert into autotag.usage (workspace_id, user_id, day, model, service_tier, images, requests, cost)"
        " values (%s, %s, (now() at time zone 'utc')::date, 'm', 'default', 0, 3, 0)",
        library.member.workspace, library.member.user,
    )  # fmt: skip
    assert refused(library, 1)["images_left"] == 0


def test_a_users_quota_counts_what_they_do_in_all_workspaces(library: Library) -> None:
    allow(library, max_images=3, scope="user")
    other = library.stack.add_member()
    library.sql("insert into public.workspace_members values (%s, %s)", other.workspace, library.member.user)
    elsewhere = Library(library.stack, dataclasses.replace(library.member, workspace=other.workspace))
    library.enqueue(rows(library, 2))
    assert refused(elsewhere, 2)["images_left"] == 1
    allow(library, max_images=5, scope="user", workspace_id=other.workspace)
    assert elsewhere.enqueue(rows(elsewhere, 5))["image_count"] == 5, "its own quota counts its own workspace"


WORKER = "00000000-0000-4000-8000-000000000001"
#: Answers that are billed and tried again.
CUT_OFF = {"kind": "image", "code": "answer_too_long", "message": "Cut off.", "retry": True, "origin": "provider"}
UNUSABLE = {"kind": "image", "code": "bad_answer", "message": "No JSON.", "retry": True, "origin": "provider"}
BROKEN = {"kind": "transient", "code": "provider_error", "message": "Broken.", "origin": "provider"}


def claimed(library: Library, images: int) -> list[dict[str, Any]]:
    """Claims as a worker does. What is delayed is due, and all limits but the quota are wide."""
    library.sql("update autotag.tasks set retry_at = now() where retry_at is not null")
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER)
    library.sql("update autotag.provider_limits set proven_at = '-infinity', account_error = null, probe_at = null,"
                " tokens_per_minute = 100000000, tokens_left = 100000000, requests_left = 10000, requests_per_minute = 10000")  # fmt: skip
    described: list[dict[str, Any]] = library.claim(WORKER, images)["images"]
    return described


def answer(library: Library, tasks: list[dict[str, Any]], errors: list[dict[str, Any]], prompt: int) -> None:
    """Reports these errors. Each answer was billed with its whole cap."""
    library.settle(WORKER, [
        {"task": task["task"], "attempt": task["attempt"], "error": error,
         "usage": {"input": prompt, "cached": 0, "cache_write": 0, "output": task["cap"], "reasoning": 0,
                   "model": "gpt-6-luna", "tier": "default"}}
        for task, error in zip(tasks, errors, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("scope", ["workspace", "user"])
@pytest.mark.parametrize("kind", ["images", "cost"])
@pytest.mark.parametrize("seed", range(4))
def test_retries_do_not_exceed_a_quota(library: Library, kind: str, scope: str, seed: int) -> None:
    """Reports random errors in random order. The bill exceeds the quota by at most one answer for each image in
    flight."""
    chance = random.Random(seed)
    library.stack.configure(
        realtime_max_images=50, realtime_requests_per_minute=100000, realtime_tokens_per_minute=100000000
    )
    [each] = library.sql("select autotag.expected_cost(null, true) as c")
    images, quota = 12, chance.randint(12, 60)
    allow(library, scope=scope, **({"max_images": quota} if kind == "images" else {"max_cost": quota * each["c"]}))
    [provider] = library.sql("select tokens_per_image - output_tokens as prompt from autotag.provider_limits")
    library.enqueue(rows(library, images))
    dearest = Decimal(0)
    for _ in range(500):
        tasks = claimed(library, chance.randint(1, images))
        if not tasks:
            break
        [price] = library.sql("select autotag.price_tokens('gpt-6-luna', 'default', %s, 0, 0, %s) as c",
                              2 * provider["prompt"], max(task["cap"] for task in tasks))  # fmt: skip
        dearest = max(dearest, price["c"])
        answer(library, tasks, chance.choices([CUT_OFF, UNUSABLE, BROKEN], k=len(tasks)), 2 * provider["prompt"])
    [live] = library.sql("select count(*) as n from autotag.tasks where finished_at is null")
    assert live["n"] == 0, "every image ends"
    [billed] = library.sql("select sum(requests) as images, sum(cost) as cost from autotag.usage")
    if kind == "images":
        assert billed["images"] <= quota
    else:
        assert billed["cost"] <= quota * each["c"] + images * dearest
    ends = {row["error_code"] for row in library.sql("select distinct error_code from autotag.tasks")}
    assert "quota_exceeded" in ends
    sentences = {row["tagging_error"] for row in library.assets().values()}
    assert f"The daily quota of this {scope} has no room for another try." in sentences


def test_answers_that_cost_what_was_estimated_never_exceed_the_quota(library: Library) -> None:
    """Twenty images fill the quota, and all answers are cut off. None is retried, because a retry would cost four times
    as much."""
    library.stack.configure(
        realtime_max_images=50, realtime_requests_per_minute=100000, realtime_tokens_per_minute=100000000
    )
    [each] = library.sql("select autotag.expected_cost(null, true) as c")
    allow(library, max_cost=20 * each["c"])
    [provider] = library.sql("select tokens_per_image - output_tokens as prompt from autotag.provider_limits")
    library.enqueue(rows(library, 20))
    tasks = claimed(library, 20)
    for first in range(0, 20, 3):
        answer(library, tasks[first : first + 3], [CUT_OFF] * len(tasks[first : first + 3]), provider["prompt"])
    [billed] = library.sql("select sum(requests) as calls, sum(cost) as cost from autotag.usage")
    assert (billed["calls"], billed["cost"] <= 20 * each["c"]) == (20, True)
    assert not claimed(library, 20)


def test_a_retry_that_fits_is_made_and_reserves_its_larger_cap(library: Library) -> None:
    [each] = library.sql("select autotag.expected_cost(null, true) as c")
    allow(library, max_cost=12 * each["c"])
    [provider] = library.sql("select tokens_per_image - output_tokens as prompt from autotag.provider_limits")
    library.enqueue(rows(library, 1))
    answer(library, claimed(library, 1), [CUT_OFF], provider["prompt"])
    [again] = claimed(library, 1)
    [used] = library.sql("select sum(cost) as c from autotag.usage")
    [price] = library.sql("select autotag.price_tokens('gpt-6-luna', 'default', %s, 0, 0, %s) as c",
                          provider["prompt"], again["cap"])  # fmt: skip
    [left] = library.sql("select available from autotag.quotas_left(%s, null)", library.member.workspace)
    assert left["available"] == 12 * each["c"] - used["c"] - price["c"]


async def test_lines_of_a_batch_are_not_tried_again_without_room(library: Library) -> None:
    library.stack.configure(express_images=0)
    library.stack.simulator.faults.add(Fault(where="BATCH", answer="length", times=1000))
    allow(library, max_images=60)
    assets = await library.upload(60)
    async with worker(library.stack):
        [job] = await library.finished(library.enqueue(assets))
    assert (job["completed"], job["failed"]) == (0, 60)
    [billed] = library.sql("select sum(requests) as n from autotag.usage")
    assert billed["n"] == 60
    assert library.sql("select distinct error_code as code from autotag.tasks") == [{"code": "quota_exceeded"}]
    audit(library.stack)


# -- a user in several workspaces at once


def elsewhere(library: Library) -> Library:
    """The same user's library in another workspace."""
    other = library.stack.add_member()
    library.sql("insert into public.workspace_members values (%s, %s)", other.workspace, library.member.user)
    return Library(library.stack, dataclasses.replace(library.member, workspace=other.workspace))


def accepted(library: Library, assets: list[str]) -> bool:
    try:
        library.enqueue(assets)
    except psycopg.Error as error:
        if error.sqlstate != "PT429":
            raise
        return False
    return True


@pytest.mark.parametrize("kind", ["every user", "this user"])
def test_uploads_into_several_workspaces_at_the_same_time_cannot_overshoot(library: Library, kind: str) -> None:
    allow(library, max_images=20, scope="user", **({"user_id": library.member.user} if kind == "this user" else {}))
    places = [library, *(elsewhere(library) for _ in range(3))]
    uploads = [(place, rows(place, 3)) for place in places for _ in range(4)]
    with ThreadPoolExecutor(len(uploads)) as pool:
        done = sum(pool.map(lambda upload: accepted(*upload), uploads))
    assert done == 6, "6 × 3 fit into 20"
    [live] = library.sql("select sum(image_count) as n from autotag.jobs")
    assert live["n"] == 18


def test_an_upload_sees_what_the_user_uploads_elsewhere_in_a_transaction_that_is_open(library: Library) -> None:
    """The second upload waits for the first one's transaction. Another user's upload does not."""
    allow(library, max_images=3, scope="user")
    there, stranger = elsewhere(library), Library(library.stack)
    first, second, third = rows(library, 2), rows(there, 2), rows(stranger, 2)
    with ThreadPoolExecutor(1) as pool, psycopg.connect(library.stack.database_url()) as connection:
        connection.execute("select set_config('request.jwt.claims', %s, true)",
                           (json.dumps({"role": "authenticated", "sub": library.member.user}),))  # fmt: skip
        connection.execute("select public.enqueue_tagging(%s::uuid[])", (first,))
        waits = pool.submit(accepted, there, second)
        assert accepted(stranger, third)
        wait_for_lock(library)
        connection.commit()
        assert not waits.result(timeout=PATIENCE)


def test_an_upload_sees_a_retry_elsewhere_that_is_not_committed(library: Library) -> None:
    """An answer was billed, and its image is retried. Both count, so the user's quota of two is used up."""
    allow(library, max_images=2, scope="user")
    there = elsewhere(library)
    library.enqueue(rows(library, 1))
    [task] = claimed(library, 1)
    assets = rows(there, 1)
    report = [{"task": task["task"], "attempt": task["attempt"], "error": UNUSABLE, "usage": {
        "input": 9, "cached": 0, "cache_write": 0, "output": 9, "reasoning": 0, "model": "gpt-6-luna", "tier": "default"}}]  # fmt: skip
    with ThreadPoolExecutor(1) as pool, psycopg.connect(library.stack.database_url()) as connection:
        connection.execute("select autotag.settle(%s, %s, %s)", (WORKER, library.member.workspace, json.dumps(report)))
        waits = pool.submit(accepted, there, assets)
        wait_for_lock(library)
        connection.commit()
        assert not waits.result(timeout=PATIENCE)
    [billed] = library.sql("select sum(requests) as n from autotag.usage")
    [live] = library.sql("select count(*) as n from autotag.tasks where finished_at is null")
    assert billed["n"] + live["n"] == 2


def test_no_seal_waits_for_or_fails_with_an_upload_of_a_user_with_a_quota(sealer: Library) -> None:
    """A user has an upload in an open transaction, which may use up the quota. The user's automatic uploads wait until
    it has ended."""
    sealer.sql("select autotag.set_automatic(false)")
    allow(sealer, max_images=3, scope="user")
    first, there = rows(sealer, 2), elsewhere(sealer)
    sealer.sql("select autotag.set_automatic(true)")
    claims = json.dumps({"role": "authenticated", "sub": sealer.member.user})
    with psycopg.connect(sealer.stack.database_url(), autocommit=True) as member:
        member.execute("select set_config('request.jwt.claims', %s, false)", (claims,))
        member.execute("insert into public.assets (workspace_id, storage_path) select %s, %s || '/' || i || '.jpg'"
                       " from generate_series(1, 2) i", (there.member.workspace, there.member.workspace))  # fmt: skip
    with psycopg.connect(sealer.stack.database_url()) as connection:
        connection.execute("select set_config('request.jwt.claims', %s, true)", (claims,))
        connection.execute("select public.enqueue_tagging(%s::uuid[])", (first,))
        seal(sealer)
        assert jobs(there) == []
        connection.commit()
    seal(sealer)
    assert (jobs(sealer), jobs(there)) == ([2], [1])


def wait_for_lock(library: Library) -> None:
    """Waits until a session waits for an advisory lock."""
    deadline = time.monotonic() + PATIENCE
    while not library.sql("select 1 from pg_locks where locktype = 'advisory' and not granted"
                          " and database = (select oid from pg_database where datname = current_database())"):  # fmt: skip
        assert time.monotonic() < deadline, "the upload does not wait"
        time.sleep(0.02)
