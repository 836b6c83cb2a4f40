"""Follows the Realtime topics that browsers follow (``autotag watch``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from realtime import AsyncRealtimeClient, RealtimeSubscribeStates

from autotag.redact import safe_message

JOIN_TIMEOUT = 10.0  # seconds to connect and join all topics
PUBLIC_TOPIC = "batch-updates"
EVENTS = ("job-progress", "batch-complete", "job-complete")

#: Gets the topic, the event and the payload of a message.
OnMessage = Callable[[str, str, dict[str, Any]], None]


class CannotFollow(Exception):
    """A topic cannot be joined. The message is a sentence that says why and what to do."""


async def follow(supabase_url: str, key: str, workspace: str | None, on_message: OnMessage) -> None:
    """Passes every message to ``on_message`` until cancelled.

    Args:
        supabase_url: the project's URL.
        key: the project's secret key, or a member's token. Without a workspace the publishable key suffices.
        workspace: follow this workspace's private topic too.
        on_message: called for every message.

    Raises:
        CannotFollow: the server refused a topic or did not answer within `JOIN_TIMEOUT`.
    """
    topics = [PUBLIC_TOPIC] + ([f"tagging:{workspace}"] if workspace else [])
    client = AsyncRealtimeClient(f"{supabase_url}/realtime/v1", key)
    refused: list[str] = []
    try:
        async with asyncio.timeout(JOIN_TIMEOUT):
            await client.connect()
            for topic in topics:
                if not await _join(client, topic, on_message):
                    refused.append(topic)
    except TimeoutError:
        raise CannotFollow(
            f"Realtime did not answer within {JOIN_TIMEOUT:g} s; check SUPABASE_URL and SUPABASE_SECRET_KEY."
        ) from None
    except Exception as error:  # noqa: BLE001
        # The client passes on every exception of its websocket library. Some contain the URL, which contains the key.
        raise CannotFollow(f"Realtime cannot be reached ({safe_message(error)}); check SUPABASE_URL.") from None
    try:
        if refused:
            raise CannotFollow(
                f"Realtime refused the topic {refused[0]}; set SUPABASE_SECRET_KEY to the project's secret key."
            )
        await asyncio.Event().wait()
    finally:
        await client.close()


async def _join(client: AsyncRealtimeClient, topic: str, on_message: OnMessage) -> bool:
    """Joins a topic; False: the server refused."""
    answered = asyncio.Event()
    joined = False

    def on_state(state: RealtimeSubscribeStates, error: Exception | None = None) -> None:
        nonlocal joined
        joined = state == RealtimeSubscribeStates.SUBSCRIBED
        answered.set()

    channel = client.channel(topic, {"config": {"private": topic != PUBLIC_TOPIC}})  # type: ignore[arg-type]
    for event in EVENTS:
        channel.on_broadcast(event, lambda message, event=event: on_message(topic, event, read_payload(message)))  # type: ignore[misc]
    await channel.subscribe(on_state)
    await answered.wait()
    return joined


def read_payload(message: Any) -> dict[str, Any]:
    """The payload of a broadcast. Any client can send any value to a public topic, so none raises here."""
    payload = message.get("payload") if isinstance(message, dict) else message
    return dict(payload) if isinstance(payload, dict) else {"payload": payload}
