"""Sends broadcasts from the outbox through Realtime's HTTP endpoint.

Needed only where ``realtime.send`` does not exist. Supabase projects have it, so their outbox is always empty.
"""

from __future__ import annotations

import httpx
import structlog

from autotag.db import Database
from autotag.observability.metrics import DELIVERED
from autotag.redact import safe_message

MAX_MESSAGES = 100  # per request; Realtime refuses more

log = structlog.get_logger(__name__)


async def deliver_outbox(db: Database, supabase_url: str | None, key: str | None) -> None:
    """Sends the messages in ``autotag.outbox``, each at most once, like Realtime itself."""
    if not supabase_url or not key:
        return
    async with httpx.AsyncClient(timeout=10) as client:
        while messages := await db.take_outbox(MAX_MESSAGES):
            try:
                response = await client.post(
                    f"{supabase_url}/realtime/v1/api/broadcast",
                    headers={"apikey": key, "Authorization": f"Bearer {key}"},
                    json={"messages": messages},
                )
                response.raise_for_status()
                DELIVERED.labels("delivered").inc(len(messages))
            except httpx.HTTPError as error:
                DELIVERED.labels("lost").inc(len(messages))
                log.error("broadcast_lost", messages=len(messages), error=safe_message(error))
                return
