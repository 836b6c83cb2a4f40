"""Compares three records: the provider's own, the database's rows, and the broadcasts that clients received.

What should become of each image comes from none of them, but from its uploader (`Books.truth`, `Books.ends`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.rows import dict_row

from lab.stack import Stack

METADATA_KEY = "autotag_batch"
PUBLIC_TOPIC, WORKSPACE_TOPIC = "batch-updates", "tagging:"
PUBLIC_KEYS = {"batch_id", "id"}  # the only keys of payloads that everybody may see
EVENTS = {"job-progress", "job-complete", "batch-complete"}
#: Seconds after the provider's answer during which it may be lost with its worker, even on a busy machine.
UNREPORTED = 5.0
#: Seconds that a request may wait in the simulator's socket on a busy machine. Its worker may be killed meanwhile.
UNREAD = 1.0
#: How an image may end: `tagged`, `gone` (its row was deleted), `moved` (to another workspace before it was tagged),
#: `untouched` (nobody asked for tags), `anything` (unknown), or the code of the error with which it fails.
TAGGED = frozenset({"tagged"})
ANYTHING = frozenset({"anything"})


@dataclass
class Books:
    """The contents of the three records when everything has ended."""

    #: the simulator's requests (`Simulator.request_log`), its batches and the files it still has
    requests: list[dict[str, Any]]
    openai_batches: list[dict[str, Any]]
    openai_files: list[dict[str, Any]]
    #: rows of assets {id, stage, tags, error, code (of the last task)}, jobs {id, image_count, completed, failed,
    #: tasks_failed, tasks (those that are left), finished, batched (OpenAI had a batch of it)},
    #: batches {id, openai_batch_id, input_file_id, state}; usage {requests, tokens}
    assets: list[dict[str, Any]]
    jobs: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    usage: dict[str, int]
    #: OpenAI ids of every batch-complete that the database sent, and that a client received
    sent: list[str]
    received: list[str]
    #: the number of batch-complete without a batch, for uploads whose last change was not the end of a batch
    sent_without_batch: int = 0
    #: the tags that each asset must have
    truth: dict[str, frozenset[str]] = field(default_factory=dict)
    #: single calls whose answer may have been lost with its worker before it was reported
    may_be_lost: int = 0
    #: whether the client was connected all the time (a broadcast is delivered at most once)
    client_heard_all: bool = True
    #: how each asset may end, if not tagged
    ends: Mapping[str, frozenset[str]] = field(default_factory=dict)
    #: how many times each picture (identified by its tags) should be tagged; None: once for each asset
    pictures: Counter[frozenset[str]] | None = None
    #: when workers were killed, in epoch seconds; None: not recorded
    kills: Sequence[float] | None = None
    #: every broadcast {topic, event, payload, private, workspace (of the payload's job)}
    broadcasts: list[dict[str, Any]] = field(default_factory=list)
    #: a sentence for each worker that ended by itself
    fallen: Sequence[str] = ()


def compare_books(books: Books) -> list[str]:
    """A sentence for each contradiction between the records, or with autotag's promises."""
    return [
        *_images(books), *_jobs(books), *_batches(books), *_payments(books), *_pictures(books), *_broadcasts(books),
        *_topics(books), *books.fallen,
        *_files(books),
    ]  # fmt: skip


def _files(books: Books) -> list[str]:
    """Violations: files that remain at OpenAI."""
    batches = {f"autotag-{row['id']}.jsonl": row for row in books.batches}
    return [
        f"file {file['id']} ({file['filename']}, batch: {batches.get(file['filename'])}) was left at OpenAI"
        for file in books.openai_files
    ]


def _images(books: Books) -> list[str]:
    found = []
    for asset in books.assets:
        if asset["id"] in books.truth:
            found += _image(asset, books.truth[asset["id"]], books.ends.get(asset["id"], TAGGED))
        else:
            found.append(f"image {asset['id']} was uploaded by nobody")
    there = {asset["id"] for asset in books.assets}
    missing = [asset for asset in books.truth if asset not in there and "gone" not in books.ends.get(asset, TAGGED)]
    return found + [f"image {asset} is not there" for asset in missing]


