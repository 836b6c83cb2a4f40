"""People's tags belong to them: random edits and runs, in every type of column, are compared with an oracle of plain
lists."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import unicodedata
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from autotag.install.adapter import TEMPLATE, render
from autotag.install.host import Host
from conftest import TEMPLATE as DATABASE
from conftest import copied_database
from lab.postgres import LocalPostgres
from support import PATIENCE

EXAMPLES = int(os.environ.get("AUTOTAG_EXAMPLES", "2000")) // 40
WORKSPACE = "00000000-0000-4000-8000-000000000001"
IMAGE = "00000000-0000-4000-8000-0000000000aa"
LONGEST = 12
#: A column's type -> how it is declared; `ai_tags` is a column of autotag's own beside the app's.
COLUMNS = {
    "text[]": "text[]", "varchar[]": "character varying[]", "varchar(n)[]": f"character varying({LONGEST})[]",
    "citext[]": "citext[]", "jsonb": "jsonb not null default '[]'", "json": "json", "ai_tags": "text[]",
}  # fmt: skip
JSON = ("jsonb", "json")
SEARCH_PATH = (
    'set search_path = "$user", public, extensions'  # Supabase's; a copy of a database does not have its settings
)


def table_of(kind: str) -> str:
    return "tags_" + re.sub(r"\W", "", kind.replace("(n)", "n"))


@pytest.fixture(scope="module")
def connection(postgres: LocalPostgres) -> Iterator[psycopg.Connection[Any]]:
    """A database with a table of images for each type of column, and store_tags and show_stage as init writes them for it."""
    with (
        copied_database(postgres, DATABASE) as name,
        psycopg.connect(postgres.url("supabase_admin", name), autocommit=True) as opened,
    ):
        opened.execute("create extension if not exists citext with schema extensions")
        opened.execute(SEARCH_PATH)
        opened.execute(f"insert into public.workspaces (id, name) values ('{WORKSPACE}', 'w')".encode())
        for kind, declared in COLUMNS.items():
            opened.execute(table_for(kind, declared).encode())
        yield opened


def table_for(kind: str, declared: str) -> str:
    table, column = table_of(kind), "ai_tags" if kind == "ai_tags" else "tags"
    tags_type = re.sub(r"\(\d+\)| not null.*", "", declared)
    rendered = render(TEMPLATE.read_text(), replace(Host(), table=f"public.{table}", tags=column, tags_type=tags_type))
    functions = "".join(
        re.findall(
            r"create or replace function autotag\.(?:stored_tags|store_tags|show_stage)\(.*?\nend \$\$;", rendered, re.S
        )
    ).replace("from autotag.stored_tags(", f"from public.{table}_stored_tags(")
    return f"""
        create table public.{table} (like public.assets including defaults);
        alter table public.{table} drop tags, add {column} {declared};
        {functions.replace("function autotag.", f"function public.{table}_")}"""


# -- the oracle


def key(tag: str) -> str:
    """Two tags are the same if they differ in case, in how their letters are composed, or in what is neither letter nor digit (but
    the # of c#), or in what nobody sees. A tag of nothing else is itself."""
    seen = (c for c in " ".join(tag.split()).lower() if unicodedata.category(c) != "Cf" and c not in "\ufe0e\ufe0f")
    text = unicodedata.normalize("NFC", "".join(seen)).replace("−", " ").strip()
    words = "".join(c if c.isalnum() or c == "#" else " " for c in text).split()
    return " ".join(words) or text


def keys(tags: list[Any]) -> set[str]:
    return {key(tag) for tag in tags if isinstance(tag, str)} - {""}


def first_of_each(tags: list[str]) -> list[str]:
    """A model's tags without repetitions: the first spelling of each tag."""
    return [tag for i, tag in enumerate(tags) if key(tag) not in keys(tags[:i])]


@dataclass
class Oracle:
    """Computes the expected column after each run, with lists and sets.

    Attributes:
        ours: tags that autotag gave and that nobody has touched, as far as the last run has seen.
        seen: normal forms of all tags that were there after the last run.
        removed: normal forms of tags that people have removed.
    """

    ours: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)

    def run(self, found: list[Any], answer: list[str]) -> tuple[list[Any], list[Any]]:
        """The expected people's tags and the whole column after a run that found this column and gave these tags."""
        theirs = [tag not in self.ours or found.count(tag) > 1 or not isinstance(tag, str) for tag in found]
        self.removed = (self.removed | self.seen) - keys(found)
        kept = [tag for tag, own in zip(found, theirs, strict=True) if own or tag in answer]
        added: list[str] = []
        for tag in answer:
            added += [tag] if key(tag) not in keys(kept + added) | self.removed else []
        self.ours = [t for t, own in zip(found, theirs, strict=True) if not own and t in answer] + added
        self.seen = keys(kept + added)
        return [tag for tag, own in zip(found, theirs, strict=True) if own], kept + added


