"""What the simulator answers: model answers about a picture, and errors in OpenAI's form."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from autotag.tokens import image_tokens
from autotag_local.openai_sim.vision import Picture

TEXT_TOKENS = 200  # what the instructions and the schema count as


class ApiError(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": {"message": message, "type": code, "param": None, "code": code}}


async def read_json(request: Request) -> dict[str, Any]:
    """The body of a request.

    Raises:
        ApiError: 400 when it is no JSON object.
    """
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request_error", "We could not parse the JSON body of your request.")
    return body


def page(request: Request, newest_first: list[dict[str, Any]], most: int) -> JSONResponse:
    """A page of a list, by ``limit`` (1 to ``most``) and ``after`` (the last id of the page before)."""
    limit = max(1, min(int(request.query_params.get("limit", 20 if most == 100 else most)), most))
    after = request.query_params.get("after")
    if after:
        ids = [item["id"] for item in newest_first]
        newest_first = newest_first[ids.index(after) + 1 :] if after in ids else []
    data = newest_first[:limit]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, "has_more": len(newest_first) > limit, **ends})


def check_expiry(anchor: object, seconds: object) -> None:
    """Checks when a file is to expire, if that was asked.

    Raises:
        ApiError: 400 when it is not between an hour and 30 days after its creation.
    """
    if anchor is None and seconds is None:
        return
    if anchor != "created_at" or not str(seconds).isdigit() or not 3600 <= int(str(seconds)) <= 2_592_000:
        raise ApiError(400, "invalid_request_error", "expires_after is wrong.")


def digest(body: dict[str, Any]) -> str:
    """A short name for the picture in a request, the same for the same bytes."""
    for message in body.get("messages", []):
        for part in message.get("content") if isinstance(message.get("content"), list) else []:
            if part.get("type") == "image_url":
                return hashlib.sha256(part["image_url"]["url"].encode()).hexdigest()[:16]
    return ""


def complete(body: dict[str, Any], picture: Picture, wrong: str | None = None) -> dict[str, Any]:
    """A chat completion about a picture; ``wrong`` names a way to be of no use (see `Fault.answer`)."""
    answer: Any = {
        "caption": f"A {picture.tags[4]} picture, {', '.join(picture.tags[:4])}.",
        "tags": [{"tag": tag.title(), "confidence": round(0.99 - 0.05 * i, 2)} for i, tag in enumerate(picture.tags)],
    }
    if wrong == "bad_schema":
        answer = {"labels": list(picture.tags)}
    elif wrong == "no_tags":
        answer["tags"] = []
    content: str | None = "I see a picture." if wrong == "no_json" else json.dumps(answer)
    refusal, finish = None, "stop"
    if wrong == "refusal":
        content, refusal = None, "I'm sorry, I can't help with that."
    elif wrong == "length":
        content, finish = (content or "")[:20], "length"
    elif wrong == "content_filter":
        content, finish = None, "content_filter"
    detail = next(
        part["image_url"].get("detail", "high")
        for message in body["messages"] if message["role"] == "user"
        for part in message["content"] if part["type"] == "image_url"
    )  # fmt: skip
    prompt = TEXT_TOKENS + image_tokens(body["model"], detail, picture.width, picture.height)
    output = min(math.ceil(len(content or refusal or "") / 4) + 1, int(body["max_completion_tokens"]))
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion", "created": int(time.time()),
        "model": f"{body['model']}-2025-04-14",
        "choices": [{
            "index": 0, "finish_reason": finish, "logprobs": None,
            "message": {"role": "assistant", "content": content, "refusal": refusal, "annotations": []},
        }],
        "usage": {
            "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        },
    }  # fmt: skip
