"""A SQL alias has one meaning within a file, and a table has the same alias everywhere.

docs/contributing/change-the-schema.md has the table of aliases. A second reference to a table in one statement has a word
that says what its rows are (``finished``, ``own``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from pglast.parser import scan

from autotag.install.adapter import TEMPLATE
from conftest import ROOT
from lab import schema

GUIDE = ROOT / "docs" / "contributing" / "change-the-schema.md"
FILES = [*sorted(schema.SCHEMAS.rglob("*.sql")), TEMPLATE]
#: The template's name for a table of the host -> the name in the table of aliases.
HOST = {"host.table": "public.assets", "host.members": "public.workspace_members"}
#: What ends a FROM clause, beside a closing parenthesis.
ENDS = {
    "where", "group", "order", "having", "limit", "offset", "fetch", "for", "window", "union", "except", "intersect",
    "returning", "set", "select", "values", ";", "loop",
}  # fmt: skip
NO_ALIAS = ENDS | {"at"}  # at time zone
#: What stands before UPDATE where it begins no statement: locks, upserts, triggers, grants.
NO_STATEMENT = {"for", "key", "do", "before", "after", "or", ",", "grant", "revoke"}
SHORT = 2  # letters of an alias; what is longer is a word


class Source(NamedTuple):
    """The object that a FROM, JOIN, USING, UPDATE or INSERT names: a table of autotag with its schema, or anything
    else."""

    alias: str
    is_table: bool
    name: str
    line: int


class Token(NamedTuple):
    word: str
    is_name: bool
    is_string: bool
    start: int
    end: int


def tokens(text: str, start: int, end: int) -> list[Token]:
    part = text[start:end]
    return [
        Token(
            part[token.start : token.end + 1].lower(), token.name == "IDENT" or token.kind == "UNRESERVED_KEYWORD",
            token.name == "SCONST", start + token.start, start + token.end + 1,
        )
        for token in scan(part) if "COMMENT" not in token.name
    ]  # fmt: skip


def closing(words: list[str], place: int) -> int:
    """The position after the parenthesis that closes the one at a position."""
    depth = 0
    for end in range(place, len(words)):
        depth += (words[end] == "(") - (words[end] == ")")
        if depth == 0:
            return end + 1
    return len(words)


def source_at(found: list[Token], words: list[str], place: int, text: str) -> Source | None:
    """The source that begins at a token, if it has an alias."""
    while words[place : place + 1] in (["lateral"], ["only"]):
        place += 1
    begin, is_table, name = place, False, "a subquery"
    if words[place : place + 1] == ["("]:
        place = closing(words, place)
    else:
        place += 1
        while words[place : place + 1] == ["."]:
            place += 2
        name = "".join(words[begin:place])
        is_table = name.startswith(("autotag.", "public.", "host."))
        if words[place : place + 1] == ["("] and words[begin - 1] != "into":
            place, is_table, name = closing(words, place), False, f"{name}(…)"
        if words[place : place + 2] == ["with", "ordinality"]:
            place += 2
    place += words[place : place + 1] == ["as"]
    if place >= len(found) or not found[place].is_name or words[place] in NO_ALIAS:
        return None
    return Source(words[place], is_table, HOST.get(name, name), text.count("\n", 0, found[begin].start) + 1)


def sources(text: str, start: int = 0, end: int | None = None) -> Iterator[Source]:
    """Every source with an alias in a script, in bodies of functions and dynamic SQL, too."""
    found = tokens(text, start, len(text) if end is None else end)
    words = [token.word for token in found]
    in_from = [False]  # for each parenthesis that is open
    for place, token in enumerate(found):
        before = words[place - 1] if place else ""
        tag = re.match(r"\$\w*\$|'", token.word)
        if token.is_string and tag and (tag[0] != "'" or "execute" in words[max(place - 3, 0) : place]):
            yield from sources(text, token.start + len(tag[0]), token.end - len(tag[0]))
        if token.word == "(":
            in_from.append(False)
        elif token.word == ")" and len(in_from) > 1:
            in_from.pop()
        elif token.word in ENDS:
            in_from[-1] = False
        begins = token.word in ("from", "using") and before != "distinct"
        in_from[-1] |= begins
        begins |= token.word == "join" or (token.word == "update" and before not in NO_STATEMENT)
        begins |= (token.word == "into" and before == "insert") or (token.word == "," and in_from[-1])
        if begins and (source := source_at(found, words, place + 1, text)):
            yield source


@cache
def sources_of(path: Path) -> list[Source]:
    """The sources of a file, in which the template's placeholders are names."""
    return list(sources(re.sub(r"\{\{ (\w+) \}\}", r"host.\1", path.read_text())))


