"""The SQL of docs/frontend.md, "Searching by tag", runs as it is printed, uses the index, and shows strangers
nothing."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

import psycopg
import pytest

from lab.postgres import LocalPostgres

DOCUMENT = Path(__file__).parents[2] / "docs/frontend.md"
MINE, THEIRS = (str(uuid.UUID(int=i)) for i in (1, 2))
MEMBER, STRANGER = (str(uuid.UUID(int=i)) for i in (3, 4))


@pytest.fixture
def session(postgres: LocalPostgres, database: str) -> psycopg.Connection:
    """Two workspaces of a thousand images each, with what the document creates."""
    section = DOCUMENT.read_text().split("\n## Searching by tag\n")[1].split("\n## ")[0]
    connection = psycopg.connect(postgres.url(database=database), autocommit=True)
    for block in re.findall(r"```sql\n(create .*?)```", section, re.DOTALL):
        connection.execute(block.encode())
    for workspace, user in ((MINE, MEMBER), (THEIRS, STRANGER)):
        connection.execute("insert into auth.users (id) values (%s)", (user,))
        connection.execute("insert into public.workspaces (id, name) values (%s, 'w')", (workspace,))
        connection.execute("insert into public.workspace_members values (%s, %s)", (workspace, user))
        connection.execute(
            "insert into public.assets (workspace_id, storage_path, tags)"
            " select %s, 'a/' || i, array['all', 'tag ' || i %% 100, 'other ' || i %% 7] from generate_series(1, 1000) i", (workspace,)
        )  # fmt: skip
    connection.execute("vacuum analyze public.assets")
    return connection


def test_the_documented_queries_use_the_index_and_show_members_their_own(session: psycopg.Connection) -> None:
    def rows(statement: str, *arguments: object) -> list[tuple[object, ...]]:
        return session.execute(statement.encode(), arguments).fetchall()

    found = "select count(*) from public.images_with_tags(%s, %s)"
    with session, session.transaction():
        session.execute("set local enable_seqscan = off")
        for operator, wanted in (("@>", "{all,tag 5}"), ("&&", "{tag 5,tag 6}")):
            plan = rows(
                f"explain select * from public.assets where workspace_id = %s and tags {operator} %s", MINE, wanted
            )
            assert any("Bitmap Index Scan on assets_tags_idx" in str(line) for (line,) in plan), plan
        for user, own in ((MEMBER, True), (STRANGER, False)):
            session.execute(
                "select set_config('request.jwt.claims', %s, true)",
                (json.dumps({"sub": user, "role": "authenticated"}),),
            )
            session.execute("set local role authenticated")
            scans = "select pg_stat_get_xact_numscans('public.assets_tags_idx'::regclass)"
            before = rows(scans)
            assert rows(found, MINE, ["tag 5"]) == [(10 if own else 0,)]
            assert (rows(scans) > before) == own, "below the function the index is used"
            first = rows("select * from public.tag_counts(%s) limit 2", MINE)
            assert first == ([("all", 1000), ("other 1", 143)] if own else [])
            narrowed = rows("select * from public.tag_counts(%s, %s) limit 1", MINE, ["other 0", "tag 7"])
            assert narrowed == ([("all", 2)] if own else [])  # 7 and 707 of the multiples of seven
            begun = rows("select * from public.tag_counts(%s, beginning => 'TAG 9') limit 3", MINE)
            assert begun == ([("tag 9", 10), ("tag 90", 10), ("tag 91", 10)] if own else [])
            session.execute("reset role")
