"""The objects of Supabase Storage: their rows and files, and how any kind of upload becomes an object."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import psycopg
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from lab.edge.session import as_caller

#: Object names that the real server accepts.
KEY = re.compile(r"[\w/!.*'() &$=;:+,?@-]+", re.ASCII)


class StorageError(Exception):
    """An error response of Storage: HTTP 400, with the actual status in the body."""

    def __init__(self, status: str, error: str, message: str, code: str) -> None:
        self.body = {"statusCode": status, "error": error, "message": message, "code": code}


@dataclass(frozen=True)
class Bucket:
    """A bucket and what it allows."""

    public: bool
    limit: int | None  # bytes of an object
    types: list[str] | None

    def check_kind(self, kind: str) -> None:
        """Refuses a content type that the bucket does not allow."""
        if self.types and not any(fnmatch(kind, allowed) for allowed in self.types):
            raise StorageError("415", "invalid_mime_type", f"mime type {kind} is not supported", "InvalidMimeType")


@dataclass(frozen=True)
class NewObject:
    """The properties of an object that an upload creates."""

    bucket: str
    path: str
    owner: str | None
    version: str
    metadata: dict[str, Any]
    user_metadata: dict[str, Any] | None = None


class Objects:
    """The objects of one project."""

    def __init__(self, pool: AsyncConnectionPool[AsyncConnection[Any]], folder: Path) -> None:
        self._pool = pool
        self._folder = folder

    def file(self, version: str) -> Path:
        """The file of an object's version."""
        return self._folder / version

    async def bucket(self, name: str) -> Bucket:
        """A bucket, without a check of the caller.

        Raises:
            StorageError: it does not exist.
        """
        async with as_caller(self._pool, {"role": "service_role"}) as connection:
            cursor = await connection.execute(
                "select public, file_size_limit, allowed_mime_types from storage.buckets where id = %s", (name,)
            )
            row = await cursor.fetchone()
        if row is None:
            raise no_bucket()
        return Bucket(*row)

    async def may_upload(self, claims: dict[str, Any], upload: NewObject, *, upsert: bool) -> None:
        """Checks the caller's rights as the real server does: it tries the insert and rolls it back.

        Raises:
            StorageError: the object exists, and ``upsert`` is off.
            psycopg.errors.InsufficientPrivilege: row level security refuses the insert.
        """
        try:
            async with as_caller(self._pool, claims) as connection:
                await _insert(connection, upload, upsert=upsert)
                raise psycopg.Rollback
        except psycopg.errors.UniqueViolation:
            raise StorageError("409", "Duplicate", "The resource already exists", "KeyAlreadyExists") from None

    async def complete(self, upload: NewObject) -> str:
        """Creates the object of a complete file, with the service's rights, and returns its id.

        As on the real server, the caller's rights were checked before the file arrived. If two uploads of one name
        overlap, the last one replaces the other.
        """
        async with as_caller(self._pool, {"role": "service_role"}) as connection:
            cursor = await connection.execute(
                "select version from storage.objects where bucket_id = %s and name = %s for update",
                (upload.bucket, upload.path),
            )
            before = await cursor.fetchone()
            object_id = await _insert(connection, upload, upsert=True)
        if before:
            self.file(before[0]).unlink(missing_ok=True)
        return object_id


async def _insert(connection: AsyncConnection[Any], upload: NewObject, *, upsert: bool) -> str:
    cursor = await connection.execute(
        "insert into storage.objects (bucket_id, name, owner, owner_id, version, metadata, user_metadata)"
        " values (%s, %s, %s, %s, %s, %s, %s)"
        + (" on conflict (bucket_id, name) do update set version = excluded.version, metadata = excluded.metadata,"
           " user_metadata = excluded.user_metadata, updated_at = now()" if upsert else "")
        + " returning id::text",
        (upload.bucket, upload.path, upload.owner, upload.owner, upload.version, json.dumps(upload.metadata),
         json.dumps(upload.user_metadata) if upload.user_metadata else None),
    )  # fmt: skip
    row = cast("tuple[str]", await cursor.fetchone())
    return row[0]


def no_bucket() -> StorageError:
    return StorageError("404", "Bucket not found", "Bucket not found", "NoSuchBucket")


def check_key(path: str) -> None:
    """Refuses an object name that the real server does not accept."""
    if not KEY.fullmatch(path) or ".." in path.split("/"):
        raise StorageError("400", "InvalidKey", f"Invalid key: {path}", "InvalidKey")


def describe(data: bytes, kind: str, cache: str) -> dict[str, Any]:
    """The metadata of an object's row."""
    return {
        "eTag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"', "size": len(data), "mimetype": kind,
        "cacheControl": cache, "lastModified": timestamp(datetime.now(UTC)), "contentLength": len(data),
        "httpStatusCode": 200,
    }  # fmt: skip


def timestamp(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
