"""The simulator's HTTP interface: chat completions, models, files; batches are in `batches`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from autotag.tokens import image_tokens
from autotag_local.openai_sim.answers import TEXT_TOKENS, ApiError, check_expiry, complete, digest, page, read_json
from autotag_local.openai_sim.batches import Batches
from autotag_local.openai_sim.faults import Fault, Faults
from autotag_local.openai_sim.limits import Limits
from autotag_local.openai_sim.vision import BadPicture, Picture, look, measure
from autotag_local.openai_sim.webhooks import make_secret

MODELS = ("gpt-4.1-mini", "gpt-4.1-nano", "gpt-4o-mini", "gpt-4o", "gpt-4.1")


@dataclass
class Plan:
    """How the simulator behaves; the defaults are tier 1 with quick answers."""

    key: str = "sk-local"
    requests_per_minute: int = 500
    tokens_per_minute: int = 200_000
    requests_per_day: int | None = 10_000
    queued_batch_tokens: int = 2_000_000
    latency: tuple[float, float] = (0.05, 0.3)  # seconds, uniform
    batch_latency: tuple[float, float] = (2.0, 4.0)  # seconds from creation to completion, uniform
    seed: int = 1
    speed: float = 1.0  # how much faster than real the limits' minutes pass (latencies are as they are given)
    webhook_url: str | None = None  # who is told of the end of a batch …
    webhook_secret: str = field(default_factory=make_secret)  # … signed with this


@dataclass
class Simulator:
    """One provider with its book."""

    plan: Plan
    faults: Faults = field(default_factory=Faults)
    #: every request: {at, method, path, status, tokens, picture, tags, done}; moments in epoch seconds
    book: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.plan.seed)
        plan = self.plan
        self.limits = Limits.of(plan.requests_per_minute, plan.tokens_per_minute, plan.requests_per_day, plan.speed)
        self.batches = Batches(self)
        self.in_flight = 0
        self.most_in_flight = 0

    def app(self) -> Starlette:
        """The application."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await self.batches.close()

        routes = [
            Route("/v1/chat/completions", self._answer(self._chat), methods=["POST"]),
            Route("/v1/models", self._answer(self._models)),
            Route("/v1/models/{model}", self._answer(self._model)),
            Route("/v1/files", self._answer(self._create_file), methods=["POST"]),
            Route("/v1/files", self._answer(self._list_files)),
            Route("/v1/files/{file}", self._answer(self._file)),
            Route("/v1/files/{file}", self._answer(self._delete_file), methods=["DELETE"]),
            Route("/v1/files/{file}/content", self._answer(self._content)),
            Route("/v1/batches", self._answer(self.batches.create), methods=["POST"]),
            Route("/v1/batches", self._answer(self.batches.list_newest)),
            Route("/v1/batches/{batch}", self._answer(self.batches.retrieve)),
            Route("/v1/batches/{batch}/cancel", self._answer(self.batches.cancel), methods=["POST"]),
            Route("/sim/faults", self._add_fault, methods=["POST"]),
            Route("/sim/faults", self._clear_faults, methods=["DELETE"]),
            Route("/sim/book", self._show_book),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    def _answer(self, handler: Any) -> Any:
        async def answer(request: Request) -> Response:
            path = request.url.path
            entry: dict[str, Any] = {"at": time.time(), "method": request.method, "path": path, "status": None}
            request.state.entry = entry
            self.book.append(entry)
            try:
                if request.headers.get("authorization") != f"Bearer {self.plan.key}":
                    raise ApiError(401, "invalid_api_key", "Incorrect API key provided.")
                fault = None
                if not request.url.path.endswith("/completions"):
                    fault = await self._meet_fault(request)
                response = cast("Response", await handler(request))
                if fault and fault.after:
                    raise _Cut
                if fault and fault.slow:
                    response = _Slow(response, fault.slow)
            except ApiError as error:
                response = JSONResponse(error.body, error.status, error.headers)
            except _Cut:
                entry["status"] = 0
                return _CutConnection()
            entry["status"] = response.status_code
            return response

        return answer

    async def _meet_fault(self, request: Request, tags: tuple[str, ...] = ()) -> Fault | None:
        """Applies the fault ordered for this request; returns it when the request is to be answered wrongly."""
        fault = self.faults.take(f"{request.method} {request.url.path}", tags)
        if fault is None:
            return None
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.cut and not fault.after:
            raise _Cut
        if fault.status is not None:
            error = ApiError(fault.status, fault.code, fault.message, fault.headers)
            if fault.body is not None:
                error.body = fault.body
            raise error
        return fault

    # -- chat completions

    async def _chat(self, request: Request) -> Response:
        body = await read_json(request)
        tokens = self.count(body)
        entry = request.state.entry
        # What is over a limit is refused on arrival; a request that is refused for another reason has used it up.
        headers, wait, which = self.limits.take(tokens) if not self.faults.waiting else ({}, 0.0, "")
        if wait:
            entry["picture"] = digest(body)
            raise ApiError(
                429, "rate_limit_exceeded",
                f"Rate limit reached for {body['model']} on {which}. Please try again in {wait:.3f}s.", headers,
            )  # fmt: skip
        picture = await self.see(body)
        entry |= {"picture": digest(body), "tags": picture.tags}
        fault = await self._meet_fault(request, picture.tags)
        if not headers:
            headers = self.limits.take(tokens)[0]
        entry["tokens"] = tokens
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.random.uniform(*self.plan.latency))
        finally:
            self.in_flight -= 1
            entry["done"] = time.time()
        answer = complete(body, picture, fault.answer if fault else None)
        entry["usage"] = answer["usage"]
        if fault and fault.after:
            raise _Cut
        return JSONResponse(answer, headers=headers)

    def count(self, body: dict[str, Any]) -> int:
        """Checks a request as the API does, but for its picture's content; the tokens it counts for.

        Raises:
            ApiError: 400 or 404.
        """
        if body.get("model") not in MODELS:
            raise ApiError(404, "model_not_found", f"The model `{body.get('model')}` does not exist.")
        schema = (body.get("response_format") or {}).get("json_schema") or {}
        if not schema.get("strict") or schema.get("schema", {}).get("additionalProperties") is not False:
            raise ApiError(400, "invalid_request_error", "response_format must be a strict JSON schema.")
        try:
            image = _image(body)
            width, height = measure(image["url"])
            most = int(body["max_completion_tokens"])
        except BadPicture as error:
            raise ApiError(400, "invalid_image", str(error)) from None
        except (KeyError, StopIteration, TypeError, ValueError):
            raise ApiError(400, "invalid_request_error", "The request is malformed.") from None
        return image_tokens(body["model"], image.get("detail", "high"), width, height) + TEXT_TOKENS + most

    async def see(self, body: dict[str, Any]) -> Picture:
        """What is in the picture of a request that `count` has checked.

        Raises:
            ApiError: 400 when the picture is broken after all.
        """
        try:
            return await asyncio.to_thread(look, _image(body)["url"])
        except BadPicture as error:
            raise ApiError(400, "invalid_image", str(error)) from None

    # -- models and files

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_describe_model(name) for name in MODELS]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in MODELS:
            raise ApiError(404, "model_not_found", f"The model '{name}' does not exist")
        return JSONResponse(_describe_model(name))

    async def _create_file(self, request: Request) -> Response:
        name, data = "", b""
        async with request.form(max_part_size=250_000_000) as form:
            upload, purpose = form.get("file"), form.get("purpose")
            if not isinstance(upload, UploadFile) or purpose != "batch":
                raise ApiError(400, "invalid_request_error", "A file and the purpose 'batch' are needed.")
            check_expiry(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))
            data = await upload.read()
            name = upload.filename or ""
        if len(data) > 200_000_000:
            raise ApiError(413, "file_too_large", "Files of purpose batch hold at most 200 MB.")
        return JSONResponse(self.store_file(name, data, "batch"))

    def store_file(self, name: str, data: bytes, purpose: str) -> dict[str, Any]:
        """Keeps a file; its description."""
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

    def _known_file(self, request: Request) -> str:
        name = str(request.path_params["file"])
        if name not in self.files:
            raise ApiError(404, "not_found", f"No such File object: {name}")
        return name

    async def _file(self, request: Request) -> Response:
        return JSONResponse(self.files[self._known_file(request)])

    async def _delete_file(self, request: Request) -> Response:
        name = self._known_file(request)
        del self.files[name]
        del self.contents[name]
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    async def _content(self, request: Request) -> Response:
        return Response(self.contents[self._known_file(request)], media_type="application/octet-stream")

    # -- for tests in other processes

    async def _add_fault(self, request: Request) -> Response:
        try:
            self.faults.add(Fault.model_validate(await request.json()))
        except (ValidationError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({})

    async def _clear_faults(self, _: Request) -> Response:
        self.faults.clear()
        return JSONResponse({})

    async def _show_book(self, _: Request) -> Response:
        return JSONResponse({"requests": self.book, "batches": self.batches.describe_all()})


def _image(body: dict[str, Any]) -> dict[str, Any]:
    """The picture that a request asks about."""
    parts = next(m["content"] for m in body["messages"] if m["role"] == "user")
    found: dict[str, Any] = next(p["image_url"] for p in parts if p["type"] == "image_url")
    return found


class _Cut(Exception):
    pass


class _CutConnection(Response):
    """Ends the connection in the middle of an answer."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})  # which never comes


class _Slow(Response):
    """Spreads an answer's body over some seconds."""

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
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "system"}
