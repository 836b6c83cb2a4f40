"""OpenAI's webhook: verified, and handed to the database, which has the workers look at OpenAI at once.

Whatever a delivery says about a batch is not believed: it only makes the next look come sooner.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import openai
import structlog
from openai import AsyncOpenAI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)  # of an event's type, or a batch's id
BODY_MOST = 65_536  # bytes; OpenAI's deliveries have a few hundred

log = structlog.get_logger(__name__)

#: Takes a delivery's id, its event's type and the batch it names; what came of it (`Database.receive_webhook`).
Receive = Callable[[str, str, str], Awaitable[str]]


def make_route(client: AsyncOpenAI, secret: str, receive: Receive) -> Route:
    """``POST /webhooks/openai``.

    Answers 204 to what is accepted, replayed, unknown or of another kind (OpenAI stops repeating it), 400 to
    what is not signed with the secret or not of the last five minutes, 413 to what is too large.
    """

    async def deliver(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_MOST:
                return _refuse(413, "too_large", "The body is larger than any delivery of OpenAI's.")
        try:
            event = client.webhooks.unwrap(bytes(body), request.headers, secret=secret)
            kind, batch = _name(event.type), _name(getattr(event.data, "id", None))
        except openai.InvalidWebhookSignatureError as error:
            log.warning("webhook_refused", reason=str(error))
            return _refuse(400, "bad_signature", str(error))
        except (ValueError, KeyError, TypeError, AttributeError):
            # A header that is missing, a body that is no text, or signed text that is no event.
            log.warning("webhook_refused", reason="not a delivery of OpenAI's")
            return _refuse(400, "bad_request", "This is no delivery of OpenAI's.")
        result = await receive(request.headers["webhook-id"], kind, batch)
        log.info("webhook", event_type=kind, openai_batch=batch, result=result)
        return Response(status_code=204)

    return Route("/webhooks/openai", deliver, methods=["POST"])


def _name(value: object) -> str:
    """The SDK reads an event without looking at its types; what is no name names nothing."""
    return value if isinstance(value, str) and NAME.fullmatch(value) else ""


def _refuse(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, status)
