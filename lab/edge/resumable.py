"""Resumable uploads to Supabase Storage: TUS 1.0.0 below ``/upload/resumable``, as its server (`@tus/server`) does.

The received part of an upload is in the folder of the objects, next to a file that describes the upload, so a restarted
edge can continue it. With the last byte, it becomes an object. Errors are plain text, with the real status.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from typing import Any

import psycopg
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lab.edge.objects import NewObject, Objects, StorageError, check_key, describe
from lab.edge.storage import refuse_token
from lab.edge.tokens import TokenError, bearer, verify

PATH = "/upload/resumable"
VERSION = "1.0.0"
LIFETIME = 24 * 3600  # seconds that an upload may take
MAX_SIZE = 50 * 1024 * 1024  # bytes; the limit of a new project
BYTES = "application/offset+octet-stream"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: `HEADERS` of the server. A browser may send these, and read these; no others.
HEADERS = (
    "Authorization, Content-Type, Location, Tus-Extension, Tus-Max-Size, Tus-Resumable, Tus-Version, Upload-Concat,"
    " Upload-Defer-Length, Upload-Length, Upload-Metadata, Upload-Offset, X-HTTP-Method-Override, X-Requested-With,"
    " X-Forwarded-Host, X-Forwarded-Proto, Forwarded"
)
#: Headers that Storage allows in addition.
MORE_HEADERS = "Authorization, X-Upsert, Upload-Expires, ApiKey, x-signature"


class TusError(Exception):
    """An error response of the server."""

    def __init__(self, status: int, body: str) -> None:
        self.status = status
        self.body = body


@dataclass(frozen=True)
class _Upload:
    """An upload that was created; the same fields are in its file."""

    bucket: str
    path: str
    version: str
    length: int
    created: float
    metadata: dict[str, str]

    def identify(self) -> str:
        """The last part of the upload's URL."""
        return base64.urlsafe_b64encode(f"{self.bucket}/{self.path}/{self.version}".encode()).decode().rstrip("=")

    def expires(self) -> dict[str, str]:
        return {"Upload-Expires": formatdate(self.created + LIFETIME, usegmt=True)}