def is_within(part: list[Any], whole: list[Any]) -> bool:
    """Whether a list is another list without some of its elements."""
    rest = iter(whole)
    return all(any(one == other and type(one) is type(other) for other in rest) for one in part)


# -- histories

MODEL_TAGS = [
    "beach",
    "Beach",
    "sky",
    "aunt mary",
    "école",
    "straße",
    "c#",
    "wedding 2019",
    "a tag of many letters",
    "t-shirt",
    "T Shirt",
    "!",
    "❤\ufe0f",
    "football",
    "e−mail",
]
TYPED = st.sampled_from(
    [
        "beach",
        "Beach",
        " BEACH",
        "sky",
        "aunt mary",
        "Aunt  Mary",
        "e\u0301cole",
        "École",
        "c#",
        "x",
        "",
        " ",
        "sea,",
        "t shirt",
        "T-Shirts",
        "❤",
        "foot\u00adball",
        "e-mail",
        "!",
        "?!",
        '"q"',
    ]
)
ODD = st.sampled_from([None, 7, 1.50, True, ["beach"], [{"a": 1}]])
MEMORIES = [
    None,
    "x",
    [],
    {},
    5,
    {"given": ["beach", "aunt mary"]},
    {"removed": {"a": 1}, "given": 5},
    {"confidence": {"sky": 1}},
]
RUN = st.tuples(st.just("run"), st.lists(st.sampled_from(MODEL_TAGS), unique=True, max_size=5))
REMOVE = st.tuples(st.just("remove"), st.integers(0, 9))
EDITS = [
    st.tuples(st.just("add"), TYPED),
    st.tuples(st.just("respell"), st.integers(0, 9)),
    st.tuples(st.sampled_from(["double", "front", "reverse"]), st.integers(0, 9)),
    st.tuples(st.just("odd"), ODD),
    st.one_of(
        st.tuples(st.just("clear"), st.booleans()),
        st.tuples(st.just("forget"), st.sampled_from(MEMORIES)),
        st.tuples(st.just("stage"), st.sampled_from(["queued", "processing", "failed"])),
    ),
]
#: Half of all steps are runs. (one_of() would take each strategy once, however often it is named.)
STEPS = st.sampled_from([*[RUN] * 8, *[REMOVE] * 2, EDITS[0], *EDITS]).flatmap(lambda step: step)


def edited(tags: list[Any], what: str, value: Any) -> list[Any]:
    """The column after a person's edit."""
    place = value % len(tags) if tags and isinstance(value, int) else None
    match what:
        case "add" | "odd":
            return [*tags, value]
        case "clear":
            return []
        case "reverse":
            return tags[::-1]
        case _ if place is None:
            return tags
        case "remove":
            text = tags[place]
            if not isinstance(text, str):
                return tags[:place] + tags[place + 1 :]
            return [tag for tag in tags if not (isinstance(tag, str) and key(tag) == key(text))]
        case "respell":
            return [tag.swapcase() if i == place and isinstance(tag, str) else tag for i, tag in enumerate(tags)]
        case "double":
            return [*tags, tags[place]]
        case "front":
            return [tags[place], *tags[:place], *tags[place + 1 :]]
    raise AssertionError(what)


