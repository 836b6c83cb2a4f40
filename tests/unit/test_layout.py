"""The one rule: the database decides. SQL lives in the migrations, in db/ and in install/, nowhere else in the product.
And the rules that keep the Python readable: who may import whom, and how long a function and a module may be."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = ROOT / "worker" / "autotag"
# install/ reads and writes the project's catalog where autotag's functions are not there yet, or not any more. Only these of
# its modules have SQL.
ALLOWED = {
    f"install/{name}.py"
    for name in (
        "adapter",
        "changes",
        "collisions",
        "conditions",
        "details",
        "evidence",
        "facts",
        "files",
        "losses",
        "migrations",
        "preview",
        "remains",
        "row_readers",
        "tag_index",
        "uninstall",
        "user_type",
    )
}
#: Every module of ours that is no test, by its name.
MODULES = {
    ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__"): path
    for top, package in ((ROOT / "worker", "autotag"), (ROOT, "lab"), (ROOT, "benchmarks"))
    for path in sorted((top / package).rglob("*.py"))
}
MAX_FUNCTION, MAX_MODULE, MAX_TEST = 50, 400, 60  # lines


def sources() -> list[Path]:
    names = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    return [path for name, path in names.items() if name not in ALLOWED and not name.startswith("db/")]


#: A text that begins as a statement of SQL, behind comments or not.
STATEMENT = re.compile(
    r"(\s|--[^\n]*(\n|$)|/\*.*?\*/)*"
    r"((select|insert|update|delete|listen|unlisten|notify|create|with|truncate)\s|(drop|alter|lock)\s+(table|function|schema|role)\b"
    r"|merge\s+into\b|(grant|revoke)\s.*\son\b|do\s+\$)",
    re.IGNORECASE | re.DOTALL,
)


def sql_in(tree: ast.Module) -> list[str]:
    """Texts of a module, or the constant parts of them, that are SQL; docstrings are none."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    texts = [
        node.value.decode(errors="replace") if isinstance(node.value, bytes) else node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and id(node) not in docstrings
    ]  # fmt: skip
    return [text for text in texts if STATEMENT.match(text)]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_sql_outside_db(path: Path) -> None:
    assert sql_in(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        'run("select 1")', 'run("SELECT 1")', 'run(f"select {name} from t")', 'run(f"{indent}select 1 from t")',
        'run(sql.SQL("delete from {}").format(t))', 'run("select " + columns + " from t")', 'run("update"\n" t set x = 1")',
        'run("""\n  -- why\n  select 1""")', 'run("/* why */ insert into t values (1)")', 'run(b"select 1")',
        'run("drop table t")', 'run("do $$ begin end $$")', 'run("grant select on t to r")', 'run("merge into t using u")',
    ],
)  # fmt: skip
def test_sql_is_found_however_it_is_written(code: str) -> None:
    assert sql_in(ast.parse(code)) != []


def test_words_are_no_sql() -> None:
    assert (
        sql_in(ast.parse('"""select 1"""\nsay("selected", "Updates follow.", "without", "drop it", "do this")')) == []
    )


def test_db_calls_functions_only() -> None:
    statements = [
        found for path in (PACKAGE / "db").glob("*.py") for found in re.findall(r'"(select [^"]+)"', path.read_text())
    ]
    assert len(statements) > 30
    for statement in statements:
        assert re.search(r"\b(autotag\.\w+|pg_notify)\(", statement), statement
        assert not re.search(r"\bfrom (?!autotag\.\w+\()", statement), statement


#: JSON without a type, and a result without one.
UNTYPED = re.compile(r"\b(?:dict|(?:Mutable)?Mapping)\[[\w\s|]+,\s*Any\]|->\s*(?:Any|Coroutine\[Any, Any, Any\])\s*:")


@pytest.mark.parametrize("folder", ["db", "worker"])
def test_messages_between_worker_and_database_have_types(folder: str) -> None:
    untyped = [
        f"{path.name}: {found}"
        for path in sorted((PACKAGE / folder).glob("*.py"))
        for found in UNTYPED.findall(path.read_text())
    ]
    assert untyped == [], "use a TypedDict or a dataclass, and a reader of db/readers.py"


