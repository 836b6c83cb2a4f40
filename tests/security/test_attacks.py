"""Each role can do what the documentation says and nothing else: attempts of every kind of attacker, and controls that
break one defence each and are found."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from rich.console import Console

from attacks import api, broadcaster, member, port, topics, uploader
from attacks.attempt import Attempt, run
from attacks.scene import Scene, set_scene
from autotag.console import say, say_json
from autotag.follow import follow
from autotag.operate import describe_payload
from autotag.status import render
from autotag_local.postgres import free_port
from autotag_local.stack import Stack, worker_process
from support import paid, until, widen, worker

LEAST = 60  # attempts of each role


@pytest.fixture
async def scene(stack: Stack) -> AsyncIterator[Scene]:
    async with set_scene(stack) as furnished:
        yield furnished


def assert_nothing(findings: list[str]) -> None:
    assert not findings, f"{len(findings)} attempts had an effect or an odd answer:\n" + "\n".join(findings[:5000])


def outsiders(scene: Scene, caller: str) -> list[Attempt]:
    """What somebody tries who has nothing to do with the victim's workspace."""
    kinds = (api.rpcs, api.rows, api.storage, api.tokens, topics.private_topics, api.statements)
    return [attempt for kind in kinds for attempt in kind(scene, caller)]


@pytest.mark.parametrize("caller", ["anon", "nobody", "neighbour"])
async def test_outsiders(scene: Scene, caller: str) -> None:
    attempts = outsiders(scene, caller)
    assert len(attempts) >= LEAST
    before = scene.snapshot(caller)
    async with scene.victim_listens():
        found = await run(scene, attempts)
    assert_nothing(found + await scene.findings(before, caller))


async def test_a_member(scene: Scene) -> None:
    """Who may use five images a day gets five, whatever they try, by the provider's book too."""
    assets = await member.furnish(scene)
    before = scene.snapshot("member")
    attempts = [*member.tables(scene), *member.rpcs(scene), *member.limits(scene, assets)]
    assert len(attempts) >= LEAST
    async with scene.victim_listens():
        found = await run(scene, attempts)
    found += await scene.findings(before, "member") + member.cheating(scene)
    assert_nothing(found)
    async with worker(scene.stack):
        await until(lambda: not scene.member.sql("select id from autotag.jobs where finished_at is null"), "every upload")
    assert len(paid(scene.stack)) <= member.QUOTA + 1, "the victim's one image is paid for, too"
    scene.victim.check_tags([scene.ids["live asset"]])


@pytest.fixture
async def served(scene: Scene, tmp_path: Path) -> AsyncIterator[port.Ports]:
    """A worker process with both its ports, which has done what there was to do; its log is in `tmp_path`."""
    ports = port.Ports(free_port(), free_port())
    environment = scene.stack.worker_environment() | {
        "AUTOTAG_HTTP": f"{port.HOST}:{ports.http}", "AUTOTAG_WEBHOOK": f"{port.HOST}:{ports.webhook}",
        "OPENAI_WEBHOOK_SECRET": scene.stack.simulator.plan.webhook_secret,
    }  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        async with worker_process(environment, log):
            await idle(scene)
            yield ports


async def idle(scene: Scene) -> None:
    await until(lambda: not scene.member.sql("select id from autotag.jobs where finished_at is null"), "every upload")
    await asyncio.sleep(0.3)  # and the last reports


def log_findings(log: Path, most: int) -> list[str]:
    """What should not stand in a log."""
    text = log.read_bytes()
    found = [f"log: {len(text):,} bytes"] if len(text) > most else []
    found += [f"log: {line[:300]!r}" for line in text.splitlines() if not _is_event(line)]
    return found + [f"log: {line[:3000]!r}" for line in text.splitlines() if b"Traceback" in line or b"unexpected_error" in line]


def _is_event(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict) and line.isascii() and line.decode().isprintable()
    except ValueError:
        return False


