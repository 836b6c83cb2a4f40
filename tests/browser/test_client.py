"""The npm package in headless Chromium: its display of 2,000 images, on a slow line, with expired tokens, after signing
out.

All scenarios share one browser, one stack and one worker; each has a workspace of its own. ``AUTOTAG_CLIENT=old`` runs them with the
snippets that the documents had before the package. ``AUTOTAG_TOKEN_SECONDS=60 AUTOTAG_TOKEN_LAPSES=5`` keeps the pages whose tokens
lapse open for five minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from chromium import need_chromium, outcome
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from autotag.http.serve import serve
from conftest import ROOT
from lab.pictures import draw
from lab.postgres import free_port
from lab.stack import HOST, Stack
from npm import BIN, built_package
from support import PATIENCE, Library, connected, until, worker

HERE = Path(__file__).parent
OLD = os.environ.get("AUTOTAG_CLIENT") == "old"
SCENARIOS = ["large", "slow", "two", "strict", "lapse", "sessions", "users", "offline", "cancel", "reload", "quota", "stranger",
             "plain", "react"]  # fmt: skip
#: Set to examples/next, after `npm ci` there, to build and drive that example, too (the scenario `next`). It is 300 MB, so CI does.
NEXT = (Path.cwd() / os.environ["AUTOTAG_NEXT"]) if "AUTOTAG_NEXT" in os.environ else None
PAGE = '<!doctype html><meta charset="utf-8"><title>page</title><div id="root"></div><script type="module" src="page.js"></script>'


WATCH = """
create table public.noted (id text);
create function public.note_message() returns trigger language plpgsql security definer set search_path = '' as $$
begin
  insert into public.noted select new.payload ->> 'id' from public.assets a
  where a.workspace_id = '{workspace}' and a.tagging_stage <> 'queued' and a.storage_path like '%picture%' limit 1;
  return null;
end $$;
create trigger note_message after insert on realtime.messages for each row execute function public.note_message();
"""
#: autotag's settings before each scenario, and how many seconds a batch takes at the provider.
USUAL = {"batch_poll_interval": "0.2 s", "chunk_delay": "0.1 s", "broadcast_interval": "0", "chunk_max_images": 50}
USUAL_LATENCY = (2.0, 3.0)
ELSEWHERE, KEY = "http://supabase.test", "sb_publishable_test"  # of the examples, until they are pointed at the stack


class Helper:
    """Handles the requests of the driver."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.libraries: dict[str, Library] = {}

    async def answer(self, request: dict[str, Any]) -> Any:
        return await getattr(self, request.pop("do"))(**request)

    async def workspace(
        self, images: int = 0, rows: int = 0, quota: int | None = None, files: int = 0
    ) -> dict[str, Any]:
        """Makes a member of a new workspace with stored pictures, with older rows that are tagged, and with files to
        upload."""
        library = Library(self.stack)
        member = library.member
        self.libraries[member.user] = library
        stored = await library.upload_files(list(draw(images))) if images else []
        if rows:
            library.sql(
                "insert into public.assets (workspace_id, storage_path, created_at, tagging_stage, tagging_progress, tags)"
                " select %s, %s || '/' || i, now() - i * interval '1 minute', 'completed', 100, '{barn,field}'"
                " from generate_series(1, %s) i", member.workspace, member.workspace, rows)  # fmt: skip
        if quota:
            library.sql("insert into autotag.quotas (workspace_id, scope, period, max_images)"
                        " values (%s, 'workspace', 'day', %s)", member.workspace, quota)  # fmt: skip
        drawn = [(self.folder / drawing.name, drawing.data) for drawing in draw(files)] if files else []
        for path, data in drawn:
            path.write_bytes(data)
        return {"member": {"user": member.user, "workspace": member.workspace}, "paths": [path for path, _ in stored],
                "files": [str(path) for path, _ in drawn]}  # fmt: skip

    async def mint(self, member: str, lifetime: float) -> dict[str, Any]:
        token = self.stack.token(member, lifetime=lifetime, aal="aal1", session_id="s")
        ends = jwt.decode(token, options={"verify_signature": False})["exp"]
        return {"token": token, "until": (ends - 1) * 1000}

    async def watch(self, member: dict[str, str]) -> None:
        """From now on, records each message that is sent in the transaction in which a row of the upload leaves
        `queued`."""
        with connected(self.stack.database_url("supabase_admin")) as connection:
            connection.execute(WATCH.replace("{workspace}", member["workspace"]).encode())

    async def watched(self) -> list[str]:
        with connected(self.stack.database_url("supabase_admin")) as connection:
            noted = [row[0] for row in connection.execute("select id from public.noted").fetchall()]
            connection.execute("drop table public.noted; drop function public.note_message cascade")
        return noted

    async def configure(self, **columns: Any) -> None:
        self.stack.configure(**columns)

    async def provider(
        self, batch_latency: tuple[float, float], hold: bool = False, cancelled: bool = False
    ) -> dict[str, Any]:
        """Sets how long batches last, and whether cancelled ones stay `cancelling` (`hold`) or may end. `cancelled`:
        waits first until the newest one is being cancelled."""
        plan, batches = self.stack.simulator.plan, self.stack.simulator.batches
        plan.batch_latency = tuple(batch_latency)
        if cancelled:
            await until(lambda: batches.describe_all()[-1]["status"].startswith("cancel"), "the provider to know")
        told = {"batches": [batch["status"] for batch in batches.describe_all()]}
        if plan.batch_may_end:
            plan.batch_may_end.set()
        plan.batch_may_end = asyncio.Event() if hold else None
        return told

    async def enqueue(self, member: dict[str, str], paths: list[str], wait: bool = False) -> None:
        """Uploads as another window of the member; `wait`: until all uploads of the workspace have ended."""
        library = self.libraries[member["user"]]
        library.enqueue(library.insert(paths))
        if wait:
            going_on = "select 1 from autotag.jobs where workspace_id = %s and finished_at is null"
            await until(lambda: not library.sql(going_on, member["workspace"]), "the uploads to be over")