@pytest.mark.parametrize(
    "code", ["def f(notes: list[dict[str, Any]]): ...", "x = cast('Mapping[str, Any]', y)", "def f() -> Any:"]
)
def test_untyped_messages_are_found(code: str) -> None:
    assert UNTYPED.search(code)
    assert not UNTYPED.search(code.replace("Any", "object"))


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """The modules that a module imports, and whether it does so as soon as it is imported itself."""
    path = MODULES[module]
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), True)]
    while todo:
        node, at_once = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + (path.name == "__init__.py")]
            base = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base, at_once
        within = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        todo += [(child, at_once and not within) for child in ast.iter_child_nodes(node)]


@pytest.mark.parametrize(
    ("package", "knows"),
    [("autotag", {"autotag"}), ("lab", {"autotag", "lab"}), ("benchmarks", {"autotag", "lab", "benchmarks"})],
)
def test_nobody_imports_what_stands_further_out(package: str, knows: set[str]) -> None:
    ours = {"autotag", "lab", "benchmarks", "tests"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    wrong = {
        f"{module} imports {name}"
        for module in MODULES if module.split(".")[0] == package
        for name, _ in imports(module) if name.split(".")[0] in ours - knows
    }  # fmt: skip
    assert wrong == set()


def test_one_package_talks_to_the_openai_sdk() -> None:
    wrong = {
        module
        for module in MODULES if module.startswith("autotag.") and not module.startswith("autotag.openai.")
        for name, _ in imports(module) if name.split(".")[0] == "openai"
    }  # fmt: skip
    assert wrong == set(), "call autotag.openai.provider.Provider instead"
    assert any(name == "openai" for name, _ in imports("autotag.openai.provider")), "imports are found at all"


def test_no_modules_import_each_other() -> None:
    graph = {module: {name for name, at_once in imports(module) if at_once and name in MODULES} for module in MODULES}
    assert sum(map(len, graph.values())) > 200, "imports are found at all"
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a cycle of imports: {' ← '.join(error.args[1])}")


def assigned(method: ast.AST) -> set[str]:
    """The attributes of ``self`` that a method assigns."""
    return {
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name) and node.value.id == "self"
    }  # fmt: skip


def test_objects_are_whole_when_they_are_made() -> None:
    """Every attribute is a field, or is assigned by the constructor (a dataclass's has ``__post_init__``)."""
    late, classes = [], 0
    for module, path in MODULES.items():
        for kind in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
            classes += 1
            names = [node.target for node in kind.body if isinstance(node, ast.AnnAssign)]
            names += [name for node in kind.body if isinstance(node, ast.Assign) for name in node.targets]
            fields = {name.id for name in names if isinstance(name, ast.Name)}
            methods = [node for node in kind.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            made = fields.union(
                *(assigned(method) for method in methods if method.name in ("__init__", "__post_init__"))
            )
            late += [
                f"{module}.{kind.name}.{method.name}: {name}"
                for method in methods
                for name in sorted(assigned(method) - made)
            ]
    assert classes > 100
    assert late == []


def reason(lines: list[str], number: int) -> bool:
    """Whether the comment directly above a line (from 1) begins with "# Long:"."""
    above = number - 2
    while above > 0 and lines[above].strip().startswith("#") and lines[above - 1].strip().startswith("#"):
        above -= 1
    return above >= 0 and re.match(r"\s*# Long: \w", lines[above]) is not None


def long_functions(lines: list[str], most: int, *, decorators: bool) -> Iterator[str]:
    """Functions of more than ``most`` lines without a reason. A docstring does not count. decorators: they count."""
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = node.end_lineno - (first if decorators else node.lineno) + 1
            if ast.get_docstring(node, clean=False) is not None:
                length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if length > most and not reason(lines, first):
                yield f"{node.name}: {length} lines"


def test_nothing_is_longer_than_one_can_take_in() -> None:
    """A comment "# Long: why" above a function, or in the first line of a module, allows more lines."""
    too_long = []
    for module, path in MODULES.items():
        lines = path.read_text().splitlines()
        if len(lines) > MAX_MODULE and not lines[0].startswith("# Long: "):
            too_long.append(f"{module}: {len(lines)} lines")
        too_long += [f"{module}.{found}" for found in long_functions(lines, MAX_FUNCTION, decorators=True)]
    assert too_long == []


def test_no_test_is_longer_than_one_can_take_in() -> None:
    """Decorators do not count, because a test may have many cases, and modules of tests have no limit."""
    assert [
        f"{path.name}: {found}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for found in long_functions(path.read_text().splitlines(), MAX_TEST, decorators=False)
    ] == []  # fmt: skip
