"""Files in Supabase Storage, and whose fault it is when one cannot be read.

"Not found" may mean three things: the file is missing, the bucket is missing, or the key does not see them. Only the
first two concern the image; the last concerns every image, so it must fail none. This is how they are told apart
(supabase/storage: src/http/plugins/jwt.ts, src/http/routes/object/getObject.ts):

- ``/object/<bucket>/<path>`` treats a key that does not verify as a stranger, for whom no private bucket exists.
  ``/object/authenticated/…`` refuses such a key as a key, so files are read there.
- A publishable key does verify, and row level security hides the files from it: "not found" again. What a key is
  stands in the key itself.
- Before "not found" fails an image, ``GET /bucket`` has shown that the key works. One such look answers for all
  images of the next seconds.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx2
import structlog

from autotag.errors import TaggingError, image_error
from autotag.images.body import Response, read_body, read_up_to
from autotag.openai.http import HTTP_ERRORS, make_http
from autotag.redact import redact
from autotag.texts import clean_text, printable

FETCH_TIMEOUT = 30.0  # seconds
LOOK_KEPT = 10.0  # seconds for which one look at the key answers for every missing file
FAILED_LOOK_KEPT = 1.0  # seconds, where the look itself failed
LONGEST_RETRY_AFTER = 120.0  # seconds; what Storage asks for beyond it is cut
MOST_TOLD = 10_000_000  # bytes of an answer that is no file; a list of 1,000 buckets has 300,000
MOST_BUCKETS_WARNED_OF = 100  # names come from rows, so there may be any number
LONGEST_REASON = 200  # characters of Storage's own words in a message

SECRET, PUBLISHABLE = "service_role", ("anon", "authenticated")  # roles: row level security holds for the latter
PASSING = (408, 425, 429)  # statuses besides 5xx that are over when they are over
REFUSALS = ("AccessDenied", "InvalidJWT", "Unauthorized", "Invalid JWT")  # the last two: of releases without codes
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
CHECK_KEY = "Check SUPABASE_SECRET_KEY (the project's secret key)."
CHECK_URL = "Check SUPABASE_URL."

log = structlog.get_logger(__name__)


class Storage:
    """Reads files of one project with one key."""

    def __init__(self, url: str, key: str, max_bytes: int, *, timeout: float = FETCH_TIMEOUT) -> None:
        """
        Args:
            url: of the project.
            key: its secret key.
            max_bytes: of a file; reading stops there.
            timeout: seconds that connecting, or a pause while reading, may take.
        """
        self._url = f"{url}/storage/v1"
        self._role = key_role(key)
        self._max_bytes = max_bytes
        headers = {"apikey": key, "Authorization": f"Bearer {key}", "Accept-Encoding": "identity"}
        self._http = make_http(
            timeout=timeout, limits=httpx2.Limits(max_connections=100), headers=headers, follow_redirects=False
        )
        self._looking = asyncio.Lock()
        self._seen: frozenset[str] | TaggingError = frozenset()
        self._seen_until = 0.0  # of time.monotonic()
        self._last_read: str | None = None  # where the last file lay that was read
        self._warned_of: set[str] = set()

    async def __aenter__(self) -> Storage:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def read(self, bucket: str, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            TaggingError: of the image when the key works and the file or its bucket is missing; of the account when
                the key or the address is wrong; else transient.
        """
        if not _stays_inside(bucket, path):
            raise file_missing()
        where = f"/object/authenticated/{quote(bucket, safe='')}/{quote(path)}"
        answer = await self._get(where, self._max_bytes)
        if isinstance(answer, bytes):
            self._last_read = where
            return answer
        raise await self._whose_fault(bucket, answer)

    async def buckets(self) -> frozenset[str]:
        """The project's buckets, which shows that the key works; asks at most every `LOOK_KEPT` seconds.

        Raises:
            TaggingError: of the account when the key or the address is wrong, transient when Storage does not say.
        """
        async with self._looking:
            if time.monotonic() >= self._seen_until:
                self._seen = await self._look()
                failed = isinstance(self._seen, TaggingError) and self._seen.kind == "transient"
                self._seen_until = time.monotonic() + (FAILED_LOOK_KEPT if failed else LOOK_KEPT)
            seen = self._seen
        if isinstance(seen, TaggingError):
            raise TaggingError(seen.kind, seen.code, seen.message, retry_after=seen.retry_after)
        return seen

    async def _whose_fault(self, bucket: str, answer: Answer) -> TaggingError:
        """The error of a file that could not be read: of the image, of the account, or of the moment."""
        if trouble := _not_of_the_file(answer):
            return trouble
        try:
            buckets = await self.buckets()
        except TaggingError as error:
            return error
        if not buckets and self._role == SECRET:
            return TaggingError("account", "storage_no_bucket", f"The project has no bucket at all. {CHECK_URL}")
        if answer.code == "NoSuchBucket" and bucket not in buckets:
            self._warn_of(bucket)
            return image_error(
                "file_missing", f"The image's bucket “{printable(bucket, 100)}” does not exist in storage."
            )
        if answer.by_storage and answer.code != "NoSuchBucket" and answer.status in (400, 404):
            return file_missing()
        return _unreachable(answer)

    async def _look(self) -> frozenset[str] | TaggingError:
        """The buckets that the key sees, or what is wrong with it."""
        if self._role in PUBLISHABLE:
            return _refused("it is not the secret one, and row level security hides the files from it")
        try:
            answer = await self._get("/bucket", MOST_TOLD)
            if isinstance(answer, Answer):
                return _not_of_the_file(answer) or _no_storage(f"status {answer.status}")
            buckets = frozenset(str(bucket["id"]) for bucket in json.loads(answer))
            if not buckets and self._role != SECRET and not await self._still_reads():
                return _refused("it sees no bucket and no file")
        except TaggingError as error:
            return error if error.kind == "transient" else _no_storage("it sends too much")
        except (ValueError, TypeError, KeyError):
            return _no_storage("it sends no list of buckets")
        return buckets

    async def _still_reads(self) -> bool:
        """Whether the file that was read last can still be read. Its absence alone proves nothing: it may be gone."""
        return self._last_read is not None and isinstance(await self._get(self._last_read, self._max_bytes), bytes)

    async def _get(self, where: str, most: int) -> bytes | Answer:
        """What lies at an address below Storage's, or what Storage answers instead.

        Raises:
            TaggingError: transient when there is no answer; of the image when what lies there is too large.
        """
        try:
            async with self._http.stream("GET", self._url + where) as response:
                if response.status_code == 200:
                    return await read_body(response, most)
                return read_answer(response, await read_up_to(response, MOST_TOLD))
        except httpx2.InvalidURL:  # longer than any URL may be, or SUPABASE_URL is none
            return Answer(414, "", "", False, None)
        except HTTP_ERRORS:
            raise TaggingError("transient", "storage_error", "Storage cannot be reached.") from None

    def _warn_of(self, bucket: str) -> None:
        if bucket not in self._warned_of and len(self._warned_of) < MOST_BUCKETS_WARNED_OF:
            self._warned_of.add(bucket)
            log.warning("bucket_missing", bucket=bucket, hint="Correct the rows that name it, or create it.")


