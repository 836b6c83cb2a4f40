"""Worker and database agree on their messages: the keys that the SQL reads and returns."""

from __future__ import annotations

import re
import typing
from dataclasses import fields, is_dataclass
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from autotag.db import errors as e
from autotag.db import lanes as l
from autotag.db import messages as m
from autotag.db import operator_messages as o
from autotag.db import profiles as p
from autotag.db import rows as r
from autotag.db import vocabulary as v
from autotag.images.sent import ImageNotes
from support import Library

WORKER = "00000000-0000-4000-8000-000000000001"

#: Each message that goes in, and the functions with the names by which they read it.
READ: dict[type, list[tuple[str, str]]] = {
    m.ErrorReport: [("clean_error", "p_error")],
    m.Usage: [("clean_usage", "p_usage")],
    m.TagResult: [("clean_result", "p_result"), ("canonical_results", "r.result"), ("read_answers", "e -> 'result'")],
    m.Report: [("read_answers", "e")],
    m.StageReport: [("report_stages", "e")],
    m.BatchNote: [("note_images", "e")],
    # m.Sent is a part of it
    m.ObservedLimits: [
        ("apply_report", "p_report.observed"),
        ("apply_sent", "p_report.observed"),
        ("update_provider_limits", "v_seen"),
        ("place_unclear", "p_observed"),
    ],
    m.PolledBatch: [("clean_poll", "e")],
    m.ProviderFacts: [("provider_checked", "p_facts")],
    o.ComparisonReport: [("settle_comparison", "p_report"), ("next_action", "p_report")],
}


#: Each row that a function answers with, and that function.
ROWS: dict[type, str] = {
    r.ClaimRow: "claim", r.BatchClaimRow: "claim_batches", r.BeatRow: "heartbeat", l.Unstored: "list_unstored",
    l.Sealed: "seal_uploads",
    o.UsageRow: "list_usage",
}  # fmt: skip


def keys(message: Any) -> set[str]:
    return {field.name for field in fields(message)} if is_dataclass(message) else set(typing.get_type_hints(message))


def required(message: Any) -> set[str]:
    """The keys that a TypedDict has to have."""
    hints = typing.get_type_hints(message, include_extras=True)
    return {name for name, hint in hints.items() if typing.get_origin(hint) is not typing.NotRequired}


@pytest.mark.parametrize("message", READ, ids=lambda message: message.__name__)
def test_the_database_reads_the_keys_that_a_message_has(library: Library, message: type) -> None:
    read: set[str] = set()
    for function, name in READ[message]:
        [row] = library.sql("select prosrc from pg_proc where proname = %s and pronamespace = 'autotag'::regnamespace",
                            function)  # fmt: skip
        body = re.sub(r"--.*", "", row["prosrc"])
        read |= set(re.findall(rf"(?<![\w.]){re.escape(name)} (?:->>?|\?) '(\w+)'", body))
        read |= set(re.findall(rf"clean_number\({name}, '(\w+)'", body))
    assert read == keys(message), f"{', '.join(function for function, _ in READ[message])} and {message.__name__}"


@pytest.mark.parametrize("message", ROWS, ids=lambda message: message.__name__)
def test_a_row_has_the_columns_of_its_function(library: Library, message: type) -> None:
    [row] = library.sql(
        "select array(select name from unnest(proargnames, proargmodes) a (name, mode) where mode in ('o', 't')) as names"
        " from pg_proc where proname = %s and pronamespace = 'autotag'::regnamespace", ROWS[message],
    )  # fmt: skip
    assert set(row["names"]) == keys(message)


def check(message: Any, answer: dict[str, Any] | None, *, every: bool = True) -> None:
    """Checks that an answer has the keys of its message: all of them, or at least the required ones."""
    assert answer is not None
    assert set(answer) <= keys(message), f"{message.__name__} lacks what the database says"
    assert (keys(message) if every else required(message)) <= set(answer), (
        f"the database leaves out of {message.__name__}"
    )


