"""Finds the file rule of a project: which files of Storage the rows of a workspace may name.

The worker reads Storage with a key that opens every file. So the database checks that a row may name its file before it
tells a worker where the file is. `find_rule` derives the rule from the existing rows and from the policies of
``storage.objects``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg

from autotag.install.adapter import TEMPLATE, file_code, no_members, of_members, place_code, render
from autotag.install.answers import Ask, HostError
from autotag.install.details import Policy
from autotag.install.evidence import CALLER, caller_code, parts_of, plain
from autotag.install.facts import Facts
from autotag.install.host import FileRule, Host, Members
from autotag.install.keys import KEY_TYPES
from autotag.install.location import too_long_code
from autotag.install.quoting import quote, table_name
from autotag.texts import printable

MAX_ROWS = 100_000  # rows that are read; in a larger table, the first ones
MAX_DEPTH = 4  # segments of a path that are searched for the folder
MAX_BUCKETS = 50  # max buckets that a rule lists
#: Columns with the user who uploaded an image, the most likely first.
UPLOADERS = ("uploaded_by", "uploader_id", "user_id", "owner_id", "created_by", "author_id", "profile_id", "owner")
#: The rules from strict to weak.
RULES = {
    "workspace-folder": "a path begins with the folder of its workspace",
    "workspace-bucket": "each workspace has a bucket of its name",
    "uploader-folder": "a path begins with the folder of a member, who uploaded it",
    "owner": "a member owns the object in Storage",
    "any": "a row may name any file, and its workspace gets the tags of that file",
}
#: `(storage.foldername(name))[1]` and `split_part(name, '/', 1)` in the output of `evidence.plain`.
FOLDER = r"(?:[\w.]*foldername (?:objects\.)?name \[ (\d+) \]|split_part (?:objects\.)?name , '/' , (\d+))"
#: The rules that compare ids with names in paths. If ids are numbers, something else may have the same number.
BY_ID = ("workspace-folder", "workspace-bucket", "uploader-folder")


#: Runs a statement in which all names and strings are quoted.
Run = Callable[[str], list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Fit:
    """A rule, the number of rows that fit it, and the ids of up to three rows that do not."""

    rule: FileRule
    rows: int
    misfits: tuple[str, ...] = ()


@dataclass
class Rows:
    """The files that the rows of a table name.

    Attributes:
        count: number of rows that name a file.
        buckets: the buckets that they name, at most `MAX_BUCKETS` + 1.
        fits: the rules to choose from, each with the number of rows that fit it.
    """

    count: int = 0
    buckets: list[str] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)


def find_rule(url: str, facts: Facts, host: Host, wanted: str | None, ask: Ask, *, may_ask: bool) -> FileRule:
    """The rule for a host's files.

    Args:
        url: connection URL of the database's owner.
        facts: of the project.
        host: its tables; the rule in it is ignored.
        wanted: the choice of the caller: one of `RULES`, or a function (key, text, text) -> boolean of the project.
        ask: called when the rows and the policies do not agree on one rule.
        may_ask: whether ``ask`` reaches a person. If not, take the strictest rule that all rows fit, unless they may
            fit it by chance.

    Raises:
        HostError: there is no such rule, or none fits.
        psycopg.OperationalError: the database cannot be reached.
    """
    if not host.names_files:
        return FileRule("none")
    return _require_buckets(_find(_read_rows(url, facts, host), facts, host, wanted, ask, may_ask=may_ask))


def _require_buckets(rule: FileRule) -> FileRule:
    """Returns the rule.

    Raises:
        HostError: the rule has to list its buckets, but there are too many.
    """
    if rule.name in ("workspace-folder", "uploader-folder", "owner") and not rule.buckets:
        raise HostError(
            f"Rows name more than {MAX_BUCKETS} buckets. Set --file-rule to workspace-bucket, any, or a function of a"
            " workspace's id, a bucket and a path that returns boolean."
        )
    return rule


def _find(rows: Rows, facts: Facts, host: Host, wanted: str | None, ask: Ask, *, may_ask: bool) -> FileRule:
    if wanted and wanted != "none":
        return _wanted(wanted, facts, host, rows)
    fitting = [fit.rule for fit in rows.fits if fit.rows == rows.count]
    hints = _hints(facts.storage_policies, host, rows.buckets or [host.bucket] if host.bucket else rows.buckets)
    hinted = {name for name, _ in hints}
    if rows.count:
        certain = bool(fitting) and (not hints or fitting[0].name in hinted)
        # A single wrong row must not lead to a rule that is weaker than the policies suggest.
        if fitting and any(list(RULES).index(hint) < list(RULES).index(fitting[0].name) for hint in hinted):
            fitting = []
    else:
        certain, fitting = len(hinted) == 1, [f for f in fitting if f.name in hinted] or fitting
    chance = _by_chance(fitting[0], rows, fitting, host) if fitting else ""
    if chance and (by_policy := [rule for rule in fitting if hints == {(rule.name, rule.depth)}]):
        return by_policy[0]
    stricter = _nearly(rows, fitting[0]) if fitting else None
    if fitting and not stricter and not chance and (certain or not may_ask):
        return fitting[0]
    answer = ask("--file-rule", _question(rows, stricter) + chance, [*RULES])
    return _wanted(answer, facts, host, rows)


def _by_chance(chosen: FileRule, rows: Rows, fitting: Sequence[FileRule], host: Host) -> str:
    """Why all rows may fit a rule by chance, as a sentence; empty: they cannot.

    No two uuids are the same. But a number may be the id of a workspace, a user or an album, or a year, and a text may
    be any name.
    """
    kind = host.user_type if chosen.name == "uploader-folder" else host.workspace_type
    if chosen.name not in BY_ID or kind == "uuid":
        return ""
    if kind != "text":
        return " The ids are numbers, so they may be ids of something else."
    if not rows.count:
        return " No row says whose a folder is."
    folder = (chosen.prefix, chosen.depth)
    others = [f for f in fitting if f.name in BY_ID and f != chosen and (f.prefix, f.depth) == folder]
    if others and not host.members.owner:
        return f" The folders are ids of {chosen.name} as well as of {others[0].name}."
    return ""


def _nearly(rows: Rows, chosen: FileRule) -> Fit | None:
    """A stricter rule than the chosen one that most rows fit, although not all. Users write rows, so one row of theirs
    could otherwise weaken the rule for all workspaces."""
    stricter = itertools.takewhile(lambda fit: fit.rule != chosen, rows.fits)
    return next((fit for fit in stricter if fit.rows and fit.rows * 2 >= rows.count), None)


def _question(rows: Rows, stricter: Fit | None) -> str:
    fits = [f"{fit.rows} fit {fit.rule.name} ({RULES[fit.rule.name]})" for fit in rows.fits]
    misfits = f" Rows that do not fit {stricter.rule.name}: {', '.join(stricter.misfits)}." if stricter else ""
    return f"Which files may a row name? Of {rows.count} rows with a file, " + "; ".join(fits) + "." + misfits


def _wanted(wanted: str, facts: Facts, host: Host, rows: Rows) -> FileRule:
    if wanted == "any":
        return FileRule("any", ())
    if "." in wanted:
        kinds = (host.workspace_type, facts.tables[host.table].columns[host.workspace])
        if not any((wanted, kind) in facts.file_functions for kind in kinds):
            raise HostError(
                f"There is no function {wanted}({host.workspace_type}, text, text) that returns boolean (--file-rule)."
            )
        return FileRule(wanted, ())
    if wanted not in RULES:
        raise HostError(f"{wanted} is not a file rule; set --file-rule to {', '.join(RULES)}, or a function.")
    found = next((fit.rule for fit in rows.fits if fit.rule.name == wanted), None)
    if found is None:
        raise no_members(wanted, host)
    return found


def _hints(policies: Iterable[Policy], host: Host, buckets: Sequence[str]) -> set[tuple[str, int]]:
    """The rules that the policies of storage.objects suggest, each with the segment of its folder (0: not certain).

    Policies of other buckets are ignored.
    """
    caller = caller_code(host.caller)
    columns = {host.workspace, host.members.workspace} - {""}
    workspaces = rf'(?<![\w."])(?:[\w"]+\.)?(?:{"|".join(re.escape(quote(name)) for name in sorted(columns))})(?![\w"])'
    hints: set[tuple[str, int]] = set()
    for text in (plain(e) for p in policies if _applies_to(p, buckets) for e in (p.using, p.check) if e):
        if re.search(r"\bNOT (?!NULL)", text):
            continue
        compared = [(m[1], m[2] or m[3]) for m in re.finditer(rf"({workspaces}|{CALLER}) = {FOLDER}", text)]
        compared += [
            (m[3], m[1] or m[2])
            for m in re.finditer(rf"{FOLDER} (?:=|IN|= ANY|= ANY ARRAY) (?:SELECT )?({workspaces}|{CALLER})", text)
        ]
        for whose, depth in compared:
            users = whose in (caller, "auth.uid", "auth.jwt ->> 'sub'")
            known = users or not whose.startswith("auth.") or whose == caller_code(host.members.claim)
            hints.add(("uploader-folder" if users else "workspace-folder", int(depth) if known else 0))
        if not compared and re.search(FOLDER, text):  # for example as an argument of a function
            hints.add(("workspace-folder", 0))
        elif not compared and caller in text and re.search(r"(?<![\w.])(objects\.)?owner(_id)?\b", text):
            hints.add(("owner", 1))
    return hints


def users_see_files(facts: Facts, rule: FileRule) -> bool:
    """Whether a policy lets signed-in users see files in a rule's buckets, so that row level security can decide."""
    return facts.users_read_objects and any(
        policy.reads and _applies_to(policy, rule.buckets) for policy in facts.storage_policies
    )