async def play(
    stack: Stack, pages: str, scenarios: list[str], folder: Path, following: str | None
) -> dict[str, dict[str, Any]]:
    """Plays each scenario, and returns what it saw."""
    helper, outcomes = Helper(stack, folder), {}
    lifetime = int(os.environ.get("AUTOTAG_TOKEN_SECONDS", "3"))
    lapses = int(os.environ.get("AUTOTAG_TOKEN_LAPSES", "3"))
    given = {"url": stack.supabase_url, "anonKey": stack.anon_key, "pages": pages, "next": following,
             "client": "old" if OLD else "package", "patience": int(os.environ.get("AUTOTAG_PATIENCE", "60000")),
             "lifetime": lifetime, "lapses": lapses}  # fmt: skip
    patience = 2 * PATIENCE + (2 + lapses) * lifetime
    for name in scenarios:
        outcomes[name] = await outcome("client.mjs", name, given, answer=helper.answer, patience=patience)
        stack.configure(**USUAL)
        await helper.provider(USUAL_LATENCY)
    return outcomes


async def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env={"PATH": os.environ["PATH"], **environment}, stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0, command


def point(folder: Path, stack: Stack) -> None:
    """Writes the files that need no bundler, and the stack's address into all files."""
    (folder / "index.html").write_text(PAGE)
    for path in (ROOT / "examples" / "plain").iterdir():
        (folder / "plain" / path.name).write_bytes(path.read_bytes())
    (folder / "plain" / "config.js").write_text(f"export const url = '{ELSEWHERE}'; export const key = '{KEY}'")
    for path in folder.rglob("*.js"):
        text = path.read_text()
        if ELSEWHERE in text:
            path.write_text(text.replace(ELSEWHERE, stack.supabase_url).replace(KEY, stack.anon_key))


@contextlib.asynccontextmanager
async def pages(stack: Stack, folder: Path) -> AsyncIterator[str]:
    """The address of the page and, in folders, of the examples: bundled, and with the stack's address."""
    built_package()
    (folder / "plain").mkdir(parents=True)
    await asyncio.gather(
        run("node", HERE / "client" / "build.mjs", HERE / "client" / "page.jsx", folder / "page.js", cwd=ROOT),
        *(run(BIN / "vite", "build", "--base=./", f"--outDir={folder / name}", cwd=ROOT / "examples" / name,
              VITE_SUPABASE_URL=ELSEWHERE, VITE_SUPABASE_PUBLISHABLE_KEY=KEY) for name in ("react", "vue")),
    )  # fmt: skip
    point(folder, stack)
    port = free_port()
    async with serve(Starlette(routes=[Mount("/", StaticFiles(directory=folder, html=True))]), HOST, port):
        yield f"http://{HOST}:{port}"