def _image(asset: dict[str, Any], truth: frozenset[str], ends: frozenset[str]) -> list[str]:
    """Violations of one image that may end in these ways."""
    if "anything" in ends:
        return []
    name, stage, tags = f"image {asset['id']}", asset["stage"], set(asset["tags"] or ())
    if stage == "completed":
        if "tagged" not in ends:
            return [f"{name} was refused, and is shown as completed"]
        return [f"{name} has the tags of another picture"] if tags != truth else []
    if tags:
        return [f"{name} has tags, and is shown as {stage}"]
    if stage == "failed" and asset.get("code") in ends:
        return [] if asset["error"] else [f"{name} failed without a sentence for the user"]
    if "moved" in ends or ("untouched" in ends and stage is None):
        return []
    code = f" ({asset['code']})" if asset.get("code") else ""
    return [f"{name} ended as {stage}{code}: {asset['error']}"]


def _jobs(books: Books) -> list[str]:
    found = [f"upload {job['id']} has not ended" for job in books.jobs if not job["finished"]]
    for job in books.jobs:
        recorded = (job["failed"], job["image_count"] - job["completed"])
        counted = (job["tasks_failed"], job["tasks"])
        if recorded != counted:
            found.append(f"upload {job['id']} counts {recorded} as failed and without tags, its images are {counted}")
    stages = Counter(asset["stage"] for asset in books.assets)
    completed = sum(job["completed"] for job in books.jobs)
    # A row that is deleted or moved may have been tagged before.
    unsure = sum(1 for ends in books.ends.values() if ends & {"gone", "moved", "anything"})
    if not 0 <= completed - stages["completed"] <= unsure:
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

    # Only single calls whose answer was lost with a worker may be paid for without a result.
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
    wanted = len(books.assets) if books.pictures is None else books.pictures.total()
    repeated = len(lines) + len(singles) - wanted
    if repeated > books.may_be_lost:
        found.append(f"{repeated} answers more than images were paid; at most {books.may_be_lost} can be explained")
    return found


def _pictures(books: Books) -> list[str]:
    """Violations: pictures that were paid for more often than uploaded, in batches, or in single calls that no kill
    explains."""
    if books.pictures is None:
        return []
    found = []
    by_batch: Counter[frozenset[str]] = Counter()
    singles: dict[frozenset[str], list[dict[str, Any]]] = {}
    for entry in books.requests:
        if entry["status"] == 200 and entry.get("usage") and entry.get("tags"):
            picture = frozenset(entry["tags"])
            if entry["method"] != "BATCH":
                singles.setdefault(picture, []).append(entry)
            elif entry.get("delivered"):
                by_batch[picture] += 1
    for picture in by_batch.keys() | singles.keys():
        wanted, calls = books.pictures[picture], singles.get(picture, [])
        repeated = by_batch[picture] + len(calls) - wanted
        excused = len(calls) if books.kills is None else sum(_may_have_died(call, books.kills) for call in calls)
        if by_batch[picture] > wanted:
            found.append(f"{_name(picture)} was uploaded {wanted} times and paid {by_batch[picture]} times by batch")
        elif repeated > excused:
            found.append(
                f"{_name(picture)} was uploaded {wanted} times and paid {by_batch[picture] + len(calls)} times,"
                f" of which {excused} may have died with a worker ({_relate(calls, books.kills or ())})"
            )
    return found


def _may_have_died(call: dict[str, Any], kills: Sequence[float]) -> bool:
    """Whether a worker was killed while a single call was in flight or its answer not yet reported."""
    return any(call["at"] - UNREAD <= kill <= (call.get("done") or call["at"]) + UNREPORTED for kill in kills)


