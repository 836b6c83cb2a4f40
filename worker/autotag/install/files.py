"""Whose a file is: which files of Storage a workspace's rows may name.

The worker reads Storage with a key that opens every file, so the database must know whose a file is before it says
where it lies. `find_rule` reads the rule off the rows that are there and off the policies of ``storage.objects``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from autotag.install.facts import Facts, StoragePolicy
from autotag.install.host import (
    Ask,
    FileRule,
    Host,
    HostError,
    Members,
    file_code,
    lateral_code,
    of_members,
    quote,
    table_name,
)

ROWS = 100_000  # rows that are looked at; of more, a part of the table's beginning
DEEPEST = 4  # the folder is looked for in so many segments of a path
MOST_BUCKETS = 50  # that a rule lists
#: Columns that say who uploaded an image, the likeliest first.
UPLOADERS = ("uploaded_by", "uploader_id", "user_id", "owner_id", "created_by", "author_id", "profile_id", "owner")
#: The rules, the strictest first.
RULES = {
    "workspace-folder": "a path begins with the folder of its workspace",
    "workspace-bucket": "each workspace has a bucket of its name",
    "uploader-folder": "a path begins with the folder of a member, who uploaded it",
    "owner": "a member owns the object in Storage",
    "any": "a row may name any file: its workspace gets that picture's tags",
}
#: `(storage.foldername(name))[1]` and `split_part(name, '/', 1)` as Postgres prints them in a policy.
FOLDER = re.compile(
    r"foldername\((?:objects\.)?name\)\)?\[(\d+)\]|split_part\((?:objects\.)?name, '/'(?:::text)?, (\d+)\)"
)


#: Runs a statement that consists of quoted names and literals.
Run = Callable[[str], list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Fit:
    """How many of the rows a rule fits."""

    rule: FileRule
    rows: int


@dataclass
class Rows:
    """What the table's rows name: how many name a file, in which buckets, and what fits them."""

    count: int = 0
    buckets: list[str] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)


def find_rule(url: str, facts: Facts, host: Host, wanted: str | None, ask: Ask, *, may_ask: bool) -> FileRule:
    """The rule for a host's files.

    Args:
        url: connection URL of the database's owner.
        facts: of the project.
        host: its tables; the rule in it does not count.
        wanted: what `--file-rule` says: one of `RULES`, or a function (uuid, text, text) -> boolean of the project.
        ask: asks a person; called when rows and policies do not agree on one rule.
        may_ask: whether a person is there. Without one the strictest rule that fits all rows is taken.

    Raises:
        HostError: there is no such rule, or none fits.
    """
    if host.path is None:
        return FileRule("none")
    return _bounded(_find(_look_at_rows(url, facts, host), facts, host, wanted, ask, may_ask=may_ask))


def _bounded(rule: FileRule) -> FileRule:
    """A rule that lists its buckets, where it is one that has to."""
    if rule.name in ("workspace-folder", "uploader-folder", "owner") and not rule.buckets:
        raise HostError(
            f"Rows name more than {MOST_BUCKETS} buckets. Say which files they may name: --file-rule workspace-bucket"
            " (a bucket for each workspace), any, or a function (uuid, text, text) that returns boolean."
        )
    return rule


def _find(rows: Rows, facts: Facts, host: Host, wanted: str | None, ask: Ask, *, may_ask: bool) -> FileRule:
    if wanted and wanted != "none":
        return _wanted(wanted, facts, host, rows)
    fitting = [fit.rule for fit in rows.fits if fit.rows == rows.count]
    hints = _hints(facts.storage_policies, host, rows.buckets or [host.bucket] if host.bucket else rows.buckets)
    if rows.count:
        certain = bool(fitting) and (not hints or fitting[0].name in hints)
        # One row that fits no other rule must not lead to a rule that is weaker than what the policies say.
        if fitting and any(list(RULES).index(hint) < list(RULES).index(fitting[0].name) for hint in hints):
            fitting = []
    else:
        certain, fitting = len(hints) == 1, [f for f in fitting if f.name in hints] or fitting
    if fitting and (certain or not may_ask):
        return fitting[0]
    answer = ask("--file-rule", _question(rows), [*RULES])
    return _wanted(answer, facts, host, rows)


def _question(rows: Rows) -> str:
    lines = [f"Which files may a row name? {rows.count} rows name one"]
    lines += [f"{fit.rows} fit {fit.rule.name} ({RULES[fit.rule.name]})" for fit in rows.fits]
    return "; ".join(lines) + "."


def _wanted(wanted: str, facts: Facts, host: Host, rows: Rows) -> FileRule:
    if wanted == "any":
        return FileRule("any", ())
    if "." in wanted:
        if wanted not in facts.file_functions:
            raise HostError(f"There is no function {wanted}(uuid, text, text) that returns boolean (--file-rule).")
        return FileRule(wanted, ())
    if wanted not in RULES:
        raise HostError(f"--file-rule is {', '.join(RULES)}, or a function: {wanted} is none of them.")
    found = next((fit.rule for fit in rows.fits if fit.rule.name == wanted), None)
    if found is None:
        raise HostError(
            f"The rule {wanted} needs a table that says who a workspace's members are; choose another --file-rule, or"
            " write a function (uuid, text, text) that returns boolean."
        )
    return found


