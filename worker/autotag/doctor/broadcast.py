"""Checks for ``autotag doctor`` that a broadcast of the database arrives at a Realtime client."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress

from realtime import AsyncRealtimeClient, BroadcastPayload, RealtimeSubscribeStates

from autotag import db
from autotag.config import DoctorSettings
from autotag.doctor.findings import Finding
from autotag.operate.follow import PRIVATE_ONLY, read_payload
from autotag.redact import redact
from autotag.texts import printable, read_json

CHECK = "broadcast"
TIMEOUT = 10.0  # seconds; the first join after a quiet period can take a second
#: Seconds between two probes. Realtime answers the first join of a project before it reads the project's messages, so
#: the first probes after a quiet time are lost. (autotag.send_test_broadcast takes five a second.)
PROBE_INTERVAL = 0.5
MAX_REASON = 200  # characters
SETTINGS = "Enable Realtime for the project (Realtime settings in the dashboard)."


async def check(settings: DoctorSettings, database: db.Operator) -> Finding:
    """Sends broadcasts from the database until one arrives."""
    key = settings.secret_key()
    if not settings.supabase_url or not key:
        return Finding(CHECK, "warning", "Not tried: SUPABASE_URL and SUPABASE_SECRET_KEY are not set.", "Set both.")
    client = AsyncRealtimeClient(f"{settings.supabase_url}/realtime/v1", key, auto_reconnect=False)
    joined: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    try:
        async with asyncio.timeout(TIMEOUT):
            await client.connect()
            return await _probe(client, database, joined)
    except TimeoutError:
        if joined.done():
            return Finding(CHECK, "error", f"No broadcast from the database arrived within {TIMEOUT:g} s.", SETTINGS)
        return Finding(CHECK, "error", f"Realtime did not let the doctor join a topic within {TIMEOUT:g} s.", SETTINGS)
    except Exception as error:  # noqa: BLE001
        # The client raises every exception of its websocket library. Each of them becomes the finding.
        return _unreachable(error)
    finally:
        with suppress(Exception):
            await client.close()


async def _probe(
    client: AsyncRealtimeClient, database: db.Operator, joined: asyncio.Future[Exception | None]
) -> Finding:
    sent: dict[str, float] = {}  # nonce -> time.monotonic()
    arrived: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def on_message(message: BroadcastPayload) -> None:
        nonce = read_payload(message).get("nonce")
        if isinstance(nonce, str) and nonce in sent and not arrived.done():
            arrived.set_result(time.monotonic() - sent[nonce])

    def on_state(state: RealtimeSubscribeStates, error: Exception | None = None) -> None:
        if not joined.done():
            joined.set_result(None if state == RealtimeSubscribeStates.SUBSCRIBED else error or Exception(str(state)))

    channel = client.channel("autotag-doctor").on_broadcast("probe", on_message)
    await channel.subscribe(on_state)
    if refusal := await joined:
        return _refused(refusal)
    while not arrived.done():
        nonce = str(uuid.uuid4())
        sent[nonce] = time.monotonic()
        await database.send_test_broadcast(nonce)
        await asyncio.wait([arrived], timeout=PROBE_INTERVAL)
    return Finding(CHECK, "ok", f"A broadcast from the database arrived after {await arrived * 1000:.0f} ms.")


def _refused(refusal: Exception) -> Finding:
    """The finding if Realtime refused the topic. Its answer is JSON with a reason."""
    reason = str(refusal)
    with suppress(ValueError, TypeError, KeyError):
        reason = str(read_json(reason)["reason"])
    if PRIVATE_ONLY in reason:
        return Finding(
            CHECK, "skipped",
            "Not tried: this project allows private topics only (Realtime settings). Clients listen to their"
            " workspace's topic; the public batch-updates reaches nobody.",
            "Watch an upload in your app, which listens to its workspace's topic.",
        )  # fmt: skip
    return Finding(CHECK, "error", f"Realtime refused a topic: {printable(redact(reason), MAX_REASON)}.", SETTINGS)


def _unreachable(error: Exception) -> Finding:
    """The finding for a failed connection: the server refused it, or did not answer. Pages of HTML are not shown."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return Finding(CHECK, "error", f"Realtime refused the key ({status}).",
                       "Set SUPABASE_SECRET_KEY to the project's secret key (Project Settings, API Keys).")  # fmt: skip
    if status is not None:
        return Finding(
            CHECK, "error", f"Realtime answered with an error ({status}).",
            "Check SUPABASE_URL and whether the project is paused, then run autotag doctor again.",
        )  # fmt: skip
    return Finding(CHECK, "error", f"Realtime cannot be reached: {type(error).__name__}.", "Check SUPABASE_URL.")
