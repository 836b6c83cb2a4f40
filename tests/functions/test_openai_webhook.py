"""The edge function openai-webhook, run by Deno: verifies, and forwards by the RPC."""

from __future__ import annotations

import base64

import httpx
import pytest
from deno import endless, served

from autotag.config import _is_webhook_secret
from lab.openai_sim.webhooks import batch_event, make_secret, sign
from support import Library, worker

SECRET = make_secret()


async def test_a_project_whose_worker_has_no_address_is_told_at_once(library: Library) -> None:
    """OpenAI delivers to the function: polls are an hour apart, and the batch finishes all the same."""
    stack, plan = library.stack, library.stack.simulator.plan
    stack.configure(batch_poll_interval="1 h")
    assets = await library.upload(60)
    async with served("openai-webhook", stack, OPENAI_WEBHOOK_SECRET=SECRET) as url, worker(stack):
        plan.webhook_url, plan.webhook_secret = url, SECRET
        await library.finished(library.enqueue(assets))
    library.check_tags()
    assert library.sql("select count(*) as n from autotag.webhooks")[0]["n"] == 1


async def test_what_is_not_genuine_does_not_reach_the_database(library: Library) -> None:
    stack = library.stack
    body = batch_event("completed", "batch_1")
    async with served("openai-webhook", stack, OPENAI_WEBHOOK_SECRET=SECRET) as url, httpx.AsyncClient() as client:

        async def post(content: bytes, headers: dict[str, str]) -> int:
            answer = await client.post(url, content=content, headers=headers)
            if answer.status_code != 204:
                assert answer.json()["error"]["message"]
            return answer.status_code

        assert await post(body, sign(make_secret(), body)) == 400
        assert await post(body.replace(b"batch_1", b"batch_2"), sign(SECRET, body)) == 400
        assert await post(body, sign(SECRET, body, at=1_000_000_000)) == 400
        assert await post(body, {}) == 400
        assert await post(b"x" * 70_000, sign(SECRET, b"x")) == 413
        assert (await endless(url, sign(SECRET, b"x"), 4_000_000))[0] == 413
        assert (await client.get(url)).status_code == 405
        assert library.sql("select * from autotag.webhooks") == []
        other = b'{"object": "event", "id": "evt_1", "type": "response.completed", "data": {"id": "resp_1"}}'
        assert await post(other, sign(SECRET, other)) == 204
        assert library.sql("select * from autotag.webhooks") == []
        once = sign(SECRET, body, webhook_id="wh_1")
        assert [await post(body, once), await post(body, once)] == [204, 204]
        assert library.sql("select id, openai_batch_id from autotag.webhooks") == [
            {"id": "wh_1", "openai_batch_id": "batch_1"}
        ]


@pytest.mark.parametrize(
    ("secret", "code"),
    [("", "no_secret"), ("whsec_", "bad_secret"), ("x", "bad_secret"), (base64.b64encode(b"x" * 32).decode(), "bad_secret"),
     ("whsec_" + base64.b64encode(b"x" * 15).decode(), "bad_secret"), ("whsec_***", "bad_secret")],
)  # fmt: skip
async def test_without_a_secret_that_nobody_guesses_it_says_so(library: Library, secret: str, code: str) -> None:
    """The worker refuses the same ones."""
    assert not _is_webhook_secret(secret)
    body = batch_event("completed", "batch_1")
    async with (
        served("openai-webhook", library.stack, OPENAI_WEBHOOK_SECRET=secret) as url,
        httpx.AsyncClient() as client,
    ):
        answer = await client.post(url, content=body, headers=sign(SECRET, body))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, code)
    assert library.sql("select * from autotag.webhooks") == []