def _hints(policies: Iterable[StoragePolicy], host: Host, buckets: Sequence[str]) -> set[str]:
    """The rules that the policies of storage.objects speak of, those of other buckets aside."""
    hints = set()
    members = host.members.table.rpartition(".")[2]
    for policy in policies:
        if not _speaks_of(policy.text, buckets):
            continue
        text = re.sub(r"\s+", " ", policy.text)
        uid = "uid()" in text
        if FOLDER.search(text):
            tenants = host.workspace in text or "jwt()" in text or bool(members and members in text)
            hints.add("workspace-folder" if tenants or not uid else "uploader-folder")
        elif uid and re.search(r"(?<![\w.])(objects\.)?owner(_id)?\b", text):
            hints.add("owner")
    return hints


def users_see_files(facts: Facts, rule: FileRule) -> bool:
    """Whether a policy lets signed-in users see files of a rule's buckets, so that row level security can be asked."""
    return facts.users_read_objects and any(
        policy.reads and _speaks_of(policy.text, rule.buckets) for policy in facts.storage_policies
    )


def _speaks_of(policy: str, buckets: Sequence[str]) -> bool:
    """Whether a policy may hold for one of these buckets: it names one of them, or none at all."""
    named = (
        set(re.findall(r"'((?:[^']|'')*)'::text", policy.split("bucket_id", 1)[1])) if "bucket_id" in policy else set()
    )
    return not named or not buckets or any(bucket.replace("'", "''") in named for bucket in buckets)


def _look_at_rows(url: str, facts: Facts, host: Host) -> Rows:
    table = facts.tables[host.table]
    uploader = next((name for name in UPLOADERS if table.columns.get(name) == "uuid" and name != host.workspace), None)
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        source = f"""(select a.* from {table_name(host.table)} a limit {ROWS}) a
            cross join lateral (select {lateral_code(host)}) f where f.path is not null"""
        run = _runner(connection)
        [(count, buckets)] = run(f"""select count(*),
            (array_agg(distinct f.bucket) filter (where f.bucket is not null))[1:{MOST_BUCKETS + 1}] from {source}""")
        rows = Rows(count, sorted(buckets or []))
        listed = _listed(rows.buckets, facts, host)
        workspace, person = f"a.{quote(host.workspace)}::text", _person(host.members, uploader, host)
        rules = [
            _folder(run, "workspace-folder", f"{{}} = {workspace}", source, listed, None),
            FileRule("workspace-bucket", ()),
        ]
        if person:
            rules += [
                _folder(run, "uploader-folder", person, source, listed, uploader),
                FileRule("owner", listed, uploader=uploader),
            ]
        for rule in rules:
            code = file_code(host, rule)
            [(fits,)] = run(f"select count(*) filter (where {code}) from {source}")
            rows.fits.append(Fit(rule, fits))
    return rows


def _runner(connection: psycopg.Connection[Any]) -> Run:
    return lambda statement: connection.execute(statement.encode()).fetchall()


def _listed(named: Sequence[str], facts: Facts, host: Host) -> tuple[str, ...]:
    """The buckets that a rule allows: those that rows name already, else the project's."""
    # Whoever writes a row chooses what it names, so only what is a bucket counts.
    found = set(named) & set(facts.buckets) or ([host.bucket] if host.bucket else facts.buckets)
    allowed = {*found, *([host.bucket] if host.bucket else [])}
    return tuple(sorted(allowed)) if len(allowed) <= MOST_BUCKETS else ()


def _person(members: Members, uploader: str | None, host: Host) -> str:
    """The condition that a folder ({}) is that of somebody who may put files there; empty: nobody can tell."""
    if members.claim:  # a token says where its own user belongs, and nothing of the user whom a row names
        return ""
    if uploader:
        return f"{{}} = a.{quote(uploader)}::text"
    rows = of_members(members, f"a.{quote(host.workspace)}")
    return f"exists (select {rows} and m.{quote(members.user)}::text = {{}})"


def _folder(
    run: Run, name: str, condition: str, source: str, buckets: tuple[str, ...],
    uploader: str | None,
) -> FileRule:  # fmt: skip
    """The rule of this name with the folder where most rows have it."""
    segment = condition.format("split_part(f.path, '/', d)")
    found = run(f"""
        select d, count(*), min(before), max(before) from (
          select d, array_to_string((string_to_array(f.path, '/'))[1:d - 1], '/') as before
          from {source.replace(" where ", f" cross join generate_series(1, {DEEPEST}) d where ")} and {segment}) x
        group by d order by count(*) desc, d limit 1""")
    if not found:
        return FileRule(name, buckets, uploader=uploader)
    depth, _, first, last = found[0]
    # One that every row has may still be an id: only a word belongs to the rule.
    prefix = f"{first}/" if first == last and re.fullmatch(r"[A-Za-z_-]+(/[A-Za-z_-]+)*", first) else ""
    return FileRule(name, buckets, prefix, depth, uploader)
