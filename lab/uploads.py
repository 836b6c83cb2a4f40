"""One upload of the demo: stored and inserted by the member's client, and verified at the end."""

from __future__ import annotations

import asyncio
import mimetypes
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.pictures import Drawing
from lab.stack import Member, Stack
from supabase import AsyncClient, AsyncClientOptions, acreate_client

MAX_PARALLEL_UPLOADS = 16  # files


@dataclass
class Upload:
    """One upload and its progress."""

    member: Member
    drawings: Sequence[Drawing]
    client: AsyncClient
    assets: list[str] = field(default_factory=list)
    job_id: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    batches: int = 0
    strategy: str = ""
    started: float = 0.0
    first_result: float | None = None
    seconds: float | None = None
    verified: int | None = None
    failures: list[tuple[str, str]] = field(default_factory=list)
    events: int = 0

    def observe(self, state: dict[str, Any]) -> None:
        """Updates the progress from an answer of tagging_job()."""
        self.state = state
        now = time.monotonic() - self.started
        if self.first_result is None and state["completed"] > 0:
            self.first_result = now
        if self.seconds is None and state["finished_at"]:
            self.seconds = now

    def summary(self) -> dict[str, Any]:
        return {
            "images": len(self.assets), "strategy": self.strategy, "batches": self.batches,
            "completed": self.state["completed"], "failed": self.state["failed"], "verified": self.verified,
            "first_result_s": round(self.first_result, 2) if self.first_result is not None else None,
            "seconds": round(self.seconds or 0, 2), "batch_complete_events": self.events,
        }  # fmt: skip


def files_of(folder: Path) -> list[Drawing]:
    """Every file of a folder, images or not, with a name that Storage accepts."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return [
        Drawing(
            f"{number:05}-{re.sub(r'[^A-Za-z0-9._-]+', '_', path.name)}",
            mimetypes.guess_type(path.name)[0] or "application/octet-stream",
            path.read_bytes(),
            frozenset(),
        )
        for number, path in enumerate(files)
    ]


async def sign_in(stack: Stack, token: str) -> AsyncClient:
    """A client with the rights of this user's browser."""
    return await acreate_client(
        stack.supabase_url, stack.anon_key, AsyncClientOptions(headers={"Authorization": f"Bearer {token}"})
    )


async def make_upload(stack: Stack, drawings: Sequence[Drawing], number: int) -> Upload:
    """Stores the files like the member's own client. The project's trigger inserts the rows."""
    member = stack.add_member(f"workspace {number}")
    upload = Upload(member, drawings, await sign_in(stack, member.token))
    bucket, gate = upload.client.storage.from_("assets"), asyncio.Semaphore(MAX_PARALLEL_UPLOADS)

    async def store(drawing: Drawing) -> str:
        path = f"{member.workspace}/{drawing.name}"
        async with gate:
            await bucket.upload(path, drawing.data, {"content-type": drawing.content_type})
        return path

    paths = await asyncio.gather(*(store(drawing) for drawing in drawings))
    query = upload.client.table("assets").select("id,storage_path").eq("workspace_id", member.workspace)
    answer = await query.execute()
    ids = {row["storage_path"]: row["id"] for row in answer.data}  # type: ignore[index, call-overload]
    upload.assets = [str(ids[path]) for path in paths]
    return upload


async def enqueue(upload: Upload) -> None:
    upload.started = time.monotonic()
    answer = await upload.client.rpc("enqueue_tagging", {"asset_ids": upload.assets}).execute()
    reply: Any = answer.data
    upload.job_id, upload.strategy, upload.batches = reply["job_id"], reply["strategy"], reply["batches"]


async def verify(upload: Upload, check_tags: bool) -> None:
    """Collects the messages of failed images and, with ``check_tags``, counts the images with the correct tags."""
    rows: dict[str, dict[str, Any]] = {}
    for start in range(0, len(upload.assets), 100):
        answer = await (
            upload.client.table("assets").select("id,tags,tagging_stage,tagging_error")
            .in_("id", upload.assets[start : start + 100]).execute()
        )  # fmt: skip
        rows |= {row["id"]: row for row in answer.data}  # type: ignore[index, call-overload, misc]
    for asset, drawing in zip(upload.assets, upload.drawings, strict=True):
        if rows[asset]["tagging_stage"] == "failed":
            upload.failures.append((drawing.name, rows[asset]["tagging_error"]))
    if check_tags:
        upload.verified = sum(
            rows[asset]["tagging_stage"] == "completed" and set(rows[asset]["tags"]) == drawing.tags
            for asset, drawing in zip(upload.assets, upload.drawings, strict=True)
        )
