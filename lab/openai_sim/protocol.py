"""Shared by all endpoints: errors, JSON bodies, pages of lists, and the expiry of files."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

MAX_EXPIRY = 2_592_000  # seconds: 30 days
MAX_ERROR = 200  # characters of an error in the request log


class ApiError(Exception):
    """An error response, in OpenAI's form unless ``body`` is replaced."""

    def __init__(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None,
        *, kind: str | None = None, param: str | None = None,
    ) -> None:  # fmt: skip
        """``kind`` is the error's ``type``; the default is the code."""
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body: Any = {"error": {"message": message, "type": kind or code, "param": param, "code": code}}

    def response(self) -> Response:
        """The HTTP response. A text body is sent as HTML, as proxies do."""
        if isinstance(self.body, str):
            return Response(self.body, self.status, self.headers, "text/html")
        return JSONResponse(self.body, self.status, self.headers)

    def summary(self) -> str:
        """The error's code, or its message when it has no code."""
        error = self.body.get("error", self.body) if isinstance(self.body, dict) else self.body
        if isinstance(error, dict):
            error = error.get("code") or error.get("message") or error.get("detail") or error
        return str(error)[:MAX_ERROR]


def invalid(code: str | None, param: str | None, message: str) -> ApiError:
    """A 400 for one parameter of a request."""
    return ApiError(400, code, message, kind="invalid_request_error", param=param)


def missing_endpoint() -> ApiError:
    """The response of a compatible server that does not have this endpoint."""
    error = ApiError(404, "not_found", "Not Found")
    error.body = {"detail": "Not Found"}
    return error


async def read_json(request: Request) -> dict[str, Any]:
    """The body of a request.

    Raises:
        ApiError: 400 when the body is not a JSON object.
    """
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request_error", "We could not parse the JSON body of your request.")
    return body


def page(request: Request, newest_first: list[dict[str, Any]], max_limit: int) -> JSONResponse:
    """A page of a list, by ``limit`` (1 to ``max_limit``) and ``after`` (the last id of the previous page)."""
    limit = max(1, min(int(request.query_params.get("limit", 20 if max_limit == 100 else max_limit)), max_limit))
    after = request.query_params.get("after")
    if after:
        ids = [item["id"] for item in newest_first]
        newest_first = newest_first[ids.index(after) + 1 :] if after in ids else []
    data = newest_first[:limit]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, "has_more": len(newest_first) > limit, **ends})


def check_expiry(anchor: object, seconds: object, min_seconds: int) -> None:
    """Checks the expiry that a request sets for a file, if any.

    Raises:
        ApiError: 400 when it is not between ``min_seconds`` and 30 days after the file's creation.
    """
    if anchor is None and seconds is None:
        return
    if anchor != "created_at":
        raise invalid("invalid_value", "expires_after.anchor", "expires_after.anchor must be 'created_at'.")
    if not str(seconds).isdigit() or not min_seconds <= int(str(seconds)) <= MAX_EXPIRY:
        raise invalid(
            "invalid_value", "expires_after.seconds",
            f"expires_after.seconds must be between {min_seconds} and {MAX_EXPIRY}.",
        )  # fmt: skip
