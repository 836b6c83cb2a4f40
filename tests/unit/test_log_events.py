"""The names of log events are past participles (docs/glossary.md): in the worker, and in the notices of the database."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from conftest import ROOT

LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
PARTICIPLE = re.compile(r"[a-z_]+ed|([a-z_]+_)?(lost|found|held|shown|sent|begun|read|unread|cut_off)")


def logged(source: str) -> Iterator[str]:
    """The names of events that a module logs: constants, or values that are assigned to a variable."""
    tree = ast.parse(source)
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in LEVELS):
            continue
        if not re.search(r"\b_?log(ger)?\b|get_logger", ast.unparse(call.func.value)) or not call.args:
            continue
        name = call.args[0]
        values: list[ast.expr] = [name]
        if isinstance(name, ast.Name):
            values = [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Assign) and any(ast.unparse(target) == name.id for target in node.targets)
            ]
        elif isinstance(name, ast.Subscript):
            continue  # a notice of the database
        assert values, f"the name of an event cannot be found: {ast.unparse(call)}"
        yield from (
            part.value
            for value in values
            for part in ast.walk(value)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        )


def test_log_events_are_past_participles() -> None:
    paths = sorted((ROOT / "worker" / "autotag").rglob("*.py"))
    events = {(path.name, event) for path in paths for event in logged(path.read_text())}
    assert len(events) > 50
    assert [(path, event) for path, event in sorted(events) if not PARTICIPLE.fullmatch(event)] == []


def test_notices_of_the_database_are_past_participles() -> None:
    paths = sorted((ROOT / "supabase" / "schemas").rglob("*.sql"))
    events = {event for path in paths for event in re.findall(r"'event', '(\w+)'", path.read_text())}
    assert len(events) > 5
    assert [event for event in sorted(events) if not PARTICIPLE.fullmatch(event)] == []


@pytest.mark.parametrize(
    ("code", "events"),
    [
        ('log.warning("batch_busy")', ["batch_busy"]),
        ('self._log.error("a", error=1)', ["a"]),
        ('e = "a" if x else "b"\nlog.error(e)', ["a", "b"]),
        ('structlog.get_logger(__name__).warning("a")', ["a"]),
        ('log.warning(notice["event"])', []),
        ('finding.error("a")', []),
    ],
)
def test_events_are_found_however_they_are_logged(code: str, events: list[str]) -> None:
    assert list(logged(code)) == events
