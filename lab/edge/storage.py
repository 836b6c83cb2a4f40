"""Supabase Storage: private and public buckets, upload, download, signed URLs, list and remove.

The rows are in ``storage.objects`` under row level security; the files are in a folder.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from email.message import Message
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import psycopg
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from lab.edge.objects import NewObject, Objects, StorageError, check_key, describe, no_bucket, timestamp
from lab.edge.render import NOT_ENABLED, TRANSFORMS, NotRendered, render
from lab.edge.session import as_caller
from lab.edge.tokens import TokenError, bearer, sign, verify

StoredFile = tuple[str, str, bytes]  # path, content type, content


def _missing() -> StorageError:
    return StorageError("404", "not_found", "Object not found", "NoSuchKey")


class Storage:
    """The storage of one project."""

    def __init__(self, pool: AsyncConnectionPool[AsyncConnection[Any]], secret: str, objects: Objects) -> None:
        self._pool = pool
        self._secret = secret
        self._objects = objects

    def routes(self) -> list[Route]:
        """Everything below ``/storage/v1``."""
        return [
            Route("/bucket", self._answer(self._create_bucket), methods=["POST"]),
            Route("/bucket", self._answer(self._list_buckets), methods=["GET"]),
            Route("/object/list/{bucket}", self._answer(self._list), methods=["POST"]),
            Route("/object/sign/{bucket}", self._answer(self._sign_many), methods=["POST"]),
            Route("/object/sign/{bucket}/{path:path}", self._answer(self._sign), methods=["POST"]),
            Route("/object/sign/{bucket}/{path:path}", self._answer(self._get_signed), methods=["GET"]),
            Route("/object/public/{bucket}/{path:path}", self._answer(self._get_public), methods=["GET"]),
            Route("/object/info/{bucket}/{path:path}", self._answer(self._info), methods=["GET"]),
            Route("/object/authenticated/{bucket}/{path:path}", self._answer(self._get_authenticated), methods=["GET"]),
            Route("/render/image/authenticated/{bucket}/{path:path}", self._answer(self._render), methods=["GET"]),
            Route("/object/{bucket}", self._answer(self._remove), methods=["DELETE"]),
            Route("/object/{bucket}/{path:path}", self._answer(self._get), methods=["GET"]),
            Route("/object/{bucket}/{path:path}", self._answer(self._upload), methods=["POST", "PUT"]),
        ]

    def _answer(self, handler: Any) -> Any:
        async def answer(request: Request) -> Response:
            try:
                return cast("Response", await handler(request))
            except StorageError as error:
                return _compact(error.body, 400)
            except TokenError as error:
                return refuse_token(error)
            except psycopg.DataError:  # a NUL in a name
                return _compact(
                    {"statusCode": "400", "error": "InvalidKey", "message": "Invalid key", "code": "InvalidKey"}, 400
                )
            except psycopg.errors.InsufficientPrivilege:
                return _compact(
                    {"statusCode": "403", "error": "Unauthorized", "code": "AccessDenied",
                     "message": "new row violates row-level security policy"}, 400)  # fmt: skip

        return answer

    def _claims(self, request: Request) -> dict[str, Any]:
        return verify(self._secret, bearer(request.headers.get("authorization")) or request.headers.get("apikey", ""))

    async def _object(self, claims: dict[str, Any], bucket: str, path: str) -> dict[str, Any]:
        """The row of an object, if the caller may see it.

        Raises:
            StorageError: the bucket or the object does not exist for the caller.
        """
        await self._objects.bucket(bucket)
        return await self._row(claims, bucket, path)

    async def _row(self, claims: dict[str, Any], bucket: str, path: str) -> dict[str, Any]:
        """The row of an object in an existing bucket."""
        async with as_caller(self._pool, claims) as connection:
            cursor = await connection.execute(
                "select id::text, version, metadata, created_at, updated_at from storage.objects"
                " where bucket_id = %s and name = %s",
                (bucket, path),
            )
            row = await cursor.fetchone()
        if row is None:
            raise _missing()
        return dict(zip(("id", "version", "metadata", "created_at", "updated_at"), row, strict=True))

    async def _create_bucket(self, request: Request) -> Response:
        body = await request.json()
        try:
            async with as_caller(self._pool, self._claims(request)) as connection:
                await connection.execute(
                    "insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types)"
                    " values (%s, %s, %s, %s, %s)",
                    (body["id"], body["name"], body.get("public", False), body.get("file_size_limit"),
                     body.get("allowed_mime_types")),
                )  # fmt: skip
        except psycopg.errors.UniqueViolation:
            raise StorageError("409", "Duplicate", "The resource already exists", "BucketAlreadyExists") from None
        return _compact({"name": body["name"]})

    async def _list_buckets(self, request: Request) -> Response:
        async with as_caller(self._pool, self._claims(request)) as connection:
            cursor = await connection.execute(
                "select id, name, owner::text, public, file_size_limit, allowed_mime_types, created_at, updated_at"
                " from storage.buckets order by id"
            )
            rows = await cursor.fetchall()
        names = ("id", "name", "owner", "public", "file_size_limit", "allowed_mime_types")
        return _compact(
            [
                {**dict(zip(names, row[:6], strict=True)), "owner": row[2] or "", "type": "STANDARD",
                 "created_at": timestamp(row[6]), "updated_at": timestamp(row[7])}
                for row in rows
            ]
        )  # fmt: skip

    async def _upload(self, request: Request) -> Response:
        claims, bucket, path = self._claims(request), request.path_params["bucket"], request.path_params["path"]
        settings = await self._objects.bucket(bucket)
        check_key(path)
        data, kind = await _body(request)
        settings.check_kind(kind)
        if settings.limit and len(data) > settings.limit:
            raise StorageError(
                "413", "Payload too large", "The object exceeded the maximum allowed size", "EntityTooLarge"
            )
        upsert = request.headers.get("x-upsert") == "true" or request.method == "PUT"
        cache = request.headers.get("cache-control", "max-age=3600")
        upload = NewObject(bucket, path, claims.get("sub"), str(uuid.uuid4()), describe(data, kind, cache))
        await self._objects.may_upload(claims, upload, upsert=upsert)
        self._objects.file(upload.version).write_bytes(data)
        return _compact({"Key": f"{bucket}/{path}", "Id": await self._objects.complete(upload)})

    def _send(self, stored: dict[str, Any], cache: str | None) -> Response:
        metadata = stored["metadata"]
        headers = {"etag": metadata["eTag"], **({"cache-control": cache} if cache else {})}
        return FileResponse(self._objects.file(stored["version"]), media_type=metadata["mimetype"], headers=headers)

    async def _get(self, request: Request) -> Response:
        """Without a valid token, serves only public buckets; other buckets then seem not to exist."""
        try:
            claims = self._claims(request)
        except TokenError:
            return await self._get_public(request)
        return await self._send_to(claims, request)

    async def _get_authenticated(self, request: Request) -> Response:
        """Like `_get`, but refuses an invalid token."""
        return await self._send_to(self._claims(request), request)

    async def _send_to(self, claims: dict[str, Any], request: Request) -> Response:
        bucket, path = request.path_params["bucket"], request.path_params["path"]
        if (await self._objects.bucket(bucket)).public:
            claims = {"role": "service_role"}
        stored = await self._row(claims, bucket, path)
        return self._send(stored, stored["metadata"]["cacheControl"])

    async def _render(self, request: Request) -> Response:
        """A scaled image, as the project's image transformations make it. If the caller may not see it, it seems not to
        exist."""
        claims = self._claims(request)
        bucket, path = request.path_params["bucket"], request.path_params["path"]
        stored = await self._object(claims, bucket, path)
        try:
            if not self._objects.file(TRANSFORMS).exists():
                raise NotRendered("403", "FeatureNotEnabled", NOT_ENABLED)
            data, kind = await asyncio.to_thread(render, self._objects.file(stored["version"]), request.query_params)
        except NotRendered as error:
            raise StorageError(error.status, error.code, error.message, error.code) from None
        return Response(data, media_type=kind, headers={"cache-control": stored["metadata"]["cacheControl"]})

    async def _get_public(self, request: Request) -> Response:
        bucket, path = request.path_params["bucket"], request.path_params["path"]
        if not (await self._objects.bucket(bucket)).public:
            raise no_bucket()
        stored = await self._row({"role": "service_role"}, bucket, path)
        return self._send(stored, stored["metadata"]["cacheControl"])

    async def _info(self, request: Request) -> Response:
        bucket, path = request.path_params["bucket"], request.path_params["path"]
        stored = await self._object(self._claims(request), bucket, path)
        metadata = stored["metadata"]
        described = _compact(
            {
                "id": stored["id"], "name": path, "version": stored["version"], "bucket_id": bucket,
                "size": metadata["size"], "content_type": metadata["mimetype"],
                "cache_control": metadata["cacheControl"], "etag": metadata["eTag"], "metadata": {},
                "last_modified": timestamp(stored["updated_at"]), "created_at": timestamp(stored["created_at"]),
            }
        )  # fmt: skip
        described.headers.update({"etag": metadata["eTag"], "cache-control": metadata["cacheControl"]})
        return described

    def _signed_url(self, bucket: str, path: str, seconds: int) -> str:
        token = sign(self._secret, "storage", lifetime=seconds, url=f"{bucket}/{path}")
        return f"/object/sign/{bucket}/{quote(path)}?token={token}"

    async def _sign(self, request: Request) -> Response:
        bucket, path = request.path_params["bucket"], request.path_params["path"]
        body = await request.json()
        await self._object(self._claims(request), bucket, path)
        return _compact({"signedURL": self._signed_url(bucket, path, int(body["expiresIn"]))})

    async def _sign_many(self, request: Request) -> Response:
        bucket, body = request.path_params["bucket"], await request.json()
        answers = []
        for path in body["paths"]:
            try:
                await self._object(self._claims(request), bucket, path)
                url, error = self._signed_url(bucket, path, int(body["expiresIn"])), None
            except StorageError:
                url, error = None, "Either the object does not exist or you do not have access to it"
            answers.append({"error": error, "path": path, "signedURL": url})
        return _compact(answers)

    async def _get_signed(self, request: Request) -> Response:
        bucket, path = request.path_params["bucket"], request.path_params["path"]
        try:
            claims = verify(self._secret, request.query_params.get("token", ""))
        except TokenError as error:
            raise StorageError("400", "InvalidJWT", _token_message(error), "InvalidJWT") from None
        if claims.get("url") != f"{bucket}/{path}":
            raise StorageError("400", "InvalidSignature", "The url do not match the signature", "InvalidSignature")
        return self._send(await self._object({"role": "service_role"}, bucket, path), None)

    async def _list(self, request: Request) -> Response:
        bucket, body = request.path_params["bucket"], await request.json()
        prefix = body.get("prefix", "").strip("/")
        start = f"{prefix}/" if prefix else ""
        async with as_caller(self._pool, self._claims(request)) as connection:
            cursor = await connection.execute(
                "select name, id::text, updated_at, created_at, last_accessed_at, metadata from storage.objects"
                " where bucket_id = %s and starts_with(name, %s) and position('/' in substr(name, %s)) = 0"
                " order by name limit %s offset %s",
                (bucket, start, len(start) + 1, min(int(body.get("limit", 100)), 1000), int(body.get("offset", 0))),
            )
            rows = await cursor.fetchall()
        return _compact(
            [
                {"name": name.removeprefix(start), "id": object_id, "updated_at": timestamp(updated),
                 "created_at": timestamp(created), "last_accessed_at": timestamp(accessed), "metadata": metadata}
                for name, object_id, updated, created, accessed, metadata in rows
            ]
        )  # fmt: skip

    async def _remove(self, request: Request) -> Response:
        bucket, body = request.path_params["bucket"], await request.json()
        async with as_caller(self._pool, self._claims(request)) as connection:
            cursor = await connection.execute(
                "delete from storage.objects where bucket_id = %s and name = any (%s) returning name, version",
                (bucket, body["prefixes"]),
            )
            rows = await cursor.fetchall()
        for _, version in rows:
            self._objects.file(version).unlink(missing_ok=True)
        return _compact([{"name": name, "bucket_id": bucket} for name, _ in rows])


def put_files(connection: psycopg.Connection[Any], folder: Path, bucket: str, files: Sequence[StoredFile]) -> None:
    """Stores files as the service role's uploads do: each of those takes 9 ms of processor time.

    Args:
        connection: as the project's owner.
        folder: where the edge has its files.
        bucket: an existing bucket.
        files: path, content type and bytes of each.
    """
    rows = []
    for path, kind, data in files:
        version = str(uuid.uuid4())
        (folder / version).write_bytes(data)
        rows.append({"name": path, "version": version, "metadata": describe(data, kind, "max-age=3600")})
    with connection.transaction():
        connection.execute("set local role service_role")
        connection.execute(
            "insert into storage.objects (bucket_id, name, version, metadata)"
            " select %s, r.name, r.version, r.metadata"
            " from jsonb_to_recordset(%s) r (name text, version text, metadata jsonb)",
            (bucket, json.dumps(rows)),
        )


def refuse_token(error: TokenError) -> Response:
    """The answer to a token that is not valid."""
    message = _token_message(error)
    return _compact({"statusCode": "403", "error": "Unauthorized", "message": message, "code": "AccessDenied"}, 400)


def _token_message(error: TokenError) -> str:
    """The message for an invalid token, as the real server's JWT library phrases it."""
    if error.reason == "expired":
        return '"exp" claim timestamp check failed'
    return "Invalid Compact JWS" if str(error) == "Not enough segments" else "signature verification failed"


async def _body(request: Request) -> tuple[bytes, str]:
    """The bytes and the content type of an upload, which is a form with one file or the file itself."""
    kind = request.headers.get("content-type", "application/octet-stream")
    if kind.startswith("multipart/form-data"):
        async with request.form() as form:
            for value in form.values():
                if isinstance(value, UploadFile):
                    return await value.read(), value.content_type or "application/octet-stream"
        return b"", "application/octet-stream"
    header = Message()
    header["content-type"] = kind
    return await request.body(), header.get_content_type()


def _compact(body: Any, status: int = 200) -> Response:
    response = JSONResponse(body, status)
    response.headers["content-type"] = "application/json; charset=utf-8"
    return response
