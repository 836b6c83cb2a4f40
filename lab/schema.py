"""The schema source, ``supabase/schemas``, and the migrations generated from it.

The source defines the schema: every object once, in reading order, functions as ``create or replace``. A migration
contains what has changed since the last release: functions are copied from the source, and changes to tables are steps
written by hand (``supabase/schemas/changes.sql``). A released migration never changes again; its hash is recorded in
``supabase/releases``.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pglast import ast, parse_sql
from pglast.parser import ParseError, parse_sql_json, scan, split
from pglast.stream import RawStream

ROOT = Path(__file__).parent.parent
SUPABASE = ROOT / "supabase"
SCHEMAS, MIGRATIONS, RELEASES = SUPABASE / "schemas", SUPABASE / "migrations", SUPABASE / "releases"
CHANGES = SCHEMAS / "changes.sql"
#: Files that every migration contains in full, because they may run any number of times.
REPEATED = ("seed.sql", "grants.sql", "version.sql")
UNRELEASED = "unreleased"
NO_CHANGES = """\
-- Changes to existing tables since the last release, as statements for an installation that has that release. They
-- run before the new release's functions are created. scripts/release moves them into the migration and empties this
-- file.
"""


class ReleaseError(Exception):
    """No migration can be generated; the message says what to do."""


@dataclass(frozen=True)
class Statement:
    """One statement of the source with the comment above it.

    Attributes:
        key: identifies the object regardless of layout: ``function autotag.claim(uuid, integer)``. For functions and
            triggers, ``drop`` takes it.
        hash: of a function's text; of other statements' syntax tree, which ignores comments and layout.
        returns: a function's return type, and the names and defaults of its parameters. If one of them differs,
            Postgres cannot always replace the function, so the migration drops it first.
        path: the file, relative to ``supabase/schemas``.
        name: of the object, without its schema; empty for a statement that names none.
    """

    key: str
    hash: str
    text: str
    comment: str
    returns: str
    path: str
    name: str = ""

    @property
    def is_function(self) -> bool:
        return self.key.startswith("function ")

    @property
    def is_trigger(self) -> bool:
        return self.key.startswith("trigger ")

    @property
    def needs_step(self) -> bool:
        """Whether an installation needs a statement in changes.sql after a change."""
        return not (self.is_function or self.is_trigger or self.path in REPEATED)

    def describe(self) -> str:
        return f"{self.path}: {' '.join(self.text.split())[:100]}"


def schema_files() -> list[Path]:
    """The files of the source in the order of ``config.toml`` (``[db.migrations] schema_paths``).

    Raises:
        ReleaseError: a file is missing there or in the folder. Its objects would be left out, and dropped.
    """
    config = tomllib.loads((SUPABASE / "config.toml").read_text())
    listed = [SUPABASE / path for path in config["db"]["migrations"]["schema_paths"]]
    if twice := [str(path.relative_to(SUPABASE)) for path, count in Counter(listed).items() if count > 1]:
        raise ReleaseError(f"{', '.join(twice)}: name each file once in config.toml (schema_paths).")
    if odd := ({*SCHEMAS.rglob("*.sql")} - {CHANGES}) ^ {*listed}:
        names = ", ".join(str(path.relative_to(SUPABASE)) for path in sorted(odd))
        raise ReleaseError(f"{names}: name each file in schemas/ in config.toml (schema_paths), and no other.")
    return listed


def source(*, host: bool) -> str:
    """The whole schema in one script.

    Args:
        host: include the host's tables and the adapter, as in the stand-alone stack.
    """
    files = [path for path in schema_files() if host or path.parent.name != "host"]
    return "\n".join(path.read_text() for path in files)


def statements(path: Path) -> Iterator[Statement]:
    """The statements of a file.

    Raises:
        ReleaseError: its SQL has a syntax error.
    """
    text = path.read_text(encoding="utf-8")
    end = 0
    try:
        for part in split(text, only_slices=True):
            yield _statement(text[part], text[end : part.start], str(path.relative_to(SCHEMAS)))
            end = text.find(";", part.stop) + 1 or part.stop
    except ParseError as error:
        raise _syntax_error(path, text, error) from None


def _statement(text: str, before: str, path: str) -> Statement:
    node = parse_sql(text)[0].stmt
    comment = "\n".join(line for line in before.strip().split("\n\n")[-1].splitlines() if line.startswith("--"))
    if isinstance(node, ast.CreateFunctionStmt):
        returns = RawStream()(node.returnType) if node.returnType else ""
        outs = [RawStream()(p) for p in node.parameters or () if p.mode.value in "obt"]
        inputs = [RawStream()(p.argType) for p in node.parameters or () if p.mode.value in "idvb"]
        parameters = [f"{p.name}{'=' if p.defexpr else ''}" for p in node.parameters or ()]
        name = ".".join(part.sval for part in node.funcname or ())
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Statement(
            f"function {name}({', '.join(inputs)})", digest, text, comment, f"{returns} {outs} {parameters}", path, name
        )
    meaning = json.dumps(_without_locations(json.loads(parse_sql_json(text))), sort_keys=True)
    digest = hashlib.sha256(meaning.encode()).hexdigest()
    key = f"{type(node).__name__} {digest[:16]}"
    if isinstance(node, ast.CreateTrigStmt) and node.replace and node.relation:
        key = f"trigger {node.trigname} on {node.relation.schemaname}.{node.relation.relname}"
    return Statement(key, digest, text, comment, "", path, _object_name(node))


def _object_name(node: ast.Node | None) -> str:
    """The name of the object that a statement creates or changes, without its schema."""
    for attribute in ("idxname", "trigname", "policy_name", "schemaname"):
        if isinstance(name := getattr(node, attribute, None), str):
            return name
    for attribute in ("relation", "view", "sequence", "typevar", "table"):
        if isinstance(table := getattr(node, attribute, None), ast.RangeVar):
            return table.relname or ""
    for attribute in ("domainname", "typeName"):
        if names := getattr(node, attribute, None):
            return str(names[-1].sval)
    return ""


def _without_locations(node: Any) -> Any:
    """A syntax tree without the locations of its parts."""
    if isinstance(node, dict):
        return {
            k: _without_locations(v)
            for k, v in node.items()
            if not k.endswith(("location", "_len", "list_start", "list_end"))
        }
    return [_without_locations(part) for part in node] if isinstance(node, list) else node


def engine() -> list[Statement]:
    """All statements of the source except the host's.

    Raises:
        ReleaseError: two of them define the same object.
    """
    found = [s for path in schema_files() if path.parent.name != "host" for s in statements(path)]
    if twice := [key for key, count in Counter(s.key for s in found).items() if count > 1]:
        raise ReleaseError(f"Defined more than once: {', '.join(twice)}.")
    return found


# -- releases


@dataclass(frozen=True)
class Release:
    """A released version: its migration's file and hash, and the source at that time.

    Attributes:
        statements: key -> hash of each statement.
        returns: key -> `Statement.returns` of each function.
        objects: key -> name and description of each statement whose change needs a step.
        baseline: hash of ``host/baseline.sql``.
    """

    version: str
    file: str
    sha256: str
    statements: dict[str, str]
    returns: dict[str, str]
    objects: dict[str, tuple[str, str]]
    baseline: str


@cache
def releases() -> list[Release]:
    """All releases, oldest first.

    Raises:
        ReleaseError: a file in ``supabase/releases`` is not a record of a release.
    """
    found = []
    for path in RELEASES.glob("*.json"):
        try:
            found.append(Release(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):
            raise ReleaseError(f"{path.relative_to(ROOT)} is not a record of a release: restore it.") from None
    return sorted(found, key=lambda release: release.file)


def changed_files() -> list[str]:
    """Released migrations that have changed or no longer exist, as paths from the root."""
    return [
        str((MIGRATIONS / release.file).relative_to(ROOT))
        for release in releases()
        if not (MIGRATIONS / release.file).exists() or sha256((MIGRATIONS / release.file).read_text()) != release.sha256
    ]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def next_migration(version: str) -> str:
    """The migration from the last release to the current source; empty when nothing has changed.

    Functions and triggers are generated: after the steps of changes.sql, changed triggers and functions that cannot be
    replaced are dropped, then functions are created, and then triggers, which call them.

    Raises:
        ReleaseError: another object has changed, or one depends on a function that has to be dropped, and changes.sql
            does not name it; or changes.sql has a syntax error.
    """
    now = engine()
    last = releases()[-1] if releases() else None
    if last is None:
        return f"{HEADER.format(version=version)}\n{LATE}\n{source(host=False)}"
    before = last.statements
    steps = _steps()
    new = [s for s in now if before.get(s.key) != s.hash]
    removed = sorted(set(before) - {s.key for s in now})
    functions, triggers = [s for s in new if s.is_function], [s for s in new if s.is_trigger]
    if not (new or removed or steps):
        return ""
    drops = [key for key in removed if key.startswith("function ")]
    drops += [s.key for s in functions if s.key in before and last.returns.get(s.key, s.returns) != s.returns]
    _check_steps(steps, new, removed, last)
    _check_dependents(steps, now, drops)
    old_triggers = [key for key in removed if key.startswith("trigger ")] + [s.key for s in triggers if s.key in before]
    parts = [HEADER.format(version=version), LATE]
    parts += [steps] if steps else []
    parts += [f"drop {key.replace(' ', ' if exists ', 1)};" for key in sorted(old_triggers) + sorted(drops)]
    parts += [f"{s.comment}\n{s.text};".strip() for s in functions + triggers]
    parts += [path.read_text().strip() for path in schema_files() if path.name in REPEATED]
    return "\n\n".join(parts) + "\n"


def _check_steps(steps: str, new: list[Statement], removed: list[str], last: Release) -> None:
    """Each changed object that is not generated has to be named in changes.sql."""
    changed = {s.name or s.text: (s.name, s.describe()) for s in new if s.needs_step}
    for key, (name, text) in last.objects.items():
        if key in removed:
            changed.setdefault(name or text, (name, f"removed from {text}"))
    if missing := [text for name, text in changed.values() if not _names(steps, name)]:
        raise ReleaseError(
            f"Changed since {last.version}. Add statements that name these objects, and update an existing schema, to"
            " supabase/schemas/changes.sql:\n" + "\n".join(f"  {text}" for text in missing)
        )


def _check_dependents(steps: str, now: list[Statement], drops: list[str]) -> None:
    """Postgres refuses to drop a function that a policy, a table or a view uses."""
    for key in drops:
        name = key.removeprefix("function ").partition("(")[0]
        call = r"(?<!\w)" + r" ?\. ?".join(re.escape(part) for part in name.split(".")) + r" ?\("
        used = [s.describe() for s in now if not (s.is_function or s.is_trigger) and re.search(call, _code(s.text))]
        if used and not _names(steps, name.rpartition(".")[2]):
            raise ReleaseError(
                f"The {key} cannot be replaced, and these objects use it. Add statements that drop these objects, and"
                " then the function, to supabase/schemas/changes.sql, and create the objects again after it or in"
                " grants.sql:\n" + "\n".join(f"  {text}" for text in used)
            )


LATE = """\
set local lock_timeout = '1s';  -- so that no query of yours waits behind it; run the file again then
set local check_function_bodies = off;  -- a function may stand before what it calls
set local client_min_messages = warning;  -- without a notice for each %type"""
HEADER = "-- autotag {version}. Made by scripts/release from supabase/schemas; what is released never changes."


def _steps() -> str:
    """changes.sql with a semicolon at its end; empty if it has no statement.

    Raises:
        ReleaseError: it has a syntax error.
    """
    text = CHANGES.read_text(encoding="utf-8").strip() if CHANGES.exists() else ""
    try:
        split(text, only_slices=True)
    except ParseError as error:
        raise _syntax_error(CHANGES, text, error) from None
    code = _code(text).strip()
    if not code:
        return ""
    return text if code.endswith(";") else f"{text}\n;"


def _syntax_error(path: Path, text: str, error: ParseError) -> ReleaseError:
    message, index = error.args[0], error.args[1] or 0
    return ReleaseError(f"{path.relative_to(ROOT)}, line {text.count(chr(10), 0, index) + 1}: {message}.")


def _names(steps: str, name: str) -> bool:
    """Whether a statement of changes.sql names an object. Without a name, any statement will do."""
    return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", _code(steps))) if name else bool(steps)


def _code(text: str) -> str:
    """SQL without comments and strings, except the text of a ``do $$ … $$``."""
    parts = [(token.name, text[token.start : token.end + 1]) for token in scan(text)]
    return " ".join(
        part
        for kind, part in parts
        if kind not in ("SQL_COMMENT", "C_COMMENT") and (kind != "SCONST" or part.startswith("$"))
    )


def record(version: str, file: str) -> Release:
    """The record of a release."""
    now = engine()
    return Release(
        version, file, sha256((MIGRATIONS / file).read_text()),
        {s.key: s.hash for s in now}, {s.key: s.returns for s in now if s.is_function},
        {s.key: (s.name, s.describe()) for s in now if s.needs_step},
        sha256((SCHEMAS / "host" / "baseline.sql").read_text()),
    )  # fmt: skip