@contextlib.asynccontextmanager
async def next_app(stack: Stack) -> AsyncIterator[str | None]:
    """Builds and starts the example in Next.js for the stack, and yields its address."""
    if not NEXT:
        yield None
        return
    folder, port = NEXT, free_port()
    command = folder / "node_modules" / ".bin" / "next"
    environment = {"NEXT_PUBLIC_SUPABASE_URL": stack.supabase_url, "NEXT_PUBLIC_SUPABASE_PUBLISHABLE_KEY": stack.anon_key,
                   "NEXT_TELEMETRY_DISABLED": "1"}  # fmt: skip
    await run(command, "build", cwd=folder, **environment)
    process = await asyncio.create_subprocess_exec(
        command, "start", "--hostname", HOST, "--port", str(port), cwd=folder,
        env={"PATH": os.environ["PATH"], **environment}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            while b"Ready" not in await process.stdout.readline():
                pass
        yield f"http://{HOST}:{port}/"
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.long
async def test_what_users_see(stack: Stack, tmp_path: Path, subtests: pytest.Subtests) -> None:
    need_chromium()
    stack.simulator.plan.batch_latency = USUAL_LATENCY
    only = os.environ.get("AUTOTAG_SCENARIOS", ",".join(SCENARIOS + ["next"] * bool(NEXT))).split(",")
    async with next_app(stack) as following, pages(stack, tmp_path / "pages") as address, worker(stack):
        outcomes = await play(stack, address, only, tmp_path, following)
    for name in only:
        with subtests.test(name):
            result = outcomes[name]
            print(name, json.dumps(result)[:1500], file=sys.stderr)
            assert "error" not in result, result["error"]
            seen = result["seen"]
            assert seen.pop("problems") == []
            CHECKS[name](seen)


def large(seen: dict[str, Any]) -> None:
    assert seen["order"], "the newest rows come first"
    assert seen["lists"]
    assert seen["bytes"] <= 40_000, "only changed rows are fetched, and of these only what changes"
    assert seen["requests"] <= seen["messages"], "at most one request for each message"
    # Milliseconds from the first message of a change to the change on the page, at 400 kbit/s: 89 to 273. The goal is 1,000; the rest
    # is for machines that do something else meanwhile.
    assert seen["first"] <= 3_000
    assert seen["idle"] == [], "nothing is polled"


def one_join(seen: dict[str, Any]) -> None:
    assert seen["joins"] == 1, "all parts of the page share one channel"


def lapse(seen: dict[str, Any]) -> None:
    assert seen["joins"] > 1, "a token that has lapsed ends the subscription"
    assert seen["tokens"] >= seen["joins"], "each join has a new token"


def users(seen: dict[str, Any]) -> None:
    assert seen["out"]["frames"] == 0, "nothing arrives for a user who has signed out"
    assert seen["other"]["frames"] == 0, "nor for the next one"
    assert seen["out"]["shown"] == seen["other"]["shown"] == []
    assert not seen["other"]["leaked"], "no row of the former user, not even for a moment"
    assert sum("refused" in status for status in seen["statuses"]) == 2


def offline(seen: dict[str, Any]) -> None:
    assert "offline" in seen["statuses"], "the page can say so"
    shown = ["8 of 8"] if OLD else ["3 of 3 completed", "8 of 8 completed"]
    assert [job.strip() for job in seen["jobs"]] == shown, "they are over and shown, also the one that nobody told of"


def nothing_more(_: dict[str, Any]) -> None:
    pass


def reload(seen: dict[str, Any], failed: int = 46) -> None:
    assert sorted(seen["stages"]) == ["completed"] * 5 + ["failed"] * failed
    assert seen["batches"][-1].startswith("cancel")


def cancel(seen: dict[str, Any]) -> None:
    assert seen["batches"][-1] == "cancelling", "the page says so while the provider still has the images"
    reload(seen, failed=7)


def slow(seen: dict[str, Any]) -> None:
    assert seen["ahead"] > 1_000, "milliseconds from the first change on the page to the end of the upload"


def quota(seen: dict[str, Any]) -> None:
    assert seen["refusal"].startswith("The daily quota of this workspace allows 3 more images today. Upload fewer")
    assert seen["texts"] == ["Not tagged"] * 5


def stranger(seen: dict[str, Any]) -> None:
    assert seen["joins"] == 1, "a refusal is not tried again for ever"
    assert [status for status in seen["statuses"] if "refused" in status] == ["refused: refused"]


def example(seen: dict[str, Any]) -> None:
    assert seen["tags"] is False or seen["tags"] >= 4
    assert "allows 1 more images today" in seen["refusal"]
    assert sorted(seen["stages"]) == ["completed"] * 2 + ["none"] * 2


CHECKS = {"large": large, "slow": slow, "two": one_join, "strict": one_join, "lapse": lapse, "sessions": nothing_more,
          "users": users, "offline": offline,
          "cancel": cancel, "reload": reload, "quota": quota, "stranger": stranger, "plain": example, "react": example, "next": example}  # fmt: skip