def _relate(calls: Sequence[dict[str, Any]], kills: Sequence[float]) -> str:
    """The calls and the kills as seconds since the first call, to help find the cause."""
    start = min(call["at"] for call in calls)
    times = ", ".join(f"{call['at'] - start:.1f}–{(call.get('done') or call['at']) - start:.1f}" for call in calls)
    return f"calls at {times} s; kills at {', '.join(f'{kill - start:.1f}' for kill in kills) or 'no time'}"


def _name(picture: frozenset[str]) -> str:
    return f"the picture of {', '.join(sorted(picture))}"


def _topics(books: Books) -> list[str]:
    """Violations: broadcasts that reach somebody who may not receive them."""
    found = []
    for sent in books.broadcasts:
        topic, event, payload = sent["topic"], sent["event"], sent["payload"]
        if topic == PUBLIC_TOPIC:
            if sent["private"] or event != "batch-complete" or not payload.keys() <= PUBLIC_KEYS:
                found.append(f"everybody was sent {event} with {', '.join(sorted(payload))}")
        elif not topic.startswith(WORKSPACE_TOPIC) or not sent["private"] or event not in EVENTS:
            found.append(f"{event} was sent to {topic}")
        elif topic != f"{WORKSPACE_TOPIC}{sent['workspace']}":
            found.append(f"{event} of workspace {sent['workspace']} was sent to {topic}")
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
    ended = [job for job in books.jobs if job["finished"]]
    least = sum(not job["batched"] for job in ended)
    if not least <= books.sent_without_batch <= len(ended):
        found.append(f"{books.sent_without_batch} batch-complete without a batch for {least} to {len(ended)} uploads")
    return found


def read_books(
    stack: Stack, truth: dict[str, frozenset[str]], received: list[str], *, may_be_lost: int, client_heard_all: bool
) -> Books:
    """Reads the current records of a stack."""
    with psycopg.connect(stack.database_url(), row_factory=dict_row) as connection:

        def rows(statement: str) -> list[dict[str, Any]]:
            return connection.execute(statement.encode()).fetchall()

        broadcasts = rows("""select m.topic, m.event, m.payload, m.private, j.workspace_id::text as workspace
            from realtime.messages m left join autotag.jobs j on j.id::text = m.payload ->> 'job_id'""")
        public = [sent["payload"]["batch_id"] for sent in broadcasts
                  if (sent["event"], sent["topic"]) == ("batch-complete", PUBLIC_TOPIC)]  # fmt: skip
        return Books(
            requests=stack.simulator.request_log,
            openai_batches=stack.simulator.batches.describe_all(),
            openai_files=list(stack.simulator.files.values()),
            assets=rows("""select a.id::text, a.tagging_stage as stage, a.tags, a.tagging_error as error, t.code
                from public.assets a left join (
                  select distinct on (asset_id) asset_id, error_code as code from autotag.tasks
                  order by asset_id, id desc
                ) t on t.asset_id = a.id"""),
            jobs=rows("""select j.id::text, j.image_count, j.completed, j.failed, j.finished_at is not null as finished,
                exists (select from autotag.batches b where b.job_id = j.id and b.openai_batch_id is not null)
                  as batched,
                count(*) filter (where t.stage = 'failed') as tasks_failed, count(t.id) as tasks
                from autotag.jobs j left join autotag.tasks t on t.job_id = j.id group by j.id"""),
            batches=rows("select id::text, openai_batch_id, input_file_id, state from autotag.batches"),
            usage=rows("""select coalesce(sum(requests), 0)::bigint as requests,
                coalesce(sum(input_tokens + output_tokens), 0)::bigint as tokens from autotag.usage""")[0],
            sent=[batch for batch in public if batch],
            sent_without_batch=public.count(None),
            received=list(received),
            truth=truth,
            may_be_lost=may_be_lost,
            client_heard_all=client_heard_all,
            broadcasts=broadcasts,
        )  # fmt: skip
