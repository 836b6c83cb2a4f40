"""Follows the Realtime topics that browsers follow (``autotag watch``).

The client's own reconnecting is off, because it silently gives up after five tries. `follow` makes a new client for
each connection and continues until it is cancelled.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from realtime import AsyncRealtimeClient, RealtimeSubscribeStates

from autotag.redact import redact, safe_message
from autotag.texts import printable, read_json

JOIN_TIMEOUT = 10.0  # seconds to connect and join all topics
FIRST_DELAY, MAX_DELAY = 0.2, 30.0  # seconds before the first try to reconnect, and the longest wait between two
CHECK_INTERVAL = 0.1  # seconds between two looks at the connection
MAX_REASON = 200  # characters
PUBLIC_TOPIC = "batch-updates"
EVENTS = ("job-progress", "batch-complete", "job-complete")
#: Beginnings of refusals that are final, so that no further try helps (supabase/realtime: its page of error codes).
FINAL = ("Unauthorized", "InvalidJWT", "MalformedJWT", "JwtSignatureError")
#: Part of the refusal of a public topic if "Allow public access" is off in Realtime's settings.
PRIVATE_ONLY = "only allows private channels"

#: Called with the topic, the event and the payload of a message.
OnMessage = Callable[[str, str, dict[str, Any]], None]
#: Called with the event of the connection, and the seconds since the connection was lost.
OnConnection = Callable[[Literal["lost", "back"], float], None]


class CannotFollow(Exception):
    """A topic cannot be followed. The message is a sentence that says why and what to do."""


class _Refused(Exception):
    """Realtime refused a topic."""

    def __init__(self, topic: str, reason: str) -> None:
        super().__init__(f"Realtime refused the topic {topic} ({printable(redact(reason), MAX_REASON)})")
        self.topic = topic
        self.private_only = PRIVATE_ONLY in reason
        self.final = self.private_only or reason.startswith(FINAL)


async def follow(
    supabase_url: str, key: str, workspace: str | None, on_message: OnMessage,
    on_connection: OnConnection = lambda what, seconds: None,
) -> None:  # fmt: skip
    """Passes every message to ``on_message`` until it is cancelled, and reconnects whenever the connection is lost.

    Realtime keeps no messages, so those that were sent while the connection was lost never arrive.

    Args:
        supabase_url: the project's URL.
        key: the project's secret key, or a member's token. Without a workspace the publishable key suffices.
        workspace: follow this workspace's private topic too.
        on_message: called for every message.
        on_connection: called when the connection was lost, and when it is back.

    Raises:
        CannotFollow: the server refused a topic, or did not answer the first connection.
    """
    topics = [PUBLIC_TOPIC] + ([f"tagging:{workspace}"] if workspace else [])
    lost: float | None = None  # time.monotonic(), while there is no connection
    began, delay = False, FIRST_DELAY
    while True:
        try:
            async with _connected(f"{supabase_url}/realtime/v1", key, topics, on_message) as ended:
                if lost is not None:
                    on_connection("back", time.monotonic() - lost)
                began, lost, delay = True, None, FIRST_DELAY
                await asyncio.wait([ended])
            ended.result()  # raises the exception of on_message
        except _Refused as refused:
            if refused.private_only and refused.topic == PUBLIC_TOPIC and workspace:
                topics.remove(PUBLIC_TOPIC)  # the project has no public topics
                continue
            if refused.final or not began:
                raise CannotFollow(_explain(refused, has_begun=began)) from None
        except _Unreachable as error:
            if error.final or not began:
                raise CannotFollow(str(error)) from None
        if lost is None:
            lost = time.monotonic()
            on_connection("lost", 0.0)
        await pause(delay * random.uniform(0.8, 1.0))
        delay = min(delay * 2, MAX_DELAY)


async def pause(seconds: float) -> None:
    """Waits before a try to reconnect; tests replace it."""
    await asyncio.sleep(seconds)


class _Unreachable(Exception):
    """There is no connection. The message is a sentence."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def _explain(refused: _Refused, *, has_begun: bool) -> str:
    if refused.private_only:
        return (
            "This project allows private topics only (Realtime settings), so there is no public topic to follow; name a"
            " workspace: autotag watch --workspace <id>."
        )
    ended = " Its token has ended." if has_begun else ""
    return f"{refused}.{ended} Set SUPABASE_SECRET_KEY to the project's secret key."


