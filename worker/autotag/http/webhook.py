"""OpenAI's webhook: verifies deliveries and passes them to the database, which triggers a poll at once.

A delivery is only a hint: its contents are not used, but the next poll starts at once.
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

MAX_ID_LENGTH = 200  # characters of a delivery's id; the limit of autotag.webhooks

log = structlog.get_logger(__name__)

#: Takes a delivery's id, event type and batch id; returns the result (`Database.receive_webhook`).
Receive = Callable[[str, str, str], Awaitable[str]]


def make_app(provider: Provider, secret: str, receive: Receive) -> Starlette:
    """The application: ``POST /webhooks/openai``.

    It returns 204 to verified deliveries, also to replays, unknown batches and other events, so that OpenAI does not
    repeat them; and 400 if the signature is wrong or the timestamp is more than five minutes off. The port refuses
    bodies that are too large.
    """

    async def deliver(request: Request) -> Response:
        try:
            delivery = provider.verify_webhook(await request.body(), request.headers, secret)
            _check(delivery)
        except BadSignature as error:
            log.warning("webhook_refused", reason=str(error), noisy=True)
            return _refuse("bad_signature", str(error))
        except ValueError:
            log.warning("webhook_refused", reason="not a delivery of OpenAI", noisy=True)
            return _refuse("bad_request", "This is not a delivery of OpenAI.")
        try:
            result = await receive(delivery.id, delivery.kind, delivery.batch)
        except Refused as refused:
            log.warning("webhook_refused", reason=str(refused), noisy=True)
            return _refuse("bad_request", str(refused))
        log.info("webhook_received", event_type=delivery.kind, openai_batch=delivery.batch, result=result)
        return Response(status_code=204)

    app = Starlette(routes=[Route("/webhooks/openai", deliver, methods=["POST"])])
    app.router.redirect_slashes = False  # redirects would contain the client's Host header, which is not trusted
    return app


def _check(delivery: Delivery) -> None:
    """Checks that the database will accept a delivery.

    Raises:
        ValueError: the id is too long, or an event of a batch has no batch id.
    """
    if len(delivery.id) > MAX_ID_LENGTH or (delivery.kind.startswith("batch.") and not delivery.batch):
        raise ValueError


def _refuse(code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, 400)
