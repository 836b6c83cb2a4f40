"""Profiles in the database: which ones can be saved, which one is in force, and which fields of an answer are
stored."""

from __future__ import annotations

import json
import math
import random
import unicodedata
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql as names

from autotag.openai.fields import read_fields
from conftest import TEMPLATE, copied_database
from lab.postgres import LocalPostgres

OWN, OTHER = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"


@pytest.fixture(scope="module")
def shared(postgres: LocalPostgres) -> Iterator[psycopg.Connection[Any]]:
    """One database for all cases."""
    with copied_database(postgres, TEMPLATE) as name, psycopg.connect(postgres.url(database=name)) as connection:
        yield connection


@pytest.fixture
def session(shared: psycopg.Connection[Any]) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that leaves nothing behind."""
    with shared.transaction(force_rollback=True):
        yield shared


def value(session: psycopg.Connection[Any], expression: str, *arguments: object) -> Any:
    row = session.execute(f"select {expression}", arguments).fetchone()  # type: ignore[arg-type]
    assert row
    return row[0]


def save(session: psycopg.Connection[Any], workspace: str | None, changes: object) -> dict[str, Any]:
    saved: dict[str, Any] = value(session, "autotag.set_profile(%s, %s)", workspace, json.dumps(changes))
    return saved


def profile(session: psycopg.Connection[Any], workspace: str | None) -> dict[str, Any]:
    shown: dict[str, Any] = value(session, "autotag.show_profile(%s)", workspace)
    return shown


def enum(count: int, length: int = 1, name: str = "room") -> dict[str, Any]:
    return {"name": name, "kind": "enum", "values": [str(i).rjust(length, "x") for i in range(count)]}


def named(*fields: str) -> list[dict[str, Any]]:
    return [{"name": name, "kind": "text"} for name in fields]


#: Changes that are refused, each with a word of the sentence that says why.
REFUSED: list[tuple[object, str]] = [
    ([], "an object"),
    ("x", "an object"),
    ({"tags": 5}, "has no tags"),
    ({"instructions": 5}, "of the type string"),
    ({"instructions": "x" * 2001}, "2001 characters"),
    ({"instructions": "a\u0007b"}, "control character"),
    ({"instructions": "x" * 1_000_001}, "1,000,000 bytes"),
    ({"language": "x" * 101}, "language"),
    ({"language": "a\nb"}, "language"),
    ({"language": ""}, "language"),
    ({"language": " "}, "language"),
    ({"language": "\u200d"}, "language"),
    ({"fields": [{"name": "a", "kind": "enum", "values": ["é", "E\u0301"]}]}, "twice"),
    ({"tag_count": 0}, "1 to 50"),
    ({"tag_count": 51}, "1 to 50"),
    ({"tag_count": 2.5}, "whole number"),
    ({"tag_count": 10**30}, "whole number"),
    ({"min_confidence": -0.1}, "0 to 1"),
    ({"min_confidence": 10**400}, "0 to 1"),
    ({"vocabulary_mode": "always"}, "open, prefer or only"),
    ({"add_parents": "yes"}, "of the type boolean"),
    ({"fields": {}}, "of the type array"),
    ({"fields": ["room"]}, "name of a field"),
    ({"fields": named(*(f"f{i}" for i in range(21)))}, "at most 20"),
    ({"fields": named("a", "a")}, "Two fields"),
    ({"fields": named("")}, "name of a field"),
    ({"fields": named("a b")}, "name of a field"),
    ({"fields": named("zimmer_ü")}, "name of a field"),
    ({"fields": named("x" * 65)}, "name of a field"),
    ({"fields": named("a\n")}, "name of a field"),
    ({"fields": [{"name": 5, "kind": "text"}]}, "name of a field"),
    ({"fields": [{"name": "a"}]}, "kind of the field a"),
    ({"fields": [{"name": "a", "kind": "Enum", "values": ["b"]}]}, "kind of the field a"),
    ({"fields": [{"name": "a", "kind": "text", "max": 5}]}, "more than name"),
    ({"fields": [{"name": "a", "kind": "text", "values": ["b"]}]}, "none otherwise"),
    ({"fields": [{"name": "a", "kind": "enum"}]}, "list of values"),
    ({"fields": [{"name": "a", "kind": "enum", "values": []}]}, "list of values"),
    ({"fields": [{"name": "a", "kind": "enum", "values": "b"}]}, "list of values"),
    ({"fields": [{"name": "a", "kind": "enum", "values": [1]}]}, "Each value"),
    ({"fields": [{"name": "a", "kind": "enum", "values": [" b"]}]}, "Each value"),
    ({"fields": [{"name": "a", "kind": "enum", "values": [""]}]}, "Each value"),
    ({"fields": [{"name": "a", "kind": "enum", "values": ["b", "B"]}]}, "twice"),
    ({"fields": [{"name": "a", "kind": "text", "description": "x" * 501}]}, "description"),
    ({"fields": [{"name": "a", "kind": "text", "description": "a\u202eb"}]}, "description"),
    # OpenAI's limits of a strict schema
    ({"fields": [enum(501, name="a"), enum(500, name="b")]}, "1,000"),
    ({"fields": [enum(251, 60)]}, "15,000"),
    ({"fields": [enum(250, 200, name=f"f{i}") for i in range(4)]}, "120,000"),
]

#: The most that is possible.
TAKEN: list[dict[str, Any]] = [
    {"instructions": "x" * 2000},
    {"instructions": 'Sag "ja" {nie} \\ \n\t—\u3000家 🏠', "language": "Deutsch", "tag_count": 50, "min_confidence": 1},
    {"fields": named(*(f"f{i}" for i in range(20)))},
    {"fields": named("x" * 64, "A-1_z")},
    {"fields": [enum(500, name="a"), enum(500, name="b")]},
    {"fields": [enum(251, 59)]},
    {"fields": [enum(250, 100, name=f"f{i}") for i in range(4)]},
    {"fields": [{"name": "a", "kind": "enum", "values": ["ein Raum", "Küche"], "description": "x" * 500}]},
]


@pytest.mark.parametrize(("changes", "why"), REFUSED, ids=[f"{i} {why}" for i, (_, why) in enumerate(REFUSED)])
def test_what_no_request_could_ask_is_refused(session: psycopg.Connection[Any], changes: object, why: str) -> None:
    with pytest.raises(psycopg.DatabaseError) as caught, session.transaction():
        save(session, OWN, changes)
    assert json.loads(caught.value.diag.message_detail or "{}") == {"code": "bad_profile"}
    assert why in str(caught.value.diag.message_primary)
    assert len(str(caught.value.diag.message_primary)) < 300
    assert profile(session, OWN)["version"] == 0


@pytest.mark.parametrize("changes", TAKEN, ids=range(len(TAKEN)))
def test_what_a_request_can_ask_is_kept_as_it_is(session: psycopg.Connection[Any], changes: dict[str, Any]) -> None:
    saved = save(session, OWN, changes)
    assert {name: saved[name] for name in changes} == changes
    assert profile(session, OWN) == saved


def test_versions(session: psycopg.Connection[Any]) -> None:
    assert profile(session, OWN)["version"] == 0
    first = save(session, None, {"language": "German"})["version"]
    assert save(session, None, {"tag_count": 5})["version"] == first + 1
    shared = profile(session, OWN)
    assert (shared["version"], shared["own"], shared["language"], shared["tag_count"]) == (
        first + 1,
        False,
        "German",
        5,
    )
    own = save(session, OWN, {"tag_count": 7})
    assert (own["version"], own["own"], own["language"], own["tag_count"]) == (first + 2, True, "German", 7), (
        "it begins with what held before, and is newer than that"
    )
    save(session, None, {"tag_count": 9})
    assert profile(session, OWN) == own
    assert profile(session, OTHER)["tag_count"] == 9
    assert save(session, OWN, {"tag_count": 7, "language": "German"}) == own, "nothing changes, so there is no version"
    none = save(session, OWN, dict.fromkeys(
        ["instructions", "language", "tag_count", "min_confidence", "vocabulary_mode", "add_parents", "fields"]))  # fmt: skip
    assert none == {
        **none,
        "version": first + 4,
        "language": None,
        "tag_count": None,
        "vocabulary_mode": "open",
        "fields": [],
    }
    history = value(session, "autotag.profile_history(%s)", OWN)
    assert [version["version"] for version in history] == [first + 4, first + 2], "no two profiles have the same number"
    assert len(value(session, "autotag.profile_history(null)")) == 3


def test_images_of_another_version_are_outdated_whichever_is_higher(session: psycopg.Connection[Any]) -> None:
    """A number is one version of one profile. So an image that another workspace's profile tagged never counts as
    tagged with this one."""
    numbers = [save(session, w, {"tag_count": n})["version"] for n, w in enumerate([None, OWN, OTHER, OTHER, OWN], 1)]
    session.execute("insert into public.workspaces (id, name) values (%s, 'own') on conflict do nothing", (OWN,))
    for number in numbers:
        session.execute(
            "insert into public.assets (workspace_id, storage_path, tags, tagging_stage, tagging_result)"
            " values (%s, 'x', '{a}', 'completed', jsonb_build_object('profile', %s::integer))", (OWN, number),
        )  # fmt: skip
    assert value(session, "autotag.preview_backfill(%s, false, null, 1000, true)", OWN)["images"] == 4
    session.execute("delete from autotag.profiles where workspace_id = %s", (OWN,))
    assert value(session, "autotag.preview_backfill(%s, false, null, 1000, true)", OWN)["images"] == 4, (
        "the general one holds"
    )


def test_a_value_that_is_composed_in_another_way_is_the_fields_own(session: psycopg.Connection[Any]) -> None:
    [field] = [{"name": "room", "kind": "enum", "values": ["Küche", "Bad"]}]
    answer = {"room": "Ku\u0308che"}
    assert value(session, "autotag.clean_fields(%s, %s)", json.dumps(answer), json.dumps([field])) == {"room": "Küche"}
    assert read_fields({"room": "ku\u0308CHE"}, [field]) == {"room": "Küche"}  # type: ignore[list-item]


def test_a_version_does_not_change(session: psycopg.Connection[Any]) -> None:
    save(session, OWN, {"tag_count": 7})
    with pytest.raises(psycopg.DatabaseError, match="does not change"), session.transaction():
        session.execute("update autotag.profiles set tag_count = 8")
    with pytest.raises(psycopg.DatabaseError, match="at most 20"), session.transaction():
        session.execute("insert into autotag.profiles (workspace_id, version, fields, created_at)"
                        " values (%s, 9, %s, now())", (OWN, json.dumps(named(*map(str, range(21))))))  # fmt: skip


@pytest.mark.parametrize("editors", [False, True])
def test_members_read_a_profile_and_editors_change_it(session: psycopg.Connection[Any], editors: bool) -> None:
    user = "33333333-3333-4333-8333-333333333333"
    if editors:
        session.execute("create or replace function autotag.is_editor(p_workspace_id autotag.workspace_id) returns boolean"
                        " language sql stable as 'select autotag.is_member(p_workspace_id)'")  # fmt: skip
    for workspace in (OWN, OTHER):
        session.execute("insert into public.workspaces (id, name) values (%s, 'w')", (workspace,))
    session.execute("insert into auth.users (id) values (%s) on conflict do nothing", (user,))
    session.execute("insert into public.workspace_members (workspace_id, user_id) values (%s, %s)", (OWN, user))
    session.execute(
        "select set_config('request.jwt.claims', %s, true)", (json.dumps({"sub": user, "role": "authenticated"}),)
    )
    session.execute("set local role authenticated")
    assert value(session, "to_jsonb(public.tagging_profile(%s))", OWN)["version"] == 0
    calls = [("public.tagging_profile(%s)", OTHER, "not_a_member"),
             ("public.set_tagging_profile(%s, '{\"tag_count\": 4}')", OTHER, "not_a_member"),
             ("public.set_tagging_profile(%s, '{\"tag_count\": 4}')", OWN, None if editors else "not_an_editor"),
             ("public.tagging_profile(%s)", None, "no_workspace"),
             ("public.set_tagging_profile(%s, '{\"tag_count\": 4}')", None, "no_workspace")]  # fmt: skip
    for call, workspace, code in calls:
        if code is None:
            answer = value(session, f"to_jsonb({call})", workspace)
            assert (answer["tag_count"], answer["own"]) == (4, True)
            continue
        with pytest.raises(psycopg.DatabaseError) as caught, session.transaction():
            value(session, call, workspace)
        assert json.loads(caught.value.diag.message_detail or "{}").get("code") == code
    for closed in ("autotag.set_profile(%s, '{}')", "autotag.show_profile(%s)", "autotag.save_profile(%s, '{}')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), session.transaction():
            value(session, closed, OWN)


# -- what is kept of an answer

FIELDS: list[dict[str, Any]] = [
    {"name": "room", "kind": "enum", "values": ["Kitchen", "bath", "Küche", "null", "'; drop table x; --"]},
    {"name": "people", "kind": "boolean"},
    {"name": "count", "kind": "integer"},
    {"name": "note", "kind": "text"},
    {"name": "__proto__", "kind": "text"},
]
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 3.0, 2.5, 2**53, 2**53 - 1, -(2**53), 10**400, -(10**30), 1e-300, "", " ", "Kitchen", "kitchen", "KITCHEN",
    " Kitchen", "bath", "Küche", "Ku\u0308che", "null", "true", "3", [], ["bath"], {}, {"room": "bath"}, [[[]]], "x" * 200, "x" * 201,
    "x" * 100_000, "家" * 300, "a\u0007b", "a\u202eb", "a  b\n c ", "\u200b", "'; drop table x; --", {"a": {"b": ["c"]}}, "🏠" * 200,
]  # fmt: skip


def expected(field: dict[str, Any], given: Any) -> Any:
    """The value that the documented promise allows for a field. `any_text`: some printable text of at most 200
    characters."""
    match field["kind"]:
        case "boolean":
            return given if isinstance(given, bool) else None
        case "enum":
            written = {unicodedata.normalize("NFC", text): text for text in field["values"]}
            return written.get(unicodedata.normalize("NFC", given)) if isinstance(given, str) else None
        case "integer":
            whole = isinstance(given, (int, float)) and not isinstance(given, bool) and math.floor(given) == given
            return int(given) if whole and abs(given) < 2**53 else None
    if not isinstance(given, str):
        return None
    return given if given.isprintable() and given == " ".join(given.split()) and 0 < len(given) <= 200 else any_text


class _AnyText:
    def __eq__(self, other: object) -> bool:
        return other is None or (isinstance(other, str) and 0 < len(other) <= 200 and other.isprintable())

    __hash__ = None  # type: ignore[assignment]


any_text = _AnyText()


@pytest.mark.parametrize("seed", range(4))
def test_nothing_but_what_was_asked_is_kept_of_an_answer(session: psycopg.Connection[Any], seed: int) -> None:
    chance = random.Random(seed)
    answers = [{field["name"]: given for field in FIELDS} for given in HOSTILE] if seed == 0 else [
        {name: chance.choice(HOSTILE) for name in chance.sample([f["name"] for f in FIELDS] + ["tags", "ROOM", "profile", ""], 5)}
        for _ in range(150)
    ]  # fmt: skip
    reports = [{"task": 1, "result": {"tags": ["a"], "confidence": {"a": 0.5}, "caption": "c", "model": "m", "fields": answer}}
               for answer in [*answers, *HOSTILE]]  # fmt: skip
    saved = save(session, OWN, {"fields": FIELDS})
    brief = value(session, "autotag.make_brief(%s)", OWN)
    kept = session.execute(
        "select autotag.fit_result(r.result, r.fields, %s) from autotag.read_answers(%s, 100) r order by r.place",
        (brief, json.dumps(reports)),
    ).fetchall()
    for (result,), report in zip(kept, reports, strict=True):
        given = report["result"]["fields"]  # type: ignore[index]
        given = given if isinstance(given, dict) else {}
        assert result == {
            "tags": ["a"], "confidence": {"a": 0.5}, "caption": "c", "model": "m", "profile": saved["version"],
            "fields": {field["name"]: expected(field, given.get(field["name"])) for field in FIELDS},
        }  # fmt: skip


def test_only_as_many_tags_as_asked_and_only_those_that_are_sure_enough(session: psycopg.Connection[Any]) -> None:
    save(session, OWN, {"min_confidence": 0.3, "tag_count": 3})
    brief = value(session, "autotag.make_brief(%s)", OWN)
    result = {
        "tags": ["a", "b", "c", "d", "e"],
        "confidence": {"a": 0.9, "b": 0.29, "d": 0.3, "e": 0.8},
        "caption": "",
        "model": "",
    }
    kept = value(session, "autotag.fit_result(%s, null, %s)", json.dumps(result), brief)
    assert (kept["tags"], kept["confidence"]) == (["a", "c", "d"], {"a": 0.9, "d": 0.3})
    assert "fields" not in kept
    nothing = value(session, "autotag.fit_result(%s, null, %s)", json.dumps({**result, "tags": ["b"]}), brief)
    assert (nothing["tags"], nothing["confidence"]) == ([], {})


def test_an_answer_without_a_profile_is_kept_as_ever(session: psycopg.Connection[Any]) -> None:
    """Fields that nobody asked for are dropped, and the rest is canonical or cleaned as before."""
    result = {"tags": ["a"], "confidence": {"a": 0.5}, "caption": "c", "model": "m"}
    for extra in ({}, {"fields": {"room": "bath"}}, {"fields": 5}, {"profile": 7}, {"fields": {}, "profile": 7}):
        kept = value(
            session,
            "result from autotag.read_answers(%s, 100)",
            json.dumps([{"task": 1, "result": {**result, **extra}}]),
        )
        assert kept == result
    for odd in ("fields", ["fields"], 5, None, {"fields": {}}):
        assert (
            value(session, "result from autotag.read_answers(%s, 100)", json.dumps([{"task": 1, "result": odd}]))
            is None
        )


# -- briefs


def test_one_brief_for_what_is_asked_the_same(session: psycopg.Connection[Any]) -> None:
    assert value(session, "autotag.make_brief(%s)", OWN) is None, "without a profile the question alone is asked"
    save(session, None, {"tag_count": 5})
    first = value(session, "autotag.make_brief(%s)", OWN)
    assert value(session, "autotag.make_brief(%s)", OTHER) == first
    save(session, OTHER, {"vocabulary_mode": "prefer"})
    second = value(session, "autotag.make_brief(%s)", OTHER)
    assert second != first
    session.execute(names.SQL("create or replace function autotag.vocabulary_for_prompt(p_workspace_id autotag.workspace_id)"
                              " returns jsonb language sql stable as {}").format("""select '["a", "b"]'::jsonb"""))  # fmt: skip
    third = value(session, "autotag.make_brief(%s)", OTHER)
    assert third not in (first, second), "another vocabulary is another question"
    assert value(session, "autotag.make_brief(%s)", OTHER) == third
    assert value(session, "autotag.make_brief(%s)", OWN) == first, "an open vocabulary is not asked"


def test_a_longer_prompt_reserves_and_costs_more(session: psycopg.Connection[Any]) -> None:
    cost = value(session, "autotag.expected_cost(null, true, %s)", OWN)
    usual = value(session, "tokens_per_image from autotag.provider_limits")
    save(session, OWN, {"instructions": "x" * 1500, "tag_count": 20, "fields": named("note")})
    brief = value(session, "autotag.make_brief(%s)", OWN)
    each, cap = (
        session.execute("select tokens_per_image, output_tokens from autotag.briefs where id = %s", (brief,)).fetchone()
        or ()
    )
    assert each >= usual + 500 + 10 * 30 + 60
    assert cap >= 400 + 10 * 30 + 60
    assert value(session, "autotag.expected_cost(null, true, %s)", OWN) > cost
    assert value(session, "autotag.expected_cost(null, true, %s)", OTHER) == cost
    # what was seen goes before what was guessed, and only for what was asked
    session.execute(
        "select autotag.learn(array_fill(1000, '{40}'), array_fill(90, '{40}'), null, array_fill(%s::bigint, '{40}'))",
        (brief,),
    )
    (seen,) = session.execute("select tokens_per_image from autotag.briefs where id = %s", (brief,)).fetchone() or (0,)
    assert 1090 <= seen <= 1200 + 100
    assert value(session, "tokens_per_image from autotag.provider_limits") == usual


def test_no_image_waits_for_ever_because_of_a_long_vocabulary(session: psycopg.Connection[Any]) -> None:
    save(session, OWN, {"instructions": "x" * 2000})
    session.execute(
        "insert into autotag.windows (workspace_id, request_type, max_units) values (%s, 'realtime', 1300)", (OWN,)
    )
    brief = value(session, "autotag.make_brief(%s)", OWN)
    assert value(session, "tokens_per_image from autotag.briefs where id = %s", brief) > 1300
    assert value(session, "autotag.fit_window(5000, %s)", OWN) == 1300


def test_an_upload_is_made_while_nothing_is_known_of_the_provider(session: psycopg.Connection[Any]) -> None:
    save(session, OWN, {"tag_count": 20})
    session.execute("select autotag.forget_provider()")
    brief = value(session, "autotag.make_brief(%s)", OWN)
    before = session.execute(
        "select question_version, output_tokens from autotag.briefs where id = %s", (brief,)
    ).fetchone()
    assert before == (-1, 700)
    session.execute(
        "update autotag.settings set max_tags = 5; select autotag.sync_question(p) from autotag.provider_limits p"
    )
    session.execute("insert into public.workspaces (id, name) values (%s, 'w')", (OWN,))
    assert value(session, "(autotag.job_brief(gen_random_uuid(), p)).id from autotag.provider_limits p") is None
    session.execute("select autotag.refresh_brief(b, p) from autotag.briefs b, autotag.provider_limits p")
    after = session.execute(
        "select b.question_version = p.question_version, b.output_tokens from autotag.briefs b, autotag.provider_limits p"
    )
    assert after.fetchone() == (True, 700), "by the profile's own number of tags"


def test_a_worker_learns_only_what_its_images_are_asked(session: psycopg.Connection[Any]) -> None:
    workers = ["00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"]
    session.execute("insert into public.workspaces (id, name) values (%s, 'w')", (OWN,))
    save(session, OWN, {"instructions": "Name the style.", "fields": named("note")})
    assets = session.execute(
        "insert into public.assets (workspace_id, storage_path) select %s, %s || '/' || n from generate_series(1, 3) n returning id",
        (OWN, OWN)).fetchall()  # fmt: skip
    session.execute("select autotag.start_job(%s, null, %s)", (OWN, [asset for (asset,) in assets]))
    for worker in workers:
        session.execute("select autotag.register_worker(%s, 'h', autotag.schema_version(), true)", (worker,))
    claimed = session.execute("select tasks from autotag.claim(%s, 10, 1)", (workers[0],)).fetchone()
    assert claimed
    [brief] = {image["brief"] for image in value(session, "autotag.describe_tasks(%s, %s)", workers[0], claimed[0])}
    asked = value(session, "autotag.describe_brief(%s, %s)", workers[0], brief)
    assert set(asked) == {
        "id",
        "version",
        "instructions",
        "language",
        "tag_count",
        "vocabulary_mode",
        "vocabulary",
        "fields",
    }
    assert (asked["instructions"], asked["fields"], asked["vocabulary"]) == ("Name the style.", named("note"), [])
    assert value(session, "autotag.describe_brief(%s, %s)", workers[1], brief) is None
    assert value(session, "autotag.describe_brief(%s, %s)", workers[0], brief + 1) is None
    assert value(session, "autotag.describe_brief(gen_random_uuid(), %s)", brief) is None
