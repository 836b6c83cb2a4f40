"""The tables of ``autotag status``: the whole system on one screen."""

from __future__ import annotations

from datetime import datetime
from typing import cast

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autotag.cli.console import cell
from autotag.db.operator_messages import (
    BatchStatus,
    FailedImages,
    JobStatus,
    LimitsStatus,
    ModelStatus,
    ProviderStatus,
    SystemStatus,
    Waiting,
    WorkerStatus,
)  # fmt: skip
from autotag.money import dollars, total
from autotag.texts import printable_all

#: Names for readers of who refused (``account_error_from``). Any other value means the AI provider.
ORIGINS = {"storage": "Storage", "host": "the host of an image", "worker": "the worker"}

#: Names for readers of what waits (``Waiting.kind``).
WAITING = {"batch": "a batch", "workspace": "single calls", "upload": "an upload", "outcomes": "tags to store"}
LONG_WAIT = 60.0  # seconds; a shorter wait for the workspace's window is normal


def render(status: SystemStatus) -> RenderableType:
    """Formats the result of ``autotag.status`` as tables.

    Its texts come from hosts, providers and users of the project, so all of them are made printable.
    """
    status = cast("SystemStatus", printable_all(status))
    now = datetime.fromisoformat(status["at"])
    parts: list[RenderableType] = [
        _headline(status), _model(status["model"], bool(status["limits"]["account_error"])), _limits(status["limits"]),
        _workers(status["workers"], now),
    ]  # fmt: skip
    if status["jobs"]:
        parts.append(_jobs(status["jobs"], now))
    if status["batches"]:
        parts.append(_batches(status["batches"], now))
    waiting = [wait for wait in status["waiting"] if _is_long(wait, now)]
    if waiting:
        parts.append(_waiting(waiting, now))
    if status["errors"]:
        parts.append(_errors(status["errors"], now))
    return Group(*(part for pair in ((part, Text()) for part in parts) for part in pair))


def _headline(status: SystemStatus) -> RenderableType:
    queue, today, limits = status["queue"], status["today"], status["limits"]
    lines = [
        Text.assemble(
            (f"{queue['live']:,}", "bold"), " images being tagged, ", (f"{queue['queued']:,}", "bold"), " queued in ",
            (f"{queue['workspaces']:,}", "bold"), " workspaces, ", (f"{queue['delayed']:,}", "bold"), " to be retried",
        ),
        Text.assemble(
            "today: ", (f"{today['images']:,}", "bold"), " images, ", (f"{today['requests']:,}", "bold"), " answers, ",
            (f"{today['input_tokens'] + today['output_tokens']:,}", "bold"), " tokens, ",
            (total(today["cost"], today["unpriced_requests"], today["unpriced_models"]), "bold"),
        ),
    ]  # fmt: skip
    if limits["account_error"]:
        origin = ORIGINS.get(limits["account_error_from"] or "", "the AI provider")
        lines.append(Text(f"Tagging is paused because of {origin}: {limits['account_error']}", "bold red"))
    if limits["blocked_until"]:
        lines.append(Text("The AI provider asked all workers to wait (429).", "yellow"))
    if not any(worker["alive"] for worker in status["workers"]):
        lines.append(Text("No worker is alive: start one with `autotag worker`.", "bold red"))
    return Group(*lines)


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1),
        header_style="dim",
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return table


def _model(model: ModelStatus, paused: bool) -> RenderableType:
    """The model with its tokens and cost per image, and special properties of it or its provider."""
    table = _table("model", "name", "effort", "tier", "tokens an image", "reserved", "cap", "1,000 images",
                   right=("tokens an image", "reserved", "cap", "1,000 images"))  # fmt: skip
    table.add_row(
        cell(model["name"]), cell(model["reasoning_effort"] or "model's default"),
        cell(model["service_tier"] or "auto"),
        f"{model['prompt_tokens'] + model['output_tokens']:,}", f"{model['reserved']:,}", f"{model['cap']:,}",
        "[yellow]cost unknown[/]" if model["cost_per_1000"] is None else dollars(model["cost_per_1000"]),
    )  # fmt: skip
    lines: list[RenderableType] = [table]
    if not model["proven"] and not paused:
        lines.append(Text(" not proven yet: one image at a time", "yellow"))
    if model["shutdown"]:
        style = "bold red" if model["shutdown"]["level"] == "error" else "yellow"
        lines.append(Text(f" {model['shutdown']['message']}", style))
    missing = missing_features(model["provider"])
    if missing:
        lines.append(Text(f" the provider has {', '.join(missing)}", "dim"))
    return Group(*lines)


def missing_features(provider: ProviderStatus) -> list[str]:
    """The features that a provider lacks, according to its answers."""
    return [
        feature for feature, missing in (
            ("no Batch API", provider["batches"] is False),
            ("no rate-limit headers", provider["rate_headers"] is False),
            ("no expiring files", provider["keep_files"] is None and provider["batches"] is not False),
        ) if missing
    ]  # fmt: skip


