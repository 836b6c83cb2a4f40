"""Delivers broadcasts that could not leave the database, through Realtime's HTTP endpoint.

On a Supabase project ``realtime.send`` exists and nothing comes this way.
"""

from __future__ import annotations

import httpx
import structlog

from autotag.db import Database
from autotag.observability.metrics import DELIVERED
from autotag.redact import safe_message

MESSAGES = 100  # Realtime refuses more in one request

log = structlog.get_logger(__name__)


async def deliver_outbox(db: Database, supabase_url: str | None, key: str | None) -> None:
    """Sends what waits in ``autotag.outbox``. Realtime delivers at most once, and so does this."""
    if not supabase_url or not key:
        return
    async with httpx.AsyncClient(timeout=10) as client:
        while messages := await db.take_outbox(MESSAGES):
            try:
                answer = await client.post(
                    f"{supabase_url}/realtime/v1/api/broadcast",
                    headers={"apikey": key, "Authorization": f"Bearer {key}"},
                    json={"messages": messages},
                )
                answer.raise_for_status()
                DELIVERED.labels("delivered").inc(len(messages))
            except httpx.HTTPError as error:
                DELIVERED.labels("lost").inc(len(messages))
                log.error("broadcast_lost", messages=len(messages), error=safe_message(error))
                return