@asynccontextmanager
async def _connected(
    url: str, key: str, topics: list[str], on_message: OnMessage
) -> AsyncIterator[asyncio.Future[None]]:
    """A connection that has joined all topics. The future is done when it is lost or a topic was closed.

    Raises:
        _Refused: a topic was refused.
        _Unreachable: there is no connection.
    """
    client = AsyncRealtimeClient(url, key, auto_reconnect=False)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        try:
            async with asyncio.timeout(JOIN_TIMEOUT):
                await client.connect()
                for topic in topics:
                    await _join(client, topic, on_message, ended)
        except TimeoutError:
            raise _Unreachable(
                f"Realtime did not answer within {JOIN_TIMEOUT:g} s; check SUPABASE_URL and SUPABASE_SECRET_KEY."
            ) from None
        except _Refused:
            raise
        except Exception as error:  # noqa: BLE001
            # The client raises every exception of its websocket library. Some contain the URL, which includes the key.
            raise _unreachable(error) from None
        watching = asyncio.create_task(_watch(client, ended))
        try:
            yield ended
        finally:
            watching.cancel()
    finally:
        with suppress(Exception):
            await client.close()


async def _watch(client: AsyncRealtimeClient, ended: asyncio.Future[None]) -> None:
    """Ends `ended` when the connection is lost, because the client does not notify its channels of every loss."""
    while client.is_connected and not ended.done():  # noqa: ASYNC110
        await asyncio.sleep(CHECK_INTERVAL)
    if not ended.done():
        ended.set_result(None)


def _unreachable(error: Exception) -> _Unreachable:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return _Unreachable(f"Realtime refuses the key or token ({status}): it is wrong or has expired.", final=True)
    return _Unreachable(f"Realtime cannot be reached ({safe_message(error)}); check SUPABASE_URL.")


async def _join(client: AsyncRealtimeClient, topic: str, on_message: OnMessage, ended: asyncio.Future[None]) -> None:
    """Joins a topic.

    Raises:
        _Refused: the server refused, or the connection ended.
    """
    answered: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()  # a refusal's reason

    def on_state(state: RealtimeSubscribeStates, error: Exception | None = None) -> None:
        if not answered.done():
            answered.set_result(None if state == RealtimeSubscribeStates.SUBSCRIBED else _reason(error or state))
        elif state != RealtimeSubscribeStates.SUBSCRIBED and not ended.done():
            ended.set_result(None)

    def pass_on(event: str, message: Any) -> None:
        try:
            on_message(topic, event, read_payload(message))
        except Exception as error:  # noqa: BLE001 - in the client's loop, it would silently end the connection
            if not ended.done():
                ended.set_exception(error)

    channel = client.channel(topic, {"config": {"private": topic != PUBLIC_TOPIC}})  # type: ignore[arg-type]
    for event in EVENTS:
        channel.on_broadcast(event, lambda message, event=event: pass_on(event, message))  # type: ignore[misc]
    await channel.subscribe(on_state)
    if reason := await answered:
        raise _Refused(topic, reason)


def _reason(answer: object) -> str:
    """The reason in Realtime's answer to a join, which is JSON."""
    with suppress(ValueError, TypeError, KeyError):
        return str(read_json(str(answer))["reason"])
    return str(answer) or "no reason"


def read_payload(message: Any) -> dict[str, Any]:
    """The payload of a broadcast. Any client can send any value to a public topic, so none raises here."""
    payload = message.get("payload") if isinstance(message, dict) else message
    return dict(payload) if isinstance(payload, dict) else {"payload": payload}
