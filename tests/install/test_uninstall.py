"""autotag can be taken out again, by the statements that the documentation gives; the host's tables stay."""

from __future__ import annotations

import psycopg

from autotag.install.migrations import apply_migrations
from conftest import ROOT
from lab.postgres import LocalPostgres


def test_nothing_of_autotag_is_left_and_the_host_is_intact(postgres: LocalPostgres, bare: str) -> None:
    url = postgres.url(database=bare)
    guide = (ROOT / "docs" / "install.md").read_text()
    statements = guide[guide.index("select autotag.set_automatic(false);\ndo $$") :].split("```")[0]
    # pg_cron lives in another database here, and the roles are the whole server's.
    unschedule = statements[statements.index("do $$") : statements.index("end $$;") + len("end $$;")]
    statements = statements.replace(unschedule, "")
    own = [unschedule] + [line for line in statements.split(";") if "cron." not in line and "role " not in line]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("""
            create table public.workspace_members (workspace_id uuid, user_id uuid);
            create table public.assets (id uuid primary key default gen_random_uuid(), workspace_id uuid not null,
              storage_bucket text, storage_path text, image_url text);
            insert into public.assets (workspace_id, image_url) values (gen_random_uuid(), 'https://example.org/1')""")
        before = objects(connection)
        apply_migrations(url)
        connection.execute("select autotag.set_automatic(true)")
        connection.execute("select public.enqueue_tagging(array(select id from public.assets))")
        assert objects(connection) - before
        for statement in own:
            connection.execute(statement.encode())
        assert objects(connection) - before == {"column assets.tagging_result", "column assets.tags"}
        assert before - objects(connection) == set()
        row = connection.execute("select count(*) from public.assets").fetchone()
        assert row == (1,)
        assert apply_migrations(url), "a new installation"
        connection.execute("select public.enqueue_tagging(array(select id from public.assets))")


def objects(connection: psycopg.Connection[tuple[str, ...]]) -> set[str]:
    """Everything outside the system's schemas that has a name."""
    found = connection.execute("""
        select 'schema ' || nspname from pg_namespace where nspname not like 'pg\\_%' and nspname <> 'supabase_migrations'
        union all select 'function ' || oid::regprocedure from pg_proc where pronamespace = 'public'::regnamespace
        union all select 'relation ' || oid::regclass from pg_class where relnamespace = 'public'::regnamespace
        union all select 'column ' || c.relname || '.' || a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid
          where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and a.attnum > 0 and not a.attisdropped
        union all select 'enum ' || typname from pg_type where typnamespace = 'public'::regnamespace and typtype = 'e'
        union all select 'policy ' || policyname from pg_policies
        union all select 'trigger ' || tgname from pg_trigger where not tgisinternal
        union all select 'constraint ' || conname from pg_constraint where connamespace = 'public'::regnamespace""")
    return {row[0] for row in found}
