"""The one rule: the database decides. SQL lives in the migrations and in db.py, nowhere else in the product."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "worker" / "autotag"
# install/ works before there is any function to call: it looks at the project and applies the migrations.
ALLOWED = {"db.py", "facts.py", "files.py", "host.py", "migrations.py"}


def sources() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name not in ALLOWED]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_sql_outside_db(path: Path) -> None:
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        and re.match(r"\s*(select|insert|update|delete|listen|notify|create|with)\s", node.value, re.IGNORECASE)
    ]  # fmt: skip
    assert found == []


def test_db_calls_functions_only() -> None:
    source = (PACKAGE / "db.py").read_text()
    for statement in re.findall(r'"(select [^"]+)"', source):
        assert re.search(r"\b(autotag\.\w+|pg_notify)\(", statement), statement
        assert not re.search(r"\bfrom (?!autotag\.\w+\()", statement), statement
