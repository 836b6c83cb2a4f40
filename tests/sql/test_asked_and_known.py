"""Images that were tagged without any tag are not offered again; doctor and the commands report profiles, URLs and
workspaces that cannot be right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from autotag.cli.app import app
from autotag.config import DoctorSettings
from autotag.doctor.examine import _storage_hosts
from conftest import TEMPLATE, copied_database
from lab.postgres import LocalPostgres

WORKSPACE, OTHER, UNKNOWN = (f"{n}1111111-1111-4111-8111-111111111111" for n in "123")
ANSWER = {"tags": [], "confidence": {}, "caption": "c", "model": "m"}


@pytest.fixture(scope="module")
def database(postgres: LocalPostgres) -> Iterator[str]:
    """A workspace with five images, all without tags, and one that has only a setting."""
    with copied_database(postgres, TEMPLATE) as name:
        url = postgres.url(database=name)
        with psycopg.connect(url, autocommit=True) as owner:
            owner.execute("insert into public.workspaces (id, name) values (%s, 'w'), (%s, 'o')", (WORKSPACE, OTHER))
            owner.execute(
                "insert into public.assets (workspace_id, storage_path, tags, tagging_result)"
                " select %s, gen_random_uuid()::text, t, r from (values (null::text[], null::jsonb), ('{}', null), ('{}', '{}'),"
                """ ('{}', '{"mine": []}'), (null, '{"given": "no list"}')) v (t, r)""", (WORKSPACE,),
            )  # fmt: skip
            owner.execute("select autotag.set_profile(%s, %s)", (OTHER, json.dumps({"language": "German"})))
        yield url


@pytest.fixture
def session(database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database) as connection, connection.transaction(force_rollback=True):
        yield connection


def value(session: psycopg.Connection[Any], expression: str, *arguments: object) -> Any:
    row = session.execute(f"select {expression}", arguments).fetchone()  # type: ignore[arg-type]
    assert row
    return row[0]


def test_an_image_that_was_tagged_with_nothing_is_not_offered_again(session: psycopg.Connection[Any]) -> None:
    """In the mode `only`, an answer without a fitting tag is an answer. Images that were never tagged are still
    offered."""
    untagged = "autotag.list_assets(%s, true, null, 9)::text[]"
    rows = value(session, untagged, WORKSPACE)
    assert len(rows) == 5
    for row in rows[:2]:
        session.execute("select autotag.store_tags(array[%s::uuid], %s, array[%s::jsonb], array[null::uuid])",
                        (row, WORKSPACE, json.dumps(ANSWER)))  # fmt: skip
    assert value(session, "array_agg(cardinality(tags)) from public.assets where id = any (%s::uuid[])", rows[:2]) == [
        0,
        0,
    ]
    assert value(session, untagged, WORKSPACE) == rows[2:]
    assert value(session, "autotag.list_assets(%s, false, null, 9)::text[]", WORKSPACE) == rows, (
        "--no-untagged has them"
    )


def test_an_only_profile_without_a_vocabulary_is_found(session: psycopg.Connection[Any]) -> None:
    def levels() -> list[str]:
        findings = value(session, "autotag.diagnose() -> 'findings'")
        return [one["level"] for one in findings if one["check"] == "vocabulary"]

    assert levels() == []
    saved = value(session, "autotag.set_profile(%s, %s)", OTHER, json.dumps({"vocabulary_mode": "only"}))
    assert saved["has_vocabulary"] is False
    assert levels() == ["warning"]
    for whose in (OTHER, None):
        with session.transaction(force_rollback=True):
            session.execute("select autotag.edit_vocabulary(%s, %s)", (whose, '[{"tag": "cat"}]'))
            assert value(session, "autotag.show_profile(%s)", OTHER)["has_vocabulary"] is True
            assert levels() == []
    session.execute("select autotag.set_profile(%s, %s)", (OTHER, json.dumps({"vocabulary_mode": "prefer"})))
    assert levels() == []


@pytest.mark.parametrize(
    ("url", "hosts", "warns"),
    [
        ("https://abc.supabase.co", ["abc.supabase.co"], False), ("https://ABC.supabase.co:443", ["abc.supabase.co"], False),
        ("http://127.0.0.1:54321", ["127.0.0.1:54321", "localhost:54321"], False), ("https://abc.supabase.co", [], False),
        (None, ["abc.supabase.co"], False), ("https://other.supabase.co", ["abc.supabase.co"], True),
    ],
)  # fmt: skip
def test_another_projects_url_is_found(url: str | None, hosts: list[str], warns: bool) -> None:
    settings = DoctorSettings(database_url="postgresql://u:p@h/x", supabase_url=url)  # type: ignore[arg-type]
    assert [finding.level for finding in _storage_hosts(settings, hosts)] == ["warning"] * warns


def test_the_doctor_is_told_the_hosts(session: psycopg.Connection[Any]) -> None:
    assert value(session, "autotag.diagnose() -> 'storage_hosts'") == value(
        session, "to_jsonb(autotag.storage_hosts())"
    )


@pytest.mark.parametrize(
    ("command", "stops"),
    [
        (["enqueue", "--yes"], True), (["compare", "--model", "m", "--yes", "--json"], True), (["usage"], False),
        (["profile", "show"], False), (["vocabulary", "export"], False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_an_unknown_workspace_is_said(
    database: str, monkeypatch: pytest.MonkeyPatch, command: list[str], stops: bool
) -> None:
    for name, setting in {
        "DATABASE_URL": database,
        "OPENAI_API_KEY": "k",
        "SUPABASE_URL": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, setting)
    said = CliRunner().invoke(app, [*command, "--workspace", UNKNOWN])
    assert "Unknown workspace" in said.stderr, said.output
    assert (said.exit_code == 1) == stops, said.output
    for known in (WORKSPACE, OTHER):
        if command[0] != "enqueue" or known == OTHER:
            assert "Unknown workspace" not in CliRunner().invoke(app, [*command, "--workspace", known]).stderr


def test_what_is_being_tagged_is_found_by_its_index(session: psycopg.Connection[Any]) -> None:
    """A connection keeps its plans. A plan that was made while nothing was tagged read all tasks for each image: 14 s
    for 50,000."""
    found = "(select count(*) from autotag.live_tasks(array(select a.id from public.assets a)))"
    session.execute("update public.assets set storage_path = workspace_id || '/' || id where storage_path is not null")
    session.execute("analyze autotag.tasks")
    for _ in range(7):  # a connection keeps its plans from the sixth call on
        assert value(session, found) == 0
    value(session, "autotag.enqueue(array(select a.id from public.assets a))")
    scans = "(select seq_scan from pg_stat_xact_all_tables where relid = 'autotag.tasks'::regclass)"
    before = value(session, scans)
    assert value(session, found) == 5
    value(session, "autotag.enqueue(array(select a.id from public.assets a))")
    assert value(session, scans) == before
