"""Files are read and written as UTF-8 in every locale."""

from __future__ import annotations

import ast
from pathlib import Path

import autotag

FOLDER = Path(autotag.__file__).parent


def without_encoding(tree: ast.AST) -> list[int]:
    """Lines of calls that read or write text in the encoding of the locale."""
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        opens = name == "open" and isinstance(call.func, ast.Name) and "b" not in _mode(call)
        if opens or (name == "read_text" and not call.args) or (name == "write_text" and len(call.args) < 2):
            found.append(call.lineno)
    return found


def _mode(call: ast.Call) -> str:
    mode = call.args[1] if len(call.args) > 1 else None
    return str(mode.value) if isinstance(mode, ast.Constant) else ""


def test_every_call_names_its_encoding() -> None:
    files = sorted(FOLDER.rglob("*.py"))
    assert len(files) > 50
    found = {str(path.relative_to(FOLDER)): without_encoding(ast.parse(path.read_text("utf-8"))) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_call_without_one_is_found() -> None:
    assert without_encoding(ast.parse("path.read_text()\nopen('x')\nopen('x', 'rb')\npath.write_text(a)")) == [1, 2, 4]
