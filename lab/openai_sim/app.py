"""The simulator's HTTP interface: chat completions, models and files. `batches` has the batches."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lab.openai_sim.answers import PromptCache, complete, draw_reasoning_tokens, log_fields
from lab.openai_sim.batches import Batches
from lab.openai_sim.completion_request import CompletionRequest, digest, find_model, first_image, parse_request
from lab.openai_sim.faults import AnswerVariant, Fault, Faults
from lab.openai_sim.limits import Limits
from lab.openai_sim.models import MODELS, find
from lab.openai_sim.plan import Plan
from lab.openai_sim.protocol import ApiError, check_expiry, missing_endpoint, page, read_json
from lab.openai_sim.vision import BadPicture, Picture, recognise

__all__ = ["Plan", "Simulator"]

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


@dataclass
class Simulator:
    """One simulated provider and its request log."""

    plan: Plan
    faults: Faults = field(default_factory=Faults)
    #: One entry for each request and each line of a batch: {at, method, path, status}; completions also have {model,
    #: effort, cap, tier, format, picture, tags, tokens, usage, dollars, done}, failures {error}. `at` and `done` are
    #: epoch seconds.
    request_log: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    rng: random.Random = field(init=False)
    limits: Limits = field(init=False)
    batches: Batches = field(init=False)
    prompt_cache: PromptCache = field(default_factory=PromptCache, init=False)
    in_flight: int = field(default=0, init=False)  # single calls
    max_in_flight: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        self.rng = random.Random(plan.seed)
        self.limits = Limits.of(
            plan.requests_per_minute, plan.tokens_per_minute, plan.requests_per_day, plan.speed, plan.request_headers
        )
        self.batches = Batches(self)

    def app(self) -> Starlette:
        """The application."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await self.batches.close()

        routes = [
            Route("/v1/chat/completions", self._answer(self._chat), methods=["POST"]),
            Route("/v1/models", self._answer(self._models)),
            Route("/v1/models/{model:path}", self._answer(self._model)),
            Route("/v1/files", self._answer(self._create_file), methods=["POST"]),
            Route("/v1/files", self._answer(self._list_files)),
            Route("/v1/files/{file}", self._answer(self._file)),
            Route("/v1/files/{file}", self._answer(self._delete_file), methods=["DELETE"]),
            Route("/v1/files/{file}/content", self._answer(self._content)),
            Route("/v1/batches", self._answer(self.batches.create), methods=["POST"]),
            Route("/v1/batches", self._answer(self.batches.list_newest)),
            Route("/v1/batches/{batch}", self._answer(self.batches.retrieve)),
            Route("/v1/batches/{batch}/cancel", self._answer(self.batches.cancel), methods=["POST"]),
            Route("/{path:path}", self._unknown_path, methods=METHODS),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    def _answer(self, handler: Any) -> Any:
        async def answer(request: Request) -> Response:
            entry = self._log_request(request)
            try:
                if not self._has_endpoint(request.url.path):
                    raise missing_endpoint()
                if request.headers.get("authorization") != f"Bearer {self.plan.key}":
                    raise ApiError(401, "invalid_api_key", "Incorrect API key provided.")
                fault = None
                if not request.url.path.endswith("/completions"):
                    fault = await self._apply_fault(request)
                response = cast("Response", await handler(request))
                if fault and fault.after:
                    raise _ConnectionCut
                if fault and fault.slow:
                    response = _SlowResponse(response, fault.slow)
            except ApiError as error:
                response = error.response()
                entry["error"] = error.summary()
            except _ConnectionCut:
                entry["status"] = 0
                return _CutResponse()
            entry["status"] = response.status_code
            if not self.plan.rate_headers:
                for name in [name for name in response.headers if name.startswith("x-ratelimit-")]:
                    del response.headers[name]
            return response

        return answer

    def _log_request(self, request: Request) -> dict[str, Any]:
        """Adds a request to the request log."""
        entry: dict[str, Any] = {
            "at": time.time(), "method": request.method, "path": request.url.path, "status": None,
        }  # fmt: skip
        request.state.entry = entry
        self.request_log.append(entry)
        return entry

    def _has_endpoint(self, path: str) -> bool:
        """Whether the simulated server has this endpoint."""
        if path.startswith(("/v1/files", "/v1/batches")):
            return self.plan.batch_api
        return self.plan.models_endpoint or not path.startswith("/v1/models")

    async def _unknown_path(self, request: Request) -> Response:
        """Answers a path without an endpoint, which a base URL without /v1 leads to."""
        text = "404 page not found"
        self._log_request(request).update(status=404, error=text)
        return PlainTextResponse(text, 404)

    async def _apply_fault(self, request: Request, tags: tuple[str, ...] = ()) -> Fault | None:
        """Applies the configured fault, if any, and returns it when the answer itself has to differ.

        Raises:
            ApiError: the fault is an error status.
            _ConnectionCut: the fault cuts the connection before the request takes effect.
        """
        fault = self.faults.take(f"{request.method} {request.url.path}", tags)
        if fault is None:
            return None
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.cut and not fault.after:
            raise _ConnectionCut
        error = fault.error()
        if error:
            raise error
        return fault

    # -- chat completions

    async def _chat(self, request: Request) -> Response:
        body = await read_json(request)
        entry = request.state.entry
        entry |= {"model": body.get("model"), "picture": digest(body)}
        parsed = parse_request(body, self.plan)
        # Like OpenAI, check the limits before anything else: a request refused for another reason still counts.
        headers, wait, limit = self.limits.take(parsed.metered) if not self.faults.waiting else ({}, 0.0, "")
        if wait:
            raise ApiError(
                429, "rate_limit_exceeded",
                f"Rate limit reached for {body['model']} on {limit}. Please try again in {wait:.3f}s.", headers,
            )  # fmt: skip
        picture = await self.read_picture(body)
        tags = picture.tags if picture else ()
        entry["tags"] = tags
        fault = await self._apply_fault(request, tags)
        if not headers:
            headers = self.limits.take(parsed.metered)[0]
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.rng.uniform(*self.plan.latency))
            await self.plan.until_answers()
        finally:
            self.in_flight -= 1
            entry["done"] = time.time()
        answer = self.answer(parsed, picture, entry["picture"], fault.answer if fault else None)
        entry |= log_fields(parsed, answer)
        if fault and fault.after:
            raise _ConnectionCut
        return JSONResponse(answer, headers=headers)

    def count_tokens(self, body: dict[str, Any], *, batch: bool = False) -> int:
        """The tokens that the limits count for a request at admission.

        Raises:
            ApiError: the API would refuse the request.
        """
        return parse_request(body, self.plan, batch=batch).metered

    async def read_picture(self, body: dict[str, Any]) -> Picture | None:
        """The content of a request's picture; None when the request has no picture.

        Raises:
            ApiError: 400 when the picture cannot be decoded.
        """
        url = first_image(body)
        try:
            return await asyncio.to_thread(recognise, url) if url else None
        except BadPicture as error:
            raise ApiError(400, "invalid_image", str(error)) from None

    def answer(
        self, request: CompletionRequest, picture: Picture | None, picture_digest: str, variant: AnswerVariant | None
    ) -> dict[str, Any]:
        """The completion for a checked request."""
        if picture and self.plan.tags:
            picture = replace(picture, tags=self.plan.tags(picture.tags))
        reasoning = draw_reasoning_tokens(request.effort, picture_digest, self.plan)
        return complete(request, picture, reasoning=reasoning, cache=self.prompt_cache, variant=variant)

    # -- models and files

    async def _models(self, _: Request) -> Response:
        names = self.plan.models
        if names is None:
            names = frozenset(name for model in MODELS.values() for name in (model.name, model.dated))
        return JSONResponse({"object": "list", "data": [_describe_model(name) for name in sorted(names)]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        find_model(name, self.plan)
        return JSONResponse(_describe_model(name))

    async def _create_file(self, request: Request) -> Response:
        name, data = "", b""
        async with request.form(max_part_size=250_000_000) as form:
            upload, purpose = form.get("file"), form.get("purpose")
            if not isinstance(upload, UploadFile) or purpose != "batch":
                raise ApiError(400, "invalid_request_error", "A file and the purpose 'batch' are required.")
            check_expiry(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"), self.plan.min_expires)
            data = await upload.read()
            name = upload.filename or ""
        if len(data) > 200_000_000:
            raise ApiError(413, "file_too_large", "Files with the purpose 'batch' can have at most 200 MB.")
        return JSONResponse(self.store_file(name, data, "batch"))

    def store_file(self, name: str, data: bytes, purpose: str) -> dict[str, Any]:
        """Stores a file and returns OpenAI's description of it."""
        described: dict[str, Any] = {
            "id": f"file-{secrets.token_hex(12)}", "object": "file", "bytes": len(data), "purpose": purpose,
            "created_at": int(time.time()), "filename": name, "status": "processed",
        }  # fmt: skip
        self.files[described["id"]] = described
        self.contents[described["id"]] = data
        return described

    async def _list_files(self, request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        return page(request, [f for f in reversed(self.files.values()) if purpose in (None, f["purpose"])], 10_000)

    def _find_file(self, request: Request) -> str:
        name = str(request.path_params["file"])
        if name not in self.files:
            raise ApiError(404, "not_found", f"No such File object: {name}")
        return name

    async def _file(self, request: Request) -> Response:
        return JSONResponse(self.files[self._find_file(request)])

    async def _delete_file(self, request: Request) -> Response:
        name = self._find_file(request)
        del self.files[name]
        del self.contents[name]
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    async def _content(self, request: Request) -> Response:
        return Response(self.contents[self._find_file(request)], media_type="application/octet-stream")


class _ConnectionCut(Exception):
    """A fault cuts the connection."""


class _CutResponse(Response):
    """Breaks the connection off in the middle of the body."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})  # the rest is never sent


class _SlowResponse(Response):
    """Sends a response body in 20 parts over a number of seconds."""

    def __init__(self, response: Response, seconds: float) -> None:
        super().__init__(response.body, response.status_code, response.headers)
        self._seconds = seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        step = max(1, len(self.body) // 20)
        for start in range(0, len(self.body), step):
            await asyncio.sleep(self._seconds / 20)
            await send({"type": "http.response.body", "body": self.body[start : start + step], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _describe_model(name: str) -> dict[str, Any]:
    model = find(name)
    return {
        "id": name, "object": "model", "created": 1_700_000_000, "owned_by": "system",
        "shutdown_date": model.shutdown_date if model else None,
    }  # fmt: skip
