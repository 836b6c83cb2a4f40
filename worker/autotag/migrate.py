"""Applies autotag's migrations to a database where there is no Supabase CLI to do it."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg

HOST_BASELINE = "host_baseline"
_FILE = re.compile(r"(?P<version>\d{14})_(?P<name>\w+)\.sql")


#: In the checkout a link to supabase/migrations, in the installed package the files themselves.
MIGRATIONS = Path(__file__).parent / "migrations"


def migrations() -> list[tuple[str, str, Path]]:
    """Version, name and file of every migration, in the order to apply them."""
    found = [(match, path) for path in sorted(MIGRATIONS.iterdir()) if (match := _FILE.fullmatch(path.name))]
    return [(match["version"], match["name"], path) for match, path in found]


def apply_migrations(url: str, *, with_host_baseline: bool = False) -> list[str]:
    """Applies what is missing, each file in a transaction of its own, and records it as the Supabase CLI does.

    Args:
        url: connection URL of the database's owner.
        with_host_baseline: also create the host's own tables (a stand-alone stack).

    Returns:
        The names of the migrations that were applied now.
    """
    applied: list[str] = []
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "create schema if not exists supabase_migrations;"
            "create table if not exists supabase_migrations.schema_migrations"
            " (version text primary key, statements text[], name text)"
        )
        known = {row[0] for row in connection.execute("select version from supabase_migrations.schema_migrations")}
        for version, name, path in migrations():
            if version in known or (name == HOST_BASELINE and not with_host_baseline):
                continue
            with connection.transaction():
                connection.execute(path.read_bytes())
                connection.execute(
                    "insert into supabase_migrations.schema_migrations (version, name) values (%s, %s)", (version, name)
                )
            applied.append(name)
    return applied
