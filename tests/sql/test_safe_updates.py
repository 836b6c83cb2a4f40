"""pg-safeupdate refuses none of our statements. Supabase loads it for PostgREST's login, and it can be loaded for a
database.

It refuses an UPDATE or a DELETE without WHERE wherever it stands: in functions, in CTEs, in dynamic SQL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from pglast.parser import scan

from autotag.install.adapter import TEMPLATE
from conftest import ROOT

#: What stands before UPDATE or DELETE where it begins no statement: locks, upserts, triggers, foreign keys, grants.
NO_STATEMENT = {"for", "key", "do", "on", "before", "after", "or", "of", ",", "grant", "revoke"}
FILES = [*sorted((ROOT / "supabase" / "schemas").rglob("*.sql")), TEMPLATE]


def without_where(text: str) -> Iterator[str]:
    """The beginnings of all statements that the extension refuses, in bodies of functions and dynamic SQL, too."""
    tokens = [(token.name, text[token.start : token.end + 1]) for token in scan(text) if "COMMENT" not in token.name]
    words = [word.lower() for _, word in tokens]
    for place, (name, word) in enumerate(tokens):
        is_code = word.startswith("$") or "execute" in words[max(place - 3, 0) : place]  # others are advice to people
        if name == "SCONST" and is_code and re.search(r"\b(update|delete)\b", word, re.IGNORECASE):
            tag = re.match(r"\$\w*\$", word)
            yield from without_where(word[len(tag[0]) : -len(tag[0])] if tag else word[1:-1].replace("''", "'"))
        if name not in ("UPDATE", "DELETE_P") or (place and words[place - 1] in NO_STATEMENT):
            continue
        if words[place + 1 : place + 2] != ["from"] and "set" not in words[place : place + 7]:
            continue  # prose
        depth, statement = 0, []
        for word in words[place:]:
            depth += (word == "(") - (word == ")")
            if depth < 0 or word == ";":
                break
            statement.append(word if depth == 0 else "")
        if "where" not in statement:
            yield " ".join(filter(None, statement))[:80]


def test_every_update_and_delete_has_a_where() -> None:
    found = [(path.name, statement) for path in FILES for statement in without_where(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("statement", "count"),
    [
        ("update t set a = 1", 1), ("update t a set b = 1 where c", 0), ("delete from only t", 1), ("delete from t where a", 0),
        ("with x as (delete from t returning *) select * from x where true", 1),
        ("update t set a = (select 1 from u where u.b = t.b)", 1), ("update t set a = u.b from u join v on v.c = u.c", 1),
        ("insert into t values (1) on conflict (a) do update set b = 1", 0), ("select 1 from t for no key update", 0),
        ("create function f() returns void as $f$ begin delete from t; end $f$", 1),
        ("do $$ begin execute 'update t set a = ''where'''; end $$", 1),
        ("create table t (a int references u on delete cascade on update cascade)", 0),
    ],
)  # fmt: skip
def test_the_check_judges_as_the_extension_does(statement: str, count: int) -> None:
    assert len(list(without_where(statement))) == count
