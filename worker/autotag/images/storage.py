"""Reads files from Supabase Storage and classifies the errors.

Storage's "not found" has three causes: the file is missing, the bucket is missing, or the key has no access to them.
The first two are errors of the image. The third affects every image, so it must not fail any of them. They are
distinguished like this (supabase/storage: src/http/plugins/jwt.ts, src/http/routes/object/getObject.ts):

- ``/object/<bucket>/<path>`` treats an invalid key as an anonymous user, who gets "not found" for private buckets.
  ``/object/authenticated/…`` rejects an invalid key, so files are read from there.
- A publishable key is valid, but row level security hides the files from it: "not found" again. `key_role` reads the
  role from the key itself.
- ``GET /bucket`` must prove that the key works before "not found" fails an image. One key check is valid for all
  images of the next `KEY_CHECK_VALID` seconds.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx2
import structlog

from autotag.db.messages import Kind
from autotag.errors import TaggingError, image_error
from autotag.images.body import Response, read_up_to, receive
from autotag.images.files import MAX_SECONDS, Download, ImageFile
from autotag.openai.http import HTTP_ERRORS, make_http
from autotag.redact import redact
from autotag.texts import clean_text, printable, read_json
from autotag.waits import retry_after

FETCH_TIMEOUT = 30.0  # seconds
CONNECTIONS = 100  # to Storage
KEY_CHECK_VALID = 10.0  # seconds that the result of a key check is used for all missing files
FAILED_KEY_CHECK_VALID = 1.0  # seconds, if the key check failed with a transient error
MAX_WAIT = 120.0  # seconds; longer waits that Storage asks for are cut to this
MAX_LIST_BYTES = 10_000_000  # bytes of a list of buckets; one of 1,000 has 300,000
MAX_ERROR_BYTES = 100_000  # bytes of an error that are read; the status is enough to classify it
MAX_BUCKET_WARNINGS = 100  # buckets in warnings; the names come from rows, so there may be any number of them
MAX_REASON_LENGTH = 200  # characters of Storage's message that are kept

URL_TOO_LONG = 414  # HTTP status; also used if the address is not a URL
SECRET, PUBLISHABLE = "service_role", ("anon", "authenticated")  # roles; row level security applies to PUBLISHABLE
TRANSIENT_STATUSES = (408, 425, 429)  # besides 5xx
REFUSALS = ("AccessDenied", "InvalidJWT", "Unauthorized", "Invalid JWT")  # the last two: older releases of Storage
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
CHECK_KEY = "Check SUPABASE_SECRET_KEY (the project's secret key)."
CHECK_URL = "Check SUPABASE_URL."

log = structlog.get_logger(__name__)


class Storage:
    """Reads files of one project with one key."""

    def __init__(self, url: str, key: str, *, timeout: float = FETCH_TIMEOUT) -> None:
        """
        Args:
            url: the project's URL.
            key: the project's secret key.
            timeout: seconds to connect, and max seconds between two reads.
        """
        self._url = f"{url}/storage/v1"
        self._role = key_role(key)
        headers = {"apikey": key, "Authorization": f"Bearer {key}", "Accept-Encoding": "identity"}
        self._http = make_http(CONNECTIONS, timeout=timeout, headers=headers, follow_redirects=False)
        self._key_check = asyncio.Lock()
        self._buckets: frozenset[str] | TaggingError = frozenset()
        self._buckets_valid_until = 0.0  # time.monotonic()
        self._last_read: str | None = None  # URL path of the file that was read last
        self._warned_buckets: set[str] = set()

    async def __aenter__(self) -> Storage:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def read(self, bucket: str, path: str, download: Download) -> ImageFile:
        """Reads a file.

        Raises:
            TaggingError: ``image`` if the key works and the file or its bucket is missing, or if the file is too large;
                ``account`` if the key or the address is wrong; otherwise ``transient``.
        """
        location = f"/object/authenticated/{object_path(bucket, path)}"
        reply = await self.fetch(location, download)
        if isinstance(reply, ImageFile):
            self._last_read = location
            return reply
        raise await self._classify(bucket, reply)

    async def fetch(
        self, location: str, download: Download, *, wanted: Callable[[Response], bool] = lambda response: True
    ) -> ImageFile | Reply:
        """Requests a path of Storage's API; returns the body of a 200, otherwise the error reply.

        Args:
            location: the path.
            download: gets the body.
            wanted: whether to read the body of a 200; otherwise the reply has status 200.

        Raises:
            TaggingError: ``transient`` if there is no reply; ``image`` if the body is too large.
        """
        async with self._request(location, download.in_time()) as response:
            if response.status_code == 200 and wanted(response):
                return await receive(response, download)
            unread = response.status_code == 200
            return read_reply(response, b"" if unread else await read_up_to(response, MAX_ERROR_BYTES))

    async def buckets(self) -> frozenset[str]:
        """Lists the project's buckets, which proves that the key works. Cached for `KEY_CHECK_VALID` seconds.

        Raises:
            TaggingError: ``account`` if the key or the address is wrong; ``transient`` if Storage is unavailable.
        """
        async with self._key_check:
            if time.monotonic() >= self._buckets_valid_until:
                self._buckets = await self._check_key()
                failed = isinstance(self._buckets, TaggingError) and self._buckets.kind == "transient"
                self._buckets_valid_until = time.monotonic() + (FAILED_KEY_CHECK_VALID if failed else KEY_CHECK_VALID)
            buckets = self._buckets
        if isinstance(buckets, TaggingError):
            # A new exception each time, because many images raise it concurrently.
            raise _trouble(buckets.kind, buckets.code, buckets.message, retry_after=buckets.retry_after)
        return buckets

    async def _classify(self, bucket: str, reply: Reply) -> TaggingError:
        """Classifies the reply to a file request that failed: ``image``, ``account`` or ``transient``."""
        if general_error := _general_error(reply):
            return general_error
        try:
            buckets = await self.buckets()
        except TaggingError as error:
            return error
        if not buckets and self._role == SECRET:
            return _trouble("account", "storage_no_bucket", f"The project has no bucket at all. {CHECK_URL}")
        if reply.code == "NoSuchBucket" and bucket not in buckets:
            self._warn_missing_bucket(bucket)
            return image_error(
                "file_missing", f"The image's bucket “{printable(bucket, 100)}” does not exist in storage."
            )
        if reply.by_storage and reply.code != "NoSuchBucket" and reply.status in (400, 404):
            return file_missing()
        return _unreachable(reply)

    async def _check_key(self) -> frozenset[str] | TaggingError:
        """The buckets that the key can list, or the error of the key or the address."""
        if self._role in PUBLISHABLE:
            return _refused("it is not the secret key, so row level security hides the files from it")
        try:
            reply = await self._get("/bucket")
            if isinstance(reply, Reply):
                return _general_error(reply) or _no_storage(f"status {reply.status}")
            buckets = frozenset(str(bucket["id"]) for bucket in read_json(reply))
            if not buckets and self._role != SECRET and not await self._can_read_last():
                return _refused("it has access to no bucket and no file")
        except TaggingError as error:
            return _no_storage("status 414") if error.status == URL_TOO_LONG else error
        except (ValueError, TypeError, KeyError):
            return _no_storage("its reply is not a list of buckets")
        return buckets

    async def _can_read_last(self) -> bool:
        """Whether the file that was read last can still be read. False proves nothing: it may have been deleted."""
        return self._last_read is not None and await self._answers(self._last_read)

    async def _answers(self, location: str) -> bool:
        async with self._request(location) as response:
            return response.status_code == 200

    async def _get(self, location: str) -> bytes | Reply:
        """Requests a path of Storage's API; returns the body of a 200, otherwise the error reply.

        Raises:
            TaggingError: ``transient`` if there is no reply.
        """
        async with self._request(location) as response:
            if response.status_code == 200:
                return await read_up_to(response, MAX_LIST_BYTES)
            return read_reply(response, await read_up_to(response, MAX_ERROR_BYTES))

    @contextlib.asynccontextmanager
    async def _request(
        self, location: str, in_time: AbstractAsyncContextManager[object] | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """A reply whose body is not read yet. If the caller does not read the body, the connection is closed and
        nothing more is downloaded. in_time: limits the time of the request and of reading."""
        try:
            async with in_time or asyncio.timeout(MAX_SECONDS), self._http.stream("GET", self._url + location) as reply:
                yield reply
        except httpx2.InvalidURL:  # the URL is too long, or SUPABASE_URL is not a URL
            raise TaggingError(
                "transient", "storage_error", "Storage answered with an error (414).", status=URL_TOO_LONG
            ) from None
        except HTTP_ERRORS:
            raise _trouble("transient", "storage_error", "Storage cannot be reached.") from None
        except TimeoutError:
            raise _trouble("transient", "storage_error", "Storage took too long.") from None

    def _warn_missing_bucket(self, bucket: str) -> None:
        if bucket not in self._warned_buckets and len(self._warned_buckets) < MAX_BUCKET_WARNINGS:
            self._warned_buckets.add(bucket)
            log.warning("bucket_not_found", bucket=bucket, hint="Correct the rows that name it, or create it.")


@dataclass(frozen=True)
class Reply:
    """An error reply of Storage, or of a proxy in front of it.

    Attributes:
        status: Storage's ``statusCode`` in the body, which is the actual status; otherwise the HTTP status.
        code: Storage's error code, such as ``NoSuchKey``; empty if it is missing.
        message: Storage's message; empty if it is missing (an error page).
        by_storage: whether Storage itself replied, not a proxy.
        retry_after: seconds to wait, from the reply's header.
    """

    status: int
    code: str
    message: str
    by_storage: bool
    retry_after: float | None


def read_reply(response: Response, body: bytes) -> Reply:
    """Parses a reply whose status is not 200."""
    try:
        parsed = read_json(body)
    except ValueError:
        parsed = None
    payload = parsed if isinstance(parsed, dict) else {}
    wait = retry_after(response.headers)
    inner_status = payload.get("statusCode")
    inner_status = str(inner_status) if isinstance(inner_status, int) else _text(inner_status)
    by_storage = len(inner_status) == 3 and inner_status.isdecimal()
    return Reply(
        int(inner_status) if by_storage else response.status_code,
        _text(payload.get("code")) or _text(payload.get("error")),
        clean_text(redact(_text(payload.get("message"))))[:MAX_REASON_LENGTH].rstrip("."),
        by_storage,
        wait and min(wait, MAX_WAIT),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def key_role(key: str) -> str | None:
    """The role of a Supabase key: from its prefix or its JWT claims; None if neither contains a role."""
    if key.startswith("sb_secret_"):
        return SECRET
    if key.startswith("sb_publishable_"):
        return PUBLISHABLE[0]
    try:
        _, claims, _ = key.split(".")
        role: Any = read_json(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["role"]
    except (ValueError, TypeError, KeyError):
        return None
    return role if isinstance(role, str) else None


def object_path(bucket: str, path: str) -> str:
    """The path of a file in URLs.

    Raises:
        TaggingError: no file can have this name.
    """
    if not _stays_inside(bucket, path):
        raise file_missing()
    return f"{quote(bucket, safe='')}/{quote(path)}"


def _stays_inside(bucket: str, path: str) -> bool:
    """Whether the path cannot leave its bucket and is a valid object name (no empty parts, no control characters)."""
    return (
        "/" not in bucket
        and not any(part in ("", ".", "..") for part in (bucket, *path.split("/")))
        and not CONTROL.search(bucket + path)
    )


def _general_error(reply: Reply) -> TaggingError | None:
    """The error if it affects every file: the key is refused, or Storage is unavailable. Otherwise None."""
    if reply.status == 401 or reply.code in REFUSALS:
        return _refused(reply.message or f"it answered with status {reply.status}")
    return _unreachable(reply) if reply.status in TRANSIENT_STATUSES or reply.status >= 500 else None


def _refused(reason: str) -> TaggingError:
    return _trouble("account", "storage_refused", f"Storage refused the key: {reason}. {CHECK_KEY}")


def _no_storage(reason: str) -> TaggingError:
    return _trouble("account", "no_storage", f"SUPABASE_URL does not lead to Storage ({reason}). {CHECK_URL}")


def _unreachable(reply: Reply) -> TaggingError:
    return _trouble("transient", "storage_error", f"Storage answered with an error ({reply.status}).",
                    retry_after=reply.retry_after)  # fmt: skip


def _trouble(kind: Kind, code: str, message: str, retry_after: float | None = None) -> TaggingError:
    """An error of Storage itself, marked so that nobody mistakes it for an error of the AI provider."""
    return TaggingError(kind, code, message, retry_after=retry_after, origin="storage")


def file_missing() -> TaggingError:
    """The error of an image whose file does not exist, or may not be seen by the caller."""
    return image_error("file_missing", "The image's file is not in storage.")
