"""Looks at a project before autotag is installed: its tables, the rule for its files, its spending limit.

A callback answers questions that the database does not answer, so this works with and without a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg

from autotag.install.adapter import TEMPLATE, record_answers, render
from autotag.install.callers import note_on_tokens, with_caller
from autotag.install.changes import plan_change
from autotag.install.collisions import check_columns
from autotag.install.conditions import check_condition, check_tag_ids, check_tags, check_users
from autotag.install.evidence import users_can_join, writes_unchecked
from autotag.install.facts import Facts, adapter_version, read_facts
from autotag.install.files import find_full_paths, find_rule, users_see_files
from autotag.install.host import Ask, Choices, FileRule, Host, HostError, notes_on_rows, notes_on_tags, propose
from autotag.install.migrations import (
    ONE_AT_A_TIME,
    SPENDING_LIMIT,
    Migration,
    check_free,
    how_to_limit,
    profile_versions,
    spending_limit,
)
from autotag.install.origin import note_on_environment, storage_hosts
from autotag.install.remembered import all_hosts, check_lost, forgotten, told_answers, with_kept_files, with_remembered
from autotag.install.rights import note_on_storage, note_on_updates
from autotag.install.row_readers import check_rows
from autotag.install.written import (
    HOST_ADAPTER,
    Written,
    check_answers,
    edited_functions,
    recorded_answers,
    written_migrations,
)
from autotag.texts import name_some


@dataclass(frozen=True)
class Survey:
    """The facts about a project.

    Attributes:
        facts: what the database shows.
        host: its tables, for the adapter.
        keeps_adapter: the database has an adapter, and no choice changes it.
        notes: notes for a person about the host.
        change: the migration that changes the installed adapter to new answers; None: there is nothing to change.
        waiting: the project's file of an adapter that is not applied yet; it contains the same answers.
    """

    facts: Facts
    host: Host
    keeps_adapter: bool
    notes: tuple[str, ...] = ()
    change: Migration | None = None
    waiting: Written | None = None


def plan_extra(found: Survey) -> list[Migration]:
    """The additional migrations of this project: a change of the adapter, or the continuation of an earlier
    installation."""
    host, facts = found.host, found.facts
    table = facts.tables.get(host.table)
    left = facts.adapter is None and table is not None and host.result in table.columns
    return [*filter(None, [found.change]), *([profile_versions(host)] if left else [])]


def survey(url: str, choices: Choices, ask: Ask, *, may_ask: bool, folder: Path | None = None) -> Survey:
    """Reads a project's database, and asks for the rest.

    Args:
        url: connection URL of the database's owner.
        choices: what the caller decides.
        ask: answers questions.
        may_ask: whether ``ask`` reaches a person. If not, take the strictest file rule that all rows fit.
        folder: the project's migrations, if it has such a folder.

    Raises:
        psycopg.OperationalError: the database cannot be reached.
        HostError: the tables cannot be used, or a question has no answer.
    """
    with psycopg.connect(url, connect_timeout=10) as connection:
        connection.execute(ONE_AT_A_TIME)
        check_free(connection)
    facts = read_facts(url)
    files = written_migrations(folder)
    if HOST_ADAPTER in facts.applied and choices == Choices():
        return _kept(facts, choices, files)
    waiting = files.get(HOST_ADAPTER) if facts.adapter is None else None
    if waiting:  # the file is never overwritten, so its answers count like those of an installed adapter
        facts = replace(facts, answers=recorded_answers(waiting.sql))
    given, remembered, forgotten_options, asked_options = choices, dict[str, Any](), set[str](), set[str]()
    if facts.adapter is not None or waiting:
        remembered = told_answers(facts)
        forgotten_options = forgotten(choices, remembered, facts)
        choices = with_remembered(choices, remembered, forgotten_options)
    noting = _noting(ask, asked_options)
    host = with_caller(url, facts, propose(facts, choices, noting), choices, noting)
    _check_host(url, facts, host)
    if choices.full_paths is None:
        host = replace(host, full_paths=find_full_paths(url, host))
    notes: tuple[str, ...] = ()
    if kept := with_kept_files(host, given, facts):
        host = kept
    else:
        known = replace(facts, file_rule=None) if "file_rule" in forgotten_options else facts
        hosts = all_hosts(
            facts, given, storage_hosts(url, choices.project_url, folder, environment=facts.answers is None)
        )
        host, notes = _find_files(url, known, replace(host, storage_hosts=hosts), choices, noting, may_ask=may_ask)
        host = replace(host, users_see_files=host.names_files and users_see_files(facts, host.files))
    if facts.adapter is not None:
        check_lost(host, remembered, forgotten_options, asked_options, facts)
    else:
        notes += _notes_on_table(url, host)
    notes += _notes(facts, host)
    if waiting and facts.answers:
        check_answers(waiting, facts.answers, record_answers(host))
        notes += _notes_on_edits(waiting, facts.answers)
    change = plan_change(url, facts, host, folder) if facts.adapter is not None else None
    return Survey(facts, host, False, notes, change, waiting)


def _notes_on_table(url: str, host: Host) -> tuple[str, ...]:
    """Notes for a person about the columns that the table of images will get.

    Raises:
        HostError: the table already has such columns, or updates fail once it has more columns.
    """
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        with connection.transaction():
            connection.execute(ONE_AT_A_TIME)
            if adapter_version(connection) is not None:  # another session has just applied the adapter
                return ()
            notes = check_columns(connection, host.table)
        return (*notes, *check_rows(connection, host, render(TEMPLATE.read_text("utf-8"), host)))


def _noting(ask: Ask, asked_options: set[str]) -> Ask:
    """The same, and adds each option that it asks for to ``asked_options``."""

    def noting(option: str, question: str, answers: Sequence[str]) -> str:
        asked_options.add(option)
        return ask(option, question, answers)

    return noting


def _notes(facts: Facts, host: Host) -> tuple[str, ...]:
    """Notes for a person about a host."""
    notes = (
        *notes_on_rows(facts.tables[host.table], host), *notes_on_tags(facts, host), *_notes_on_trust(facts, host),
        *note_on_updates(facts, host), *note_on_tokens(facts, host), *note_on_storage(facts, host),
        *note_on_environment(facts.answers),
    )  # fmt: skip
    if facts.adapter is None or HOST_ADAPTER in facts.applied:
        return notes
    return (
        *notes,
        "The database has autotag's adapter, but not in its migration history (supabase_migrations). After you have"
        " compared the files with it, mark them: supabase migration repair --status applied <versions>.",
    )


def _kept(facts: Facts, choices: Choices, files: Mapping[str, Written]) -> Survey:
    """The survey of a project whose adapter stays as it is, so no answer matters. The buckets of its file rule are
    unknown here: only the adapter has them."""
    try:
        host = propose(facts, choices, _first_answer)
    except HostError:
        host = Host()
    notes = [*note_on_environment(facts.answers)]
    notes += [
        f"{file.path.name} is not applied yet: supabase db push or autotag migrate applies it."
        for name, file in files.items()
        if name not in facts.applied
    ]
    rule = FileRule(facts.file_rule or "none", ())
    return Survey(facts, replace(host, files=rule), keeps_adapter=True, notes=tuple(notes))


def _check_host(url: str, facts: Facts, host: Host) -> None:
    """Refuses conditions that Postgres does not accept, and tables or rows that autotag cannot use."""
    images = facts.tables[host.table]
    if images.rules:  # Postgres cannot apply the rule to autotag's updates, so no tags would be stored
        raise HostError(
            f"{host.table} has a rule on update ({images.rules[0]}), so no tags can be stored there. "
            f'Use a trigger instead, and: drop rule "{images.rules[0]}" on {host.table};'
        )
    if host.where:
        check_condition(url, host.table, "a", host.where, "--where")
    if host.members.where:
        check_condition(url, host.members.table, "m", host.members.where, "--members-where")
    members = host.members
    if not host.caller and members.user_type != "uuid" and (members.table or members.owner):
        check_users(url, *((host.table, host.workspace) if members.owner else (members.table, members.user)))
    if host.tags in images.columns and facts.adapter is None:
        if host.tags_type in ("json", "jsonb"):
            check_tags(url, host.table, host.tags, images.defaults.get(host.tags))
        check_tag_ids(url, host.table, host.tags)


def _notes_on_edits(file: Written, answers: Mapping[str, Any]) -> tuple[str, ...]:
    edited = edited_functions(file.sql, answers)
    if not edited:
        return ()
    return (f"The project has changed {name_some(edited)} in {file.path.name}; the examples show what that answers.",)


def _find_files(
    url: str, facts: Facts, host: Host, choices: Choices, ask: Ask, *, may_ask: bool
) -> tuple[Host, tuple[str, ...]]:
    """Adds the file rule to the host. URLs of its Storage count as files if a rule fits them; otherwise they stay
    URLs."""
    wanted = choices.file_rule or facts.file_rule
    if host.storage_hosts and not choices.file_rule:
        try:
            return replace(host, files=find_rule(url, facts, host, wanted, refuse_to_ask, may_ask=False)), ()
        except HostError:
            plain = replace(host, storage_hosts=())
            note = (
                f"No rule fits the files of {', '.join(host.storage_hosts)} that rows name by URL, so these URLs are"
                " fetched like others (AUTOTAG_IMAGE_HOSTS). Set --file-rule to read them through Storage."
            )
            rule = find_rule(url, facts, plain, wanted, ask, may_ask=may_ask)
            return replace(plain, files=rule), (note,) if host.url or choices.project_url else ()
    return replace(host, files=find_rule(url, facts, host, wanted, ask, may_ask=may_ask)), ()


def _notes_on_trust(facts: Facts, host: Host) -> list[str]:
    """Warnings about answers that trust rows which users may write themselves."""
    notes, members, rule = [], host.members, host.files
    if members.table in facts.tables:
        how = users_can_join(facts.tables[members.table], (members.workspace, members.user))
        notes += [f"Attention: {members.table} {how}: whoever does may tag the images of any workspace."] if how else []
    if rule.uploader and rule.uploader != host.workspace and writes_unchecked(facts.tables[host.table], rule.uploader):
        notes.append(
            f"Attention: users may write any user into {host.table}.{rule.uploader}, which says whose a file is (rule"
            f" {rule.name}): they get the tags of a colleague's files. Let a policy check {rule.uploader} = (select"
            " auth.uid()) for insert and update."
        )
    if rule.name in ("workspace-folder", "uploader-folder") and rule.depth > 1 and not rule.prefix:
        notes.append(
            f"Paths have different folders in front of the one that the rule {rule.name} looks at, so it accepts any:"
            " a row may name the folder of its own below each of them."
        )
    return notes


def _first_answer(_option: str, _question: str, answers: Sequence[str]) -> str:
    return answers[0] if answers else "unknown"


class _NoAnswer(HostError):
    """A question cannot be answered, because it depends on a missing answer."""


def survey_alone(url: str, choices: Choices, folder: Path | None = None) -> Survey:
    """Surveys a project (`survey`) without a person.

    Raises:
        HostError: as in `survey`. The message has every question that does not depend on another answer.
    """
    missing: list[str] = []

    def assume(option: str, question: str, answers: Sequence[str]) -> str:
        depends = option not in _ALONE
        if not (depends and missing):
            missing.append(_refusal(option, question, answers))
        if option != "--members-claim" and (not answers or (depends and len(missing) == 1)):
            raise _NoAnswer
        return next(iter(answers), "unknown")  # only to find the other missing answers

    try:
        found = survey(url, choices, assume, may_ask=False, folder=folder)
    except HostError as error:
        if not missing:
            raise
        about_assumed = isinstance(error, _NoAnswer) or "--members" in str(error)
        other = [] if about_assumed else [str(error)]
        raise HostError(" ".join([*missing, *other])) from None
    if missing:
        raise HostError(" ".join(missing))
    return found


#: Options on which no other question of `propose` depends.
_ALONE = ("--bucket", "--members-table", "--members-function", "--members-claim", "--where")


def refuse_to_ask(option: str, question: str, answers: Sequence[str]) -> str:
    """Refuses every question, because no person can be asked.

    Raises:
        HostError: always; it names the option that answers the question.
    """
    raise HostError(_refusal(option, question, answers))


def _refusal(option: str, question: str, answers: Sequence[str]) -> str:
    choice = f" (one of {name_some(answers)})" if answers else ""
    return f"{question} Set {option}{choice}."


def plan_spending_limit(
    wanted: float | None, facts: Facts, folder: Path | None, ask: Callable[[], float] | None
) -> list[Migration]:
    """The migration that limits what each workspace may spend; empty if a limit exists, or if none is wanted.

    Args:
        wanted: dollars a month; 0: no limit; None: not decided.
        facts: of the project.
        folder: the project's migrations, if it has such a folder.
        ask: asks a person for ``wanted`` at the first installation; None: no person can be asked.

    Raises:
        HostError: the answer is negative, or the database or a file has another limit.
    """
    there = written_migrations(folder).get(SPENDING_LIMIT)
    if SPENDING_LIMIT in facts.applied or facts.spending_limits:
        present = next(iter(facts.spending_limits), None)
        if wanted is not None and (present != round(wanted, 2) if wanted else present is not None):
            raise HostError(how_to_limit(wanted, facts.spending_limits))
        return []
    if there:
        if wanted is not None and there.sql != spending_limit(wanted).sql:
            raise HostError(
                f"{there.path.name} is not applied yet and has another limit; edit that file, or delete it and"
                " run this again."
            )
        return []
    if wanted is None and ask and facts.adapter is None:
        wanted = ask()
        if wanted < 0:
            raise HostError("A spending limit is a number of dollars; 0 means no limit.")
    return [spending_limit(wanted)] if wanted else []
