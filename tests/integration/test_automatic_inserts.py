"""Automatic mode and the host's inserts: no insert waits or fails because of automatic mode, and no image is lost."""

from __future__ import annotations

import json
import random
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from sealing import WORKER, jobs, seal, transaction
from support import Library

NOBODY = str(uuid.UUID(int=0))

Connection = psycopg.Connection[dict[str, Any]]
INSERT = "insert into public.assets (workspace_id, storage_path) select w, w || '/' || gen_random_uuid() from unnest(%s::uuid[]) w returning id::text"
WAIT = "5 s"  # for a statement of the host; only one that waits for another transaction takes so long


def collected(library: Library) -> list[str]:
    return [row["id"] for row in library.sql("select asset_id::text as id from autotag.arrivals")]


def insert(connection: Connection, *workspaces: str | None) -> list[str]:
    return [row["id"] for row in connection.execute(INSERT, (list(workspaces),)).fetchall()]


def host(library: Library, *, autocommit: bool = False) -> Connection:
    connection: Connection = psycopg.connect(library.stack.database_url(), autocommit=True, row_factory=dict_row)
    connection.execute(f"set statement_timeout = '{WAIT}'".encode())
    connection.autocommit = autocommit
    return connection


# -- one thing at a time


def test_open_inserts_of_one_user_hold_up_nobody(sealer: Library) -> None:
    workspace = sealer.member.workspace
    with host(sealer) as first, host(sealer) as second, host(sealer, autocommit=True) as third:
        late = insert(first, workspace)
        insert(second, workspace)
        insert(third, workspace)
        seal(sealer)
        assert jobs(sealer) == [1], "what is committed is sealed while others are open"
        second.rollback()
        first.commit()
    assert collected(sealer) == late
    seal(sealer)
    assert jobs(sealer) == [1, 1]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_isolated_transactions_do_not_conflict(sealer: Library, level: str) -> None:
    workspace = sealer.member.workspace
    with host(sealer) as first, host(sealer) as second:
        for connection in (first, second):
            connection.execute(f"set transaction isolation level {level}".encode())
            insert(connection, workspace)
        seal(sealer)
        for connection in (first, second):
            insert(connection, workspace)
            connection.commit()
    assert len(collected(sealer)) == 4


def test_an_insert_notifies_nobody(sealer: Library) -> None:
    """Inserts must not notify: a notification would make commits wait for each other, and its transaction could not be
    prepared."""
    with psycopg.connect(sealer.stack.database_url(), autocommit=True) as listener:
        listener.execute("listen autotag")
        sealer.insert([f"{n}.jpg" for n in range(5)])
        sealer.sql("notify autotag, 'the end'")
        [note] = list(listener.notifies(timeout=30, stop_after=1))
    assert note.payload == "the end"


def test_a_locked_table_costs_the_collection_and_not_the_insert(sealer: Library) -> None:
    """An upgrade of autotag locks the table of arrivals. Inserts of rows succeed meanwhile, although they are not
    collected."""
    with transaction(sealer) as upgrade, host(sealer, autocommit=True) as connection:
        upgrade.execute("lock table autotag.arrivals in access exclusive mode")
        assert len(insert(connection, *[sealer.member.workspace] * 3)) == 3
        timeout = connection.execute("show statement_timeout").fetchone()
        lock_timeout = connection.execute("show lock_timeout").fetchone()
    assert (timeout, lock_timeout) == ({"statement_timeout": "5s"}, {"lock_timeout": "0"}), (
        "the host's own settings stay"
    )
    assert collected(sealer) == []


