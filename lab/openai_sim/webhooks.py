"""The simulator's webhooks: signed as in Standard Webhooks, and sent again until the receiver accepts them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time

import httpx

MAX_TRIES = 3
RETRY_DELAY = 0.2  # seconds; OpenAI retries for up to 72 hours


def make_secret() -> str:
    """A signing secret in OpenAI's form."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()


def batch_event(status: str, batch_id: str) -> bytes:
    """The body of the event for a batch that has ended."""
    event = {
        "object": "event", "id": f"evt_{secrets.token_hex(12)}", "type": f"batch.{status}",
        "created_at": int(time.time()), "data": {"id": batch_id},
    }  # fmt: skip
    return json.dumps(event).encode()


def sign(secret: str, body: bytes, *, webhook_id: str | None = None, at: float | None = None) -> dict[str, str]:
    """The headers of a delivery; ``at`` is the timestamp that they claim (epoch seconds, default now)."""
    webhook_id = webhook_id or f"wh_{secrets.token_hex(12)}"
    timestamp = str(int(time.time() if at is None else at))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mac = hmac.new(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "content-type": "application/json", "webhook-id": webhook_id, "webhook-timestamp": timestamp,
        "webhook-signature": "v1," + base64.b64encode(mac).decode(),
    }  # fmt: skip


async def deliver(url: str, secret: str, body: bytes) -> None:
    """Sends an event until the receiver accepts it or `MAX_TRIES` is reached."""
    headers = sign(secret, body)
    async with httpx.AsyncClient(timeout=5) as client:
        for _ in range(MAX_TRIES):
            try:
                if (await client.post(url, content=body, headers=headers)).is_success:
                    return
            except httpx.HTTPError:
                pass  # the receiver is not reachable; try again
            await asyncio.sleep(RETRY_DELAY)
