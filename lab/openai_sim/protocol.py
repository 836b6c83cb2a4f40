"""What all of OpenAI's endpoints share: errors, JSON bodies, pages, and the expiry of files."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

LONGEST_EXPIRY = 2_592_000  # seconds: 30 days
ERROR_LENGTH = 200  # characters of an error that the book keeps


class ApiError(Exception):
    """An error answer; in OpenAI's form unless its ``body`` is replaced."""

    def __init__(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None,
        *, kind: str | None = None, param: str | None = None,
    ) -> None:  # fmt: skip
        """``kind`` is the error's ``type``: the code, unless it is given."""
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body: Any = {"error": {"message": message, "type": kind or code, "param": param, "code": code}}

    def response(self) -> Response:
        """The HTTP answer: a text body is a page of HTML, as proxies send it."""
        if isinstance(self.body, str):
            return Response(self.body, self.status, self.headers, "text/html")
        return JSONResponse(self.body, self.status, self.headers)

    def summary(self) -> str:
        """The error's code, or its message where it has no code."""
        error = self.body.get("error", self.body) if isinstance(self.body, dict) else self.body
        if isinstance(error, dict):
            error = error.get("code") or error.get("message") or error.get("detail") or error
        return str(error)[:ERROR_LENGTH]


def invalid(code: str | None, param: str | None, message: str) -> ApiError:
    """A 400 about one parameter of a request."""
    return ApiError(400, code, message, kind="invalid_request_error", param=param)


def not_offered() -> ApiError:
    """What a compatible server says at an endpoint that it does not have."""
    error = ApiError(404, "not_found", "Not Found")
    error.body = {"detail": "Not Found"}
    return error


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


def check_expiry(anchor: object, seconds: object, shortest: int) -> None:
    """Checks when a file is to expire, if that was asked.

    Raises:
        ApiError: 400 when it is not between ``shortest`` seconds and 30 days after its creation.
    """
    if anchor is None and seconds is None:
        return
    if anchor != "created_at":
        raise invalid("invalid_value", "expires_after.anchor", "expires_after.anchor must be 'created_at'.")
    if not str(seconds).isdigit() or not shortest <= int(str(seconds)) <= LONGEST_EXPIRY:
        raise invalid(
            "invalid_value", "expires_after.seconds",
            f"expires_after.seconds must be between {shortest} and {LONGEST_EXPIRY}.",
        )  # fmt: skip
