"""The operator's commands as processes: status, enqueue, usage, watch."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from typing import Any

import httpx
import psycopg
import pytest

from forked import run_command
from lab.openai_sim.faults import Fault
from lab.stack import Stack
from support import PATIENCE, Library, until, worker


async def run(stack: Stack, *arguments: str, **more: str) -> tuple[int, str, str]:
    """Runs one command. Returns exit code, stdout and stderr."""
    environment = {"PATH": os.environ["PATH"], "COLUMNS": "140", **stack.operator_environment(), **more}
    return await run_command(*arguments, environment=environment)


@asynccontextmanager
async def running(stack: Stack, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "autotag", *arguments, env={"PATH": os.environ["PATH"], **stack.operator_environment()},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


async def status(stack: Stack) -> dict[str, Any]:
    code, out, error = await run(stack, "status", "--json")
    assert code == 0, error
    answer: dict[str, Any] = json.loads(out)
    return answer


async def test_status_of_an_empty_system_says_that_no_worker_is_alive(library: Library) -> None:
    assert (await status(library.stack))["queue"] == {"workspaces": 0, "queued": 0, "delayed": 0, "live": 0}
    code, out, _ = await run(library.stack, "status")
    assert code == 0
    assert "No worker is alive: start one with `autotag worker`." in out


async def test_status_goes_on_where_no_terminal_is(library: Library) -> None:
    async with running(library.stack, "status", "--watch") as process, asyncio.timeout(PATIENCE):
        assert process.stdout is not None
        for _ in range(2):
            while "No worker is alive" not in (await process.stdout.readline()).decode():
                assert not process.stdout.at_eof()


async def test_status_shows_uploads_batches_limits_workers_errors_and_cost(library: Library) -> None:
    stack = library.stack
    stack.simulator.plan.batch_latency = (20, 20)
    stack.simulator.faults.add(Fault(answer="refusal"))
    single, batch = await library.upload(2, seed=3), await library.upload(60)
    async with worker(stack):
        await library.finished(library.enqueue(single))
        told = library.enqueue(batch)
        await until(lambda: library.sql("select 1 from autotag.batches where request_done > 0") != [], "some lines")
        seen = await status(stack)
        [used] = library.sql("select sum(cost) as cost, sum(images) as images from autotag.usage")
        code, shown, _ = await run(stack, "status")
    [job] = seen["jobs"]
    assert (job["job_id"], job["image_count"], job["strategy"]) == (told["job_id"], 60, "batch")
    [one] = seen["batches"]
    assert one["openai_batch_id"] == stack.simulator.batches.describe_all()[0]["id"]
    assert 0 < one["done"] <= one["images"] == 55
    assert one["eta"] < one["eta_p90"]
    assert seen["limits"]["queued_batch_tokens_used"] > 0
    assert 0 < seen["limits"]["requests_left"] <= seen["limits"]["requests_per_minute"] == 500
    [who] = seen["workers"]
    assert who["alive"]
    assert [(e["code"], e["images"]) for e in seen["errors"]] == [("refused", 1)]
    assert (seen["today"]["cost"], seen["today"]["images"]) == (float(used["cost"]), used["images"])
    assert code == 0
    for word in (
        told["job_id"][:8],
        one["openai_batch_id"],
        "The AI declined to describe this image.",
        "requests a minute",
    ):
        assert word in shown


async def test_enqueue_brings_in_what_is_untagged_and_can_go_on_after_a_stop(library: Library) -> None:
    stack = library.stack
    done = await library.upload(2, seed=5)
    async with worker(stack):
        await library.finished(library.enqueue(done))
    library.insert([f"old-{i}.jpg" for i in range(12)])
    workspace = library.member.workspace
    code, out, error = await run(stack, "enqueue", "--workspace", workspace, "--limit", "5", "--yes")
    assert code == 0, error
    cost = re.match(r"5 images, about \$(0\.00\d+), about 4 s\.", out)
    assert cost, out
    assert 0 < float(cost[1]) < 0.01
    assert "5 images in 1 upload." in out
    code, out, error = await run(stack, "enqueue", "--workspace", workspace, "--json")
    assert (code, json.loads(out)["started"], json.loads(out)["predicted"]["images"]) == (2, False, 7)
    assert "Add --yes to start" in error
    code, out, _ = await run(stack, "enqueue", "--workspace", workspace, "--json", "--yes")
    first = json.loads(out)
    assert (code, first["images"], first["jobs"]) == (0, 7, 1)
    assert json.loads((await run(stack, "enqueue", "--workspace", workspace, "--json", "--yes"))[1])["images"] == 0
    assert library.sql("select sum(image_count) as n from autotag.jobs") == [{"n": 14}], "each once"
    # all of them, the tagged ones too, after a given one
    order = sorted(done)
    code, out, _ = await run(
        stack, "enqueue", "--workspace", workspace, "--no-untagged", "--after", order[0], "--json", "--yes"
    )
    assert json.loads(out)["images"] == 1


async def test_enqueue_waits_while_there_is_no_room_and_says_what_it_cannot_do(library: Library) -> None:
    stack = library.stack
    stack.configure(live_images_max=4)
    library.insert([f"old-{i}.jpg" for i in range(6)])
    workspace = library.member.workspace

    def waiting() -> bool:
        """Whether a session of the command is idle after a call of backfill, which was refused."""
        with psycopg.connect(stack.database_url("supabase_admin")) as connection:
            sessions = connection.execute("""select from pg_stat_activity where datname = current_database()
                and state = 'idle' and query like '%autotag.backfill(%'""")
            return sessions.fetchone() is not None

    await run(stack, "enqueue", "--workspace", workspace, "--limit", "3", "--yes")
    await until(lambda: not waiting(), "the first command's session to end")
    again = asyncio.create_task(run(stack, "enqueue", "--workspace", workspace, "--limit", "3", "--yes"))
    await until(waiting, "the second command to wait")
    assert not again.done(), "it waits for room"
    for job in library.sql("select id::text from autotag.jobs"):
        library.rpc("public.cancel_tagging", job["id"])
    code, out, error = await again
    assert (code, "3 images in 1 upload." in out) == (0, True), error
    code, _, error = await run(stack, "enqueue", "--workspace", "nonsense", "--yes")
    assert (code, "invalid input syntax" in error) == (2, True)
    code, _, error = await run(stack, "enqueue", "--workspace", workspace, "--limit", "0")
    assert code == 2


@pytest.mark.parametrize("wrong", [{"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x"}])
async def test_a_database_that_does_not_answer_is_one_sentence(library: Library, wrong: dict[str, str]) -> None:
    for command in (["status"], ["usage", "--workspace", library.member.workspace]):
        code, _, error = await run(library.stack, *command, **wrong)
        assert (code, error.count("\n")) == (1, 1)
        assert "check DATABASE_URL" in error


async def test_usage_as_table_csv_and_json(library: Library) -> None:
    stack = library.stack
    assets = await library.upload(3)
    async with worker(stack):
        await library.finished(library.enqueue(assets))
    workspace = library.member.workspace
    [row] = csv.DictReader(io.StringIO((await run(stack, "usage", "--workspace", workspace, "--csv"))[1]))
    [same] = json.loads((await run(stack, "usage", "--workspace", workspace, "--json"))[1])
    [real] = library.sql("select *, round(cost, 8) as rounded from autotag.usage")
    assert (row["user_id"], int(row["images"]), row["model"]) == (library.member.user, 3, real["model"])
    assert (row["service_tier"], int(row["reasoning_tokens"])) == ("default", 0)
    assert re.fullmatch(r"0\.\d{1,8}", row["cost"]), "no exponent, at most eight decimals"
    assert Decimal(row["cost"]) == real["rounded"]
    assert (same["images"], same["input_tokens"]) == (3, real["input_tokens"])
    assert same["cost"] == float(real["rounded"])
    shown = (await run(stack, "usage", "--workspace", workspace))[1]
    assert library.member.user in shown
    assert "unknown" not in shown.lower()
    none = await run(stack, "usage", "--workspace", workspace, "--csv", "--until", "2020-01-01")
    assert none[1].strip() == (
        "user_id,day,model,service_tier,images,requests,input_tokens,cached_tokens,cache_write_tokens,output_tokens,"
        "reasoning_tokens,cost"
    )


async def test_an_unknown_cost_is_said_and_never_shown_as_zero(library: Library) -> None:
    stack, workspace = library.stack, library.member.workspace
    stack.simulator.plan.models = frozenset({"my-model"})
    stack.configure(model="my-model")
    await library.upload(2)
    out = (await run(stack, "enqueue", "--workspace", workspace, "--yes"))[1]
    assert out.startswith("2 images, cost unknown (autotag.models has no price for my-model), about 4 s."), out
    async with worker(stack):
        await until(lambda: library.sql("select 1 from autotag.jobs where completed = 2") != [], "both images")
        shown = (await run(stack, "status"))[1]
    assert "2 answers of unknown cost (my-model)" in shown
    assert "cost unknown" in shown, "in the model's own line"
    assert "$" not in shown
    [row] = csv.DictReader(io.StringIO((await run(stack, "usage", "--workspace", workspace, "--csv"))[1]))
    assert (row["model"], row["cost"]) == ("my-model", "")
    [same] = json.loads((await run(stack, "usage", "--workspace", workspace, "--json"))[1])
    assert same["cost"] is None
    shown = (await run(stack, "usage", "--workspace", workspace))[1]
    assert "Unknown: autotag.models has no price for my-model" in shown
    assert "$" not in shown


async def test_status_shows_the_model_its_end_and_what_its_provider_lacks(library: Library) -> None:
    stack = library.stack
    library.sql(
        "update autotag.models set shutdown_date = (now() at time zone 'utc')::date + 80, successor = 'gpt-6.1-terra'"
        " where name = 'gpt-6-luna'"
    )
    library.sql("update autotag.provider_limits set proven_at = null, has_batches = false, has_rate_headers = false")
    shown = (await run(stack, "status"))[1]
    for words in (
        "gpt-6-luna", "none", "not proven yet: one image at a time", "in 80 days; its successor is gpt-6.1-terra",
        "the provider has no Batch API, no rate-limit headers",
    ):  # fmt: skip
        assert words in shown, shown
    library.sql("select autotag.pause_tagging('no such bucket', 'storage')")
    shown = (await run(stack, "status"))[1]
    assert "Tagging is paused because of Storage: no such bucket" in shown
    assert "not proven yet" not in shown, "the reason is said already"


async def joined(library: Library, shown: asyncio.StreamReader) -> None:
    """Waits until `autotag watch` has joined both topics, by messages on the second topic that are repeated until one
    is shown."""
    topic = f"tagging:{library.member.workspace}"
    async with asyncio.timeout(PATIENCE):
        while True:
            library.sql("select realtime.send('{}', 'job-progress', %s, true)", topic)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await shown.readline()
                    return


async def test_watch_follows_the_topics_as_browsers_do(library: Library) -> None:
    stack = library.stack
    stack.configure(realtime_max_images=0, chunk_max_images=4)
    assets = await library.upload(8)
    async with running(stack, "watch", "--workspace", library.member.workspace, "--json") as process, worker(stack):
        assert process.stdout is not None
        await joined(library, process.stdout)
        await library.finished(library.enqueue(assets))
        heard: list[tuple[str, str]] = []
        async with asyncio.timeout(PATIENCE):
            while not {"batch-complete", "job-complete"} <= {event for _, event in heard}:
                message = json.loads(await process.stdout.readline())
                heard.append((message["topic"], message["event"]))
    private = f"tagging:{library.member.workspace}"
    assert ("batch-updates", "batch-complete") in heard
    assert (private, "job-complete") in heard


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\n\u202e\u2066[red][link=https://evil.example]\x1b]8;;https://evil.example\x1b\\x\0"


def is_text(shown: str) -> bool:
    """Whether a text has no control characters except line ends, and none that change the direction of writing."""
    return not re.search(r"[^\n\x20-\x7e\xa0-\U0010ffff]|[\u200e\u200f\u2028-\u202e\u2066-\u2069]", shown)


async def test_what_anybody_broadcasts_is_one_line_of_text_and_ends_nothing(library: Library) -> None:
    stack = library.stack
    payloads = [{"batch_id": HOSTILE, HOSTILE: "x" * 100_000}, {"batch_id": "the-last"}]
    async with running(stack, "watch") as process, httpx.AsyncClient() as anybody:
        assert process.stdout is not None
        lines: list[str] = []
        async with asyncio.timeout(PATIENCE):
            while not any("the-last" in line for line in lines):
                for payload in payloads:  # again until the command has joined
                    message = {"topic": "batch-updates", "event": "batch-complete", "payload": payload}
                    await anybody.post(
                        f"{stack.supabase_url}/realtime/v1/api/broadcast", headers={"apikey": stack.anon_key},
                        json={"messages": [message]},
                    )  # fmt: skip
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        while True:
                            lines.append((await process.stdout.readline()).decode())
    assert any("\\x1b[2J" in line for line in lines), "the attempt is seen"
    for line in lines:
        assert is_text(line), line
        assert re.match(r"\d\d:\d\d:\d\d  batch-updates ", line), line
        assert len(line) < 1000


async def test_hostile_words_in_the_database_are_text_for_every_command(library: Library) -> None:
    stack, workspace = library.stack, library.member.workspace
    hostile = HOSTILE.replace("\0", "")  # Postgres stores none
    stack.simulator.plan.models = frozenset({hostile})
    stack.configure(model=hostile)
    await library.upload(2)
    library.sql("select autotag.pause_tagging(%s, 'provider')", hostile)
    for command in (
        ["status"], ["doctor"], ["enqueue", "--workspace", workspace, "--yes"], ["usage", "--workspace", workspace],
        ["enqueue", "--workspace", hostile, "--yes"], ["compare", "--workspace", workspace, "--model", hostile, "--yes"],
    ):  # fmt: skip
        _, out, error = await run(stack, *command)
        shown = out + error
        assert shown, command
        assert is_text(shown), (command, shown)
        assert "Traceback" not in shown, (command, shown)