@dataclass(frozen=True)
class Answer:
    """An answer of Storage, or of what stands before it, that is not the file.

    Attributes:
        status: the one inside the body, where Storage puts the real one, or else that of HTTP.
        code: Storage's, such as ``NoSuchKey``; empty when it did not say.
        message: Storage's words; empty when it did not say (an error page).
        by_storage: whether Storage itself said so, and nothing that stands before it.
        retry_after: seconds that the answer asks to wait.
    """

    status: int
    code: str
    message: str
    by_storage: bool
    retry_after: float | None


def read_answer(response: Response, body: bytes) -> Answer:
    """Sorts out an answer that is not 200."""
    try:
        told = json.loads(body)
    except ValueError:
        told = None
    told = told if isinstance(told, dict) else {}
    inner = str(told.get("statusCode", ""))
    by_storage = len(inner) == 3 and inner.isdecimal()
    return Answer(
        int(inner) if by_storage else response.status_code,
        str(told.get("code") or told.get("error") or ""),
        clean_text(redact(str(told.get("message") or "")))[:LONGEST_REASON].rstrip("."),
        by_storage,
        read_retry_after(response.headers),
    )


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait; None when it does not, or names a date."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else None


def key_role(key: str) -> str | None:
    """The role that a key of Supabase acts as, by what stands in it; None when it does not say."""
    if key.startswith("sb_secret_"):
        return SECRET
    if key.startswith("sb_publishable_"):
        return PUBLISHABLE[0]
    try:
        _, claims, _ = key.split(".")
        role: Any = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["role"]
    except (ValueError, TypeError, KeyError):
        return None
    return role if isinstance(role, str) else None


def _stays_inside(bucket: str, path: str) -> bool:
    """Whether a path leads nowhere but into its bucket, and has the form of an object's name, which holds no control
    characters."""
    return (
        "/" not in bucket
        and not any(part in ("", ".", "..") for part in (bucket, *path.split("/")))
        and not CONTROL.search(bucket + path)
    )


def _not_of_the_file(answer: Answer) -> TaggingError | None:
    """The error when the answer is the same for every file: the key is refused, or Storage is in trouble."""
    if answer.status == 401 or answer.code in REFUSALS:
        return _refused(answer.message or f"it answered with status {answer.status}")
    return _unreachable(answer) if answer.status in PASSING or answer.status >= 500 else None


def _refused(reason: str) -> TaggingError:
    return TaggingError("account", "storage_refused", f"Storage refused the key: {reason}. {CHECK_KEY}")


def _no_storage(what: str) -> TaggingError:
    return TaggingError("account", "no_storage", f"No Storage answers at SUPABASE_URL ({what}). {CHECK_URL}")


def _unreachable(answer: Answer) -> TaggingError:
    return TaggingError(
        "transient",
        "storage_error",
        f"Storage answered with an error ({answer.status}).",
        retry_after=answer.retry_after,
    )


def file_missing() -> TaggingError:
    """The error of an image whose file is not there."""
    return image_error("file_missing", "The image's file is not in storage.")