async def test_the_ports(scene: Scene, served: port.Ports, tmp_path: Path) -> None:
    secret = scene.stack.simulator.plan.webhook_secret
    attempts = [*port.requests(served), *port.deliveries(served, secret)]
    assert len(attempts) >= LEAST
    before, asked_before = scene.snapshot(), len(scene.stack.simulator.book)
    found = await run(scene, attempts) + await scene.findings(before)
    found += [f"asked: {entry}" for entry in scene.stack.simulator.book[asked_before:]]
    # With the secret: a look at OpenAI, and the deliveries' ids.
    found += await run(scene, port.stolen(served, secret))
    found += [line for line in await scene.findings(before) if "autotag.webhooks got" not in line]
    found += [f"asked: {e}" for e in scene.stack.simulator.book[asked_before:] if (e["method"], e["path"]) != ("GET", "/v1/batches")]
    assert_nothing(found + log_findings(tmp_path / "log", 100_000))
    assert b"200 OK" in await port.exchange(served.http, b"GET /healthz HTTP/1.0\r\n\r\n")


async def test_the_public_topic(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said there reaches who listens there, as text, and nothing else."""
    attempts, told = broadcaster.attempts(scene), []
    assert len(attempts) >= LEAST
    before = scene.snapshot()

    def show(topic: str, event: str, payload: dict[str, Any]) -> None:
        told.append(payload)
        say(f"12:00:00  {topic:<45}  {event:<14}  {describe_payload(payload)}")
        say_json({"topic": topic, "event": event, "payload": payload})

    watching = asyncio.create_task(follow(scene.stack.supabase_url, scene.stack.secret_key, scene.victim.member.workspace, show))
    try:
        await asyncio.sleep(0.5)
        async with scene.victim_listens():
            found = await run(scene, attempts)
        found += await scene.findings(before)
        scene.victim.sql("""select realtime.send('{"batch_id": "real"}'::jsonb, 'batch-complete', 'batch-updates', false)""")
        await until(lambda: any(p.get("batch_id") == "real" for p in told) or watching.done(), "the real message")
        assert not watching.done(), watching.exception()
    finally:
        watching.cancel()
    shown = capsys.readouterr().out
    assert len(told) > 1000, "the forged ones arrive"
    found += [f"shown: {line[:200]!r}" for line in shown.split("\n") if not (line.isprintable() and len(line) < 20_000 or line.startswith("{"))]
    found += [f"shown: {line[:200]!r}" for line in shown.split("\n") if not line.startswith(("12:00:00  batch-updates", "12:00:00  tagging:", "{")) and line]
    assert_nothing(found)


async def test_an_uploader(scene: Scene, tmp_path: Path) -> None:
    """Each hostile upload ends with a sentence of its own, and everybody else's pictures get their tags meanwhile."""
    uploads, stack = uploader.Uploads(), scene.stack
    await uploads.insert(scene)
    widen(stack)
    stack.configure(batch_max_images=1000, chunk_max_images=900, chunk_size=200)
    attempts = uploads.attempts()
    assert len(attempts) >= LEAST
    environment = stack.worker_environment() | {
        "AUTOTAG_IMAGE_MAX_BYTES": str(uploader.BYTES_MOST), "AUTOTAG_IMAGE_MAX_PIXELS": str(uploader.PIXELS_MOST),
        "AUTOTAG_IMAGE_HOSTS": uploader.HOSTS,
    }  # fmt: skip
    scene.member.enqueue([asset for asset, _ in uploads.assets.values()])
    scene.victim.enqueue(uploads.good)
    with (tmp_path / "log").open("wb") as log:
        async with worker_process(environment, log) as process:
            await idle(scene)
            cpu = sum(os.times()[2:4]), process.pid
    found = await run(scene, attempts) + uploader.stored(scene)
    scene.victim.check_tags([*uploads.good, scene.ids["live asset"]])
    asked = Counter(entry["picture"] for entry in paid(stack))
    found += [f"asked: {entry}" for entry in stack.simulator.book if entry["status"] not in (200, 404)]
    found += log_findings(tmp_path / "log", 200 * 400 + 20_000)
    shown = io.StringIO()
    with psycopg.connect(stack.database_url(), row_factory=dict_row) as connection:
        row = connection.execute("select autotag.status() as s").fetchone()
    Console(file=shown, width=250, force_terminal=True, color_system=None).print(render(row["s"]))
    found += [f"shown: {line[:200]!r}" for line in shown.getvalue().split("\n") if not line.isprintable()]
    assert_nothing(found)
    assert asked, cpu
