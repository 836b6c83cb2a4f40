"""Every RPC, its errors and big arrays, through every client: all of them get the same answers."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from callers import CALLERS, Answer, Call

from conftest import ROOT
from lab.stack import Member, Stack
from support import Library, worker

UNKNOWN = str(uuid.UUID(int=0))


@dataclass
class Client:
    """One client in the hands of one member."""

    call: Call
    library: Library

    async def rpc(self, function: str, *, member: Member | None = None, **arguments: Any) -> Answer:
        return await self.call((member or self.library.member).token, function, arguments)


@pytest.fixture(params=CALLERS)
async def client(request: pytest.FixtureRequest, library: Library) -> AsyncIterator[Client]:
    async with CALLERS[request.param](library.stack) as call:
        yield Client(call, library)


async def test_a_job_from_enqueue_to_usage(client: Client) -> None:
    library = client.library
    assets = await library.upload(3)
    told = (await client.rpc("enqueue_tagging", asset_ids=assets)).data
    assert set(told) == {"job_id", "strategy", "image_count", "skipped", "batches", "eta"}
    assert (told["strategy"], told["image_count"], told["skipped"], told["batches"]) == ("realtime", 3, 0, 0)
    again = (await client.rpc("enqueue_tagging", asset_ids=assets)).data
    assert (again["job_id"], again["image_count"], again["skipped"]) == (told["job_id"], 0, 3)
    async with worker(library.stack):
        await library.finished(told)
    job = (await client.rpc("tagging_job", job_id=told["job_id"])).data
    assert {"job_id", "strategy", "stages", "progress", "eta", "error"} <= set(job)
    assert (job["stages"]["completed"], job["progress"], job["error"]) == (3, 100, None)
    assert (await client.rpc("tagging_profile", workspace_id=library.member.workspace)).data["version"] == 0
    [day] = (await client.rpc("tagging_usage", workspace_id=library.member.workspace)).data
    assert (day["images"], day["requests"], day["user_id"]) == (3, 3, library.member.user)
    assert day["input_tokens"] > 0
    assert (
        await client.rpc("tagging_usage", workspace_id=library.member.workspace, since="2020-01-01", until="2020-01-02")
    ).data == []


async def test_cancel_and_retry(client: Client) -> None:
    assets = client.library.insert(["a.jpg", "b.jpg"])
    job_id = (await client.rpc("enqueue_tagging", asset_ids=assets)).data["job_id"]
    nothing = await client.rpc("retry_tagging", job_id=job_id)
    assert (nothing.error or {})["code"] == "PT409"
    assert nothing.code == "nothing_to_retry"
    assert (await client.rpc("cancel_tagging", job_id=job_id)).data == {"job_id": job_id, "cancelled": 2}
    again = (await client.rpc("retry_tagging", job_id=job_id)).data
    assert (again["image_count"], again["job_id"] != job_id) == (2, True)


async def test_what_would_happen_and_what_is_allowed(client: Client) -> None:
    plan = (await client.rpc("tagging_strategy", image_count=300)).data
    assert set(plan) == {"type", "chunks", "delay_ms", "batches", "estimate_seconds"}
    assert (plan["type"], plan["batches"]) == ("batch-parallel", 3)
    workspace = client.library.member.workspace
    limit = {"workspace_id": workspace, "request_type": "realtime", "image_count": 30}
    free = {"allowed": True, "retry_after": 0, "reason": None}
    assert (await client.rpc("peek_rate_limit", **limit)).data == free
    server_only = await client.rpc("check_rate_limit", **limit)
    assert (server_only.code, (server_only.error or {})["code"]) == ("service_only", "PT403")
    client.library.stack.configure(members_may_take=True)
    assert (await client.rpc("check_rate_limit", **limit)).data == free
    for function in ("check_rate_limit", "peek_rate_limit"):
        refused = (await client.rpc(function, **limit)).data
        assert (refused["allowed"], refused["reason"]) == (False, "window_full")
        assert 0 < refused["retry_after"] <= 60
        never = (await client.rpc(function, **{**limit, "image_count": 31})).data
        assert never == {"allowed": False, "retry_after": None, "reason": "exceeds_limit"}


async def test_the_server_side_hands_a_webhook_over(client: Client) -> None:
    delivery = {"webhook_id": "wh_1", "event_type": "batch.completed", "batch_id": "batch_1"}
    for kind, result in (("batch.completed", "unknown"), ("batch.completed", "replayed"), ("response.done", "ignored")):
        answer = await client.call(client.library.stack.secret_key, "openai_webhook", {**delivery, "event_type": kind})
        assert answer.data == {"result": result}
    bad = await client.call(client.library.stack.secret_key, "openai_webhook", {**delivery, "batch_id": ""})
    assert bad.code == "bad_webhook"
    assert (await client.rpc("openai_webhook", **delivery)).code == "42501"


async def test_5000_images_in_one_call(client: Client) -> None:
    assets = client.library.insert([f"{i}.jpg" for i in range(5000)])
    told = (await client.rpc("enqueue_tagging", asset_ids=assets)).data
    assert (told["image_count"], told["strategy"], told["batches"]) == (5000, "batch-parallel", 10)


async def test_every_refusal_has_status_code_message_and_hint(client: Client) -> None:
    library = client.library
    stranger = library.stack.add_member("stranger")
    [mine] = library.insert(["a.jpg"])
    job_id = (await client.rpc("enqueue_tagging", asset_ids=[mine])).data["job_id"]
    library.stack.configure(live_images_max=2)
    workspace = library.member.workspace
    limit = {"workspace_id": workspace, "request_type": "realtime", "image_count": 1}
    cases: list[tuple[str, str, str, dict[str, Any]]] = [
        ("PT400", "no_images", "enqueue_tagging", {"asset_ids": []}),
        ("PT404", "unknown_asset", "enqueue_tagging", {"asset_ids": [UNKNOWN]}),
        ("PT413", "too_many_images", "enqueue_tagging", {"asset_ids": [str(uuid.UUID(int=i)) for i in range(50_001)]}),
        ("PT429", "too_many_live_images", "enqueue_tagging", {"asset_ids": library.insert(["b.jpg", "c.jpg"])}),
        ("PT404", "unknown_job", "tagging_job", {"job_id": UNKNOWN}),
        ("PT404", "unknown_job", "cancel_tagging", {"job_id": UNKNOWN}),
        ("PT404", "unknown_job", "retry_tagging", {"job_id": UNKNOWN}),
        ("PT409", "nothing_to_retry", "retry_tagging", {"job_id": job_id}),
        ("PT400", "no_images", "tagging_strategy", {"image_count": 0}),
        ("PT400", "unknown_request_type", "check_rate_limit", {**limit, "request_type": "hourly"}),
        ("PT400", "no_images", "check_rate_limit", {**limit, "image_count": -1}),
        ("PT403", "not_a_member", "check_rate_limit", {**limit, "workspace_id": UNKNOWN}),
        ("PT403", "not_a_member", "tagging_usage", {"workspace_id": UNKNOWN}),
        ("PT403", "not_an_editor", "set_tagging_profile", {"workspace_id": workspace, "profile": {"tag_count": 5}}),
    ]
    for status, code, function, arguments in cases:
        answer = await client.rpc(function, **arguments)
        assert answer.error, (function, answer)
        assert (answer.error["code"], answer.code) == (status, code), function
        assert answer.error["message"], code
        assert answer.error["hint"], code
    busy = await client.rpc("enqueue_tagging", asset_ids=library.insert(["d.jpg", "e.jpg"]))
    assert busy.detail["retry_after"] >= 1
    theirs = await client.rpc("enqueue_tagging", member=stranger, asset_ids=[mine])
    assert (theirs.code, (theirs.error or {})["code"]) == ("unknown_asset", "PT404")


async def test_wrong_types_and_anon_are_refused_by_postgres_itself(client: Client) -> None:
    wrong = await client.rpc("enqueue_tagging", asset_ids=["no uuid"])
    assert (wrong.error or {})["code"] == "22P02"
    anon = await client.call("", "enqueue_tagging", {"asset_ids": [UNKNOWN]})
    assert (anon.error or {})["code"] == "42501"


async def test_over_http_the_status_is_the_one_in_the_code(library: Library, stack: Stack) -> None:
    stack.configure(live_images_max=1)
    cases = {
        400: ("enqueue_tagging", {"asset_ids": []}),
        403: ("tagging_usage", {"workspace_id": UNKNOWN}),
        404: ("tagging_job", {"job_id": UNKNOWN}),
        409: ("retry_tagging", {"job_id": library.enqueue(library.insert(["a.jpg"]))["job_id"]}),
        413: ("enqueue_tagging", {"asset_ids": [str(uuid.UUID(int=i)) for i in range(50_001)]}),
        429: ("enqueue_tagging", {"asset_ids": library.insert(["b.jpg"])}),
    }
    headers = {"apikey": stack.anon_key, "authorization": f"Bearer {library.member.token}"}
    async with httpx.AsyncClient(base_url=f"{stack.supabase_url}/rest/v1/rpc", headers=headers) as http:
        for status, (function, arguments) in cases.items():
            answer = await http.post(f"/{function}", json=arguments)
            assert (answer.status_code, answer.json()["code"]) == (status, f"PT{status}")


def test_every_code_that_can_be_raised_is_documented() -> None:
    migrations = "".join(path.read_text() for path in (ROOT / "supabase" / "schemas").rglob("*.sql"))
    raised = set(re.findall(r"refuse\(\s*(\d{3}), '(\w+)'", migrations))
    assert len(raised) > 10
    documented = (ROOT / "docs" / "sql-api.md").read_text()
    for status, code in raised:
        assert re.search(rf"`{code}`[^\n]*{status}|{status}[^\n]*`{code}`", documented), f"{status} {code}"
