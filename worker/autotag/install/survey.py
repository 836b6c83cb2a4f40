"""Looks at a project before autotag is installed: its tables, the rule for its files, its spending limit.

A callback answers what the database does not show, so that this works with and without a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autotag.install.conditions import check_condition, check_users
from autotag.install.facts import Facts, read_facts
from autotag.install.files import find_full_paths, find_rule, users_see_files
from autotag.install.host import Ask, Choices, FileRule, Host, HostError, propose
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
    """

    facts: Facts
    host: Host
    keeps_adapter: bool
    notes: tuple[str, ...] = ()


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
    host = propose(facts, choices, ask)
    _check_rules(facts, host)
    if host.where:
        check_condition(url, host.table, "a", host.where, "--where")
    if host.members.where:
        check_condition(url, host.members.table, "m", host.members.where, "--members-where")
    if host.members.table and not host.caller and host.members.user_type != "uuid":
        check_users(url, host.members.table, host.members.user)
    if choices.full_paths is None:
        host = replace(host, full_paths=find_full_paths(url, host))
    hosts = storage_hosts(url, choices.project_url, folder)
    host, notes = _find_files(url, facts, replace(host, storage_hosts=hosts), choices, ask, may_ask=may_ask)
    visible = host.names_files and users_see_files(facts, host.files)
    return Survey(facts, replace(host, users_see_files=visible), False, notes)


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
