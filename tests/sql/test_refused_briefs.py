"""If a provider refuses what one workspace's profile asks, only that workspace is affected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from autotag.openai.classify import classify_status
from conftest import TEMPLATE, copied_database
from lab.postgres import LocalPostgres

WORKER = "00000000-0000-4000-8000-00000000000a"
HOSTILE, OTHER, THIRD = (f"00000000-0000-4000-8000-00000000000{n}" for n in (1, 2, 3))
RESULT = {"tags": ["a"], "confidence": {"a": 1}, "caption": "c", "model": "m"}
Error = dict[str, Any]


def error(code: str, **more: Any) -> Error:
    return {"kind": "account", "code": code, "message": f"The provider refused the account: {code}", "origin": "provider",
            **more}  # fmt: skip


SCHEMA = error("unsupported_parameter", parameter="response_format", about_request=True)
CONTEXT = error("invalid_request_error", about_request=True)
LLAMA = error("exceed_context_size_error")
TOO_LARGE = error("http_413")
REFUSED = [SCHEMA, CONTEXT, LLAMA, TOO_LARGE]
ACCOUNT = [
    error(code)
    for code in ("invalid_api_key", "insufficient_quota", "model_not_found", "http_402", "http_403", "http_404")
] + [error("http_413", origin="storage")]


@dataclass
class Scene:
    """Three workspaces with images, and a worker that holds whatever is released."""

    session: psycopg.Connection[Any]
    clock: int = 0
    calls: int = 0

    def value(self, statement: str, *values: object) -> Any:
        row = self.session.execute(statement.encode(), values or None).fetchone()
        assert row is not None
        return row[0]

    def advance(self, seconds: int) -> None:
        self.clock += seconds
        self.session.execute(
            "select set_config('autotag.now', (timestamptz '2030-01-01' + make_interval(secs => %s))::text, true)",
            (self.clock,),
        )
        self.session.execute("update autotag.workers set lease_until = autotag.now() + interval '1 day'")

    def start(
        self, profiles: tuple[str, ...], proven: bool = True, uploads: tuple[str, ...] = (HOSTILE, OTHER, THIRD)
    ) -> None:
        self.session.execute("update autotag.settings set test_clock = true")
        self.advance(0)
        self.value("select autotag.register_worker(%s, 'h', autotag.schema_version(), true)", WORKER)
        self.session.execute(
            "update autotag.provider_limits set proven_at = case when %s then autotag.now() end, probe_at = null",
            (proven,),
        )
        for workspace in profiles:
            self.value(
                "select (autotag.save_profile(%s, %s)).version", workspace, json.dumps({"instructions": workspace})
            )
        for workspace in (HOSTILE, OTHER, THIRD):
            self.session.execute(
                "insert into public.workspaces (id, name) values (%s, 'w') on conflict do nothing", (workspace,)
            )
            if workspace in uploads:
                self.upload(workspace)

    def upload(self, workspace: str) -> None:
        self.session.execute(
            "insert into public.assets (workspace_id, storage_path) select %s, %s || '/' || gen_random_uuid()"
            " from generate_series(1, 4)", (workspace, workspace),
        )  # fmt: skip
        self.value("select public.enqueue_tagging(array(select id from public.assets where workspace_id = %s"
                   " and tagging_stage is null))", workspace)  # fmt: skip

    def claim(self) -> dict[str, list[tuple[int, int]]]:
        """The images that are released, by workspace."""
        self.calls += 1
        self.value("select (autotag.claim(%s, 100, %s)).tasks", WORKER, self.calls)
        held: dict[str, list[tuple[int, int]]] = {HOSTILE: [], OTHER: [], THIRD: []}
        for task, attempt, workspace in self.session.execute(
            "select id, attempt, workspace_id::text from autotag.tasks where worker_id = %s order by id", (WORKER,)
        ).fetchall():
            held[workspace].append((task, attempt))
        return held

    def report(self, workspace: str, tasks: list[tuple[int, int]], error: Error | None = None) -> None:
        reports = [{"task": t, "attempt": a, **({"error": error} if error else {"result": RESULT})} for t, a in tasks]
        if reports:
            self.value("select autotag.settle(%s, %s, %s)", WORKER, workspace, json.dumps(reports))

    def provider(self) -> tuple[bool, bool, str]:
        """Whether tagging is paused, whether the question is proven, and the form of answers."""
        row = self.session.execute(
            "select account_error is not null, proven_at is not null, autotag.describe_question() ->> 'answer_format'"
            " from autotag.provider_limits"
        ).fetchone()
        assert row is not None
        return row

    def failed(self, workspace: str) -> list[str]:
        """The codes of the images of a workspace that have failed."""
        return [
            row[0] for row in self.session.execute(
                "select error_code from autotag.tasks where workspace_id = %s and stage = 'failed'", (workspace,)
            ).fetchall()
        ]  # fmt: skip


@pytest.fixture(scope="module")
def shared(postgres: LocalPostgres) -> Iterator[psycopg.Connection[Any]]:
    with (
        copied_database(postgres, TEMPLATE) as name,
        psycopg.connect(postgres.url("supabase_admin", name)) as connection,
    ):
        yield connection


@pytest.fixture
def scene(shared: psycopg.Connection[Any]) -> Iterator[Scene]:
    with shared.transaction(force_rollback=True):
        yield Scene(shared)


WORKS = (False, True, "json_schema")


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda e: e["code"])
def test_a_profile_that_is_always_refused_slows_nobody_down(scene: Scene, refusal: Error) -> None:
    """The first claim of each round tags all images of the other workspaces, and requests each image of this one
    once."""
    scene.start((HOSTILE,))
    for _ in range(3):
        held = scene.claim()
        assert [len(tasks) for tasks in held.values()] == [4, 4, 4]
        scene.report(HOSTILE, held[HOSTILE], refusal)
        assert scene.provider() == WORKS
        for workspace in (OTHER, THIRD):
            scene.report(workspace, held[workspace])
        scene.advance(60)
        for workspace in (HOSTILE, OTHER, THIRD):
            scene.upload(workspace)
    assert scene.provider() == WORKS
    assert scene.failed(HOSTILE) == ["profile_refused"] * 12
    assert scene.failed(OTHER) == []
    assert scene.value("select count(*) from autotag.models where degraded <> '{}'") == 0
    said = scene.value("select min(error) from autotag.tasks where stage = 'failed'")
    assert said == f"The AI provider refuses what this workspace's profile asks: {refusal['code']}"


@pytest.mark.parametrize("trouble", ACCOUNT, ids=lambda e: f"{e['origin']} {e['code']}")
def test_trouble_with_the_account_pauses_whoever_meets_it(scene: Scene, trouble: Error) -> None:
    scene.start((HOSTILE,))
    scene.report(HOSTILE, scene.claim()[HOSTILE][:1], trouble)
    assert scene.provider() == (True, False, "json_schema")
    assert scene.failed(HOSTILE) == []


@pytest.mark.parametrize(("status", "body", "expected"), [
    (400, {"message": "request (14476 tokens) exceeds the available context size (8192 tokens)", "type": "exceed_context_size_error"}, True),
    (400, {"message": "The specified schema produces a constraint that has too many states for serving."}, True),
    (400, {"message": "Invalid schema", "param": "response_format", "code": "invalid_json_schema"}, True),
    (413, {"message": "Payload too large"}, True),
    (422, {"message": "Something is odd"}, True),
    (400, {"message": "API key not valid", "status": "INVALID_ARGUMENT"}, False),
    (401, {"message": "no"}, False),
    (402, {"message": "no"}, False),
    (403, {"message": "no"}, False),
    (404, {"message": "The model `x` does not exist", "code": "model_not_found"}, False),
    (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}, False),
    (500, {"message": "no"}, False),
])  # fmt: skip
def test_the_worker_says_what_a_request_may_be_the_reason_of(status: int, body: dict[str, str], expected: bool) -> None:
    assert classify_status(status, {"error": body}, {}).as_json()["about_request"] is expected


@pytest.mark.parametrize(
    ("refusal", "expected"), [(SCHEMA, (False, False, "json_object")), (LLAMA, (True, False, "json_schema"))]
)
def test_what_the_plain_question_meets_concerns_all(
    scene: Scene, refusal: Error, expected: tuple[bool, bool, str]
) -> None:
    scene.start((HOSTILE,))
    scene.report(OTHER, scene.claim()[OTHER][:1], refusal)
    assert scene.provider() == expected


@pytest.mark.parametrize(
    ("refusal", "expected"), [(SCHEMA, (False, False, "json_object")), (LLAMA, (True, False, "json_schema"))]
)
def test_the_first_question_of_all_is_a_brief(scene: Scene, refusal: Error, expected: tuple[bool, bool, str]) -> None:
    scene.start((HOSTILE,), proven=False, uploads=(HOSTILE,))
    [image] = scene.claim()[HOSTILE]
    scene.report(HOSTILE, [image], refusal)
    assert scene.provider() == expected
    assert scene.failed(HOSTILE) == []


@pytest.mark.parametrize("refusal", [SCHEMA, LLAMA], ids=lambda e: e["code"])
def test_while_nothing_is_proven_the_others_are_tried_next(scene: Scene, refusal: Error) -> None:
    scene.start((HOSTILE, OTHER, THIRD), proven=False)
    asked: list[str] = []
    while True:
        [(workspace, tasks)] = [(w, t) for w, t in scene.claim().items() if t]
        asked.append(workspace)
        if workspace != HOSTILE:
            scene.report(workspace, tasks)
            break
        scene.report(workspace, tasks, refusal)
        assert scene.provider() == (False, False, "json_schema")
    assert scene.provider() == WORKS
    assert len(asked) <= 5
    assert scene.value("select refusals from autotag.provider_limits") == {}


def test_a_second_workspace_that_is_refused_makes_it_the_providers(scene: Scene) -> None:
    """Every workspace has a profile, and the provider no longer supports schemas. The refusal of a second workspace
    counts after a minute, and then the form of requests changes."""
    scene.start((HOSTILE, OTHER, THIRD))
    held = scene.claim()
    scene.report(HOSTILE, held[HOSTILE][:1], SCHEMA)
    scene.report(OTHER, held[OTHER][:1], SCHEMA)  # within a minute: the others have not answered yet
    assert scene.provider() == WORKS
    assert (scene.failed(HOSTILE), scene.failed(OTHER)) == (["profile_refused"], [])
    scene.advance(61)
    scene.upload(THIRD)
    later = [image for image in scene.claim()[THIRD] if image not in held[THIRD]]
    scene.report(THIRD, later[:1], SCHEMA)
    assert scene.provider() == (False, False, "json_object")


def test_a_success_between_two_refusals_contradicts_them(scene: Scene) -> None:
    scene.start((HOSTILE, OTHER))
    held = scene.claim()
    scene.report(HOSTILE, held[HOSTILE][:1], SCHEMA)
    scene.report(THIRD, held[THIRD])
    scene.advance(61)
    scene.upload(OTHER)
    later = [image for image in scene.claim()[OTHER] if image not in held[OTHER]]
    scene.report(OTHER, later[:1], SCHEMA)
    assert scene.provider() == WORKS
    assert scene.failed(OTHER) == ["profile_refused"]


@pytest.mark.parametrize("parameter", ["response_format", None])
def test_unreadable_answers_of_one_profile_concern_it_alone(scene: Scene, parameter: str | None) -> None:
    """While no question is proven, text instead of JSON can mean that the provider ignores the format, or that the
    profile asks for text."""
    scene.start((HOSTILE,), proven=False)
    scene.session.execute(
        "update autotag.workspaces set virtual_time = case when workspace_id = %s then 0 else 1 end", (HOSTILE,)
    )
    [image] = scene.claim()[HOSTILE]
    scene.report(
        HOSTILE, [image], {"kind": "image", "code": "bad_answer", "message": "m", "retry": True, "parameter": parameter}
    )
    assert scene.provider() == (False, False, "json_schema")
    assert sum(len(tasks) for tasks in scene.claim().values()) == 1, "the next one is tried at once"


@pytest.mark.parametrize(("code", "brief", "expected"), [
    ("unsupported_parameter", True, "image"), ("context_length_exceeded", True, "image"),
    ("context_length_exceeded", False, "account"), ("insufficient_quota", True, "account"),
])  # fmt: skip
def test_a_batch_that_a_profile_makes_unacceptable_is_no_trouble_with_the_account(
    scene: Scene, code: str, brief: bool, expected: str
) -> None:
    scene.start((HOSTILE,) if brief else ())
    poll = json.dumps(
        [{"id": "batch_1", "status": "failed", "error_code": code, "error": "m", "error_kind": "account"}]
    )
    job = scene.value("select id from autotag.jobs where workspace_id = %s", HOSTILE)
    scene.session.execute(
        "insert into autotag.batches (job_id, workspace_id, ordinal, image_count, openai_batch_id, created_at)"
        " values (%s, %s, 1, 4, 'batch_1', autotag.now())", (job, HOSTILE),
    )  # fmt: skip
    kind = "(autotag.blame_briefs(autotag.clean_poll(%s::jsonb)))[1].error_kind"
    assert scene.value(f"select {kind}", poll) == expected
    judged = "select autotag.judge_batch_error(b, %s::jsonb, true) ->> 'kind' from autotag.batches b"
    assert scene.value(judged, json.dumps(error(code))) == expected
