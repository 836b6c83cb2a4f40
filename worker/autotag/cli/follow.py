"""A workspace's Realtime topics in the terminal (``autotag watch``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from realtime import AsyncRealtimeClient, RealtimeSubscribeStates

from autotag.redact import said

JOIN_TIMEOUT = 10.0  # seconds
EVENTS = ("job-progress", "batch-complete", "job-complete")


class CannotFollow(Exception):
    """Realtime cannot be joined; the message says why and what to do."""


async def follow(
    supabase_url: str, key: str, workspace: str | None, told: Callable[[str, str, dict[str, Any]], None]
) -> None:
    """Hands every message to ``told`` (topic, event, payload) until cancelled.

    Args:
        supabase_url: the project's address.
        key: its secret key, or a member's token; without a workspace the publishable key does.
        workspace: whose private topic is followed too.
        told: hears of every message.

    Raises:
        CannotFollow: the server refused or did not answer.
    """
    topics = ["batch-updates"] + ([f"tagging:{workspace}"] if workspace else [])
    client = AsyncRealtimeClient(f"{supabase_url}/realtime/v1", key)
    refused: list[str] = []
    try:
        async with asyncio.timeout(JOIN_TIMEOUT):
            await client.connect()
            for topic in topics:
                await _join(client, topic, told, refused)
    except TimeoutError:
        raise CannotFollow("Realtime did not answer; check SUPABASE_URL and the key.") from None
    except Exception as error:  # noqa: BLE001
        # The client raises whatever its websocket library does, some of it with the address, which has the key in it.
        raise CannotFollow(f"Realtime cannot be reached: {said(error)}; check SUPABASE_URL.") from None
    try:
        if refused:
            raise CannotFollow(f"{refused[0]} cannot be joined with this key; pass the project's secret key.")
        await asyncio.Event().wait()
    finally:
        await client.close()


async def _join(
    client: AsyncRealtimeClient, topic: str, told: Callable[[str, str, dict[str, Any]], None], refused: list[str]
) -> None:
    answered = asyncio.Event()

    def note(state: RealtimeSubscribeStates, error: Exception | None = None) -> None:
        if state != RealtimeSubscribeStates.SUBSCRIBED:
            refused.append(topic)
        answered.set()

    channel = client.channel(topic, {"config": {"private": topic != "batch-updates"}})  # type: ignore[arg-type]
    for event in EVENTS:
        channel.on_broadcast(event, lambda message, event=event: told(topic, event, read_payload(message)))  # type: ignore[misc]
    await channel.subscribe(note)
    await answered.wait()


def read_payload(message: Any) -> dict[str, Any]:
    """What a message carries. Anybody may send one of any form to a public topic, and none ends the command."""
    payload = message.get("payload") if isinstance(message, dict) else message
    return dict(payload) if isinstance(payload, dict) else {"payload": payload}