@dataclass
class _Hold:
    """The request that is working on an upload. A newer request stops it, because its connection may be dead."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: asyncio.Event = field(default_factory=asyncio.Event)


class Resumable:
    """The resumable uploads of one project."""

    def __init__(self, secret: str, objects: Objects) -> None:
        self._secret = secret
        self._objects = objects
        self._holds: dict[str, _Hold] = {}

    def routes(self) -> list[Route]:
        """Everything below ``/storage/v1/upload/resumable``."""
        one = {"HEAD": self._head, "PATCH": self._patch, "DELETE": self._delete}
        return [
            Route(PATH, self._answer(self._options), methods=["OPTIONS"]),
            Route(PATH, self._answer(self._create), methods=["POST"]),
            Route(PATH + "/{id}", self._answer(self._options), methods=["OPTIONS"]),
            *(Route(PATH + "/{id}", self._answer(handler), methods=[method]) for method, handler in one.items()),
        ]

    def _answer(self, handler: Callable[[Request], Awaitable[Response]]) -> Any:
        async def answer(request: Request) -> Response:
            response = await self._refusal(handler, request)
            response.headers["access-control-expose-headers"] = HEADERS
            response.headers["tus-resumable"] = VERSION
            return response

        return answer

    async def _refusal(self, handler: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        try:
            if request.method != "OPTIONS":
                _check_headers(request)
            return await handler(request)
        except TusError as error:
            return Response(error.body, error.status)
        except StorageError as error:
            return Response(error.body["message"], int(error.body["statusCode"]))
        except TokenError as error:
            return refuse_token(error)
        except psycopg.errors.InsufficientPrivilege:
            return Response("new row violates row-level security policy", 403)
        except ClientDisconnect:
            return Response()  # nobody reads this response; the received bytes are kept

    def _claims(self, request: Request) -> dict[str, Any]:
        return verify(self._secret, bearer(request.headers.get("authorization")))

    async def _options(self, _: Request) -> Response:
        return Response(status_code=204, headers={
            "Tus-Version": VERSION, "Tus-Extension": "creation,creation-with-upload,termination,expiration",
            "Tus-Max-Size": str(MAX_SIZE), "Access-Control-Allow-Origin": "*",
            "Access-Control-Allow-Methods": "POST, HEAD, PATCH, OPTIONS, DELETE",
            "Access-Control-Allow-Headers": f"{HEADERS}, {MORE_HEADERS}", "Access-Control-Max-Age": "86400",
        })  # fmt: skip

    async def _create(self, request: Request) -> Response:
        claims = self._claims(request)
        if "upload-defer-length" in request.headers:
            raise TusError(501, "creation-defer-length extension is not (yet) supported.\n")
        if "upload-length" not in request.headers:
            raise TusError(400, "Upload-Length or Upload-Defer-Length header required\n")
        if "upload-metadata" not in request.headers:
            raise StorageError("400", "InvalidRequest", "Metadata header is required", "InvalidRequest")
        metadata, length = _parse(request.headers["upload-metadata"]), int(request.headers["upload-length"])
        bucket_name, path = metadata.get("bucketName", ""), metadata.get("objectName", "")
        if not bucket_name:
            raise StorageError("400", "Invalid Input", "Bucket name invalid", "InvalidBucketName")
        check_key(path)
        bucket = await self._objects.bucket(bucket_name)
        if length > min(bucket.limit or MAX_SIZE, MAX_SIZE):
            raise TusError(413, "Maximum size exceeded\n")
        cache = metadata.get("cacheControl", "")
        metadata["cacheControl"] = f"max-age={cache}" if re.fullmatch(r"-?\d+", cache) else "no-cache"
        upload = _Upload(bucket_name, path, str(uuid.uuid4()), length, time.time(), metadata)
        await self._may_upload(request, claims, upload)
        bucket.check_kind(_kind(upload))
        self._objects.file(upload.version).touch()
        self._objects.file(upload.version + ".info").write_text(json.dumps(asdict(upload)))
        headers = {"Location": str(request.url.replace(query="")).rstrip("/") + f"/{upload.identify()}"}
        if request.headers.get("content-type") == BYTES:
            async with self._hold(upload) as wanted:
                headers |= await self._receive(request, claims, upload, wanted)
        elif length == 0:
            headers |= await self._finish(claims, upload)
        else:
            headers |= upload.expires()
        return Response(status_code=201, headers=headers)

    async def _head(self, request: Request) -> Response:
        """Requires a valid token, but no rights, as on the real server."""
        self._claims(request)
        upload = self._find(request)
        async with self._hold(upload):
            headers = {
                "Cache-Control": "no-store", "Upload-Offset": str(self._offset(upload)),
                "Upload-Length": str(upload.length), "Upload-Metadata": _written(upload.metadata),
            }  # fmt: skip
        return Response(headers=headers)

    async def _patch(self, request: Request) -> Response:
        claims, upload = self._claims(request), self._find(request, expired=True)
        if "upload-offset" not in request.headers:
            raise TusError(403, "Upload-Offset header required\n")
        if "content-type" not in request.headers:
            raise TusError(403, "Content-Type header required\n")
        await self._may_upload(request, claims, upload)
        async with self._hold(upload) as wanted:
            self._find(request)
            if int(request.headers["upload-offset"]) != self._offset(upload):
                raise TusError(409, "Upload-Offset conflict\n")
            headers = await self._receive(request, claims, upload, wanted)
        return Response(status_code=204, headers=headers)

    async def _delete(self, request: Request) -> Response:
        claims, upload = self._claims(request), self._find(request)
        await self._may_upload(request, claims, upload)
        async with self._hold(upload):
            if self._offset(upload) == upload.length:
                raise TusError(400, "Cannot terminate an already completed upload")
            self._forget(upload)
        return Response(status_code=204)

    async def _may_upload(self, request: Request, claims: dict[str, Any], upload: _Upload) -> None:
        """Each request is checked like an ordinary upload."""
        declared = {"mimetype": upload.metadata.get("contentType"), "contentLength": upload.length}
        new = NewObject(upload.bucket, upload.path, claims.get("sub"), upload.version, declared, _user_metadata(upload))
        await self._objects.may_upload(claims, new, upsert=request.headers.get("x-upsert") == "true")

    def _find(self, request: Request, *, expired: bool = False) -> _Upload:
        """The upload of a URL.

        Raises:
            StorageError: this is not the URL of an upload.
            TusError: the upload does not exist (any more).
        """
        name = request.path_params["id"]
        try:
            decoded = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
        except ValueError:
            decoded = ""
        version = decoded.rpartition("/")[2]
        if not UUID.fullmatch(version):
            raise StorageError("400", "InvalidUploadId", "Invalid upload id", "InvalidUploadId")
        info = self._objects.file(version + ".info")
        if not info.exists():
            raise TusError(404, "The file for this url was not found\n")
        upload = _Upload(**json.loads(info.read_text()))
        if upload.identify() != name:
            raise TusError(404, "The file for this url was not found\n")
        if not expired and time.time() > upload.created + LIFETIME:
            raise TusError(410, "The file for this url no longer exists\n")
        return upload

    def _offset(self, upload: _Upload) -> int:
        file = self._objects.file(upload.version)
        if not file.exists():
            raise TusError(410, "The file for this url no longer exists\n")
        return file.stat().st_size

    def _forget(self, upload: _Upload) -> None:
        for name in (upload.version, upload.version + ".info"):
            self._objects.file(name).unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def _hold(self, upload: _Upload) -> AsyncIterator[asyncio.Event]:
        """Lets one request at a time work on an upload. Yields an event, which a newer request sets."""
        hold = self._holds.setdefault(upload.version, _Hold())
        hold.wanted.set()
        async with hold.lock:
            hold.wanted.clear()
            yield hold.wanted

    async def _receive(
        self, request: Request, claims: dict[str, Any], upload: _Upload, wanted: asyncio.Event
    ) -> dict[str, str]:
        """Writes the body as it arrives, until it ends or another request wants the upload. Returns the headers of the
        answer."""
        room = upload.length - self._offset(upload)
        if int(request.headers.get("content-length", 0)) > room:
            raise TusError(413, "upload's size exceeded\n")
        with self._objects.file(upload.version).open("ab", buffering=0) as file:
            async for chunk in _until(request.stream(), wanted):
                file.write(chunk[:room])
                room -= min(len(chunk), room)
        headers = {"Upload-Offset": str(upload.length - room)}
        return headers | (upload.expires() if room else await self._finish(claims, upload))

    async def _finish(self, claims: dict[str, Any], upload: _Upload) -> dict[str, str]:
        data = self._objects.file(upload.version).read_bytes()
        described = describe(data, _kind(upload), upload.metadata["cacheControl"])
        await self._objects.complete(
            NewObject(upload.bucket, upload.path, claims.get("sub"), upload.version, described, _user_metadata(upload))
        )
        return {"Tus-Complete": "1"}


async def _until(chunks: AsyncIterator[bytes], wanted: asyncio.Event) -> AsyncIterator[bytes]:
    """The chunks that arrive before the event is set."""
    stop = asyncio.ensure_future(wanted.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(chunks, None))
            await asyncio.wait({coming, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return
            chunk: bytes | None = coming.result()
            if chunk is None:
                return
            yield chunk
    finally:
        stop.cancel()


def _check_headers(request: Request) -> None:
    """The checks that the server makes before anything else."""
    headers = request.headers
    if "tus-resumable" not in headers:
        raise TusError(412, "Tus-Resumable Required\n")
    numbers = ("upload-offset", "upload-length")
    invalid = [name for name in numbers if not re.fullmatch(r"0|[1-9]\d*", headers.get(name, "0"))]
    if headers["tus-resumable"] != VERSION:
        invalid.append("tus-resumable")
    if request.method == "PATCH" and headers.get("content-type", BYTES) != BYTES:
        invalid.append("content-type")
    if "upload-metadata" in headers:
        try:
            _parse(headers["upload-metadata"])
        except ValueError:
            invalid.append("upload-metadata")
    if invalid:
        raise TusError(400, f"Invalid {' '.join(invalid)}\n")


def _parse(header: str) -> dict[str, str]:
    """The pairs of an Upload-Metadata header.

    Raises:
        ValueError: it is not valid.
    """
    metadata: dict[str, str] = {}
    for pair in header.split(","):
        name, _, value = pair.partition(" ")
        if not name or name in metadata or not name.isascii():
            raise ValueError(pair)
        metadata[name] = base64.b64decode(value, validate=True).decode()
    return metadata


def _written(metadata: dict[str, str]) -> str:
    """The metadata as a header."""
    return ",".join(f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in metadata.items())


def _kind(upload: _Upload) -> str:
    return upload.metadata.get("contentType") or "application/octet-stream"


def _user_metadata(upload: _Upload) -> dict[str, Any] | None:
    """The JSON object in the field `metadata`. Any other value counts as missing."""
    with contextlib.suppress(ValueError):
        parsed = json.loads(upload.metadata.get("metadata", ""))
        return parsed if isinstance(parsed, dict) else None
    return None
