"""Every RPC, its errors and large arrays, with every client and every type of keys: all get the same answers.

With AUTOTAG_TEST_PROJECT=1 the services are those of `supabase start` (or of the variables of `supabase status -o env`)
and not the local edge's.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, fields
from typing import Any

import httpx
import pytest
import pytest_asyncio
from callers import CALLERS, Answer, Call

from conftest import BARE_TEMPLATE, ROOT, copied_database, quicken
from key_types import KEYS, KeyedStack, install_keys
from lab.postgres import LocalPostgres
from lab.project import project_variables
from lab.stack import Member, Stack, local_stack, supabase_stack
from support import Library, connected, worker

#: One database, one edge and one simulator for each type of keys: every test has a workspace of its own.
pytestmark = pytest.mark.asyncio(loop_scope="module")
REAL = os.environ.get("AUTOTAG_TEST_PROJECT") == "1"
KINDS = ("uuid",) if REAL else ("uuid", "bigint", "integer", "text")
UNKNOWN = str(uuid.UUID(int=0))
#: An id that no row has, and one that is none.
NO_ROW = {"uuid": UNKNOWN, "bigint": 7, "integer": 7, "text": "no row"}
WRONG = {"uuid": "no uuid", "bigint": "no number", "integer": "2.5"}


@dataclass
class Client:
    """One client that acts for one member."""

    call: Call
    library: Library
    stack: KeyedStack

    @property
    def workspace(self) -> Any:
        return self.stack.keys.natural(self.library.member.workspace, 1)

    def insert(self, paths: list[str]) -> list[Any]:
        return list(self.stack.keys.natural(self.library.insert(paths), 0))

    async def rpc(self, function: str, *, member: Member | None = None, **arguments: Any) -> Answer:
        return await self.call((member or self.library.member).token, function, arguments)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[KeyedStack]:
    if REAL:
        async with supabase_stack(project_variables()) as running:
            yield _keyed(running, kind)
        return
    postgres: LocalPostgres = request.getfixturevalue("postgres")
    with copied_database(postgres, BARE_TEMPLATE) as database:
        install_keys(postgres, database, KEYS[kind])
        async with local_stack(postgres, database) as local:
            yield _keyed(local, kind)


def _keyed(running: Stack, kind: str) -> KeyedStack:
    values = {field.name: getattr(running, field.name) for field in fields(Stack)}
    stack = KeyedStack(**{**values, "connect": connected}, keys=KEYS[kind])
    quicken(stack)
    return stack


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=CALLERS)
async def call(request: pytest.FixtureRequest, keyed: KeyedStack) -> AsyncIterator[Call]:
    async with CALLERS[request.param](keyed) as call:
        yield call


@pytest.fixture(scope="module")
def many(keyed: KeyedStack) -> tuple[Member, list[Any]]:
    """2,000 images of one workspace for all clients, because inserting them takes as long as enqueuing them."""
    library = Library(keyed)
    return library.member, list(keyed.keys.natural(library.insert([f"{i}.jpg" for i in range(2000)]), 0))


@pytest.fixture
def client(call: Call, keyed: KeyedStack) -> Iterator[Client]:
    library = Library(keyed)
    yield Client(call, library, keyed)
    library.sql("truncate autotag.jobs, autotag.tasks, autotag.queues, autotag.workspaces, autotag.webhooks cascade")


async def test_a_job_from_enqueue_to_usage(client: Client) -> None:
    library = client.library
    assets = client.stack.keys.natural(await library.upload(3), 0)
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
    assert (await client.rpc("tagging_profile", workspace_id=client.workspace)).data["version"] == 0
    [day] = (await client.rpc("tagging_usage", workspace_id=client.workspace)).data
    assert (day["images"], day["requests"], day["user_id"]) == (3, 3, client.stack.keys.natural(library.member.user, 2))
    assert day["input_tokens"] > 0
    assert (
        await client.rpc("tagging_usage", workspace_id=client.workspace, since="2020-01-01", until="2020-01-02")
    ).data == []


async def test_cancel_and_retry(client: Client) -> None:
    assets = client.insert(["a.jpg", "b.jpg"])
    job_id = (await client.rpc("enqueue_tagging", asset_ids=assets)).data["job_id"]
    nothing = await client.rpc("retry_tagging", job_id=job_id)
    assert (nothing.error or {})["code"] == "PT409"
    assert nothing.code == "nothing_to_retry"
    assert (await client.rpc("cancel_tagging", job_id=job_id)).data == {"job_id": job_id, "cancelled": 2}
    again = (await client.rpc("retry_tagging", job_id=job_id)).data
    assert (again["image_count"], again["job_id"] != job_id) == (2, True)


async def test_uploads_are_found_again(client: Client) -> None:
    own = {"workspace_id": client.workspace}
    first, second = [
        (await client.rpc("enqueue_tagging", asset_ids=client.insert(names)))
        .data["job_id"] for names in (["a.jpg", "b.jpg"], ["c.jpg"])
    ]  # fmt: skip
    newest, oldest = listed = (await client.rpc("tagging_jobs", **own)).data
    assert [job["job_id"] for job in listed] == [second, first]
    same = (await client.rpc("tagging_job", job_id=first)).data
    predicted = {"eta", "eta_p90"}
    assert {k: v for k, v in oldest.items() if k not in predicted} == {
        k: v for k, v in same.items() if k not in predicted
    }
    assert oldest["stages"]["queued"] == 2
    page = {**own, "only_live": False, "before": newest["created_at"], "limit": 1}
    assert [job["job_id"] for job in (await client.rpc("tagging_jobs", **page)).data] == [first]
    await client.rpc("cancel_tagging", job_id=first)
    assert [job["job_id"] for job in (await client.rpc("tagging_jobs", **own)).data] == [second]
    everything = (await client.rpc("tagging_jobs", **own, only_live=False)).data
    assert [job["status"] for job in everything] == ["running", "cancelled"]
    stranger = client.library.stack.add_member("stranger")
    theirs = await client.rpc("tagging_jobs", member=stranger, **own)
    nobodys = await client.rpc("tagging_jobs", workspace_id=NO_ROW[client.stack.keys.base[1]])
    assert (theirs.code, nobodys.code) == ("not_a_member", "not_a_member")


async def test_what_would_happen_and_what_is_allowed(client: Client) -> None:
    plan = (await client.rpc("tagging_strategy", image_count=300)).data
    assert set(plan) == {"type", "chunks", "delay_ms", "batches", "estimate_seconds", "note"}
    assert (plan["type"], plan["batches"]) == ("batch-parallel", 3)
    own = {"workspace_id": client.workspace}
    limit = {**own, "request_type": "realtime", "image_count": 30}
    free = {"allowed": True, "retry_after": 0, "reason": None}
    assert (await client.rpc("peek_rate_limit", **limit)).data == free
    server_only = await client.rpc("check_rate_limit", **limit)
    assert (server_only.code, (server_only.error or {})["code"]) == ("service_only", "PT403")
    with client.stack.configured(members_may_take=True):
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


async def test_2000_images_in_one_call(client: Client, many: tuple[Member, list[Any]]) -> None:
    member, assets = many
    told = (await client.rpc("enqueue_tagging", member=member, asset_ids=assets)).data
    assert (told["image_count"], told["strategy"], told["batches"]) == (2000, "batch-parallel", 10)


async def test_every_refusal_has_status_code_message_and_hint(client: Client) -> None:
    library = client.library
    stranger = library.stack.add_member("stranger")
    no_row = NO_ROW[client.stack.keys.base[0]]
    [mine] = client.insert(["a.jpg"])
    job_id = (await client.rpc("enqueue_tagging", asset_ids=[mine])).data["job_id"]
    own = {"workspace_id": client.workspace}
    limit = {**own, "request_type": "realtime", "image_count": 1}
    cases: list[tuple[str, str, str, dict[str, Any]]] = [
        ("PT400", "no_images", "enqueue_tagging", {"asset_ids": []}),
        ("PT404", "unknown_asset", "enqueue_tagging", {"asset_ids": [no_row]}),
        ("PT413", "too_many_images", "enqueue_tagging", {"asset_ids": [mine] * 50_001}),
        ("PT429", "too_many_live_images", "enqueue_tagging", {"asset_ids": client.insert(["b.jpg", "c.jpg"])}),
        ("PT404", "unknown_job", "tagging_job", {"job_id": UNKNOWN}),
        ("PT404", "unknown_job", "cancel_tagging", {"job_id": UNKNOWN}),
        ("PT404", "unknown_job", "retry_tagging", {"job_id": UNKNOWN}),
        ("PT409", "nothing_to_retry", "retry_tagging", {"job_id": job_id}),
        ("PT400", "no_images", "tagging_strategy", {"image_count": 0}),
        ("PT400", "unknown_request_type", "check_rate_limit", {**limit, "request_type": None}),
        ("PT400", "no_images", "check_rate_limit", {**limit, "image_count": -1}),
        ("PT403", "not_a_member", "check_rate_limit", {**limit, "workspace_id": no_row}),
        ("PT403", "not_a_member", "tagging_usage", {"workspace_id": no_row}),
        ("PT400", "no_workspace", "tagging_jobs", {"workspace_id": None}),
        ("PT403", "not_an_editor", "set_tagging_profile", {**own, "profile": {"tag_count": 5}}),
    ]
    with client.stack.configured(live_images_max=2):
        answers = [await client.rpc(function, **arguments) for _, _, function, arguments in cases]
        busy = await client.rpc("enqueue_tagging", asset_ids=client.insert(["d.jpg", "e.jpg"]))
    for (status, code, function, _), answer in zip(cases, answers, strict=True):
        assert answer.error, (function, answer)
        assert (answer.error["code"], answer.code) == (status, code), function
        assert answer.error["message"], code
        assert answer.error["hint"], code
    assert busy.detail["retry_after"] >= 1
    theirs = await client.rpc("enqueue_tagging", member=stranger, asset_ids=[mine])
    assert (theirs.code, (theirs.error or {})["code"]) == ("unknown_asset", "PT404")


async def test_wrong_types_and_anon_are_refused_by_postgres_itself(client: Client) -> None:
    asset = client.stack.keys.base[0]
    if asset in WRONG:  # every text is an id
        wrong = await client.rpc("enqueue_tagging", asset_ids=[WRONG[asset]])
        assert (wrong.error or {})["code"] == "22P02"
    for function in ("check_rate_limit", "peek_rate_limit"):
        wrong = await client.rpc(function, workspace_id=client.workspace, request_type="hourly", image_count=1)
        assert (wrong.error or {})["code"] == "22P02"
    anon = await client.call("", "enqueue_tagging", {"asset_ids": [NO_ROW[asset]]})
    assert (anon.error or {})["code"] == "42501"


async def test_over_http_the_status_is_the_one_in_the_code(keyed: KeyedStack) -> None:
    library = Library(keyed)
    [mine, *others] = keyed.keys.natural(library.insert(["a.jpg", "b.jpg"]), 0)
    job = library.enqueue([str(mine)])
    no_row = NO_ROW[keyed.keys.base[1]]
    cases = {
        400: ("enqueue_tagging", {"asset_ids": []}),
        403: ("tagging_usage", {"workspace_id": no_row}),
        404: ("tagging_job", {"job_id": UNKNOWN}),
        409: ("retry_tagging", {"job_id": job["job_id"]}),
        413: ("enqueue_tagging", {"asset_ids": [mine] * 50_001}),
        429: ("enqueue_tagging", {"asset_ids": others}),
    }
    headers = {"apikey": keyed.anon_key, "authorization": f"Bearer {library.member.token}"}
    with keyed.configured(live_images_max=1):
        async with httpx.AsyncClient(base_url=f"{keyed.supabase_url}/rest/v1/rpc", headers=headers) as http:
            for status, (function, arguments) in cases.items():
                answer = await http.post(f"/{function}", json=arguments)
                assert (answer.status_code, answer.json()["code"]) == (status, f"PT{status}")


async def test_every_code_that_can_be_raised_is_documented() -> None:
    migrations = "".join(path.read_text() for path in (ROOT / "supabase" / "schemas").rglob("*.sql"))
    raised = set(re.findall(r"refuse\(\s*(\d{3}), '(\w+)'", migrations))
    assert len(raised) > 10
    documented = (ROOT / "docs" / "sql-api.md").read_text()
    for status, code in raised:
        assert re.search(rf"`{code}`[^\n]*{status}|{status}[^\n]*`{code}`", documented), f"{status} {code}"
