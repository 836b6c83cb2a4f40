"""The auditor is itself tested: books that agree pass, and every kind of seeded violation is found."""

from __future__ import annotations

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
    return {"method": "POST", "path": "/v1/chat/completions", "status": 200, "usage": usage, **more}


def batch(name: str = "batch_1", row: str = "row-1", status: str = "completed") -> dict[str, Any]:
    return {"id": name, "status": status, "metadata": {"autotag_batch": row}}


@pytest.fixture
def books() -> Books:
    """Two images by batch and one by a single call, after a refusal and a batch that OpenAI had no room for."""
    return Books(
        requests=[line(1), line(2), call(status=429, usage=None), call()],
        openai_batches=[batch("batch_0", status="failed"), batch()],
        openai_files=[],
        assets=[{"id": a, "stage": "completed", "tags": ["red", a], "error": None} for a in ("a", "b", "c")],
        jobs=[{"id": "job-1", "image_count": 3, "completed": 3, "failed": 0, "finished": True,
               "tasks_failed": 0, "tasks": 0}],
        batches=[{"id": "row-1", "openai_batch_id": "batch_1", "state": "done"}],
        usage={"requests": 3, "tokens": 340},
        sent=["batch_1"],
        received=["batch_1"],
        truth={a: frozenset({"red", a}) for a in "abc"},
    )  # fmt: skip


def test_books_that_agree_pass(books: Books) -> None:
    assert compare_books(books) == []


def edit(table: str, **changes: Any) -> Callable[[Books], None]:
    return lambda books: getattr(books, table)[0].update(changes)


def add(table: str, item: Any) -> Callable[[Books], None]:
    return lambda books: getattr(books, table).append(item)


def pay_twice(books: Books) -> None:
    """A second call for an image, well booked."""
    books.requests.append(call())
    books.usage.update(requests=4, tokens=440)


SEEDED: dict[str, Callable[[Books], None]] = {
    "ended as processing": edit("assets", stage="processing"),
    "tags of another picture": edit("assets", tags=["red", "b"]),
    "image c is not there": lambda books: books.assets.pop() and None,
    "has not ended": edit("jobs", finished=False),
    "counts (0, 1) as failed and without tags": edit("jobs", completed=2),
    "count 2 images as completed, 3 are": edit("jobs", completed=2),
    "was created 2 times": add("openai_batches", batch("batch_2")),
    "is in no row": add("openai_batches", batch("batch_3", "row-3")),
    "names a batch that OpenAI does not have": edit("batches", openai_batch_id="batch_9"),
    "was left creating": edit("batches", state="creating"),
    "paid 2 times by batch": add("requests", line(1, batch="batch_2")),
    "usage counts 2 answers": lambda books: books.usage.update(requests=2),
    "usage counts 4 answers": lambda books: books.usage.update(requests=4),
    "10 fewer than OpenAI billed": lambda books: books.usage.update(tokens=330),
    "-10 fewer than OpenAI billed": lambda books: books.usage.update(tokens=350),
    "answers more than images were paid": pay_twice,
    "was sent 2 times": add("sent", "batch_1"),
    "was sent 0 times": lambda books: books.sent.clear(),
    "batch-complete of batch_5": add("sent", "batch_5"),
    "heard of batch_1 2 times": add("received", "batch_1"),
    "heard of batch_6": add("received", "batch_6"),
    "never heard of batch_1": lambda books: books.received.clear(),
    "file file-1 was left": add("openai_files", "file-1"),
}


@pytest.mark.parametrize("sentence", SEEDED)
def test_a_seeded_violation_is_found(books: Books, sentence: str) -> None:
    wrong = deepcopy(books)
    SEEDED[sentence](wrong)
    assert any(sentence in violation for violation in compare_books(wrong)), compare_books(wrong)


def test_answers_that_died_with_their_worker_are_no_violation(books: Books) -> None:
    """Paid and unknown: so many as were in hand at the deaths, and not one more."""
    books.requests += [call(), call()]
    books.may_be_lost = 2
    assert compare_books(books) == []
    books.may_be_lost = 1
    assert len(compare_books(books)) == 2


def test_there_is_a_point_before_and_after_every_step() -> None:
    assert len(POINTS) == len(set(POINTS)) == 40
