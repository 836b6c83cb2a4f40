"""Plans of the hot queries: claiming reads only what it releases, whatever else is queued."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from conftest import skip
from lab.postgres import LocalPostgres

WORKER = "99999999-0000-4000-8000-000000000001"
SLOTS = 64
BIG = ("tasks", "queues", "workspaces", "jobs", "batches")


@pytest.fixture
def plans(postgres: LocalPostgres, database: str, machine_postgres: bool) -> list[dict[str, Any]]:
    """All plans of one claim of 64 images while 40,000 tasks of 20,000 workspaces are queued."""
    if not machine_postgres:
        skip("auto_explain is not in the wheel")
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        connection.execute("""
            update autotag.settings set realtime_requests_per_minute = 1000000, realtime_tokens_per_minute = 1000000000;
            update autotag.provider_limits set requests_per_minute = 1000000, tokens_per_minute = 1000000000,
              requests_per_day = null, tokens_per_image = 1;
            insert into autotag.workspaces (workspace_id, queued) select gen_random_uuid(), 2 from generate_series(1, 20000);
            insert into autotag.jobs (id, workspace_id, strategy, image_count, created_at)
            select workspace_id, workspace_id, 'realtime', 2, now() from autotag.workspaces;
            insert into autotag.queues (job_id, workspace_id, joined, queued) select id, workspace_id, true, 2 from autotag.jobs;
            insert into autotag.tasks (job_id, workspace_id, asset_id, lane)
            select j.id, j.workspace_id, gen_random_uuid(), 'realtime' from generate_series(1, 2) n, autotag.jobs j""")
        connection.execute("vacuum analyze")
        connection.execute("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", (WORKER,))
        connection.execute("select autotag.claim(%s, 1, 1)", (WORKER,))
        found: list[dict[str, Any]] = []

        def take(notice: psycopg.errors.Diagnostic) -> None:
            text = notice.message_primary or ""
            if "plan:\n" in text:
                found.append(json.loads(text.split("plan:\n", 1)[1]))

        connection.add_notice_handler(take)
        connection.execute("load 'auto_explain'")
        for setting in ("log_min_duration = 0", "log_nested_statements = on", "log_analyze = on", "log_format = json",
                        "log_level = notice"):  # fmt: skip
            connection.execute(f"set auto_explain.{setting}".encode())
        row = connection.execute("select cardinality(tasks) from autotag.claim(%s, %s, 2)", (WORKER, SLOTS)).fetchone()
        assert row == (SLOTS,)
        return found


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", []) for node in nodes(child))]


def read(node: dict[str, Any]) -> int:
    """The number of rows that a scan read."""
    return int((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])


def test_a_claim_reads_no_large_table_from_end_to_end(plans: list[dict[str, Any]]) -> None:
    assert len(plans) > 20, "the plans of the nested statements"
    scans = [
        (node["Relation Name"], read(node), plan["Query Text"]) for plan in plans for node in nodes(plan["Plan"])
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] in BIG and read(node) > SLOTS
    ]  # fmt: skip
    assert scans == []


def test_a_claim_reads_as_many_tasks_as_it_releases(plans: list[dict[str, Any]]) -> None:
    looked_at = sum(
        read(node) for plan in plans for node in nodes(plan["Plan"])
        if node.get("Relation Name") == "tasks" and "Scan" in node["Node Type"] and node["Node Type"] != "Bitmap Index Scan"
    )  # fmt: skip
    # each of them once to find it, and once to take it
    assert SLOTS <= looked_at <= 2 * SLOTS + 10, f"{looked_at} rows of tasks were read for {SLOTS}"


def test_the_queues_index_serves_the_cursor(plans: list[dict[str, Any]]) -> None:
    used = {node.get("Index Name") for plan in plans for node in nodes(plan["Plan"])}
    assert {"tasks_job_id_idx", "workspaces_turn_idx", "queues_turn_idx"} <= used