def second_meanings(found: Iterable[Source]) -> list[str]:
    """The aliases of a table that also stand for something else, each with the lines."""
    meanings: dict[str, dict[str, Source]] = {}
    for source in found:
        meanings.setdefault(source.alias, {}).setdefault(source.name, source)
    return [
        f"{alias} is " + " and ".join(f"{source.name} in line {source.line}" for source in named.values())
        for alias, named in meanings.items()
        if len(named) > 1 and any(source.is_table for source in named.values())
    ]


def listed() -> dict[str, str]:
    """The guide's table of aliases: table -> alias."""
    pairs = re.findall(r"\| `(\w+)` \| `([\w.]+)`", GUIDE.read_text().split("## Aliases")[1].split("\n## ")[0])
    assert len(pairs) == len(dict(pairs)) == len({table for _, table in pairs}), "an alias or a table is listed twice"
    return {table if "." in table else f"autotag.{table}": alias for alias, table in pairs}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_alias_has_one_meaning_within_a_file(path: Path) -> None:
    assert second_meanings(sources_of(path)) == []


def test_a_table_has_the_same_alias_everywhere() -> None:
    names = listed()
    wrong = [
        f"{path.relative_to(ROOT)}:{source.line}: {source.name} is {source.alias}, not {names.get(source.name)}"
        for path in FILES
        for source in sources_of(path)
        if source.is_table and names.get(source.name) != source.alias
        and (len(source.alias) <= SHORT or source.name not in names)
    ]  # fmt: skip
    assert wrong == [], f"{GUIDE.name} has the table of aliases"


def test_every_table_has_an_alias() -> None:
    made = {
        name for path in FILES for name in re.findall(r"^create table (autotag\.\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(made) > 20
    assert made == {table for table in listed() if table.startswith("autotag.")}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("select 1 from autotag.jobs j join autotag.tasks as t on true", ["j autotag.jobs", "t autotag.tasks"]),
        ("select 1 from autotag.jobs j, only autotag.tasks t, unnest(a, b) with ordinality u (x, i)",
         ["j autotag.jobs", "t autotag.tasks", "u unnest(…)"]),
        ("update autotag.jobs j set a = x.b from (select 1 from autotag.tasks t order by 1, 2) x", ["j autotag.jobs", "x a subquery", "t autotag.tasks"]),
        ("delete from autotag.jobs j using autotag.tasks t, gone g where true", ["j autotag.jobs", "t autotag.tasks", "g gone"]),
        ("insert into autotag.jobs as j (a) select 1 from autotag.f(1) f on conflict do update set a = j.a", ["j autotag.jobs", "f autotag.f(…)"]),
        ("select 1 from a cross join lateral (select 1) b left join lateral autotag.f(a.x) c on true", ["b a subquery", "c autotag.f(…)"]),
        ("select a is distinct from b, extract(epoch from c at time zone d) from autotag.jobs", []),
        ("select 1 from autotag.jobs for no key update; select 1 from autotag.jobs where true", []),
        ("create function f() returns void as $f$ begin for a in select from autotag.jobs j loop null; end loop; end $f$", ["j autotag.jobs"]),
        ("do $$ begin execute 'select 1 from autotag.jobs j'; raise 'from autotag.jobs t'; end $$", ["j autotag.jobs"]),
        ("-- from autotag.jobs x\nselect 1 from autotag.jobs -- the\n j", ["j autotag.jobs"]),
    ],
)  # fmt: skip
def test_sources_are_found_however_they_are_written(statement: str, expected: list[str]) -> None:
    assert [f"{source.alias} {source.name}" for source in sources(statement)] == expected


@pytest.mark.parametrize(
    ("statement", "count"),
    [
        ("select 1 from autotag.jobs j; select 1 from autotag.jobs j", 0), ("select 1 from autotag.jobs x; select 1 from autotag.tasks x", 1),
        ("select 1 from autotag.jobs x; select 1 from (select 1) x", 1), ("select 1 from unnest(a) x; select 1 from autotag.jobs x", 1),
        ("with live as (select 1) select 1 from live j; select 1 from autotag.jobs j", 1), ("select 1 from unnest(a) x, (select 1) x", 0),
        ("update autotag.batches b set a = 1 where b.id in (select free.id from autotag.batches free)", 0),
    ],
)  # fmt: skip
def test_a_second_meaning_is_found(statement: str, count: int) -> None:
    assert len(second_meanings(sources(statement))) == count