def _limits(limits: LimitsStatus) -> Table:
    table = _table("limits of the provider", "limit", "used up", "used", "of", right=("used", "of"))
    rows: list[tuple[str, int, float]] = [
        ("requests a minute", limits["requests_per_minute"], limits["requests_left"]),
        ("tokens a minute", limits["tokens_per_minute"], limits["tokens_left"]),
        ("queued batch tokens", limits["queued_batch_tokens"],
         limits["queued_batch_tokens"] - limits["queued_batch_tokens_used"]),
    ]  # fmt: skip
    if limits["requests_per_day"] is not None and limits["requests_left_today"] is not None:
        rows.insert(2, ("requests a day", limits["requests_per_day"], limits["requests_left_today"]))
    for name, limit, left in rows:
        used = min(max(limit - left, 0), limit)
        table.add_row(name, ProgressBar(limit, used, width=20), f"{used:,.0f}", f"{limit:,.0f}")
        if name == "requests a day" and left < 1:
            table.add_row("", cell(f"used up: single calls go on at {limit / 24:,.0f} an hour", "yellow"))
    return table


def _workers(workers: list[WorkerStatus], now: datetime) -> Table:
    table = _table(
        "workers", "worker", "host", "version", "images", "up", "heartbeat", "", right=("images", "up", "heartbeat")
    )
    for worker in workers:
        note = "" if worker["listening"] else "[yellow]polls[/]"
        table.add_row(
            cell(worker["worker"][:8]), cell(worker["host"]), cell(worker["version"]), str(worker["held"]),
            _ago(worker["started_at"], now), f"{_ago(worker['last_heartbeat_at'], now)} ago",
            note if worker["alive"] else "[red]lost[/]",
        )  # fmt: skip
    return table


def _jobs(jobs: list[JobStatus], now: datetime) -> Table:
    table = _table("uploads", "job", "workspace", "strategy", "images", "failed", "progress", "age", "left (p90)",
                   right=("images", "failed", "age", "left (p90)"))  # fmt: skip
    for job in jobs:
        table.add_row(
            cell(job["job_id"][:8]), cell(job["workspace_id"][:8]),
            cell(job["strategy"] + (" ↓" if job["fallback"] else "")),
            f"{job['image_count']:,}", f"[red]{job['failed']}[/]" if job["failed"] else "0",
            ProgressBar(100, job["progress"], width=16), _ago(job["created_at"], now),
            _left(job["eta"], job["eta_p90"], now),
        )  # fmt: skip
    return table


def _batches(batches: list[BatchStatus], now: datetime) -> Table:
    table = _table("batches", "batch", "at the provider", "state", "images", "done", "age", "left (p90)",
                   right=("images", "done", "age", "left (p90)"))  # fmt: skip
    for batch in batches:
        state = batch["state"] if not batch["openai_status"] else f"{batch['state']} ({batch['openai_status']})"
        table.add_row(
            cell(batch["batch"][:8]), cell(batch["openai_batch_id"] or ""), cell(state),
            f"{batch['images']:,}", f"{batch['done']:,}",
            _ago(batch["submitted_at"] or batch["created_at"], now), _left(batch["eta"], batch["eta_p90"], now),
        )  # fmt: skip
        if batch["error"]:
            table.add_row("", cell(batch["error"], "yellow"))
    return table


def _is_long(wait: Waiting, now: datetime) -> bool:
    """Whether something waits longer than a window of a minute explains. Outcomes wait for a locked row, so they
    count."""
    if wait["kind"] == "outcomes" or wait["until"] is None:
        return True
    return (datetime.fromisoformat(wait["until"]) - now).total_seconds() > LONG_WAIT


def _waiting(waiting: list[Waiting], now: datetime) -> Table:
    table = _table("what waits", "what", "workspace", "id", "images", "for", "why", right=("images", "for"))
    for wait in waiting:
        until, style = wait["until"], "" if wait["until"] else "red"
        left = duration((datetime.fromisoformat(until) - now).total_seconds()) if until else "ever"
        table.add_row(
            WAITING.get(wait["kind"], cell(wait["kind"])), cell(wait["workspace_id"][:8]), cell((wait["id"] or "")[:8]),
            f"{wait['images']:,}", cell(left, style), cell(wait["reason"], style),
        )  # fmt: skip
    return table


def _errors(errors: list[FailedImages], now: datetime) -> Table:
    table = _table("images that failed in the last 24 hours", "images", "code", "what users read", "last",
                   right=("images", "last"))  # fmt: skip
    for error in errors:
        table.add_row(f"{error['images']:,}", cell(error["code"] or ""), cell(error["message"] or ""),
                      f"{_ago(error['last_at'], now)} ago")  # fmt: skip
    return table


def _ago(time: str, now: datetime) -> str:
    return duration((now - datetime.fromisoformat(time)).total_seconds())


def _left(eta: str | None, p90: str | None, now: datetime) -> str:
    if eta is None or p90 is None:
        return ""
    median, slow = (max(0.0, (datetime.fromisoformat(e) - now).total_seconds()) for e in (eta, p90))
    return f"{duration(median)} ({duration(slow)})"


def duration(seconds: float) -> str:
    """Seconds as text: 45 s, 12 min, 3 h 5 min, 2 days."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 86_400:.0f} days"
