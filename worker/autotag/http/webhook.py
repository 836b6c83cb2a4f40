"""OpenAI's webhook: verified, and handed to the database, which has the workers look at OpenAI at once.

Whatever a delivery says about a batch is not believed: it only makes the next look come sooner.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from autotag.db import Refused
from autotag.openai.provider import BadSignature, Provider
from autotag.openai.records import Delivery

MAX_ID_LENGTH = 200  # characters of a delivery's id (autotag.webhooks)

log = structlog.get_logger(__name__)

#: Takes a delivery's id, its event's type and the batch it names; what came of it (`Database.receive_webhook`).
Receive = Callable[[str, str, str], Awaitable[str]]


def make_app(provider: Provider, secret: str, receive: Receive) -> Starlette:
    """The application: ``POST /webhooks/openai``.

    Answers 204 to what is accepted, replayed, unknown or of another kind (OpenAI stops repeating it), 400 to
    what is not signed with the secret or not of the last five minutes. The port refuses what is too large.
    """

    async def deliver(request: Request) -> Response:
        try:
            delivery = provider.verify_webhook(await request.body(), request.headers, secret)
            _check(delivery)
        except BadSignature as error:
            log.warning("webhook_refused", reason=str(error), noisy=True)
            return _refuse("bad_signature", str(error))
        except ValueError:
            log.warning("webhook_refused", reason="not a delivery of OpenAI's", noisy=True)
            return _refuse("bad_request", "This is no delivery of OpenAI's.")
        try:
            result = await receive(delivery.id, delivery.kind, delivery.batch)
        except Refused as refused:
            log.warning("webhook_refused", reason=str(refused), noisy=True)
            return _refuse("bad_request", str(refused))
        log.info("webhook", event_type=delivery.kind, openai_batch=delivery.batch, result=result)
        return Response(status_code=204)

    app = Starlette(routes=[Route("/webhooks/openai", deliver, methods=["POST"])])
    app.router.redirect_slashes = False  # it builds a URL from the client's Host header, whatever that holds
    return app


def _check(delivery: Delivery) -> None:
    """Whether the database would take a delivery.

    Raises:
        ValueError: its id is too long, or it is of a batch and names none.
    """
    if len(delivery.id) > MAX_ID_LENGTH or (delivery.kind.startswith("batch.") and not delivery.batch):
        raise ValueError


def _refuse(code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, 400)
