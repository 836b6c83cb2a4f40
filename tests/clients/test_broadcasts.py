"""`batch-complete` reaches real clients: supabase-js (anonymous and signed in) and Python's realtime."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from lab.demo import batch_updates
from lab.pictures import draw
from lab.stack import Stack
from support import PATIENCE, Library, until, worker

HERE = Path(__file__).parent


@contextlib.asynccontextmanager
async def node(script: str, **environment: str) -> AsyncIterator[list[dict[str, Any]]]:
    """Runs a script with Node. Yields the growing list of the JSON lines that it prints."""
    process = await asyncio.create_subprocess_exec(
        "node", "--no-warnings", str(HERE / script), env={"PATH": os.environ["PATH"], **environment},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    lines: list[dict[str, Any]] = []
    assert process.stdout is not None
    stdout = process.stdout

    async def read() -> None:
        async for line in stdout:
            lines.append(json.loads(line))

    reader = asyncio.create_task(read())
    try:
        yield lines
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reader


def keys(stack: Stack) -> dict[str, str]:
    return {"SUPABASE_URL": stack.supabase_url, "SUPABASE_ANON_KEY": stack.anon_key}


def joined(lines: list[dict[str, Any]], topic: str) -> bool:
    return {"topic": topic, "status": "SUBSCRIBED"} in lines


async def test_the_existing_clients_snippet_hears_each_batch_once(library: Library) -> None:
    stack, member = library.stack, library.member
    private = f"tagging:{member.workspace}"
    assets = await library.upload(210)
    async with (
        node("listen.mjs", **keys(stack)) as anonymous,
        node("listen.mjs", **keys(stack), MEMBER_TOKEN=member.token, PRIVATE_TOPIC=private) as signed_in,
        batch_updates(stack) as python,
    ):
        await until(lambda: joined(anonymous, "batch-updates"), "supabase-js to join")
        await until(lambda: joined(signed_in, "batch-updates") and joined(signed_in, private), "the member to join")
        async with worker(stack):
            [job] = await library.finished(library.enqueue(assets))
        expected = sorted(batch["batch_id"] for batch in job["batches"])
        assert len(expected) == 3
        await until(lambda: len(python) >= 3, "realtime-py to hear of every batch")

        def heard(lines: list[dict[str, Any]]) -> list[str]:
            return sorted(line["payload"]["batch_id"] for line in lines if line.get("event") == "batch-complete")

        await until(
            lambda: len(heard(anonymous)) >= 3 and len(heard(signed_in)) >= 3, "supabase-js to hear of every batch"
        )
        await until(
            lambda: any(line.get("private") == "job-complete" for line in signed_in), "the member's job-complete"
        )
        assert heard(anonymous) == heard(signed_in) == sorted(python) == expected
        privately = [line for line in signed_in if "private" in line]
        assert sorted(p["payload"]["batch_id"] for p in privately if p["private"] == "batch-complete") == expected
        assert not [line for line in anonymous if "private" in line]


async def test_the_existing_clients_snippet_hears_of_an_upload_without_batches(library: Library) -> None:
    """One message arrives, after the last image. It has the id that Realtime adds, and no batch."""
    assets = await library.upload(7)
    async with node("listen.mjs", **keys(library.stack)) as lines:
        await until(lambda: joined(lines, "batch-updates"), "supabase-js to join")
        async with worker(library.stack):
            await library.finished(library.enqueue(assets))
        await until(lambda: any("event" in line for line in lines), "the message")
    [payload] = [line["payload"] for line in lines if "event" in line]
    assert set(payload) == {"id", "batch_id"}
    assert payload["batch_id"] is None


async def test_a_stranger_cannot_join_a_workspaces_topic(library: Library) -> None:
    stack, stranger = library.stack, library.stack.add_member("stranger")
    private = f"tagging:{library.member.workspace}"
    for environment in ({"MEMBER_TOKEN": stranger.token}, {}):
        async with node("listen.mjs", **keys(stack), PRIVATE_TOPIC=private, **environment) as lines:
            await until(lambda: any(line.get("topic") == private for line in lines), "an answer")
            answer = next(line for line in lines if line.get("topic") == private)
            assert answer["status"] == "CHANNEL_ERROR"
            assert "You do not have permissions" in answer["error"]


async def test_supabase_js_drives_the_whole_job(library: Library, tmp_path: Path) -> None:
    drawing = next(d for d in draw(3) if d.content_type == "image/png")
    picture = tmp_path / "picture.png"
    picture.write_bytes(drawing.data)
    async with (
        worker(library.stack),
        node(
            "drive.mjs", **keys(library.stack), MEMBER_TOKEN=library.member.token,
            WORKSPACE_ID=library.member.workspace, PICTURE=str(picture),
        ) as lines,
        asyncio.timeout(PATIENCE),
    ):  # fmt: skip
        await until(lambda: bool(lines), "the script's report")
    [told] = lines
    assert set(told["row"]["tags"]) == drawing.tags
    assert (told["row"]["tagging_stage"], told["row"]["tagging_progress"]) == ("completed", 100)
    assert (told["job"]["completed"], told["job"]["progress"]) == (1, 100)
    assert told["refused"]["code"] == "PT400"
    assert json.loads(told["refused"]["details"])["code"] == "no_images"
