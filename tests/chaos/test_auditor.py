"""Tests of the auditor: books that agree pass, and every kind of seeded violation is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from lab.chaos.auditor import Books, compare_books
from lab.chaos.doomed import POINTS


def line(task: int, **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return {"method": "BATCH", "status": 200, "batch": "batch_1", "custom_id": str(task), "delivered": True,
            "usage": usage, **more}  # fmt: skip


def call(**more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 90, "completion_tokens": 10}
    return {"method": "POST", "path": "/v1/chat/completions", "status": 200, "usage": usage, "at": 1.0, "done": 2.0,
            **more}  # fmt: skip


def batch(name: str = "batch_1", row: str = "row-1", status: str = "completed") -> dict[str, Any]:
    return {"id": name, "status": status, "metadata": {"autotag_batch": row}}


def broadcast(topic: str, event: str, **more: Any) -> dict[str, Any]:
    return {"topic": topic, "event": event, "private": True, "workspace": "w", "payload": {"job_id": "job-1"}, **more}


@pytest.fixture
def books() -> Books:
    """Two images by batch and one by a single call, after a refusal and a batch that OpenAI had no room for.

    Another image was refused by its host.
    """
    return Books(
        requests=[line(1, tags=("red", "a")), line(2, tags=("red", "b")), call(status=429, usage=None),
                  call(tags=("red", "c")), call(tags=("red", "d"))],
        openai_batches=[batch("batch_0", status="failed"), batch()],
        openai_files=[],
        assets=[*({"id": a, "stage": "completed", "tags": ["red", a], "error": None, "code": None} for a in "abc"),
                {"id": "d", "stage": "failed", "tags": None, "error": "It could not be stored.", "code": "not_stored"}],
        jobs=[{"id": "job-1", "image_count": 3, "completed": 3, "failed": 0, "finished": True,
               "tasks_failed": 0, "tasks": 0, "batched": True},
              {"id": "job-2", "image_count": 1, "completed": 0, "failed": 1, "finished": True,
               "tasks_failed": 1, "tasks": 1, "batched": False}],
        batches=[{"id": "row-1", "openai_batch_id": "batch_1", "input_file_id": "file-1", "state": "done"}],
        usage={"requests": 4, "tokens": 440},
        sent=["batch_1"],
        received=["batch_1"],
        sent_without_batch=1,
        truth={a: frozenset({"red", a}) for a in "abcd"},
        ends={"d": frozenset({"not_stored"})},
        pictures=Counter(frozenset({"red", a}) for a in "abcd"),
        kills=[],
        broadcasts=[
            broadcast("batch-updates", "batch-complete", private=False, workspace=None, payload={"batch_id": "batch_1"}),
            broadcast("tagging:w", "job-complete"),
        ],
    )  # fmt: skip


def test_books_that_agree_pass(books: Books) -> None:
    assert compare_books(books) == []


def test_a_file_that_nobody_knows_of_is_a_fault(books: Books) -> None:
    """The worker died before it recorded the uploaded file, and the batch was cancelled before another worker took it.
    The file still has to be deleted."""
    books.batches.append({"id": "row-2", "openai_batch_id": None, "input_file_id": None, "state": "cancelled"})
    books.openai_files.append({"id": "file-9", "filename": "autotag-row-2.jsonl"})
    [found] = compare_books(books)
    assert "file-9" in found


def edit(table: str, **changes: Any) -> Callable[[Books], None]:
    return lambda books: getattr(books, table)[0].update(changes)


def add(table: str, item: Any) -> Callable[[Books], None]:
    return lambda books: getattr(books, table).append(item)


def pay_twice(books: Books) -> None:
    """Adds a second call for an image, with correct usage."""
    books.requests.append(call())
    books.usage.update(requests=5, tokens=540)


def edit_image(asset: str, **changes: Any) -> Callable[[Books], None]:
    return lambda books: next(a for a in books.assets if a["id"] == asset).update(changes)


def expect(asset: str, *ends: str) -> Callable[[Books], None]:
    return lambda books: books.ends.update({asset: frozenset(ends)})  # type: ignore[attr-defined]


def lose(asset: str) -> Callable[[Books], None]:
    """Removes the row of an image."""
    return lambda books: books.assets.remove(next(a for a in books.assets if a["id"] == asset))


SEEDED: dict[str, Callable[[Books], None]] = {
    "image a ended as processing": edit("assets", stage="processing", tags=None),
    "image a has tags, and is shown as processing": edit("assets", stage="processing"),
    "tags of another picture": edit("assets", tags=["red", "b"]),
    "image c is not there": lose("c"),
    "image d is not there": lose("d"),
    "image x was uploaded by nobody": add(
        "assets", {"id": "x", "stage": None, "tags": None, "error": None, "code": None}
    ),
    "image d was refused, and is shown as completed": edit_image("d", stage="completed", tags=["red", "d"]),
    "image d has tags, and is shown as failed": edit_image("d", tags=["red", "d"]),
    "image d failed without a sentence": edit_image("d", error=None),
    "image d ended as failed (unknown)": edit_image("d", code="unknown"),
    "image d ended as queued": edit_image("d", stage="queued", error=None, code=None),
    "image d ended as None": edit_image("d", stage=None, error=None, code=None),
    "image c ended as failed (not_stored)": edit_image("c", stage="failed", tags=None, error="…", code="not_stored"),
    "image c ended as failed (cancelled)": edit_image("c", stage="failed", tags=None, error="…", code="cancelled"),
    "has not ended": edit("jobs", finished=False),
    "counts (0, 1) as failed and without tags": edit("jobs", completed=2),
    "count 2 images as completed, 3 are": edit("jobs", completed=2),
    "count 4 images as completed, 3 are": edit("jobs", completed=4),
    "was created 2 times": add("openai_batches", batch("batch_2")),
    "is in no row": add("openai_batches", batch("batch_3", "row-3")),
    "names a batch that OpenAI does not have": edit("batches", openai_batch_id="batch_9"),
    "was left creating": edit("batches", state="creating"),
    "paid 2 times by batch": add("requests", line(1, batch="batch_2")),
    "usage counts 3 answers": lambda books: books.usage.update(requests=3),
    "usage counts 5 answers": lambda books: books.usage.update(requests=5),
    "10 fewer than OpenAI billed": lambda books: books.usage.update(tokens=430),
    "-10 fewer than OpenAI billed": lambda books: books.usage.update(tokens=450),
    "answers more than images were paid": pay_twice,
    "picture of a, red was uploaded 1 times and paid 2 times by batch": add(
        "requests", line(9, batch="batch_2", tags=("red", "a"))
    ),
    "picture of c, red was uploaded 1 times and paid 2 times, of which 0": add("requests", call(tags=("red", "c"))),
    "picture of a, red was uploaded 1 times and paid 2 times, of which 0": add("requests", call(tags=("red", "a"))),
    "picture of e, red was uploaded 0 times": add("requests", call(tags=("red", "e"))),
    "everybody was sent job-complete": add("broadcasts", broadcast("batch-updates", "job-complete", private=False)),
    "everybody was sent batch-complete with batch_id, workspace_id": add(
        "broadcasts",
        broadcast(
            "batch-updates", "batch-complete", private=False, payload={"batch_id": "batch_1", "workspace_id": "w"}
        ),
    ),
    "job-progress of workspace w was sent to tagging:v": add("broadcasts", broadcast("tagging:v", "job-progress")),
    "job-progress was sent to tagging:w": add("broadcasts", broadcast("tagging:w", "job-progress", private=False)),
    "job-complete was sent to somewhere": add("broadcasts", broadcast("somewhere", "job-complete")),
    "worker 7 ended by itself": lambda books: setattr(books, "fallen", ["worker 7 ended by itself with 1"]),
    "was sent 2 times": add("sent", "batch_1"),
    "was sent 0 times": lambda books: books.sent.clear(),
    "batch-complete of batch_5": add("sent", "batch_5"),
    "heard of batch_1 2 times": add("received", "batch_1"),
    "heard of batch_6": add("received", "batch_6"),
    "never heard of batch_1": lambda books: books.received.clear(),
    "0 batch-complete without a batch for 1 to 2": lambda books: setattr(books, "sent_without_batch", 0),
    "3 batch-complete without a batch for 1 to 2": lambda books: setattr(books, "sent_without_batch", 3),
    "file file-1 (autotag-row-1.jsonl": add("openai_files", {"id": "file-1", "filename": "autotag-row-1.jsonl"}),
    "file file-2 (output.jsonl": add("openai_files", {"id": "file-2", "filename": "output.jsonl"}),
}


@pytest.mark.parametrize("sentence", SEEDED)
def test_a_seeded_violation_is_found(books: Books, sentence: str) -> None:
    wrong = deepcopy(books)
    SEEDED[sentence](wrong)
    assert any(sentence in violation for violation in compare_books(wrong)), compare_books(wrong)


def test_answers_that_died_with_their_worker_are_no_violation(books: Books) -> None:
    """Paid answers may be unknown, but no more of them than were in flight when workers died."""
    books.requests += [call(), call()]
    books.may_be_lost = 2
    assert compare_books(books) == []
    books.may_be_lost = 1
    assert len(compare_books(books)) == 2


def test_a_picture_may_be_asked_again_when_its_worker_was_killed(books: Books) -> None:
    """The worker must have been killed during the call, shortly before it or shortly after it."""
    books.requests[3].update(at=100.0, done=100.5)
    books.requests += [call(tags=("red", "c"), at=110.0, done=110.5)]
    books.usage.update(requests=5, tokens=540)
    books.may_be_lost = 1
    for kill, excused in ((98.9, False), (99.1, True), (100.1, True), (101.0, True), (106.0, False)):
        books.kills = [kill]
        assert (compare_books(books) == []) is excused, kill


OTHER_ENDS = {
    "gone": ("c", lose("c")),
    "moved": ("d", edit_image("d", stage="processing", error=None, code=None)),
    "untouched": ("d", edit_image("d", stage=None, error=None, code=None)),
    "cancelled": ("d", edit_image("d", code="cancelled")),
    "anything": ("d", edit_image("d", stage="queued", tags=["?"])),
}


@pytest.mark.parametrize("end", OTHER_ENDS)
def test_an_image_may_end_as_those_who_uploaded_it_say(books: Books, end: str) -> None:
    asset, change = OTHER_ENDS[end]
    change(books)
    assert compare_books(books) != []
    expect(asset, "tagged", end)(books)
    assert compare_books(books) == []


def test_there_is_a_point_before_and_after_every_step() -> None:
    assert len(POINTS) == len(set(POINTS)) == 44
