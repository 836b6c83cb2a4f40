"""Automatic mode in tests that seal uploads themselves (the fixture ``sealer``)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg.rows import dict_row

from support import Library

WORKER = "00000000-0000-4000-8000-000000000001"


def seal_one(library: Library) -> dict[str, Any]:
    [row] = library.sql("select * from autotag.seal_uploads(%s)", WORKER)
    return row


def seal(library: Library, most: int = 50) -> list[str]:
    """Seals until nothing is due, nor will be in a moment (`upload_quiet` is 1 ms); the notices."""
    notices = []
    for _ in range(most):
        sealed = seal_one(library)
        notices += [notice["event"] for notice in sealed["notices"]]
        if not sealed["more"]:
            if sealed["wait"] is None or sealed["wait"] > 0.1:
                return notices
            time.sleep(sealed["wait"])
    raise AssertionError(f"something is still due after {most} calls")


def jobs(library: Library) -> list[int]:
    """The sizes of the workspace's jobs."""
    rows = library.sql("select image_count as n from autotag.jobs where workspace_id = %s order by created_at",
                       library.member.workspace)  # fmt: skip
    return [row["n"] for row in rows]


def stages(library: Library, assets: list[str]) -> list[str | None]:
    rows = library.assets()
    return [rows[asset]["tagging_stage"] for asset in assets]


def due_now(library: Library) -> None:
    """Makes postponed uploads due."""
    library.sql("update autotag.uploads set seal_at = '-infinity'")


@contextlib.contextmanager
def transaction(library: Library) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A transaction of the host that is still open."""
    with psycopg.connect(library.stack.database_url(), row_factory=dict_row) as connection:
        yield connection