def _applies_to(policy: Policy, buckets: Sequence[str]) -> bool:
    """Whether a policy can apply to one of these buckets. It cannot if everything that it allows requires another
    bucket."""
    ways = parts_of(policy.using or policy.check or "true", "OR")
    return not buckets or not all(any(_is_other(plain(part), buckets) for part in parts_of(way, "AND")) for way in ways)


def _is_other(condition: str, buckets: Sequence[str]) -> bool:
    """Whether a condition requires one of a list of buckets that contains none of these."""
    text = r"'(?:[^']|'')*'"
    match = re.fullmatch(rf"(?:objects\.)?bucket_id = (?:({text})|ANY ARRAY \[ ({text}(?: , {text})*) \])", condition)
    named = re.findall(r"'((?:[^']|'')*)'", match[1] or match[2]) if match else []
    return bool(match) and not any(bucket.replace("'", "''") in named for bucket in buckets)


def find_full_paths(url: str, host: Host) -> bool:
    """Whether paths begin with the name of their bucket, as ``fullPath`` in the reply to an upload does.

    A folder may have the same name as its bucket, so the objects in Storage decide. If Storage has neither object, all
    rows must begin with the bucket.
    """
    if not host.path or not (host.bucket or host.bucket_column):
        return False
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        stands, without = (
            f"exists (select from storage.objects o where o.bucket_id = f.bucket and o.name = {path})"
            for path in ("f.path", "substr(f.path, length(f.bucket) + 2)")
        )
        [(rows, begin, as_written, shorter)] = _runner(connection)(f"""
            select count(*), count(*) filter (where b), count(*) filter (where b and {stands}),
              count(*) filter (where b and {without})
            from {_source(replace(host, storage_hosts=()), 1000)}
            cross join lateral (select starts_with(f.path, f.bucket || '/') as b) x where f.path is not null""")
    return bool(shorter > as_written or (begin and begin == rows and as_written == shorter == 0))


