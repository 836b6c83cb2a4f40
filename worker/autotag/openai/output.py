"""Parses a batch's output and error files."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence

from autotag.db.messages import BatchAnswer, Field
from autotag.errors import TaggingError
from autotag.openai.answers import read_completion, read_usage
from autotag.openai.classify import classify_status
from autotag.texts import read_json

_MARK = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MAX_LINE_BYTES = 1_000_000  # longer lines are cut; an answer has a few thousand bytes


async def read_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields the lines that are not blank. A line that is too long is cut, so that it is not a valid answer."""
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


def read_line(
    line: bytes, max_tags: int, fields: Sequence[Field] = (), *, may_be_empty: bool = False
) -> BatchAnswer | None:
    """Parses one line of an output or error file; None if it is not a valid answer.

    For the other arguments, see `read_completion`.
    """
    try:
        entry = read_json(line)
        # A line may have no mark: the picture had none, or an earlier version made the line (`prompt.custom_id`).
        task_id, _, mark = str(entry["custom_id"]).partition("-")
        task = int(task_id)
        response = entry.get("response") or {}
        status, body = int(response.get("status_code") or 0), response.get("body")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    if not 0 < task < 2**63:
        return None
    report: BatchAnswer = {"task": task}
    if _MARK.fullmatch(mark):
        report["mark"] = mark
    try:
        if status != 200 or not isinstance(body, dict):
            # "completed" batches were seen to contain lines with status 0 or 5xx, or with only `error`.
            raise classify_status(status, body or entry.get("error"), {})
        report["usage"] = read_usage(body)
        report["result"] = read_completion(body, max_tags, fields, may_be_empty=may_be_empty)
    except TaggingError as error:
        report["error"] = error.as_json()
    return report
