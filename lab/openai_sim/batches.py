"""OpenAI Batches: validating → in_progress → finalizing → completed, or failed, expired, cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import time
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lab.openai_sim.answers import log_fields
from lab.openai_sim.completion_request import CompletionRequest, digest, no_credit, parse_request
from lab.openai_sim.faults import AnswerVariant, Faults
from lab.openai_sim.plan import Plan
from lab.openai_sim.protocol import ApiError, check_expiry, page, read_json
from lab.openai_sim.vision import Picture
from lab.openai_sim.webhooks import batch_event, deliver

MAX_LINES = 50_000
DAY = 86_400  # seconds: the completion window


class Provider(Protocol):
    """The parts of the simulator that the batches use."""

    plan: Plan
    faults: Faults
    rng: random.Random
    request_log: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    contents: dict[str, bytes]

    def count_tokens(self, body: dict[str, Any], *, batch: bool = False) -> int: ...

    async def read_picture(self, body: dict[str, Any]) -> Picture | None: ...

    def answer(
        self, request: CompletionRequest, picture: Picture | None, picture_digest: str, variant: AnswerVariant | None
    ) -> dict[str, Any]: ...

    def store_file(self, name: str, data: bytes, purpose: str) -> dict[str, Any]: ...


class Batches:
    """The batches of one organisation, oldest first."""

    def __init__(self, simulator: Provider) -> None:
        self._sim = simulator
        self._batches: dict[str, dict[str, Any]] = {}
        self._queued_tokens: dict[str, int] = {}
        #: ids of batches that the key can no longer see
        self.hidden: set[str] = set()
        self._running: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def describe_all(self) -> list[dict[str, Any]]:
        return list(self._batches.values())

    async def create(self, request: Request) -> Response:
        if not self._sim.plan.credit:
            raise no_credit()
        body = await read_json(request)
        if body.get("endpoint") != "/v1/chat/completions" or body.get("completion_window") != "24h":
            raise ApiError(400, "invalid_request_error", "Invalid endpoint or completion_window.")
        if body.get("input_file_id") not in self._sim.files:
            raise ApiError(
                400, "invalid_request_error",
                f"Cannot find file {body.get('input_file_id')}, or project does not have access to it.",
            )  # fmt: skip
        expiry = body.get("output_expires_after") or {}
        check_expiry(expiry.get("anchor"), expiry.get("seconds"), self._sim.plan.min_expires)
        metadata = body.get("metadata") or {}
        if len(metadata) > 16 or any(len(k) > 64 or len(str(v)) > 512 for k, v in metadata.items()):
            raise ApiError(400, "invalid_request_error", "metadata is too large.")
        batch: dict[str, Any] = {
            "id": f"batch_{secrets.token_hex(12)}", "object": "batch", "endpoint": body["endpoint"], "errors": None,
            "input_file_id": body["input_file_id"], "completion_window": "24h", "status": "validating",
            "output_file_id": None, "error_file_id": None, "created_at": int(time.time()),
            "expires_at": int(time.time()) + DAY, "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
        }  # fmt: skip
        self._batches[batch["id"]] = batch
        task = asyncio.create_task(self._run(batch))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return JSONResponse(batch)

    async def list_newest(self, request: Request) -> Response:
        return page(request, [b for b in reversed(self._batches.values()) if b["id"] not in self.hidden], 100)

    def _find(self, request: Request) -> dict[str, Any]:
        batch = self._batches.get(request.path_params["batch"])
        if batch is None or batch["id"] in self.hidden:
            raise ApiError(404, "not_found", f"No batch found with id '{request.path_params['batch']}'.")
        return batch

    async def retrieve(self, request: Request) -> Response:
        return JSONResponse(self._find(request))

    async def cancel(self, request: Request) -> Response:
        batch = self._find(request)
        if batch["status"] in ("validating", "in_progress", "finalizing"):
            batch["status"] = "cancelling"
        return JSONResponse(batch)

    async def _run(self, batch: dict[str, Any]) -> None:
        """Processes a batch, then sends the webhook."""
        await self._process(batch)
        plan = self._sim.plan
        if plan.webhook_url:
            await deliver(plan.webhook_url, plan.webhook_secret, batch_event(batch["status"], batch["id"]))

    async def _process(self, batch: dict[str, Any]) -> None:
        plan = self._sim.plan
        seconds = self._sim.rng.uniform(*plan.batch_latency)
        await asyncio.sleep(seconds * 0.1 if plan.batch_validation is None else plan.batch_validation)
        lines = await self._validate(batch)
        if lines is None:
            batch["status"] = "failed"
            return
        batch["request_counts"]["total"] = len(lines)
        if batch["status"] == "validating":
            batch["status"] = "in_progress"
        fault = self._sim.faults.take("RUN")
        last = len(lines) if not fault or fault.expire_at is None else int(fault.expire_at * len(lines))
        started = time.monotonic()
        output: list[str] = []
        errors: list[str] = []
        for i, line in enumerate(lines):
            if batch["status"] == "cancelling" or i >= last:
                break
            await plan.until_answers()
            succeeded, answer = await self._answer(batch, line)
            (output if succeeded else errors).append(json.dumps(answer))
            batch["request_counts"]["completed" if succeeded else "failed"] += 1
            # Spread the lines evenly over the batch's duration, however long each one takes to process.
            await asyncio.sleep(max(0.0, started + seconds * 0.8 * (i + 1) / len(lines) - time.monotonic()))
        cancelled = batch["status"] == "cancelling"
        if cancelled and plan.batch_may_end:
            await plan.batch_may_end.wait()
        if not cancelled:
            batch["status"] = "finalizing"
            await asyncio.sleep(seconds * 0.1)
        # OpenAI does not keep the order of the input.
        self._sim.rng.shuffle(output)
        for key, rows in (("output_file_id", output), ("error_file_id", errors)):
            if rows:
                mangled = self._sim.faults.take("OUTPUT") if key == "output_file_id" else None
                data = mangle(rows, mangled.mangle if mangled else None)
                self._mark_delivered(batch["id"], data)
                batch[key] = self._sim.store_file(f"{batch['id']}_{key}.jsonl", data, "batch_output")["id"]
        batch["status"] = "cancelled" if cancelled else "completed" if last == len(lines) else "expired"
        self._queued_tokens.pop(batch["id"], None)

    def _mark_delivered(self, batch_id: str, data: bytes) -> None:
        """Marks the log entries whose answers can be read from an output or error file."""
        readable = set()
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                if entry["response"]["status_code"] == 200:
                    readable.add(entry["custom_id"])
            except (ValueError, KeyError, TypeError):
                continue
        for entry in self._sim.request_log:
            if entry.get("batch") == batch_id:
                entry["delivered"] = entry.get("delivered", False) or entry["custom_id"] in readable

    async def _validate(self, batch: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The lines of the input file. When the file is invalid, sets the batch's errors and returns None."""

        def refuse(code: str, message: str) -> list[dict[str, Any]] | None:
            batch["errors"] = {
                "object": "list", "data": [{"code": code, "message": message, "param": None, "line": None}]
            }  # fmt: skip
            return None

        try:
            data = self._sim.contents[batch["input_file_id"]]
            lines, tokens = await asyncio.to_thread(self._read, data)
            ids = [line["custom_id"] for line in lines]
        except (ValueError, KeyError, TypeError):
            return refuse("invalid_json_line", "A line of the input file is not valid.")
        if not lines or len(lines) > MAX_LINES:
            return refuse("invalid_request", "The input file must contain between 1 and 50,000 requests.")
        if len(set(ids)) < len(ids):
            return refuse("duplicate_custom_id", "The input file contains a custom_id more than once.")
        fault = self._sim.faults.take("VALIDATE")
        if fault:
            return refuse(fault.code, fault.message)
        if sum(self._queued_tokens.values()) + tokens > self._sim.plan.queued_batch_tokens:
            return refuse("token_limit_exceeded", "Enqueued token limit reached. Please try again once batches end.")
        self._queued_tokens[batch["id"]] = tokens
        return lines

    def _read(self, data: bytes) -> tuple[list[dict[str, Any]], int]:
        """The lines of an input file and the tokens that they queue. Lines that will be refused queue none.

        Raises:
            KeyError, TypeError, ValueError: a line is not a request.
        """
        lines, tokens = [], 0
        for text in filter(None, data.splitlines()):
            line = json.loads(text)
            if not isinstance(line["body"], dict) or not isinstance(line["url"], str):
                raise TypeError
            lines.append(line)
            with contextlib.suppress(ApiError):
                tokens += self._sim.count_tokens(line["body"], batch=True)
        return lines, tokens

    async def _answer(self, batch: dict[str, Any], line: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Whether a line succeeded, and its line in the output or error file."""
        request, picture_digest = line["body"], digest(line["body"])
        entry = {
            "at": time.time(), "method": "BATCH", "path": line["url"], "picture": picture_digest, "status": None,
            "model": request.get("model"), "batch": batch["id"], "custom_id": line["custom_id"],
        }  # fmt: skip
        self._sim.request_log.append(entry)
        request_id = secrets.token_hex(16)
        try:
            parsed = parse_request(request, self._sim.plan, batch=True)
            picture = await self._sim.read_picture(request)
            entry["tags"] = picture.tags if picture else ()
            fault = self._sim.faults.take("BATCH /v1/chat/completions", entry["tags"])
            refusal = fault.error() if fault else None
            if refusal:
                raise refusal
            status, body = 200, self._sim.answer(parsed, picture, picture_digest, fault.answer if fault else None)
            entry |= log_fields(parsed, body, batch=True)
        except ApiError as error:
            status, body = error.status, error.body
            entry["error"] = error.summary()
        entry["status"] = status
        answer = {
            "id": f"batch_req_{request_id}", "custom_id": line["custom_id"], "error": None,
            "response": {"status_code": status, "request_id": request_id, "body": body},
        }  # fmt: skip
        return status == 200, answer


def mangle(rows: list[str], kind: str | None) -> bytes:
    """An output file of these lines; ``kind`` breaks it in a way that real providers have broken theirs."""
    first = json.loads(rows[0])
    match kind:
        case "duplicate":
            rows = [*rows, *rows[:3]]
        case "unknown":
            rows = [json.dumps(first | {"custom_id": name}) for name in ("999999999999", "x", "-1", "")] + rows
        case "missing":
            rows = rows[2:]
        case "status_0":
            rows[0] = json.dumps(first | {"response": {"status_code": 0, "request_id": "", "body": None}})
        case "error_only":
            error = {"code": "batch_expired", "message": "This request could not be executed before it expired."}
            rows[0] = json.dumps(first | {"response": None, "error": error})
        case "garbage":
            rows = ["{", "null", "[]", '"x"', "\u0000", *rows]
    data = "\n".join(rows).encode() + b"\n"
    return data[: len(data) * 2 // 3] if kind == "truncate" else data
