"""`autotag watch` reconnects after every outage, however long, and reports what it has missed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from autotag.operate import follow as following
from autotag.operate.follow import CannotFollow, follow
from lab.stack import Member, Stack
from support import connected, soon

MORE_THAN_FIVE = 7  # tries: the client's own reconnecting ends after five


@dataclass
class Watch:
    """Everything that a watcher has received."""

    heard: list[str] = field(default_factory=list)  # "topic n"
    connection: list[str] = field(default_factory=list)

    def on_message(self, topic: str, event: str, payload: dict[str, Any]) -> None:
        self.heard.append(f"{topic.split(':')[0]} {payload['n']}")

    def on_connection(self, what: str, seconds: float) -> None:
        assert (seconds > 0) == (what == "back")
        self.connection.append(what)


@pytest.fixture
def member(stack: Stack) -> Member:
    return stack.add_member()


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces the delays before each try by short ones, and collects them."""
    delays: list[float] = []

    async def pause(seconds: float) -> None:
        delays.append(seconds)
        await asyncio.sleep(0.01)

    monkeypatch.setattr(following, "pause", pause)
    return delays


@contextlib.asynccontextmanager
async def watching(stack: Stack, key: str, workspace: str | None) -> AsyncIterator[tuple[Watch, asyncio.Task[None]]]:
    watch = Watch()
    task = asyncio.create_task(follow(stack.supabase_url, key, workspace, watch.on_message, watch.on_connection))
    try:
        yield watch, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def hears(stack: Stack, watch: Watch, topic: str, n: int) -> None:
    """Sends a message until it arrives, because a subscription takes a moment."""
    private = topic != following.PUBLIC_TOPIC

    def send() -> None:
        with connected(stack.database_url()) as connection:
            connection.execute(
                "select realtime.send(jsonb_build_object('n', %s::int), 'batch-complete', %s, %s)", (n, topic, private)
            )

    for _ in range(100):
        await asyncio.to_thread(send)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await soon(lambda: f"{topic.split(':')[0]} {n}" in watch.heard)
                return
    raise AssertionError(f"{topic}: message {n} never arrived; {watch}")


async def test_it_hears_again_after_more_tries_than_the_client_makes(
    stack: Stack, member: Member, tries: list[float]
) -> None:
    topic = f"tagging:{member.workspace}"
    async with watching(stack, stack.secret_key, member.workspace) as (watch, task):
        for outage in range(1, 3):
            await hears(stack, watch, following.PUBLIC_TOPIC, outage)
            await hears(stack, watch, topic, outage)
            before = len(tries)
            await stack.manners.go_down()
            await soon(lambda before=before: len(tries) > before + MORE_THAN_FIVE or task.done())  # type: ignore[misc]
            assert not task.done(), task
            assert tries[before] <= 1.0, "the first try is soon"
            assert tries[before + MORE_THAN_FIVE] > 20, "and the later ones are not a storm"
            assert max(tries) <= following.MAX_DELAY
            stack.manners.down = False
        await hears(stack, watch, topic, 9)
        assert watch.connection == ["lost", "back"] * 2


async def test_a_token_that_runs_out_ends_it_with_a_sentence(stack: Stack, member: Member, tries: list[float]) -> None:
    """No later try can succeed, so it ends with an error instead of receiving nothing."""
    token = stack.token(member.user, lifetime=2)
    async with watching(stack, token, member.workspace) as (watch, task):
        with pytest.raises(CannotFollow, match=r"[Tt]oken"):
            await asyncio.wait_for(task, 20)
        assert watch.connection in ([], ["lost"])


async def test_without_public_topics_it_follows_the_private_one(stack: Stack, member: Member) -> None:
    stack.manners.private_only = True
    async with watching(stack, stack.secret_key, member.workspace) as (watch, _):
        await hears(stack, watch, f"tagging:{member.workspace}", 1)
    with pytest.raises(CannotFollow, match="autotag watch --workspace"):
        await follow(stack.supabase_url, stack.secret_key, None, watch.on_message)


async def test_a_server_that_never_answered_is_told_at_once(stack: Stack, tries: list[float]) -> None:
    stack.manners.down = True
    with pytest.raises(CannotFollow, match="502") as caught:
        await follow(stack.supabase_url, stack.secret_key, None, lambda *_: None)
    assert "<" not in str(caught.value)
    assert tries == []
