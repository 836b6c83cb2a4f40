"""Three books compared: the provider's own record, the database's rows, and what clients received."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.rows import dict_row

from lab.stack import Stack

METADATA_KEY = "autotag_batch"


@dataclass
class Books:
    """What each of the three says when everything has ended."""

    #: the simulator's requests (`Simulator.request_log`), its batches and the ids of the files it still has
    requests: list[dict[str, Any]]
    openai_batches: list[dict[str, Any]]
    openai_files: list[str]
    #: rows of assets {id, stage, tags, error}, jobs {id, image_count, completed, failed, tasks_failed, tasks (those
    #: that are left), finished}, batches {id, openai_batch_id, state}; usage {requests, tokens}
    assets: list[dict[str, Any]]
    jobs: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    usage: dict[str, int]
    #: OpenAI ids of every batch-complete that the database sent, and that a client received
    sent: list[str]
    received: list[str]
    #: the tags that each asset must have
    truth: dict[str, frozenset[str]] = field(default_factory=dict)
    #: single calls whose answer may have died with its worker before it was reported
    may_be_lost: int = 0
    #: whether the client was connected all the time (a broadcast is delivered at most once)
    client_heard_all: bool = True


def compare_books(books: Books) -> list[str]:
    """Every way in which the books disagree with each other or with the promises, as sentences."""
    return [
        *_images(books), *_jobs(books), *_batches(books), *_payments(books), *_broadcasts(books),
        *(f"file {name} was left at OpenAI" for name in books.openai_files),
    ]  # fmt: skip


def _images(books: Books) -> list[str]:
    found = []
    for asset in books.assets:
        if asset["stage"] != "completed":
            found.append(f"image {asset['id']} ended as {asset['stage']}: {asset['error']}")
        elif set(asset["tags"] or ()) != books.truth[asset["id"]]:
            found.append(f"image {asset['id']} has the tags of another picture")
    return found + [f"image {lost} is not there" for lost in books.truth.keys() - {a["id"] for a in books.assets}]


def _jobs(books: Books) -> list[str]:
    found = [f"upload {job['id']} has not ended" for job in books.jobs if not job["finished"]]
    for job in books.jobs:
        told = (job["failed"], job["image_count"] - job["completed"])
        counted = (job["tasks_failed"], job["tasks"])
        if told != counted:
            found.append(f"upload {job['id']} counts {told} as failed and without tags, its images are {counted}")
    stages = Counter(asset["stage"] for asset in books.assets)
    completed = sum(job["completed"] for job in books.jobs)
    if stages["completed"] != completed:
        found.append(f"uploads count {completed} images as completed, {stages['completed']} are")
    return found


def _batches(books: Books) -> list[str]:
    found = []
    live = [batch for batch in books.openai_batches if batch["status"] != "failed"]
    created = Counter(batch["metadata"].get(METADATA_KEY) for batch in live)
    found += [f"batch {row} was created {n} times at OpenAI" for row, n in created.items() if n > 1]
    ours = {row["openai_batch_id"] for row in books.batches}
    found += [f"batch {batch['id']} at OpenAI is in no row" for batch in live if batch["id"] not in ours]
    known = {batch["id"] for batch in books.openai_batches}
    found += [f"row {row['id']} names a batch that OpenAI does not have" for row in books.batches
              if row["openai_batch_id"] and row["openai_batch_id"] not in known]  # fmt: skip
    unfinished = [row for row in books.batches if row["state"] not in ("done", "cancelled")]
    return found + [f"batch {row['id']} was left {row['state']}" for row in unfinished]


def _payments(books: Books) -> list[str]:
    found = []
    answered = [entry for entry in books.requests if entry["status"] == 200 and entry.get("usage")]
    lines = [entry for entry in answered if entry["method"] == "BATCH" and entry.get("delivered")]
    singles = [entry for entry in answered if entry["method"] == "POST"]
    per_task = Counter(entry["custom_id"] for entry in lines)
    found += [f"image of task {task} was paid {n} times by batch" for task, n in per_task.items() if n > 1]

    def tokens(entries: list[dict[str, Any]]) -> int:
        return sum(e["usage"]["prompt_tokens"] + e["usage"]["completion_tokens"] for e in entries)

    # A single call whose answer died with its worker is paid and unknown; nothing else may be.
    lost = len(lines) + len(singles) - books.usage["requests"]
    if not 0 <= lost <= books.may_be_lost:
        found.append(
            f"usage counts {books.usage['requests']} answers; OpenAI gave {len(lines)} by batch"
            f" and {len(singles)} singly, of which at most {books.may_be_lost} can have been lost"
        )
    missing = tokens(lines) + tokens(singles) - books.usage["tokens"]
    dearest = max((tokens([entry]) for entry in singles), default=0)
    if not (0 <= missing <= max(lost, 0) * dearest) or (lost == 0 and missing):
        found.append(f"usage counts {books.usage['tokens']} tokens, {missing} fewer than OpenAI billed")
    repeated = len(lines) + len(singles) - len(books.assets)
    if repeated > books.may_be_lost:
        found.append(f"{repeated} answers more than images were paid; at most {books.may_be_lost} can be explained")
    return found


def _broadcasts(books: Books) -> list[str]:
    found = []
    over = {row["openai_batch_id"] for row in books.batches if row["state"] == "done" and row["openai_batch_id"]}
    sent, received = Counter(books.sent), Counter(books.received)
    found += [f"batch-complete of {batch} was sent {sent[batch]} times" for batch in sorted(over | sent.keys())
              if sent[batch] != 1 or batch not in over]  # fmt: skip
    found += [f"a client heard of {batch} {n} times" for batch, n in received.items() if n > 1 or batch not in sent]
    if books.client_heard_all:
        found += [f"the client never heard of {batch}" for batch in sent.keys() - received.keys()]
    return found


def read_books(
    stack: Stack, truth: dict[str, frozenset[str]], received: list[str], *, may_be_lost: int, client_heard_all: bool
) -> Books:
    """The books of a stack as they are now."""
    with psycopg.connect(stack.database_url(), row_factory=dict_row) as connection:

        def rows(statement: str) -> list[dict[str, Any]]:
            return connection.execute(statement.encode()).fetchall()

        return Books(
            requests=stack.simulator.request_log,
            openai_batches=stack.simulator.batches.describe_all(),
            openai_files=list(stack.simulator.files),
            assets=rows("select id::text, tagging_stage as stage, tags, tagging_error as error from public.assets"),
            jobs=rows("""select j.id::text, j.image_count, j.completed, j.failed, j.finished_at is not null as finished,
                count(*) filter (where t.stage = 'failed') as tasks_failed, count(t.id) as tasks
                from autotag.jobs j left join autotag.tasks t on t.job_id = j.id group by j.id"""),
            batches=rows("select id::text, openai_batch_id, state from autotag.batches"),
            usage=rows("""select coalesce(sum(requests), 0)::bigint as requests,
                coalesce(sum(input_tokens + output_tokens), 0)::bigint as tokens from autotag.usage""")[0],
            sent=[row["id"] for row in rows("""select payload ->> 'batch_id' as id from realtime.messages
                where event = 'batch-complete' and topic = 'batch-updates'""")],
            received=list(received),
            truth=truth,
            may_be_lost=may_be_lost,
            client_heard_all=client_heard_all,
        )  # fmt: skip
