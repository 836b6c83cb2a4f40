"""The statements and commands in docs/security.md do what the page says."""

from __future__ import annotations

import json
import re
import subprocess

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from conftest import ROOT
from support import Library

PAGE = (ROOT / "docs" / "security.md").read_text()


def blocks(heading: str, language: str = "sql") -> list[str]:
    """The blocks of code of a section, in order."""
    section = re.split(rf"^#+ {re.escape(heading)}$", PAGE, flags=re.MULTILINE)[1]
    return re.findall(rf"```{language}\n(.*?)```", re.split(r"^#+ ", section, flags=re.MULTILINE)[0], re.DOTALL)


def test_a_workers_login_is_replaced(library: Library) -> None:
    # The stack's own worker has that name.
    make, end, forget = (block.replace("tagger", "rotated") for block in blocks("The worker's login"))
    owner = library.stack.database_url("postgres")
    with psycopg.connect(owner, autocommit=True) as connection:
        connection.execute("create role rotated login in role autotag_worker")
        connection.execute(sql.SQL(make))  # type: ignore[arg-type]
        for role in ("rotated", "rotated2"):
            connection.execute(sql.SQL("alter role {} password 'tests only'").format(sql.Identifier(role)))
        logins = {role: make_conninfo(owner, user=role, password="tests only") for role in ("rotated", "rotated2")}
        try:
            with psycopg.connect(logins["rotated"]) as thief:
                assert thief.execute("select autotag.worker_settings()").fetchone()
                for statement in [*end.split(";")[:-1], *forget.split(";")[:-1]]:
                    connection.execute(statement.encode())
                with pytest.raises(psycopg.OperationalError):
                    thief.execute("select autotag.worker_settings()")
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(logins["rotated"])
            with psycopg.connect(logins["rotated2"]) as worker:
                assert worker.execute("select autotag.worker_settings()").fetchone()
        finally:
            connection.execute("drop role if exists rotated, rotated2")


def test_nobody_but_the_owner_makes_objects_where_adapters_look(library: Library) -> None:
    (look, _) = blocks("Inside the database")
    names = {row["rolname"] for row in library.sql(look)}
    assert names
    assert not names & {"anon", "authenticated", "service_role", "authenticator", "autotag_worker"}


def test_the_quotas_are_accepted(library: Library) -> None:
    (quotas,) = blocks("Money")
    library.sql(quotas)
    assert len(library.sql("select id from autotag.quotas")) == 2


def test_a_thousand_hints_are_two_refetches() -> None:
    """Runs the page's snippet under Node, with a pause of 40 ms."""
    (snippet,) = blocks("Realtime", "ts")
    function = snippet[snippet.index("function coalesce") : snippet.index("const refetchSoon")].replace(
        ": () => void", ""
    )
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", f"""{function}
          const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
          let calls = 0
          const hint = coalesce(() => calls++, 40)
          const seen = []
          for (let i = 0; i < 1000; i++) hint()
          seen.push(calls)            // at once, and only once
          await wait(300)
          seen.push(calls)            // once more for all the others, and then it is over
          hint()
          seen.push(calls)            // at once again
          console.log(JSON.stringify(seen))"""],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [1, 2, 3]


def test_the_table_of_broadcasts_is_what_the_migrations_send() -> None:
    """The page lists every event with all keys of its payload, and no others."""
    told = {
        (event, frozenset(re.findall(r"`(\w+)`", payload)))
        for event, payload in re.findall(r"^\|[^|]*\| `(\w+-\w+)` \| ([^|]*) \|$", PAGE, re.MULTILINE)
    }
    source = "\n".join(path.read_text() for path in sorted((ROOT / "supabase" / "schemas").rglob("*.sql")))
    sent = {
        (event, frozenset(re.findall(r"'(\w+)',", payload)))
        for event, payload in re.findall(
            r"broadcast(?:_to_workspace)?\([^']*(?:'batch-updates', )?'([a-z]+-[a-z]+)',\s*jsonb_build_object\((.*?)\)[,)]", source, re.DOTALL
        )
    }  # fmt: skip
    assert sent == told
    assert len(sent) == 4
