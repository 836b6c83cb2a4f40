"""The product's dependencies are exactly what it imports, and docs/architecture.md explains each of them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(entry) for entry in PROJECT["dependencies"]]
OPTIONAL = [Requirement(entry) for entries in PROJECT["optional-dependencies"].values() for entry in entries]
#: What an extra installs that is imported by a name of its own.
OF_EXTRAS = {("psycopg", "pool"): "psycopg-pool"}


def imported() -> dict[str, set[str]]:
    """The distributions that the product imports, and the folders (or modules at the top) that do."""
    providers = packages_distributions()
    found: dict[str, set[str]] = {}
    for path in (ROOT / "worker").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top != "autotag":
                    wanted = providers.get(top, [top])
                    dist = top if top == "opentelemetry" else canonicalize_name(wanted[0])
                    found.setdefault(dist, set()).add(module(path))
    return found


def module(path: Path) -> str:
    """The folder of the package that a module is in, or the module itself at the top."""
    return path.relative_to(ROOT / "worker" / "autotag").parts[0].removesuffix(".py")


def declared(requirements: list[Requirement]) -> set[str]:
    names = {canonicalize_name(one.name) for one in requirements}
    return names | {OF_EXTRAS[key] for one in requirements for e in one.extras if (key := (one.name, e)) in OF_EXTRAS}


def test_the_product_imports_what_it_declares_and_nothing_else() -> None:
    used = set(imported())
    assert used - declared(REQUIRED) == {"opentelemetry"}, "imported, but not declared"
    assert declared(REQUIRED) - used == set(), "declared, but not imported"
    assert {one.name.split("-")[0] for one in OPTIONAL} == {"opentelemetry"}


def test_what_is_optional_is_imported_by_one_module_alone() -> None:
    assert imported()["opentelemetry"] == {"observability"}


def test_each_dependency_is_explained_where_it_is_used() -> None:
    """The table in docs/architecture.md: dependency, why, which folders and modules."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = {
        canonicalize_name(re.sub(r"\[.*\]", "", name)): set(re.findall(r"`([\w/]+)`", where))
        for name, where in re.findall(r"^\| `([\w\[\],-]+)` \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    }
    used = imported()
    used["psycopg"] |= used.pop("psycopg-pool")
    assert {name: used[name] for name in used if name != "opentelemetry"} == rows
