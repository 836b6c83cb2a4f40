"""OpenAI's webhook: a genuine delivery finishes the batch at once, and every other one is refused or ignored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette

from autotag.http.serve import serve
from autotag.http.webhook import make_app
from autotag.openai.provider import Provider
from autotag.worker.run import Worker
from autotag.worker.wake import Wake
from lab.openai_sim.webhooks import batch_event, make_secret, sign
from lab.postgres import free_port
from support import Library, worker, worker_settings

SECRET = make_secret()


@pytest.fixture
async def received() -> AsyncIterator[tuple[httpx.AsyncClient, list[tuple[str, str, str]]]]:
    """A client of the application, and a list of what the application reported to the database."""
    deliveries: list[tuple[str, str, str]] = []

    async def receive(webhook_id: str, kind: str, batch: str) -> str:
        deliveries.append((webhook_id, kind, batch))
        return "accepted"

    app = make_app(Provider("none", "http://none.invalid/v1", 1), SECRET, receive)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        yield client, deliveries


async def test_a_signed_delivery_is_taken(received: tuple[httpx.AsyncClient, list[tuple[str, str, str]]]) -> None:
    client, deliveries = received
    body = batch_event("completed", "batch_1")
    answer = await client.post("/webhooks/openai", content=body, headers=sign(SECRET, body, webhook_id="wh_1"))
    assert (answer.status_code, deliveries) == (204, [("wh_1", "batch.completed", "batch_1")])


@pytest.mark.parametrize(
    "what",
    ["forged", "changed", "late", "from the future", "unsigned", "no id", "bad timestamp", "signed rubbish",
     "signed list", "not text"],
)  # fmt: skip
async def test_what_is_not_genuine_never_reaches_the_database(
    received: tuple[httpx.AsyncClient, list[tuple[str, str, str]]], what: str
) -> None:
    client, deliveries = received
    body = batch_event("completed", "batch_1")
    bodies = {
        "signed rubbish": b"{",
        "signed list": b"[1]",
        "not text": b"\xff\xfe",
    }
    body = bodies.get(what, body)
    at = {"late": time.time() - 301, "from the future": time.time() + 301}.get(what)
    headers = sign(make_secret() if what == "forged" else SECRET, body, at=at) if what != "not text" else {
        **sign(SECRET, b"x"), "content-type": "application/json"}  # fmt: skip
    if what == "changed":
        body = body.replace(b"batch_1", b"batch_2")
    if what == "unsigned":
        headers = {}
    if what == "no id":
        del headers["webhook-id"]
    if what == "bad timestamp":
        headers["webhook-timestamp"] = "yesterday"
    answer = await client.post("/webhooks/openai", content=body, headers=headers)
    assert (answer.status_code, deliveries) == (400, [])
    assert answer.json()["error"]["message"]


async def test_other_methods_and_paths_are_not_there(
    received: tuple[httpx.AsyncClient, list[tuple[str, str, str]]],
) -> None:
    client, _ = received
    assert (await client.get("/webhooks/openai")).status_code == 405
    assert (await client.post("/webhooks/stripe")).status_code == 404


async def test_a_delivery_makes_the_batch_finish_at_once(library: Library) -> None:
    """Polls are an hour apart, so without the webhook the batch would not end within this test."""
    stack, plan = library.stack, library.stack.simulator.plan
    port = free_port()
    stack.configure(batch_poll_interval="1 h")
    plan.webhook_url, plan.webhook_secret = f"http://127.0.0.1:{port}/webhooks/openai", SECRET
    assets = await library.upload(60)
    async with worker(stack, webhook=f"127.0.0.1:{port}", openai_webhook_secret=SECRET):
        await library.finished(library.enqueue(assets))
    library.check_tags()
    assert library.sql("select count(*) as n from autotag.webhooks")[0]["n"] == 1


async def test_a_delivery_that_comes_before_its_batch_is_known_is_not_lost(library: Library) -> None:
    stack = library.stack
    stack.configure(batch_poll_interval="1 h")
    assets = await library.upload(60)
    library.sql("select autotag.receive_webhook('wh_early', 'batch.completed', 'batch_early')")
    library.enqueue(assets)
    library.sql("update autotag.provider_limits set next_poll_at = now() + interval '1 h'")
    name = "00000000-0000-4000-8000-000000000001"
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", name)
    [batch] = library.claim_batches(name, 1)["batches"]
    library.sql("update autotag.batches set state = 'creating'")
    library.sql("select autotag.batch_submitted(%s, %s, %s, 'batch_early', 'validating', 'file-1')",
                name, batch["batch"], batch["attempt"])  # fmt: skip
    [look] = library.claim_batches(name, 1)["poll"]
    assert look["id"] == "batch_early"


@pytest.mark.parametrize("which", ["http", "webhook"])
async def test_an_address_that_is_taken_is_said(library: Library, which: str) -> None:
    port = free_port()
    async with serve(Starlette(), "127.0.0.1", port):
        addresses = {"webhook": f"127.0.0.1:{free_port()}", which: f"127.0.0.1:{port}"}
        settings = worker_settings(library.stack, openai_webhook_secret=SECRET, **addresses)
        with pytest.raises(OSError, match=f"cannot serve on 127.0.0.1:{port}: Address already in use"):
            await Worker(settings, Wake()).run()


def test_a_flood_of_deliveries_and_probes_is_ignored(library: Library) -> None:
    [told] = library.sql("select count(*) filter (where r = 'unknown') as stored, count(*) filter (where r = 'ignored') as ignored"
                         " from generate_series(1, 700) n, autotag.receive_webhook('wh_' || n, 'batch.completed', 'batch_x') r")  # fmt: skip
    assert told == {"stored": 600, "ignored": 100}
    assert library.sql("select count(*) as n from autotag.webhooks") == [{"n": 600}]
    library.sql("create table public.sent (topic text)")
    library.sql("create or replace function autotag.broadcast(p_topic text, p_event text, p_payload jsonb, p_private boolean)"
                " returns void language sql as $$ insert into public.sent values (p_topic) $$")  # fmt: skip
    library.sql("select autotag.send_test_broadcast(gen_random_uuid()) from generate_series(1, 100)")
    assert library.sql("select count(*) as n from public.sent")[0]["n"] <= 5