def test_single_calls(library: Library) -> None:
    check(m.Registered, register(library))
    assets = library.insert(["a.jpg", "b.jpg"])
    library.enqueue(assets)
    [claim] = library.sql("select * from autotag.claim(%s, 10, 1)", WORKER)
    assert set(claim) == {"tasks", "wait", "bound", "question"}
    check(m.Question, claim["question"])
    images = value(library, "autotag.describe_tasks(%s, %s)", WORKER, Plain(claim["tasks"]))
    assert len(images) == 2
    for image in images:
        check(m.Image, {**image, "claim": 1})  # the worker adds the claim's number
    [beat] = library.sql("select * from autotag.heartbeat(%s, '{1}', '{0}')", WORKER)
    check(r.BeatRow, beat)
    assert keys(r.BeatRow) == keys(m.Beat)
    check(m.Registered, beat["settings"])
    workspace = library.member.workspace
    reports = [{"task": image["task"], "attempt": image["attempt"], "called": False,
                "error": {"kind": "image", "code": "answer_too_long"}} for image in images]  # fmt: skip
    settled = value(library, "autotag.settle(%s, %s, %s, null, true)", WORKER, workspace, reports)
    check(m.Settled, settled)
    for notice in settled["notices"]:
        check(m.Notice, notice)
    assert settled["notices"]
    [unstored] = library.sql("select workspaces::text[] as workspaces, wait from autotag.list_unstored(%s)", WORKER)
    check(l.Unstored, unstored)
    assert unstored["workspaces"] == [str(workspace)]
    picked = value(library, "autotag.pick_unstored(%s, %s, 10)", WORKER, workspace)
    assert picked == sorted(image["task"] for image in images)
    stored = value(library, "autotag.store_waiting(%s, %s, %s)", WORKER, workspace, Plain(picked))
    check(l.Stored, stored)
    assert stored["stored"] == 2
    assert value(library, "autotag.postpone_stores(%s, %s, %s)", WORKER, workspace, Plain(picked)) == []
    assert value(library, "autotag.report_stages(%s, null, '[]', %s)", WORKER, {"sent": 2, "sent_age": 0.5}) == []


def test_batches(library: Library) -> None:
    register(library)
    library.enqueue(library.insert([f"{number}.jpg" for number in range(60)]))
    [claim] = library.sql("select * from autotag.claim_batches(%s, 1, 1)", WORKER)
    assert set(claim) == {"batches", "wait", "question", "poll", "cancel", "files", "unrecorded", "look_up"}
    check(m.Question, claim["question"])
    [batch] = claim["batches"]
    check(m.Batch, batch)
    held = (WORKER, batch["batch"], batch["attempt"])
    images = value(library, "autotag.batch_images(%s, %s, %s, 0, 100)", *held)
    assert len(images) > 50
    for image in images:  # what is said of a single call besides has a default
        assert set(image) == keys(m.Image) - {"attempt", "job", "traceparent", "waited", "workspace", "claim", "brief"}
    library.sql("update autotag.batches set state = 'creating'")
    library.sql("select autotag.batch_submitted(%s, %s, %s, 'batch_1', 'validating', 'file-1')", *held)
    library.sql("update autotag.provider_limits set next_poll_at = '-infinity'")
    [claim] = library.sql("select * from autotag.claim_batches(%s, 1, 2)", WORKER)
    [submitted] = claim["poll"]
    check(m.Sought, submitted)
    library.sql("update autotag.batches set state = 'done', reserved_tokens = 0, unrecorded_files = 1,"
                " finished_at = now() - interval '1 h'")  # fmt: skip
    library.sql("update autotag.provider_limits set next_poll_at = '-infinity'")
    [claim] = library.sql("select * from autotag.claim_batches(%s, 1, 3)", WORKER)
    [unrecorded] = claim["unrecorded"]
    check(m.Sought, unrecorded)
    library.sql("select autotag.files_deleted(%s, '{}', array[%s]::uuid[])", WORKER, unrecorded["id"])
    library.sql("update autotag.provider_limits set next_poll_at = '-infinity'")
    assert library.sql("select unrecorded from autotag.claim_batches(%s, 1, 4)", WORKER) == [{"unrecorded": None}]


def test_what_waits_for_realtime(library: Library) -> None:
    library.sql("insert into autotag.outbox (topic, event, payload, private, created_at)"
                " values ('t', 'e', '{}', true, now())")  # fmt: skip
    [message] = value(library, "autotag.take_outbox(10)")
    check(m.Broadcast, message)


