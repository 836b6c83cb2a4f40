"""A worker for its operator: logs without secrets, metrics that agree with the simulator's records, reliable health,
and traces from the request to the broadcast."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from autotag.http.health import Health
from autotag.observability import metrics, traces
from conftest import ROOT
from lab.openai_sim.faults import Fault
from lab.postgres import free_port
from lab.stack import worker_process
from support import Library, answered_pictures, until, worker

DASHBOARD = ROOT / "deploy" / "grafana-dashboard.json"


async def scrape(url: str) -> dict[tuple[str, ...], float]:
    """The samples of the metrics, by name and label values."""
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/metrics")
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text) for sample in family.samples
    }  # fmt: skip


async def status(url: str) -> tuple[int, str | None]:
    async with httpx.AsyncClient() as client:
        answer = await client.get(url)
    return answer.status_code, answer.json()["reason"]


async def test_a_run_says_everything_and_gives_nothing_away(library: Library, tmp_path: Path) -> None:
    """A worker process sends single calls and a batch with failures of every kind. Its log is read, and its metrics are
    compared."""
    stack, port = library.stack, free_port()
    url = f"http://127.0.0.1:{port}"
    few, many = await library.upload(12), await library.upload(60, seed=2)
    lost = library.insert(["gone.jpg"])
    stack.simulator.faults.add(Fault(status=500, times=2))
    stack.simulator.faults.add(Fault(answer="refusal", times=1))
    with (tmp_path / "log").open("wb") as log:
        environment = stack.worker_environment() | {"AUTOTAG_HTTP": f"127.0.0.1:{port}", "AUTOTAG_LOG_LEVEL": "debug"}
        async with worker_process(environment, log):
            await library.finished(*[library.enqueue(some) for some in (few, many, lost)])
            seen = await scrape(url)
            assert await status(f"{url}/healthz") == await status(f"{url}/readyz") == (200, None)
    lines = (tmp_path / "log").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert {"worker_started", "image_not_tagged", "batch_submitted", "batch_harvested", "worker_stopped"} <= {
        event["event"] for event in events
    }
    assert all({"event", "level", "timestamp"} <= event.keys() for event in events)
    failed = [event for event in events if event["event"] == "image_not_tagged"]
    assert all({"task", "asset", "kind", "code", "message"} <= event.keys() for event in failed)
    text = "\n".join(lines)
    for secret in (
        stack.secret_key,
        stack.openai_key,
        stack.jwt_secret,
        stack.database_url().split(":")[2].split("@")[0],
    ):
        assert secret not in text
    assert not re.search(r"token=|base64|data:image|/9j/|Bearer ", text), "no signed URL, no image"

    answered = len(answered_pictures(stack))
    tagged = (
        seen["autotag_images_answered_total", "realtime", "tagged"]
        + seen["autotag_images_answered_total", "batch", "tagged"]
    )
    assert tagged == 12 + 60 - 1
    assert seen["autotag_images_answered_total", "realtime", "transient"] == 2
    usage = [entry["usage"] for entry in stack.simulator.request_log if entry.get("usage") and entry["status"] == 200]
    counted = {
        kind: sum(seen.get(("autotag_tokens_total", lane, kind), 0) for lane in ("realtime", "batch"))
        for kind in ("input", "output")
    }
    assert counted == {
        "input": sum(u["prompt_tokens"] for u in usage),
        "output": sum(u["completion_tokens"] for u in usage),
    }
    assert answered == 12 + 60
    assert seen["autotag_images_today",] == tagged
    assert seen["autotag_workers",] == 1
    assert seen["autotag_live_images",] == seen["autotag_work_images",] == 0
    assert seen["autotag_stage_seconds_count", "called"] >= 12


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        name for panel in dashboard["panels"] for target in panel.get("targets", [])
        for name in re.findall(r"\bautotag_\w+", target["expr"])
    }  # fmt: skip
    there = {name for _, name, _ in metrics._SYSTEM} | {"autotag_batches", metrics.SHUTDOWN_DAYS}
    for family in metrics.REGISTRY.collect():
        there |= {
            family.name,
            f"{family.name}_total",
            f"{family.name}_bucket",
            f"{family.name}_sum",
            f"{family.name}_count",
        }
    assert asked <= there
    assert len(asked) >= 15
    assert {metrics.SHUTDOWN_DAYS, "autotag_unpriced_answers_today"} <= asked
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel} == {"${datasource}"}


async def test_ready_means_the_database_answers_and_the_account_works(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(metrics, "SAMPLE_INTERVAL", 0)
    async with worker(library.stack, http=f"127.0.0.1:{port}"):
        await until(lambda: library.sql("select 1 from autotag.workers") != [], "the worker to register")
        assert await status(f"{url}/readyz") == (200, None)
        library.sql("update autotag.provider_limits set account_error = 'no quota', probe_at = now() + interval '1 h'")
        assert await status(f"{url}/readyz") == (503, "Tagging is paused; see autotag status.")
        library.sql("update autotag.provider_limits set account_error = null, probe_at = null")
        monkeypatch.setattr(metrics, "READ_TIMEOUT", 0.3)
        with psycopg.connect(library.stack.database_url()) as blocker:
            blocker.execute("lock table autotag.usage in access exclusive mode")
            code, reason = await status(f"{url}/readyz")
            assert (code, reason) == (503, "The database did not answer: TimeoutError.")
            assert await status(f"{url}/healthz") == (200, None), "a restart would not help"
        assert await status(f"{url}/readyz") == (200, None)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_the_end_of_the_model_and_answers_without_a_price_are_metrics(library: Library) -> None:
    stack, port = library.stack, free_port()
    url = f"http://127.0.0.1:{port}"
    stack.simulator.plan.models = frozenset({"my-model"})
    stack.configure(model="my-model")
    async with worker(stack, http=f"127.0.0.1:{port}"):
        await library.finished(library.enqueue(await library.upload(2)))
        seen = await scrape(url)
    assert (seen["autotag_unpriced_answers_today",], seen["autotag_cost_today_dollars",]) == (2, 0)
    assert (metrics.SHUTDOWN_DAYS,) not in seen, "no end is known"
    library.sql(
        "insert into autotag.models (name, shutdown_date) values ('my-model', (now() at time zone 'utc')::date + 40)"
        " on conflict (name) do update set shutdown_date = excluded.shutdown_date"
    )
    async with worker(stack, http=f"127.0.0.1:{port}"):
        await until(lambda: library.sql("select 1 from autotag.workers where lease_until > now()") != [], "the worker")
        await until(lambda: is_open(port), "its port, which opens after it has registered")
        assert (await scrape(url))[metrics.SHUTDOWN_DAYS,] == 40


def test_a_process_whose_heart_has_stopped_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("autotag.http.health.time.monotonic", lambda: now[0])
    health = Health(20)
    assert health.problem() is None
    now[0] += 100
    assert "No heartbeat" in (health.problem() or "")
    health.beat(20)
    assert health.problem() is None
    health.beat(1)
    now[0] += 4
    assert "No heartbeat" in (health.problem() or ""), "the lease has become shorter"


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def spans() -> Any:
    exporter = InMemorySpanExporter()
    traces.use_processor(SimpleSpanProcessor(exporter))
    yield exporter
    traces.use_processor(None)


async def test_an_upload_is_one_trace_from_the_request_to_the_commit(
    library: Library, spans: InMemorySpanExporter
) -> None:
    stack = library.stack
    asked, unasked = await library.upload(2), await library.upload(2, seed=2)
    headers = {
        "apikey": stack.anon_key, "Authorization": f"Bearer {library.member.token}",
        "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01",
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=stack.supabase_url, headers=headers) as client, worker(stack):
        jobs = []
        for assets in (asked, unasked):
            answer = await client.post("/rest/v1/rpc/enqueue_tagging", json={"asset_ids": assets})
            jobs.append(answer.json())
            client.headers["traceparent"] = "not one"
        await library.finished(*jobs)
    by_trace: dict[str, list[Any]] = {}
    for span in spans.get_finished_spans():
        by_trace.setdefault(f"{span.context.trace_id:032x}", []).append(span)
    for trace, assets in ((TRACE, asked), (jobs[1]["job_id"].replace("-", ""), unasked)):
        images = [span for span in by_trace[trace] if span.name == "tag image"]
        assert {span.attributes["autotag.asset_id"] for span in images} == set(assets)
        steps = {span.name for span in by_trace[trace]}
        assert {"fetch", "call"} <= steps
    settled = [span for span in spans.get_finished_spans() if span.name == "settle"]
    linked = {link.context.span_id for span in settled for link in span.links}
    assert linked == {span.context.span_id for span in spans.get_finished_spans() if span.name == "tag image"}


def test_traces_that_cannot_be_made_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(traces.TracesError, match=r"pip install 'supabase-autotag\[otel\]'"):
        traces.configure_traces()