def _source(host: Host, rows: int = MAX_ROWS) -> str:
    """The rows ``a`` that autotag tags, each with its location ``f``."""
    counted = f" where ({host.where})" if host.where else ""
    place = place_code(host, FileRule("none"), f"not ({too_long_code(host)})")
    return f"(select a.* from {table_name(host.table)} a{counted} limit {rows}) a {place}".replace(
        "autotag.", "pg_temp."
    )


def _read_urls(connection: psycopg.Connection[Any], host: Host) -> None:
    """Creates the adapter's functions that read URLs of Storage, for this connection only."""
    begin = r"create or replace function autotag\.(?:storage_hosts|percent_decode|storage_file)\("
    found = re.findall(rf"{begin}.*?\n(?:end )?\$\$;", TEMPLATE.read_text("utf-8"), re.DOTALL)
    for text in found:
        connection.execute(render(text, host).replace("autotag.", "pg_temp.").encode())


def _read_rows(url: str, facts: Facts, host: Host) -> Rows:
    table = facts.tables[host.table]
    kinds = {name: KEY_TYPES.get(table.base_type(name) or "") for name in UPLOADERS}
    uploader = next((name for name, kind in kinds.items() if kind == host.user_type and name != host.workspace), None)
    if host.members.owner:
        uploader = host.workspace
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        if host.storage_hosts:
            _read_urls(connection, host)
        source = _source(host)
        run = _runner(connection)
        [(count, buckets)] = run(f"""select count(*),
            (array_agg(distinct f.bucket) filter (where f.bucket is not null))[1:{MAX_BUCKETS + 1}] from {source}
            where f.path is not null""")
        rows = Rows(count, sorted(buckets or []))
        listed = _listed(rows.buckets, facts, host)
        workspace, person = f"a.{quote(host.workspace)}::text", _person(host.members, uploader, host)
        rules = [
            _folder(run, "workspace-folder", lambda folder: f"{folder} = {workspace}", source, listed, None),
            FileRule("workspace-bucket", ()),
        ]
        if person:
            rules += [
                _folder(run, "uploader-folder", person, source, listed, uploader),
                FileRule("owner", listed, uploader=uploader),
            ]
        for rule in rules:
            code = file_code(host, rule)
            [(fits, others)] = run(f"""select count(*) filter (where {code}),
                (array_agg(a.{quote(host.id)}::text) filter (where not coalesce({code}, false)))[1:3]
                from {source} where f.path is not null""")
            rows.fits.append(Fit(rule, fits, tuple(others or [])))
    return rows