def test_operators(library: Library) -> None:
    check(o.Metrics, value(library, "autotag.metrics()"))
    library.insert(["a.jpg"])
    diagnosis = value(library, "autotag.diagnose()")
    check(o.Diagnosis, diagnosis)
    for finding in diagnosis["findings"]:
        check(o.FindingRow, finding)
    library.enqueue(library.insert(["b.jpg"]))
    check(o.StoredFile, value(library, "autotag.diagnose()")["sample"])
    check_status(library)
    library.sql(
        "update autotag.models set shutdown_date = current_date + 3 where name = (select model from autotag.settings)"
    )
    model = value(library, "autotag.status()")["model"]
    check(o.ModelStatus, model)
    check(o.Shutdown, model["shutdown"])
    check(o.ProviderStatus, model["provider"])
    workspace = library.member.workspace
    check(o.BackfillPreview, value(library, "autotag.preview_backfill(%s, true, null, 10)", workspace))
    check(o.BackfillPart, value(library, "autotag.backfill(%s, true, null, 10)", workspace))
    check(o.BackfillPart, value(library, "autotag.backfill(%s, true, null, 10)", workspace))


def check_status(library: Library) -> None:
    """Checks that every part of the status has the keys of its message."""
    register(library)
    library.enqueue(library.insert([f"{number}.jpg" for number in range(60)]))
    library.sql(
        "insert into autotag.usage (workspace_id, day, model, service_tier) values (%s, current_date, 'x', 'default')",
        library.member.workspace,
    )
    [claim] = library.sql("select * from autotag.claim(%s, 1, 1)", WORKER)
    failed = [{"task": task, "attempt": 1, "called": False, "error": {"kind": "image", "code": "answer_too_long"}}
              for task in claim["tasks"]]  # fmt: skip
    assert value(library, "autotag.settle(%s, %s, %s)", WORKER, library.member.workspace, failed)["accepted"] == 1
    status = value(library, "autotag.status()")
    check(o.SystemStatus, status)
    for part, message in {"queue": o.QueueStatus, "limits": o.LimitsStatus, "today": o.TodayStatus}.items():
        check(message, status[part])
    for part, message in {"jobs": o.JobStatus, "batches": o.BatchStatus, "workers": o.WorkerStatus,
                          "errors": o.FailedImages}.items():  # fmt: skip
        assert status[part], f"the test makes no {part}"
        for row in status[part]:
            check(message, row)


def test_comparisons(library: Library) -> None:
    library.insert(["a.jpg"])
    library.sql("update public.assets set tags = '{red}', tagging_stage = 'completed'")
    workspace = library.member.workspace
    preview = value(library, "autotag.preview_comparison(%s, 'gpt-5-mini', null, 1)", workspace)
    check(o.ComparisonPreview, preview)
    question = preview["question"]
    check(o.ModelQuestion, question)
    [image] = value(library, "autotag.comparison_sample(%s, 1)", workspace)
    check(o.ComparedImage, image)
    admission = value(library, "autotag.admit_comparison(%s, %s)", workspace, question)
    check(o.Admission, admission, every=False)
    library.sql("update autotag.provider_limits set blocked_until = now() + interval '1 h'")
    retry_later = value(library, "autotag.admit_comparison(%s, %s)", workspace, question)
    check(o.Admission, retry_later, every=False)
    library.sql("select autotag.pause_tagging('no credit', 'storage')")
    stopped = value(library, "autotag.admit_comparison(%s, %s)", workspace, question)
    check(o.Admission, stopped, every=False)
    assert {*admission, *retry_later, *stopped} == keys(o.Admission)
    said: set[str] = set()
    for code, error in {
        "done": None, "answer_too_long": {"kind": "image"}, "no_credit": {"kind": "account"},
        "provider_error": {"kind": "transient"}, "x": {"kind": "account", "parameter": "detail"},
    }.items():  # fmt: skip
        report: o.ComparisonReport = {"called": True, "failures": 0, "cut_off": False, "proven": False, "reserved": 100,
                                      "reserved_at": admission["reserved_at"], "cap": 100}  # fmt: skip
        if error:
            report["error"] = {**error, "code": code}  # type: ignore[typeddict-item]
        step = value(library, "autotag.settle_comparison(%s, %s, %s)", workspace, question, report)
        check(o.ComparisonStep, step, every=False)
        said |= set(step)
    assert said == keys(o.ComparisonStep)