def test_the_hosts_own_timeout_is_the_hosts(sealer: Library) -> None:
    with host(sealer, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("insert into public.assets (workspace_id, storage_path)"
                               " select %s, 'x' from pg_sleep(30)", (sealer.member.workspace,))  # fmt: skip
        assert len(insert(connection, sealer.member.workspace)) == 1
    assert len(collected(sealer)) == 1


def test_a_subtransaction_that_rolls_back_takes_its_images_with_it(sealer: Library) -> None:
    workspace = sealer.member.workspace
    with host(sealer) as connection:
        kept = insert(connection, workspace)
        with connection.transaction(force_rollback=True):
            insert(connection, workspace)
        kept += insert(connection, workspace)
    assert sorted(collected(sealer)) == sorted(kept)


def test_a_deferred_constraint_that_fails_takes_its_images_with_it(sealer: Library) -> None:
    sealer.sql(
        "alter table public.assets add constraint one unique (workspace_id, image_url) deferrable initially deferred"
    )
    with host(sealer) as connection:
        for _ in range(2):
            connection.execute("insert into public.assets (workspace_id, image_url) values (%s, 'https://x/1.jpg')",
                               (sealer.member.workspace,))  # fmt: skip
        with pytest.raises(psycopg.errors.UniqueViolation):
            connection.commit()
    assert collected(sealer) == []


def test_a_copy_of_20_000_rows_is_one_upload(sealer: Library) -> None:
    workspace = sealer.member.workspace
    sealer.stack.configure(live_images_max=100_000)
    with host(sealer) as connection:
        connection.execute("set local statement_timeout = 0")
        with connection.cursor().copy("copy public.assets (workspace_id, storage_path) from stdin") as copy:
            for number in range(20_000):
                copy.write_row((workspace, f"{workspace}/{number}.jpg"))
    assert len(collected(sealer)) == 20_000
    seal(sealer)
    assert jobs(sealer) == [20_000]
    assert collected(sealer) == []


@pytest.mark.parametrize(
    "kind", ["a foreign file", "a location that is too long", "no location", "a copy of a tagged row"]
)
def test_what_is_odd_in_a_row_is_found_out_later(sealer: Library, kind: str) -> None:
    """Inserts do not check locations. A refused location becomes a task, which fails with the reason."""
    workspace = sealer.member.workspace
    sealer.sql("alter table public.assets drop constraint assets_check")
    columns, row = {
        "a foreign file": ("storage_path", f"'{uuid.uuid4()}/a.jpg'"),
        "a location that is too long": ("image_url", "'https://x/' || repeat('x', 9000)"),
        "no location": ("storage_path", "null"),
        "a copy of a tagged row": ("storage_path, tagging_stage", f"'{workspace}/a.jpg', 'completed'"),
    }[kind]
    sealer.sql(f"insert into public.assets (workspace_id, {columns}) values ('{workspace}', {row})")
    sealer.insert(["a.jpg"])
    assert len(collected(sealer)) == 2
    seal(sealer)
    assert jobs(sealer) == [2 if kind in ("a foreign file", "a location that is too long") else 1]
    assert collected(sealer) == []


# -- everything at once

TOKENS = {
    "nobody": None,
    "a user": lambda user: json.dumps({"role": "authenticated", "sub": user}),
    "no uuid": lambda _: '{"sub": "user_2abcDEF"}',
    "no sub": lambda _: '{"role": "service_role"}',
    "no JSON": lambda _: "{not json",
    "a list": lambda _: "[1]",
    "a number as sub": lambda _: '{"sub": 7}',
    "an object as sub": lambda _: '{"sub": {"a": []}}',
}
SERVER = {"nobody", "no sub", "no JSON"}  # the project's own server; other tokens without a user may tag nothing


@dataclass
class Session:
    """A session of the host, and the images that it has inserted in the open transaction and its savepoints."""

    connection: Connection
    open: list[dict[str, str | None]] = field(default_factory=lambda: [{}])

    def insert(self, choice: random.Random, users: list[str], rows: list[str | None]) -> set[str]:
        """Inserts images of these workspaces under some token; returns those that automatic mode does not collect."""
        user, name = choice.choice(users), choice.choice(list(TOKENS))
        make = TOKENS[name]
        self.connection.execute("select set_config('request.jwt.claims', %s, true)", (make(user) if make else "",))
        got = self.connection.execute(
            "insert into public.assets (workspace_id, storage_path) select w, coalesce(w, gen_random_uuid()) || '/x'"
            " from unnest(%s::uuid[]) w returning id::text, workspace_id::text as workspace", (rows,)).fetchall()  # fmt: skip
        inserted = {row["id"]: user if name == "a user" else None for row in got if row["workspace"]}
        self.open[-1] |= inserted
        return set() if name in {"a user", *SERVER} else set(inserted)

    def merge(self) -> dict[str, str | None]:
        merged = {asset: user for level in self.open for asset, user in level.items()}
        self.open = [{}]
        return merged


@pytest.mark.parametrize("seed", range(6))
def test_every_image_that_is_committed_is_in_one_job_of_its_uploader(sealer: Library, seed: int) -> None:
    """Sessions of the host insert, commit and roll back in any order, under any token, while uploads are sealed."""
    choice = random.Random(seed)
    sealer.sql("alter table public.assets alter workspace_id drop not null")
    users = [sealer.member.user, str(uuid.UUID(int=seed + 1))]
    spaces = [sealer.member.workspace, sealer.stack.add_member().workspace]
    gone = sealer.stack.add_member().workspace
    committed: dict[str, str | None] = {}
    uncollected: set[str] = set()
    sessions = [Session(host(sealer)) for _ in range(4)]
    try:
        for step in range(120):
            session = choice.choice(sessions)
            connection = session.connection
            match choice.choice(
                ["insert"] * 6 + ["savepoint", "back", "commit", "commit", "rollback", "seal", "delete"]
            ):
                case "insert":
                    rows = choice.choices([*spaces, *([gone] if gone else []), None], k=choice.choice([1, 1, 3, 20]))
                    uncollected |= session.insert(choice, users, rows)
                case "savepoint":
                    connection.execute(f"savepoint s{len(session.open)}".encode())
                    session.open.append({})
                case "back" if len(session.open) > 1:
                    session.open.pop()
                    connection.execute(f"rollback to s{len(session.open)}".encode())
                case "commit":
                    connection.commit()
                    committed |= session.merge()
                case "rollback":
                    connection.rollback()
                    session.merge()
                case "seal":
                    seal(sealer)
                case "delete" if gone and step > 60 and not any(len(level) for s in sessions for level in s.open):
                    sealer.sql("delete from public.workspaces where id = %s", gone)
                    gone = ""
        for session in sessions:
            session.connection.commit()
            committed |= session.merge()
    finally:
        for session in sessions:
            session.connection.close()
    assert seal(sealer) == []
    seal(sealer)
    there = {row["id"] for row in sealer.sql("select id::text from public.assets where workspace_id is not null")}
    there, committed = there - uncollected, {a: user for a, user in committed.items() if a not in uncollected}
    tasks = sealer.sql("select t.asset_id::text as id, j.user_id::text as user from autotag.tasks t join autotag.jobs j on j.id = t.job_id"
                       " where t.workspace_id in (select id from public.workspaces)")  # fmt: skip
    assert max(Counter(task["id"] for task in tasks).values()) == 1
    assert {task["id"]: task["user"] for task in tasks} == {a: user for a, user in committed.items() if a in there}
    assert there == {asset for asset in committed if asset in there}, "the test knows of every row"
    assert collected(sealer) == []
    assert NOBODY not in {task["user"] for task in tasks}
    assert sealer.sql("select 1 from autotag.workers where id = %s", WORKER) != []