def _runner(connection: psycopg.Connection[Any]) -> Run:
    """Returns a function that runs read-only statements. They contain conditions of the project, so they must not be
    able to write."""

    def run(statement: str) -> list[tuple[Any, ...]]:
        try:
            with connection.transaction():
                connection.execute("set transaction read only")
                return connection.execute(statement.encode()).fetchall()
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:  # a condition of the project fails on a row, or locks rows
            reason = (error.diag.message_primary or str(error)).splitlines()[0]
            raise HostError(f"The rows of the images cannot be read: {printable(reason, 300)}.") from None

    return run


def _listed(named: Sequence[str], facts: Facts, host: Host) -> tuple[str, ...]:
    """The buckets that a rule allows: those that rows name, or all buckets of the project. Empty: more than
    `MAX_BUCKETS`."""
    # Users write the rows, so only existing buckets count.
    found = set(named) & set(facts.buckets) or ([host.bucket] if host.bucket else facts.buckets)
    allowed = {*found, *([host.bucket] if host.bucket else [])}
    return tuple(sorted(allowed)) if len(allowed) <= MAX_BUCKETS else ()


def _person(members: Members, uploader: str | None, host: Host) -> Callable[[str], str] | None:
    """The condition that a folder belongs to the uploader or to a member; None: there is no table of members."""
    if (
        not members.table and not members.owner
    ):  # a token or a function knows the workspaces of the caller, not those of the user in a row
        return None
    if uploader:
        return lambda folder: f"{folder} = a.{quote(uploader)}::text"
    rows = of_members(members, f"a.{quote(host.workspace)}")
    return lambda folder: f"exists (select {rows} and m.{quote(members.user)}::text = {folder})"


def _folder(
    run: Run, name: str, condition: Callable[[str], str], source: str, buckets: tuple[str, ...],
    uploader: str | None,
) -> FileRule:  # fmt: skip
    """The rule of this name, with the folder at the depth where most rows have it."""
    segment = condition("split_part(f.path, '/', d)")
    found = run(f"""
        select d, count(*), min(before), max(before) from (
          select d, array_to_string((string_to_array(f.path, '/'))[1:d - 1], '/') as before
          from {source} cross join generate_series(1, {MAX_DEPTH}) d where f.path is not null and {segment}) x
        group by d order by count(*) desc, d limit 1""")
    if not found:
        return FileRule(name, buckets, uploader=uploader)
    depth, _, first, last = found[0]
    # A prefix that all rows share may be an id by chance, so only words become part of the rule.
    prefix = f"{first}/" if first == last and re.fullmatch(r"[A-Za-z_-]+(/[A-Za-z_-]+)*", first) else ""
    return FileRule(name, buckets, prefix, depth, uploader)