NOTES: ImageNotes = {
    "truncated": 0.97, "pieces": 2, "frame": 3, "page": 1, "pages": 2, "thumbnail": [160, 120], "kind": "PDF",
}  # fmt: skip


def test_notes_on_images_are_kept(library: Library) -> None:
    assert set(NOTES) == keys(ImageNotes)
    assert value(library, "autotag.clean_image_notes(%s)", NOTES) == NOTES


def test_profiles_and_briefs(library: Library) -> None:
    workspace = library.member.workspace
    check(p.Profile, value(library, "autotag.show_profile(%s)", workspace))
    field = {"name": "room", "kind": "enum", "values": ["kitchen"], "description": "Where it is"}
    changes = {"instructions": "Name rooms.", "language": "en", "tag_count": 5, "min_confidence": 0.5,
               "vocabulary_mode": "open", "add_parents": False, "fields": [field]}  # fmt: skip
    assert set(changes) == keys(p.ProfileChanges)
    saved = value(library, "autotag.set_profile(%s, %s)", workspace, changes)
    check(p.Profile, saved)
    assert {name: saved[name] for name in changes} == changes, "a change is lost"
    check(m.Field, saved["fields"][0])
    [version] = value(library, "autotag.profile_history(%s)", workspace)
    check(p.Profile, {**version, "has_vocabulary": False})
    library.insert(["a.jpg"])
    library.sql("update public.assets set tags = '{red}', tagging_stage = 'completed'")
    preview = value(library, "autotag.preview_comparison(%s, 'gpt-5-mini', null, 1)", workspace)
    check(m.Brief, preview["brief"])
    register(library)
    library.enqueue(library.insert(["b.jpg"]))
    [claim] = library.sql("select * from autotag.claim(%s, 1, 1)", WORKER)
    [image] = value(library, "autotag.describe_tasks(%s, %s)", WORKER, Plain(claim["tasks"]))
    check(m.Brief, value(library, "autotag.describe_brief(%s, %s)", WORKER, image["brief"]))


def test_vocabularies(library: Library) -> None:
    workspace = library.member.workspace
    entry = {"tag": "cat", "aliases": ["kitty"], "description": "A pet", "parent": None, "uses": 1}
    assert set(entry) == keys(v.Entry)
    done = value(library, "autotag.edit_vocabulary(%s, %s, '{}', false)", workspace, [entry])
    check(v.VocabularyChange, done)
    assert value(library, "autotag.list_vocabulary(%s)", workspace) == [entry]
    library.insert(["a.jpg"])
    library.sql("update public.assets set tags = '{red}'")
    check(v.TagsInUse, value(library, "autotag.tags_in_use(%s, null, 10)", workspace))
    counted = value(library, "autotag.count_uses(%s, %s, 1)", workspace, {"red": 3})
    check(v.UsesCounted, counted)
    assert counted["new"] == [{"tag": "red", "uses": 3}]


def test_refusals(library: Library) -> None:
    said: set[str] = set()
    library.stack.configure(live_images_max=1)
    clash = [{"tag": "cat", "aliases": ["pet"]}, {"tag": "dog", "aliases": ["pet"]}]
    for call, *arguments in (
        ("autotag.edit_vocabulary(null, %s, '{}', false)", [{"tag": 1}]),
        ("autotag.edit_vocabulary(null, %s, '{}', false)", clash),
        ("autotag.check_live_capacity(%s, 2)", library.member.workspace),
    ):
        with pytest.raises(psycopg.DatabaseError) as refused:
            value(library, call, *arguments)
        said |= set(e.refusal(refused.value) or {})
    assert keys(e.Refusal) <= said, "nothing says this when a call is refused"


def register(library: Library) -> dict[str, Any]:
    library.sql("update autotag.provider_limits set proven_at = now()")
    answer: dict[str, Any] = value(
        library, "autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER
    )
    return answer


class Plain(list[int]):
    """A list that is an array in SQL, and not JSON."""


def value(library: Library, call: str, *arguments: Any) -> Any:
    """The value that one call of a function returns."""
    placed = [list(one) if isinstance(one, Plain) else Jsonb(one) if isinstance(one, dict | list) else one
              for one in arguments]  # fmt: skip
    return library.sql(f"select {call} as told", *placed)[0]["told"]
