"""Looks at a project before autotag is installed: its tables, the rule for its files, its spending limit.

A callback answers what the database does not show, so that this works with and without a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autotag.install.changes import plan_change, with_kept_files, with_remembered
from autotag.install.conditions import check_condition, check_tags, check_users
from autotag.install.evidence import users_join, writes_unchecked
from autotag.install.facts import Facts, read_facts
from autotag.install.files import find_full_paths, find_rule, users_see_files
from autotag.install.host import Ask, Choices, FileRule, Host, HostError, notes_on_rows, notes_on_tags, propose
from autotag.install.migrations import HOST_ADAPTER, SPENDING_LIMIT, Migration, spending_limit
from autotag.install.origin import storage_hosts
from autotag.texts import name_some


@dataclass(frozen=True)
class Survey:
    """What is known of a project.

    Attributes:
        facts: what the database shows.
        host: the tables, as the adapter is to know them.
        keeps_adapter: the database has an adapter, and no choice asks for a different one.
        notes: what a person should know about the host.
        change: the migration that changes the installed adapter to new answers; None: there is nothing to change.
    """

    facts: Facts
    host: Host
    keeps_adapter: bool
    notes: tuple[str, ...] = ()
    change: Migration | None = None


def survey(url: str, choices: Choices, ask: Ask, *, may_ask: bool, folder: Path | None = None) -> Survey:
    """Reads a project's database, and asks what it does not show.

    Args:
        url: connection URL of the database's owner.
        choices: what the caller decides.
        ask: answers questions.
        may_ask: whether ``ask`` reaches a person. Without one the strictest file rule that fits all rows is taken.
        folder: the project's migrations, if it has such a folder.

    Raises:
        psycopg.OperationalError: the database cannot be reached.
        HostError: the tables cannot be used, or a question has no answer.
    """
    facts = read_facts(url)
    if HOST_ADAPTER in facts.applied and replace(choices, project_url=None) == Choices():
        # The adapter is not written again, so no answer matters. It alone knows the buckets of its rule.
        try:
            host = propose(facts, choices, _first_answer)
        except HostError:
            host = Host()
        return Survey(facts, replace(host, files=FileRule(facts.file_rule or "none", ())), keeps_adapter=True)
    chosen = choices
    if facts.adapter is not None:
        choices = with_remembered(choices, facts)
    host = propose(facts, choices, ask)
    _check_rules(facts, host)
    if host.where:
        check_condition(url, host.table, "a", host.where, "--where")
    if host.members.where:
        check_condition(url, host.members.table, "m", host.members.where, "--members-where")
    if host.members.table and not host.caller and host.members.user_type != "uuid":
        check_users(url, host.members.table, host.members.user)
    images = facts.tables[host.table]
    if host.tags_type in ("json", "jsonb") and host.tags in images.columns and facts.adapter is None:
        check_tags(url, host.table, host.tags, images.defaults.get(host.tags))
    if choices.full_paths is None:
        host = replace(host, full_paths=find_full_paths(url, host))
    notes: tuple[str, ...] = ()
    if kept := with_kept_files(host, chosen, facts):
        host = kept
    else:
        hosts = storage_hosts(url, choices.project_url, folder)
        host, notes = _find_files(url, facts, replace(host, storage_hosts=hosts), choices, ask, may_ask=may_ask)
        host = replace(host, users_see_files=host.names_files and users_see_files(facts, host.files))
    notes += (*notes_on_rows(images, host), *notes_on_tags(facts, host), *_notes_on_trust(facts, host))
    change = plan_change(url, facts, host, folder) if facts.adapter is not None else None
    return Survey(facts, host, False, notes, change)


def _find_files(
    url: str, facts: Facts, host: Host, choices: Choices, ask: Ask, *, may_ask: bool
) -> tuple[Host, tuple[str, ...]]:
    """The host with its file rule. URLs of its Storage are files where a rule fits them; otherwise they stay URLs."""
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
            return replace(plain, files=rule), (note,) if host.url else ()
    return replace(host, files=find_rule(url, facts, host, wanted, ask, may_ask=may_ask)), ()


def _notes_on_trust(facts: Facts, host: Host) -> list[str]:
    """What in the answers rests on rows that users may write themselves."""
    notes, members, rule = [], host.members, host.files
    if members.table in facts.tables:
        how = users_join(facts.tables[members.table], (members.workspace, members.user))
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


def _check_rules(facts: Facts, host: Host) -> None:
    """Refuses a table with a rule on update: Postgres cannot apply it to autotag's updates, so no tags are stored."""
    rules = facts.tables[host.table].rules
    if rules:
        raise HostError(
            f"{host.table} has a rule on update ({rules[0]}), so no tags can be stored there. "
            f'Use a trigger instead, and: drop rule "{rules[0]}" on {host.table};'
        )


def _first_answer(_option: str, _question: str, answers: Sequence[str]) -> str:
    return answers[0] if answers else "unknown"


def refuse_to_ask(option: str, question: str, answers: Sequence[str]) -> str:
    """Answers no question, because no person is there.

    Raises:
        HostError: always; it names the option that answers the question.
    """
    choice = f" (one of {name_some(answers)})" if answers else ""
    raise HostError(f"{question} Set {option}{choice}.")


def plan_spending_limit(
    wanted: float | None, facts: Facts, folder: Path | None, ask: Callable[[], float] | None
) -> list[Migration]:
    """The migration that limits what each workspace may spend; none where one exists, or no limit is wanted.

    Args:
        wanted: dollars a month; 0: no limit; None: not decided.
        facts: of the project.
        folder: the project's migrations, if it has such a folder.
        ask: asks a person for ``wanted`` at the first installation; None: no person is there.

    Raises:
        HostError: the answer is negative.
    """
    if SPENDING_LIMIT in facts.applied or (folder and list(folder.glob(f"*_autotag_{SPENDING_LIMIT}.sql"))):
        return []
    if wanted is None and ask and facts.adapter is None:
        wanted = ask()
        if wanted < 0:
            raise HostError("A spending limit is a number of dollars; 0 means no limit.")
    return [spending_limit(wanted)] if wanted else []
