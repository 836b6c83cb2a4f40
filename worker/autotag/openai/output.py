"""The lines of a batch's output and error files."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from autotag.db.messages import BatchAnswer
from autotag.errors import TaggingError
from autotag.openai.answers import read_completion, read_usage
from autotag.openai.classify import classify_status

MAX_LINE_BYTES = 1_000_000  # bytes of a line that are kept; an answer has a few thousand


async def read_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines that are not blank; one that is too long comes as what it began with, which is no answer."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
        if len(rest) > MAX_LINE_BYTES:
            rest = rest[:MAX_LINE_BYTES]
    if rest.strip():
        yield rest


def read_line(line: bytes, max_tags: int) -> BatchAnswer | None:
    """One line of an output or error file; None when it is no answer."""
    try:
        entry = json.loads(line)
        task = int(entry["custom_id"])
        response = entry.get("response") or {}
        status, body = int(response.get("status_code") or 0), response.get("body")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    if not 0 < task < 2**63:
        return None
    report: BatchAnswer = {"task": task}
    try:
        if status != 200 or not isinstance(body, dict):
            # Lines of "completed" batches have been seen with status 0 and 5xx, and with `error` alone.
            raise classify_status(status, body or entry.get("error"), {})
        report["usage"] = read_usage(body)
        report["result"] = read_completion(body, max_tags)
    except TaggingError as error:
        report["error"] = error.as_json()
    return report
