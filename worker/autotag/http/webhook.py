"""OpenAI's webhook: verified, and handed to the database, which has the workers look at OpenAI at once.

Whatever a delivery says about a batch is not believed: it only makes the next look come sooner.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import openai
import structlog
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from autotag.db import Refused

NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)  # of an event's type, or a batch's id

ID_MOST = 200  # characters of a delivery's id (autotag.webhooks)

log = structlog.get_logger(__name__)

#: Takes a delivery's id, its event's type and the batch it names; what came of it (`Database.receive_webhook`).
Receive = Callable[[str, str, str], Awaitable[str]]


def make_app(client: AsyncOpenAI, secret: str, receive: Receive) -> Starlette:
    """The application: ``POST /webhooks/openai``.

    Answers 204 to what is accepted, replayed, unknown or of another kind (OpenAI stops repeating it), 400 to
    what is not signed with the secret or not of the last five minutes. The port refuses what is too large.
    """

    async def deliver(request: Request) -> Response:
        try:
            event = client.webhooks.unwrap(await request.body(), request.headers, secret=secret)
            kind, batch = _name(event.type), _name(getattr(event.data, "id", None))
            _check(request.headers["webhook-id"], kind, batch)
        except openai.InvalidWebhookSignatureError as error:
            log.warning("webhook_refused", reason=str(error), noisy=True)
            return _refuse("bad_signature", str(error))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # A header that is missing or too long, a body that is no text, or signed text that is no event.
            log.warning("webhook_refused", reason="not a delivery of OpenAI's", noisy=True)
            return _refuse("bad_request", "This is no delivery of OpenAI's.")
        try:
            result = await receive(request.headers["webhook-id"], kind, batch)
        except Refused as refused:
            log.warning("webhook_refused", reason=str(refused), noisy=True)
            return _refuse("bad_request", str(refused))
        log.info("webhook", event_type=kind, openai_batch=batch, result=result)
        return Response(status_code=204)

    app = Starlette(routes=[Route("/webhooks/openai", deliver, methods=["POST"])])
    app.router.redirect_slashes = False  # it builds a URL from the client's Host header, whatever that holds
    return app


def _check(delivery: str, kind: str, batch: str) -> None:
    """Whether the database would take a delivery.

    Raises:
        ValueError: its id is too long, or it is of a batch and names none.
    """
    if len(delivery) > ID_MOST or (kind.startswith("batch.") and not batch):
        raise ValueError


def _name(value: object) -> str:
    """The SDK reads an event without looking at its types; what is no name names nothing."""
    return value if isinstance(value, str) and NAME.fullmatch(value) else ""


def _refuse(code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, 400)