class Row:
    """One image, in a table whose column of tags has the type ``kind``."""

    def __init__(self, connection: psycopg.Connection[Any], kind: str) -> None:
        self.connection, self.kind, self.table = connection, kind, table_of(kind)
        self.column = "ai_tags" if kind == "ai_tags" else "tags"
        self.sql(
            f"insert into public.{self.table} (id, workspace_id, storage_path) values ('{IMAGE}', '{WORKSPACE}', 'p')"
        )

    def sql(self, statement: str, *values: object) -> list[Any]:
        cursor = self.connection.execute(statement.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def tags(self) -> list[Any]:
        [(tags,)] = self.sql(f"select to_json({self.column}) from public.{self.table}")
        return tags or []

    def memory(self) -> Any:
        [(memory,)] = self.sql(f"select tagging_result from public.{self.table}")
        return memory

    def error(self) -> Any:
        [(error,)] = self.sql(f"select tagging_error from public.{self.table}")
        return error

    def write(self, value: str | list[str | None] | None) -> None:
        """Updates the column as a client does. value: JSON as text, or a list for an array."""
        kind = self.kind if self.kind in JSON else COLUMNS[self.kind]
        self.sql(f"update public.{self.table} set {self.column} = %s::{kind}", value)

    def edit(self, tags: list[Any], null: bool = False) -> None:
        if self.kind in JSON:
            self.write("null" if null else json.dumps(tags))
        else:
            self.write(None if null else tags)

    def run(self, tags: list[str], model: str = "m") -> None:
        answer = {"tags": tags, "confidence": dict.fromkeys(tags, 0.5), "caption": "c", "model": model}
        [(cleaned,)] = self.sql("select autotag.clean_result(%s)", json.dumps(answer))
        assert [str(image) for image in self.store(cleaned)] == [IMAGE]

    def run_as_is(self, tags: list[str]) -> None:
        """Stores an answer with these tags as they are, in any spelling that a vocabulary can have."""
        self.store({"tags": tags, "confidence": dict.fromkeys(tags, 0.5), "caption": "c", "model": "m"})

    def store(self, result: Any) -> Any:
        [(written,)] = self.sql(
            f"select public.{self.table}_store_tags(array[%s::uuid], %s, array[%s::jsonb], array[null::uuid])::uuid[]",
            IMAGE, WORKSPACE, json.dumps(result),
        )  # fmt: skip
        return written

    def stage(self, stage: str) -> None:
        self.sql(f"select public.{self.table}_show_stage(array[%s::uuid], %s, %s, 10)", IMAGE, WORKSPACE, stage)


@pytest.mark.parametrize("kind", COLUMNS)
@settings(
    max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(history=st.lists(STEPS, min_size=6, max_size=16))
@example(history=[("run", ["beach"]), ("remove", 0), ("run", ["sky"]), ("run", ["sea"]), ("run", ["beach"])])
@example(history=[("run", ["beach"]), ("respell", 0), ("run", ["sky"]), ("remove", 0), ("run", ["beach"])])
@example(history=[("run", ["t-shirt", "T Shirt"]), ("remove", 0), ("run", ["T Shirt"])])
@example(history=[("run", ["t-shirt"]), ("run", ["T Shirt", "t-shirt"])])
@example(history=[("add", "❤"), ("run", ["❤\ufe0f"]), ("remove", 0), ("run", ["❤\ufe0f"])])
@example(
    history=[
        ("run", ["beach"]),
        ("remove", 0),
        ("run", []),
        ("add", "beach"),
        ("run", []),
        ("remove", 0),
        ("run", ["beach"]),
    ]
)
def test_no_tag_of_a_person_is_lost_and_none_that_they_removed_returns(
    connection: psycopg.Connection[Any], kind: str, history: list[tuple[str, Any]]
) -> None:
    with connection.transaction(force_rollback=True):
        row, oracle = Row(connection, kind), Oracle()
        tags: list[Any] = []
        for number, (what, value) in enumerate(history):
            if what == "run":
                answer = [t for t in first_of_each(value) if kind != "varchar(n)[]" or len(t) <= LONGEST]
                theirs, expected = oracle.run(tags, answer)
                row.run(value, f"model {number}")
                check_run(row, oracle, theirs, expected, answer)
                tags = expected
            elif what == "forget":
                row.sql(
                    f"update public.{row.table} set tagging_result = %s::jsonb", json.dumps(value) if value else None
                )
                oracle = Oracle()
            elif what == "stage":
                memory = row.memory()
                row.stage(value)
                assert (row.tags(), row.memory()) == (tags, memory)
            elif what != "odd" or kind in JSON or value is None:
                tags = edited(tags, what, value)
                row.edit(tags, null=what == "clear" and value)


def check_run(row: Row, oracle: Oracle, theirs: list[Any], expected: list[Any], answer: list[str]) -> None:
    stored = row.tags()
    assert row.error() is None
    assert is_within(theirs, stored), f"a person's tag is lost: {theirs} are not all in {stored}"
    assert not keys(stored) & oracle.removed, f"a removed tag is back: {stored}, removed {oracle.removed}"
    assert keys(stored) <= keys(theirs) | keys(answer), f"a tag that only an earlier run gave is there: {stored}"
    assert keys(answer) <= keys(stored) | oracle.removed, f"a new tag is missing: {stored}"
    assert json.dumps(stored) == json.dumps(expected)
    memory = row.memory()
    assert memory["given"] == oracle.ours
    assert memory.get("added", []) == [t for t in theirs if isinstance(t, str) and t]
    assert set(memory.get("removed", [])) == oracle.removed
    assert keys(list(memory["confidence"])) == keys(answer) & keys(stored)


# -- forms that nobody expects

LARGE = "x" * 1_000_000
STAYS = "so they stay as they are."
ARRAYS: dict[str, tuple[str, str, str]] = {
    "more than one dimension": ("'{{aunt,mary},{wedding,2019}}'", "a", "not a list"),
    "10,000 tags": ("(select array_agg('t' || i) from generate_series(1, 10000) i)", "a", "too many"),
    "a tag of 1 MB": (f"array[repeat('x', {len(LARGE)})]", "a", "too many"),
    "1 MB that cannot be compressed": (
        "array[(select string_agg(md5(i::text), '') from generate_series(1, 31250) i)]", "a", "too many",
    ),
}  # fmt: skip
DOCUMENTS: dict[str, tuple[str, str, str]] = {
    "an object": ("""'{"aunt": "mary"}'""", "a", "not a list"),
    "a text": ("""'"aunt mary"'""", "a", "not a list"),
    "a number": ("'5'", "a", "not a list"),
    "objects": ("""'[{"name": "Aunt Mary", "by": "ann"}]'""", "a", "are objects"),
    "an object among texts": ("""'["aunt mary", {"name": "a"}]'""", "a", "are objects"),
    "10,000 tags": ("(select json_agg('t' || i) from generate_series(1, 10000) i)", "a", "too many"),
    "a tag of 1 MB": (f"json_build_array(repeat('x', {len(LARGE)}))", "a", "too many"),
}
ONLY_JSON = {"a character that Postgres cannot read": (r"""'["\u0000", "aunt mary"]'""", "a", "not a list")}


@pytest.mark.parametrize("kind", COLUMNS)
def test_what_autotag_cannot_add_to_stays_as_it_is(connection: psycopg.Connection[Any], kind: str) -> None:
    forms = {**DOCUMENTS, **(ONLY_JSON if kind == "json" else {})} if kind in JSON else ARRAYS
    declared = kind if kind in JSON else re.sub(r"\(\d+\)", "", COLUMNS[kind])
    for name, (value, tag, reason) in forms.items():
        if kind == "varchar(n)[]" and "1 MB" in name:
            continue
        with connection.transaction(force_rollback=True):
            row = Row(connection, kind)
            row.run(["sky"])
            row.edit([])
            row.sql(f"update public.{row.table} set {row.column} = ({value})::{declared}")
            image = f"md5({row.column}::text)"
            before = row.sql(f"select {image} from public.{row.table}")
            row.run([tag])
            assert row.sql(f"select {image} from public.{row.table}") == before, name
            assert reason in row.error(), name
            assert row.error().endswith(STAYS)
            row.edit(["aunt mary"])
            row.run(["sky", "sea"])
            assert (row.tags(), row.error()) == (["aunt mary", "sea"], None), f"{name}: what was removed is remembered"


def test_elements_stay_as_they_are_written(connection: psycopg.Connection[Any]) -> None:
    with connection.transaction(force_rollback=True):
        row = Row(connection, "json")
        row.write('[ "Aunt", [{"b":1, "b":2}], 1.50, "\\u00e9" ]')
        row.run(["sky"])
        [(text,)] = row.sql(f"select tags::text from public.{row.table}")
        assert text == '["Aunt", [{"b":1, "b":2}], 1.50, "\\u00e9", "sky"]'
    with connection.transaction(force_rollback=True):
        row = Row(connection, "text[]")
        row.sql(f"update public.{row.table} set tags = '[3:4]={{aunt,NULL}}'")
        row.run([])
        assert row.sql(f"select tags::text from public.{row.table}") == [("[3:4]={aunt,NULL}",)]
        row.run(["sky"])
        assert row.tags() == ["aunt", None, "sky"]


@pytest.mark.parametrize("kind", ["text[]", "jsonb"])
def test_a_memory_of_1_mb_breaks_nothing(connection: psycopg.Connection[Any], kind: str) -> None:
    for memory in (json.dumps({"given": ["aunt mary"], "x": LARGE}), json.dumps([LARGE] * 3)):
        with connection.transaction(force_rollback=True):
            row = Row(connection, kind)
            row.edit(["aunt mary"])
            row.sql(f"update public.{row.table} set tagging_result = %s::jsonb", memory)
            row.run(["sky"])
            assert (row.tags(), row.error()) == (["aunt mary", "sky"], None)


def test_a_memory_that_is_full_forgets_nothing(connection: psycopg.Connection[Any]) -> None:
    with connection.transaction(force_rollback=True):
        row = Row(connection, "text[]")
        for number in range(8):
            row.edit([f"{number} {'x' * 40} {i}" for i in range(500)])
            row.run(["sky"])
        assert "sky" not in row.tags()
        assert "removed too many" in row.error()
        first = f"0 {'x' * 40} 0"
        row.edit(["aunt mary"])
        row.run([first])
        assert row.tags() == ["aunt mary"]
        row.sql(f"update public.{row.table} set tagging_result = null")
        row.run([first])
        assert row.tags() == ["aunt mary", first], "without its memory autotag begins anew"


# -- at the moment of storing


@pytest.mark.parametrize("kind", COLUMNS)
def test_an_edit_that_commits_while_tags_are_stored_counts(
    connection: psycopg.Connection[Any], postgres: LocalPostgres, kind: str
) -> None:
    """The update waits for the person's transaction, and then compares the row as it is after it."""
    row = Row(connection, kind)
    row.run(["beach", "sky"])
    with psycopg.connect(connection.info.dsn, password=connection.info.password) as person:
        person.execute(SEARCH_PATH)
        edit(person, row, ["aunt mary", "sky"])
        storing = threading.Thread(target=row.run, args=(["beach", "sea"],))
        storing.start()
        wait_for_lock(person, connection.info.backend_pid)
        person.commit()
        storing.join(PATIENCE)
    assert row.tags() == ["aunt mary", "sea"]
    assert row.memory()["removed"] == ["beach"]
    row.sql(f"delete from public.{row.table}")


def edit(connection: psycopg.Connection[Any], row: Row, tags: list[str]) -> None:
    """A person's edit over another connection."""
    other = copy(row)
    other.connection = connection
    other.edit(tags)


def wait_for_lock(connection: psycopg.Connection[Any], pid: int) -> None:
    until = time.monotonic() + PATIENCE
    while connection.execute("select pg_blocking_pids(%s)", (pid,)).fetchone() == ([],):
        assert time.monotonic() < until, "the update does not wait"


# -- what triggers of the host leave


def change_tags(row: Row, code: str) -> None:
    """A trigger of the app. code: the new value of `t`, the tags as a list of texts."""
    column = f"new.{row.column}"
    if row.kind in JSON:
        read, write = f"array(select json_array_elements_text({column}::json))", f"to_json(t)::{row.kind}"
    else:
        read, write = f"{column}::text[]", f"t::{COLUMNS[row.kind]}"
    row.sql(f"""
        create function public.change_tags() returns trigger language plpgsql as $$
        declare t text[] := {read};
        begin
          if {column} is not null then
            t := {code};
            {column} := {write};
          end if;
          return new;
        end $$;
        create trigger change_tags before insert or update on public.{row.table}
          for each row execute function public.change_tags()""")


LOWER = "array(select lower(x) from unnest(t) with ordinality u (x, i) order by i)"


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_tag_that_a_trigger_respells_is_given(connection: psycopg.Connection[Any], kind: str) -> None:
    with connection.transaction(force_rollback=True):
        row = Row(connection, kind)
        change_tags(row, LOWER)
        for tag in ("Cat", "Dog", "Fox"):
            row.run_as_is([tag, "Sky"])
            assert set(row.tags()) == {tag.lower(), "sky"}
            assert set(row.memory()["given"]) == set(row.tags())
            assert set(row.memory()["confidence"]) == set(row.tags())
            assert not {"added", "removed"} & set(row.memory())
        row.edit(["fox", "mine"])
        row.run_as_is(["Sky", "Ant", "MINE"])
        assert row.tags() == ["mine", "ant"]
        assert (row.memory()["added"], row.memory()["removed"]) == (["mine"], ["sky"])


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_tag_that_a_trigger_takes_out_was_removed_by_nobody(connection: psycopg.Connection[Any], kind: str) -> None:
    with connection.transaction(force_rollback=True):
        row = Row(connection, kind)
        change_tags(row, "t[:2]")
        row.run(["a", "b", "c", "d"])
        assert row.tags() == row.memory()["given"] == ["a", "b"]
        row.run(["c", "d"])
        assert row.tags() == row.memory()["given"] == ["c", "d"]
        row.edit(["d"])
        row.run(["c", "d", "e"])
        assert row.tags() == ["d", "e"]
        assert row.memory()["removed"] == ["c"], "a person removed it"
        change_again = "array_remove(array_remove(t, 'mine'), 'Mine')"
        row.sql("drop function public.change_tags() cascade")
        row.edit(["Mine", "d"])
        row.run(["d"])
        change_tags(row, change_again)
        row.run(["d"])
        assert row.tags() == ["d"]
        row.sql("drop function public.change_tags() cascade")
        row.run(["d", "mine"])
        assert row.tags() == ["d", "mine"], "a trigger took it out, not a person"


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize(
    ("code", "answer", "left"),
    [
        ("array_replace(t, 'kitty', 'cat')", ["kitty", "dog"], ["cat", "dog"]),
        (
            "string_to_array(replace(array_to_string(t, '|'), ' ', '|'), '|')",
            ["red barn", "dog"],
            ["red", "barn", "dog"],
        ),
    ],
)
def test_what_a_trigger_puts_in_the_place_of_a_tag_is_given(
    connection: psycopg.Connection[Any], kind: str, code: str, answer: list[str], left: list[str]
) -> None:
    with connection.transaction(force_rollback=True):
        row = Row(connection, kind)
        row.edit(["mine"])
        change_tags(row, code)
        for _ in range(3):
            row.run(answer)
            assert row.tags()[0] == "mine"
            assert sorted(row.tags()[1:]) == sorted(left)
        row.run(["fox"])
        assert row.tags() == ["mine", "fox"]


def test_what_takes_the_place_of_a_tag_may_be_a_persons_if_theirs_has_gone_too(
    connection: psycopg.Connection[Any],
) -> None:
    with connection.transaction(force_rollback=True):
        row = Row(connection, "text[]")
        row.edit(["mine"])
        change_tags(row, "case when 'red barn' = any (t) then array['my own', 'barn'] else t end")
        row.run(["red barn"])
        assert row.tags() == row.memory()["added"] == ["my own", "barn"]


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_tag_that_becomes_what_a_person_has_or_removed_comes_once(
    connection: psycopg.Connection[Any], kind: str
) -> None:
    with connection.transaction(force_rollback=True):
        row = Row(connection, kind)
        change_tags(row, "array_replace(array_replace(t, 'kitty', 'cat'), 'puss', 'cat')")
        row.edit(["mine", "cat"])
        for _ in range(3):
            row.run(["kitty", "dog"])
            assert row.tags() == ["mine", "cat", "cat", "dog"]
            assert row.memory()["removed"] == ["kitty"]
        row.edit(["dog"])
        for _ in range(3):
            row.run(["kitty", "dog"])
            assert row.tags() == ["dog"]
        row.run(["puss", "dog"])  # nobody knows that before
        for _ in range(3):
            row.run(["puss", "dog"])
            assert row.tags() == ["dog"]
        row.edit(["mine"])
        row.run(["kitty", "puss", "fox"])
        assert row.tags() == ["mine", "fox"]


def test_without_a_change_triggers_run_once(connection: psycopg.Connection[Any]) -> None:
    with connection.transaction(force_rollback=True):
        row = Row(connection, "text[]")
        row.sql(f"""
            create table public.runs (i int generated always as identity);
            create function public.count_runs() returns trigger language plpgsql as
              'begin insert into public.runs default values; return new; end';
            create trigger count_runs before update on public.{row.table} for each row execute function public.count_runs()""")
        row.run(["a", "b"])
        row.run(["b", "c"])
        assert row.sql("select count(*)::int from public.runs") == [(2,)]


@pytest.mark.parametrize("body", ["return old", "return null"])
def test_a_write_that_a_trigger_undoes_is_none(connection: psycopg.Connection[Any], body: str) -> None:
    with connection.transaction(force_rollback=True):
        row = Row(connection, "text[]")
        row.sql(f"""
            create function public.undo() returns trigger language plpgsql as $$ begin {body}; end $$;
            create trigger undo before update on public.{row.table} for each row execute function public.undo()""")
        assert row.store({"tags": ["a"], "confidence": {}, "caption": "c", "model": "m"}) is None
        assert row.tags() == []
    with connection.transaction(force_rollback=True):  # where an earlier run has completed the image
        row = Row(connection, "text[]")
        assert row.store({"tags": ["a"], "confidence": {}, "caption": "c", "model": "m"}) is not None
        row.sql(f"""
            create function public.undo() returns trigger language plpgsql as $$ begin {body}; end $$;
            create trigger undo before update on public.{row.table} for each row execute function public.undo()""")
        written = row.store({"tags": ["b"], "confidence": {}, "caption": "d", "model": "m"})
        assert (written, row.tags()) == (None, ["a"])


# -- as a vocabulary spells them


@dataclass
class Library:
    """A workspace with a vocabulary, and one image."""

    row: Row
    mode: str

    def know(self, *entries: dict[str, Any]) -> None:
        self.row.sql("select autotag.edit_vocabulary(%s::uuid, %s, '{}', true)", WORKSPACE, json.dumps(entries))

    def run(self, *tags: str) -> list[Any]:
        answer = {"tags": tags, "confidence": {}, "caption": "c", "model": "m"}
        self.row.sql(
            f"select public.{self.row.table}_store_tags(array[%s::uuid], %s,"
            " autotag.match_results(%s::uuid, array[%s::jsonb]), array[null::uuid])",
            IMAGE, WORKSPACE, WORKSPACE, json.dumps(answer),
        )  # fmt: skip
        assert not {"names", "above"} & set(self.row.memory())
        return self.row.tags()


@pytest.fixture(params=["only", "prefer"])
def library(connection: psycopg.Connection[Any], request: pytest.FixtureRequest) -> Iterator[Library]:
    with connection.transaction(force_rollback=True):
        connection.execute(
            "select autotag.save_profile(%s::uuid, %s)", (WORKSPACE, json.dumps({"vocabulary_mode": request.param}))
        )
        yield Library(Row(connection, "text[]"), request.param)


def test_a_removed_tag_stays_away_under_another_spelling(library: Library) -> None:
    library.know({"tag": "t-shirt"}, {"tag": "dog"})
    assert library.run("t shirt", "dog") == ["t-shirt", "dog"]
    library.row.edit(["dog"])
    library.know({"tag": "T Shirt"}, {"tag": "dog"})
    assert library.run("t shirt", "dog") == ["dog"]
    assert library.run("tshirt", "t-shirts", "dog")[:1] == ["dog"]
    assert "T Shirt" not in library.row.tags()


@pytest.mark.parametrize("typed", [False, True])
def test_a_removed_tag_stays_away_when_the_vocabulary_has_nearly_the_same(library: Library, typed: bool) -> None:
    library.know({"tag": "mountain"}, {"tag": "christina"})
    if typed:
        library.row.edit(["mountain", "christina"])
        library.run()
    else:
        assert library.run("mountain", "christina") == ["mountain", "christina"]
    library.row.edit([])
    library.know({"tag": "Mountains"}, {"tag": "Christine"}, {"tag": "Christina"})
    assert library.run("mountains", "christine", "christina") == ["Christine"], "one has another's name"


def test_a_removed_tag_stays_away_as_an_alias_of_another(library: Library) -> None:
    library.know({"tag": "kitty"}, {"tag": "dog"})
    assert library.run("kitty", "dog") == ["kitty", "dog"]
    library.row.edit(["dog"])
    library.know({"tag": "Cat", "aliases": ["kitty"]}, {"tag": "dog"})
    assert library.run("cat", "dog") == ["dog"]
    assert library.row.memory()["removed"] == ["kitty"]


@pytest.mark.parametrize(("typed", "entry", "given"), [
    ("t shirt", {"tag": "T-Shirt"}, "t shirt"), ("kitty", {"tag": "Cat", "aliases": ["kitty"]}, "cat"),
    ("mountains", {"tag": "Mountain"}, "mountains"),
])  # fmt: skip
def test_a_persons_tag_is_not_doubled(library: Library, typed: str, entry: dict[str, Any], given: str) -> None:
    library.know(entry)
    library.row.edit([typed])
    assert library.run(given) == [typed]
    library.row.edit([])
    assert library.run(given) == [], "and it stays away when it is removed"


def test_a_given_tag_takes_the_new_name(library: Library) -> None:
    library.know({"tag": "kitty"})
    library.run("kitty")
    library.know({"tag": "Cat", "aliases": ["kitty"]})
    assert library.run("cat") == ["Cat"]
    library.row.edit([])
    assert library.run("kitty") == []


def set_mode(library: Library, mode: str) -> None:
    library.row.sql("select autotag.save_profile(%s::uuid, %s)", WORKSPACE, json.dumps({"vocabulary_mode": mode}))


@pytest.mark.parametrize("typed", [False, True])
def test_names_hold_when_the_vocabulary_no_longer_decides(library: Library, typed: bool) -> None:
    """In the mode `open`, a model's tags stay as they are, but tags that the vocabulary has as names of one tag still
    count as one tag."""
    library.know({"tag": "Cat", "aliases": ["kitty"]}, {"tag": "Mountain"}, {"tag": "dog"})
    if typed:
        library.row.edit(["kitty", "mountains"])
        library.run()
        expected = ["kitty", "mountains", "sunny", "dogs"]
    else:
        assert library.run("kitty", "mountain", "dog") == ["Cat", "Mountain", "dog"]
        library.row.edit(["dog"])
        expected = ["dogs", "sunny"]
    set_mode(library, "open")
    for answer in ("kitty", "cat", "mountains", "Mountain", "mountain"):
        assert set(library.run(answer, "sunny", "dogs")) == set(expected), answer
    if typed:
        library.row.edit([])
        assert library.run("cat", "mountain") == []


def test_a_name_of_an_own_entry_is_no_name_of_a_general_one(library: Library) -> None:
    library.row.sql(
        "select autotag.edit_vocabulary(null, %s, '{}', true)", json.dumps([{"tag": "Animal", "aliases": ["pet"]}])
    )
    library.know({"tag": "Pet"})
    library.row.edit(["pet"])
    assert library.run("animal", "pet") == ["pet", "Animal"]


def test_parents_of_removed_tags_alone_are_not_added(library: Library) -> None:
    library.row.sql(
        "select autotag.save_profile(%s::uuid, %s)",
        WORKSPACE, json.dumps({"vocabulary_mode": library.mode, "add_parents": True}),
    )  # fmt: skip
    nature = [{"tag": "Natur"}, {"tag": "Blau", "parent": "Natur"}]
    library.know({"tag": "sky"}, *nature)
    assert library.run("sky") == ["sky"]
    library.row.edit(["mine"])
    library.know({"tag": "Himmel", "aliases": ["sky"], "parent": "Blau"}, {"tag": "Wald", "parent": "Natur"}, *nature)
    assert library.run("himmel") == ["mine"], "both levels follow from it alone"
    assert library.run("himmel", "wald") == ["mine", "Wald", "Natur"], "Natur is above Wald, too"
    assert set(library.run("himmel", "blau")) == {"mine", "Natur", "Blau"}, "the model gave one of them itself"
    assert library.run("himmel") == ["mine"], "what an earlier run gave goes with its reason"
    library.row.edit(["mine", "Himmel"])
    assert set(library.run("himmel")) == {"mine", "Himmel", "Blau", "Natur"}, "it is there again"
