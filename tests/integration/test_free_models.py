"""A price of zero is a known price: it is shown as $0, fits into every quota of dollars, and causes no division by
zero."""

from __future__ import annotations

import json
import uuid
from typing import Any

import psycopg
import pytest

from sealing import WORKER, jobs, seal
from support import Library, audit, worker


def rows(library: Library, count: int) -> list[str]:
    return library.insert([f"{uuid.uuid4()}.jpg" for _ in range(count)])


@pytest.fixture
def free(library: Library) -> Library:
    """The model in use costs nothing, and a quota of dollars is used up by what was billed before."""
    library.sql("insert into autotag.models (name, input_price, output_price) values ('gpt-6-luna', 0, 0)"
                " on conflict (name) do update set input_price = 0, cached_price = 0, cache_write_price = 0, output_price = 0")  # fmt: skip
    library.sql(
        "insert into autotag.quotas (scope, period, max_cost) values ('workspace', 'day', 1), ('user', 'month', 0)"
    )
    library.sql(
        "insert into autotag.usage (workspace_id, user_id, day, model, service_tier, images, requests, cost)"
        " values (%s, %s, (now() at time zone 'utc')::date, 'dear', 'default', 0, 3, 1.5)",
        library.member.workspace, library.member.user,
    )  # fmt: skip
    return library


async def test_uploads_of_a_free_model_pass_a_quota_of_dollars_that_is_used_up(free: Library) -> None:
    assets = await free.upload(4)
    async with worker(free.stack):
        [job] = await free.finished(free.enqueue(assets))
    assert (job["completed"], job["failed"]) == (4, 0)
    assert free.sql("select sum(cost) as c, count(*) filter (where cost is null) as n from autotag.usage where model <> 'dear'"
                    ) == [{"c": 0, "n": 0}]  # fmt: skip
    audit(free.stack)


def test_batches_and_retries_of_a_free_model_do_too(free: Library) -> None:
    assert free.enqueue(rows(free, 100))["batches"] == 1
    free.enqueue(rows(free, 1))
    free.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER)
    [task] = free.claim(WORKER, 1)["images"]
    error = {"kind": "image", "code": "bad_answer", "message": "No JSON.", "retry": True, "origin": "provider"}
    usage = {
        "input": 100,
        "cached": 0,
        "cache_write": 0,
        "output": 9,
        "reasoning": 0,
        "model": "gpt-6-luna",
        "tier": "default",
    }
    report = [{"task": task["task"], "attempt": task["attempt"], "error": error, "usage": usage}]
    free.sql("select autotag.settle(%s, %s, %s)", WORKER, free.member.workspace, json.dumps(report))
    assert (
        free.sql("select error_code, finished_at from autotag.tasks where id = %s", task["task"])[0]["finished_at"]
        is None
    )


def test_automatic_uploads_of_a_free_model_do_not_wait_for_next_month(free: Library, sealer: Library) -> None:
    free.sql(
        "insert into autotag.quotas (scope, period, workspace_id, max_images) values ('workspace', 'month', %s, 0)",
        free.member.workspace,
    )
    free.insert(["a.jpg"])
    seal(sealer)
    [waits] = free.sql("select seal_at > now() as so from autotag.uploads")
    assert waits["so"], "the quota of images has no room"
    free.sql("delete from autotag.quotas where max_images = 0")
    seal(sealer)
    assert jobs(free) == [1]


@pytest.mark.parametrize("tier", ["default", "batch", "flex", "unknown", "scale", "made-up"])
@pytest.mark.parametrize("model", ["gpt-6-luna", "gpt-6-luna-2026-10-01"])
def test_it_costs_zero_in_every_tier(free: Library, tier: str, model: str) -> None:
    [row] = free.sql(
        "select autotag.price_tokens(%s, %s, 100, 10, 5, 7) as some, autotag.price_tokens(%s, %s, null, null, null, null) as none",
        model, tier, model, tier,
    )  # fmt: skip
    assert row == {"some": 0, "none": 0}


def test_an_answer_that_names_another_model_is_free_too(free: Library) -> None:
    """llama.cpp and other servers answer with a model name of their own. The price of the requested model then limits
    the cost."""
    [row] = free.sql("select autotag.price_answers('{\"model\": \"gpt-6-luna\"}', '/models/x.gguf', 'default', 1, 0, 0, 1) as c,"
                     " autotag.price_answers('{\"model\": \"other\"}', '/models/x.gguf', 'default', 1, 0, 0, 1) as unknown")  # fmt: skip
    assert row == {"c": 0, "unknown": None}


def test_previews_status_and_doctor_say_zero(free: Library) -> None:
    [row] = free.sql("select autotag.status() as s, autotag.diagnose() as d, autotag.expected_cost() as c,"
                     " autotag.expected_cost('batch', true) as b")  # fmt: skip
    assert (row["c"], row["b"]) == (0, 0)
    assert (row["s"]["model"]["priced"], row["s"]["model"]["cost_per_1000"]) == (True, 0)
    [price] = [f for f in row["d"]["findings"] if f["check"] == "price"]
    assert price["level"] == "ok"
    assert "$0.00 and $0.00 per million" in price["message"]


def test_one_price_of_zero_and_the_other_unknown_is_unknown(library: Library) -> None:
    library.sql("insert into autotag.models (name, input_price) values ('half', 0)")
    assert library.sql("select autotag.price_tokens('half', 'default', 1, 0, 0, 1) as c") == [{"c": None}]


def test_a_quota_that_is_used_up_still_refuses_what_has_no_price(library: Library) -> None:
    """A quota of 0 dollars refuses images of a model without a price, because nothing shows that they are free."""
    library.sql("update autotag.settings set model = 'no-price-known'")
    library.sql("insert into autotag.quotas (scope, period, max_cost) values ('workspace', 'day', 0)")
    with pytest.raises(psycopg.Error) as caught:
        library.enqueue(rows(library, 1))
    assert json.loads(caught.value.diag.message_detail or "")["quota"] == "cost"


def test_a_discount_of_everything_is_a_price_of_zero_in_batches_alone(library: Library) -> None:
    library.sql("insert into autotag.models (name, input_price, output_price, batch_discount) values ('gpt-6-luna', 1, 1, 1)"
                " on conflict (name) do update set batch_discount = 1")  # fmt: skip
    [row] = library.sql("select autotag.expected_cost('batch', true) as b, (autotag.price_reservations()).free as f")
    assert row == {"b": 0, "f": False}


def preview(library: Library, model: str) -> Any:
    return library.sql("select autotag.preview_comparison(%s, %s, null, 5) as p", library.member.workspace, model)[0][
        "p"
    ]


async def test_a_comparison_with_a_free_model_passes_a_quota_that_is_used_up(library: Library) -> None:
    assets = await library.upload(2)
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
    library.sql("insert into autotag.models (name, input_price, output_price) values ('local', 0, 0)")
    library.sql("insert into autotag.quotas (scope, period, max_cost) values ('workspace', 'day', 0)")
    assert preview(library, "local")["cost"] == 0
    with pytest.raises(psycopg.Error):
        preview(library, "without-a-price")
    with pytest.raises(psycopg.Error):
        preview(library, "gpt-6-luna")
