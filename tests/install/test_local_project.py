"""This repository as a project of the Supabase CLI: config, seed, and the demo against such a stack.

What `supabase start` runs in Docker cannot run everywhere; the same path goes through the local edge here.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import psycopg
import pytest

from cli_tools import BINARY, supabase
from conftest import ROOT
from lab.postgres import LocalPostgres
from lab.project import parse_env
from lab.stack import edge_stack
from support import rpc

ALICE, HERS = "aaaaaaaa-0000-4000-8000-000000000001", "11111111-0000-4000-8000-000000000001"
BOB = "bbbbbbbb-0000-4000-8000-000000000002"


def test_the_cli_reads_the_config_and_would_refuse_a_wrong_one(
    postgres: LocalPostgres, bare: str, tmp_path: Path
) -> None:
    url = postgres.url(database=bare)
    supabase("migration", "list", f"--remote={url}", "--workdir", str(ROOT))
    shutil.copytree(ROOT / "supabase", tmp_path / "supabase")
    config = tmp_path / "supabase" / "config.toml"
    config.write_text(config.read_text().replace("public = false", 'public = "perhaps"'))
    with pytest.raises(AssertionError, match="Expected boolean"):
        supabase("migration", "list", f"--remote={url}", "--workdir", str(tmp_path))


def test_the_seed_gives_two_workspaces_that_do_not_see_each_other(postgres: LocalPostgres, bare: str) -> None:
    url = postgres.url(database=bare)
    said = supabase("db", "push", "--include-seed", f"--remote={url}", "--yes", "--workdir", str(ROOT))
    assert "seed" in said.lower()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((ROOT / "supabase" / "seed.sql").read_bytes())  # a second time: no harm
        paths = [row[0] for row in connection.execute("select storage_path from public.assets order by 1")]
    files = ROOT / "supabase" / "seed" / "assets"
    assert paths == sorted(str(path.relative_to(files)) for path in files.rglob("*.png"))
    for user, seen in ((ALICE, 3), (BOB, 3), ("cccccccc-0000-4000-8000-000000000003", 0)):
        claims = json.dumps({"sub": user, "role": "authenticated"})
        with psycopg.connect(postgres.url("authenticator", bare)) as connection:
            connection.execute(
                "select set_config('request.jwt.claims', %s, true), set_config('role', 'authenticated', true)",
                (claims,),
            )
            row = connection.execute("select count(*), count(distinct workspace_id) from public.assets").fetchone()
        assert row == (seen, min(seen, 1))


@pytest.mark.long
async def test_the_demo_runs_against_the_variables_of_supabase_status(postgres: LocalPostgres, bare: str) -> None:
    supabase("db", "push", "--include-seed", f"--remote={postgres.url(database=bare)}", "--yes", "--workdir", str(ROOT))
    async with edge_stack(postgres, bare) as stack:
        variables = {
            "API_URL": stack.supabase_url, "DB_URL": stack.owner_url, "ANON_KEY": stack.anon_key,
            "SERVICE_ROLE_KEY": stack.secret_key, "JWT_SECRET": stack.jwt_secret,
        }  # fmt: skip
        code, out, err = await demo("--supabase", "--json", **variables)
        assert code == 0, err
        told = json.loads(out.splitlines()[-1])
        assert [u["verified"] for u in told["uploads"]] == [3, 30, 120, 300]
        assert [u["batch_complete_events"] for u in told["uploads"]] == [0, 0, 1, 3]
        assert told["http_429"] == 0
        with psycopg.connect(stack.owner_url) as connection:
            settings = connection.execute(
                "select batch_poll_interval::text, batch_seconds from autotag.settings"
            ).fetchone()
        assert settings == ("00:01:00", 2700), "the demo leaves the stack's settings as they were"
        # the seed's own workspace, by its own member
        stack_of_alice = rpc(stack, ALICE, "public.tagging_strategy", 3)
        assert stack_of_alice["type"] == "realtime"


async def demo(*arguments: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lab.demo", *arguments,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), **environment},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_without_a_stack_the_demo_says_what_to_do(postgres: LocalPostgres, bare: str) -> None:
    assert BINARY.exists()
    code, _, err = await demo("--supabase", "--json")
    assert (code, "supabase start" in err, "Traceback" in err) == (2, True, False), err
    empty = {"API_URL": "http://127.0.0.1:1", "DB_URL": postgres.url(database=bare), "ANON_KEY": "a",
             "SERVICE_ROLE_KEY": "s", "JWT_SECRET": "j"}  # fmt: skip
    code, _, err = await demo("--supabase", **empty)
    assert (code, "supabase migration up" in err) == (2, True), err
    code, _, err = await demo("--supabase", **{**empty, "JWT_SECRET": ""})
    assert (code, "JWT_SECRET is missing" in err) == (2, True), err


def test_what_supabase_status_prints_is_read() -> None:
    assert parse_env('API_URL="http://127.0.0.1:54321"\nDB_URL="postgresql://x"\nJWT_SECRET=plain\n') == {
        "API_URL": "http://127.0.0.1:54321", "DB_URL": "postgresql://x", "JWT_SECRET": "plain",
    }  # fmt: skip
