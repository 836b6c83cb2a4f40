"""No SQL function is longer than a screen. A longer one is split into named steps, or a comment says why not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotag.install.adapter import TEMPLATE
from lab import schema

#: Lines, from `create or replace function` to the end of the body.
MAX_LINES = 60
BEGINNING = re.compile(r"^create (?:or replace )?function (?P<name>[\w.]+)", re.MULTILINE | re.IGNORECASE)
REST = re.compile(r".*?\bas (?P<quote>\$\w*\$).*?(?P=quote);", re.DOTALL | re.IGNORECASE)
REASON = re.compile(r"-- Long: \S")
SOURCES = [*sorted(schema.SCHEMAS.rglob("*.sql")), TEMPLATE]


def functions(text: str) -> Iterator[tuple[str, int, bool]]:
    """Each function of a script: its name, its lines, and whether the comment right above it says why it is long."""
    for found in BEGINNING.finditer(text):
        rest = REST.match(text, found.start())
        assert rest, f"{found['name']} has no body between dollar quotes, so nobody knows where it ends"
        above = text[: found.start()].split("\n")[:-1]
        comment: list[str] = []
        while above and above[-1].startswith("--"):
            comment.append(above.pop())
        yield found["name"], rest.group().count("\n") + 1, any(REASON.match(line) for line in comment)


def too_long(text: str) -> dict[str, int]:
    """The functions of a script that are too long and do not say why, with their lines."""
    return {name: lines for name, lines, reasoned in functions(text) if lines > MAX_LINES and not reasoned}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(schema.ROOT)))
def test_no_function_is_too_long(path: Path) -> None:
    assert too_long(path.read_text()) == {}, (
        f"more than {MAX_LINES} lines: give its steps names, or say why that would be worse (-- Long: …)"
    )


def test_every_function_is_measured() -> None:
    measured = {name for path in SOURCES for name, _, _ in functions(path.read_text())}
    made = {s.key.removeprefix("function ").split("(")[0] for s in schema.engine() if s.is_function}
    assert made <= measured
    assert "autotag.describe_assets" in measured, "the adapter's, too"


def script(lines: int, comment: str = "-- Does much.") -> str:
    """A function of so many lines between two short ones."""
    body = "\n".join(["  perform 1;"] * (lines - 5))
    return f"""\
-- Long: this is another function's reason.
create or replace function autotag.before() returns text language sql as $$ select '$q$;' $$;

{comment}
create or replace function autotag.middle(p integer default 1) returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $body$
begin
{body}
end $body$;

create function autotag.after() returns integer
language sql
as $$
  select 1
$$;
"""


def test_what_is_too_long_is_found() -> None:
    assert [(name, lines) for name, lines, _ in functions(script(61))] == [
        ("autotag.before", 1), ("autotag.middle", 61), ("autotag.after", 5),
    ]  # fmt: skip
    assert too_long(script(60)) == {}
    assert too_long(script(61)) == {"autotag.middle": 61}


def test_a_reason_right_above_it_is_enough() -> None:
    assert too_long(script(200, "-- Does much.\n-- Long: a step costs 2.5 µs a call.")) == {}
    assert too_long(script(200, "-- Long:")) == {"autotag.middle": 200}, "no reason"
    assert too_long(script(200, "-- Long: of something else.\n")) == {"autotag.middle": 200}, "not right above it"
