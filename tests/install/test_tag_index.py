"""`autotag init` offers the index for searching by tag, where there is none yet and Postgres can have one."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from autotag.install.facts import Facts, read_facts
from autotag.install.host import Host
from autotag.install.tag_index import TagIndex, offer_index
from conftest import BARE_TEMPLATE, copied_database
from lab.postgres import LocalPostgres

#: table -> the type of its tags, more statements
TABLES = {
    "texts": ("text[]", ""),
    "varchars": ("varchar(40)[]", ""),
    "citexts": ("extensions.citext[]", ""),
    "objects": ("jsonb", ""),
    "Odd Names": ("text[]", ""),
    "other_kind": ("text[]", "create index other_kind_tags_idx on public.other_kind (tags)"),
    "partial": ("text[]", "create index partial_tags_idx on public.partial using gin (tags) where tags <> '{}'"),
    "ready": ("text[]", "create index some_name on public.ready using gin (tags)"),
    "ready_objects": ("jsonb", "create index other_name on public.ready_objects using gin (tags)"),
    "plain_json": ("json", ""),
    "failed": ("text[]", "create index failed_idx on public.failed using gin (tags);"
                         "update pg_index set indisvalid = false where indexrelid = 'public.failed_idx'::regclass"),
}  # fmt: skip
OFFERED = {
    "texts": "create index concurrently if not exists texts_tags_idx on public.texts using gin (tags);",
    "varchars": "create index concurrently if not exists varchars_tags_idx on public.varchars using gin (tags);",
    "citexts": "create index concurrently if not exists citexts_tags_idx on public.citexts using gin (tags);",
    "objects": "create index concurrently if not exists objects_tags_idx on public.objects using gin (tags jsonb_path_ops);",
    "Odd Names": 'create index concurrently if not exists "Odd Names_tags_idx" on public."Odd Names" using gin (tags);',
    "other_kind": "create index concurrently if not exists other_kind_tags_gin_idx on public.other_kind using gin (tags);",
    "partial": "create index concurrently if not exists partial_tags_gin_idx on public.partial using gin (tags);",
    "parted": "create index if not exists parted_tags_idx on public.parted using gin (tags);",
}


@pytest.fixture(scope="module")
def url(postgres: LocalPostgres) -> Iterator[str]:
    """A project with all the tables."""
    with copied_database(postgres, BARE_TEMPLATE) as name:
        with psycopg.connect(postgres.url("supabase_admin", name), autocommit=True) as connection:
            connection.execute("create extension citext with schema extensions")
            for table, (kind, more) in TABLES.items():
                connection.execute(f'create table public."{table}" (id uuid primary key, tags {kind}); {more}'.encode())
                connection.execute(f'alter table public."{table}" owner to postgres'.encode())
            connection.execute("create table public.parted (id uuid primary key, tags text[]) partition by hash (id);"
                               "create table public.part partition of public.parted for values with (modulus 1, remainder 0);"
                               "alter table public.parted owner to postgres; alter table public.part owner to postgres")  # fmt: skip
        yield postgres.url(database=name)


def offer(facts: Facts, table: str) -> TagIndex:
    kind = facts.tables[f"public.{table}"].columns["tags"]
    return offer_index(Host(table=f"public.{table}", tags_type=kind), facts)


def test_it_is_offered_where_it_is_missing_and_then_no_more(url: str) -> None:
    facts = read_facts(url)
    assert {table: offer(facts, table).statement for table in OFFERED} == OFFERED
    assert offer(facts, "ready") == offer(facts, "ready_objects") == TagIndex()
    assert "As jsonb it would have one" in (offer(facts, "plain_json").note or "")
    assert "drop index concurrently public.failed_idx" in (offer(facts, "failed").note or "")
    assert "partitioned" in (offer(facts, "parted").note or "")
    assert [offer(facts, table).statement for table in ("plain_json", "failed")] == [None, None]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("set enable_seqscan = off")
        connection.execute("set search_path = public, extensions")
        for table, statement in OFFERED.items():
            connection.execute(statement.encode())
            connection.execute(statement.encode())  # a second time: no error
            wanted = """'["a"]'""" if "json" in facts.tables[f"public.{table}"].columns["tags"] else "'{a}'"
            plan = connection.execute(
                f'explain select * from public."{table}" where tags @> {wanted}'.encode()
            ).fetchall()
            assert any("Bitmap Index Scan" in line for (line,) in plan), (table, plan)
    facts = read_facts(url)
    assert {table: offer(facts, table) for table in OFFERED} == dict.fromkeys(OFFERED, TagIndex())


def test_a_table_that_is_not_known_gets_no_offer() -> None:
    assert offer_index(Host(table="public.nowhere"), Facts({}, [])) == TagIndex()
