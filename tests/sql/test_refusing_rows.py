"""Rows of a large upload that raise errors: only their own images fail, and the others take little longer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from lab.postgres import LocalPostgres

WORKSPACE = "00000000-0000-4000-8000-000000000001"
IMAGES = 10_000
ODD = "storage_path ~ '/p[0-9]*[37]7$'"  # 2 %
STAGES = (
    "select coalesce(tagging_stage, 'none'), {odd}, count(*)::integer from public.assets group by 1, 2 order by 1, 2"
)
#: Rows of a table that were written since the transaction began, also by what was undone.
WRITTEN = "select n_tup_upd + n_tup_del from pg_stat_xact_user_tables where relid = %s::regclass"


@pytest.fixture
def session(postgres: LocalPostgres, database: str) -> Iterator[psycopg.Connection[Any]]:
    """A session in a database where one row in fifty raises when autotag writes it."""
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        connection.execute(
            f"""
            insert into public.workspaces (id, name) values ('{WORKSPACE}', 'w');
            insert into public.assets (workspace_id, storage_path)
            select '{WORKSPACE}', '{WORKSPACE}/p' || i from generate_series(1, {IMAGES}) i;
            create function public.refuse() returns trigger language plpgsql as $$ begin raise exception 'no'; end $$;
            create trigger refuse before update on public.assets for each row when (new.{ODD})
              execute function public.refuse()""".encode()
        )
        yield connection


def value(session: psycopg.Connection[Any], statement: str, *arguments: object) -> Any:
    row = session.execute(statement, arguments).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


def stages(session: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    return session.execute(STAGES.format(odd=ODD).encode()).fetchall()


def test_an_upload_with_rows_that_raise_is_shown_and_cancelled_without_doing_the_work_again_and_again(
    session: psycopg.Connection[Any],
) -> None:
    """Few rows are written again if some rows raise errors. When the whole upload was halved each time, 50,000 images
    with one such row in a hundred took two minutes."""
    with session.transaction():
        job = value(session, "select (public.enqueue_tagging(array(select id from public.assets))).job_id")
        shown = value(session, WRITTEN, "public.assets")
    refused = IMAGES // 50
    assert stages(session) == [("none", True, refused), ("queued", False, IMAGES - refused)]
    with session.transaction():
        assert value(session, "select (public.cancel_tagging(%s)).cancelled", job) == IMAGES
        written = {
            table: value(session, WRITTEN, table) for table in ("public.assets", "autotag.tasks", "autotag.jobs")
        }
    assert stages(session) == [("failed", False, IMAGES - refused), ("none", True, refused)]
    assert session.execute("select error_code, count(*)::integer from autotag.tasks group by 1").fetchall() == [
        ("cancelled", IMAGES)
    ]
    assert session.execute("select failed, finished_at is not null from autotag.jobs").fetchall() == [(IMAGES, True)]
    assert shown < 3 * IMAGES
    assert written["public.assets"] < 3 * IMAGES
    assert written["autotag.tasks"] < 5 * IMAGES, "of the first try, of the parts that raise, and of the others"
    assert written["autotag.jobs"] < 10
