"""What an installed adapter remembers of the answers of `init`, and what of it still holds beside new answers.

An answer holds as long as those that it is about: a condition on members is about their table. So where an answer
changes, those about it are forgotten and found again as at the first installation. Where that finds something else than
what was told, and what was told is still possible, nothing is guessed: it has to be named again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from autotag.install.adapter import record_answers
from autotag.install.answers import EVERY_ROW, OWN_LOGINS, Choices, HostError
from autotag.install.facts import Facts
from autotag.install.host import FileRule, Host
from autotag.install.members import plain_name
from autotag.install.origin import host_of
from autotag.texts import name_some

#: Answers of which one replaces the others.
EXCLUSIVE = (
    ("members_table", "members_claim", "members_function", "owner"),
    ("path", "object"),
    ("workspace", "owner"),
)
_WORKSPACE = ("table", "workspace", "owner")
_PLACE = ("table", "path", "object")
_MEMBERS = ("members_table", "members_claim", "members_function", "owner")
#: Answer -> the answers that it is about.
ABOUT: dict[str, tuple[str, ...]] = {
    "table": (), "editors": (), "project_url": (),
    **dict.fromkeys(("id", "workspace", "owner", "path", "object", "url", "tags", "where"), ("table",)),
    "bucket": _PLACE, "full_paths": _PLACE, "file_rule": (*_WORKSPACE, "path", "object"),
    **dict.fromkeys(("members_table", "members_claim", "members_function"), _WORKSPACE),
    "members_workspace": ("members_table", *_WORKSPACE), "members_user": ("members_table", "caller_claim"),
    "members_where": ("members_table",), "claim_form": ("members_claim", *_WORKSPACE),
    "caller_claim": _MEMBERS,
}  # fmt: skip
#: Answer -> the option that names it, for those that must not become another one without a word.
OPTIONS = {
    "id": "--id-column", "workspace": "--workspace-column", "owner": "--owner-column", "path": "--path-column",
    "object": "--object-column", "url": "--url-column", "tags": "--tags-column", "bucket": "--bucket",
    "where": "--where", "members_table": "--members-table", "members_claim": "--members-claim",
    "members_function": "--members-function", "members_workspace": "--members-workspace-column",
    "members_user": "--members-user-column", "members_where": "--members-where", "file_rule": "--file-rule",
}  # fmt: skip
#: Choices by which the rows are looked at again to find the file rule.
_LOOKS_AT_FILES = ("file_rule", "bucket", "path", "object", "url", "full_paths", "workspace", "owner")
#: Answers with which the file rule was found; it says nothing about others.
_FILES_OF = ("table", "workspace", "owner", "path", "object")


def told_answers(facts: Facts) -> dict[str, Any]:
    """The answers that the installed adapter records, by their names in `Choices`.

    Raises:
        HostError: it does not say what it was told.
    """
    if facts.answers is None:
        raise HostError(
            "The adapter does not record its answers (autotag.adapter_answers), so init cannot change them; edit its"
            " functions in a migration of your own."
        )
    known = {one.name for one in fields(Choices)}
    told = {name: value for name, value in facts.answers["choices"].items() if name in known}
    rule = facts.answers["files"]["name"]
    return told if rule == "none" else {**told, "file_rule": rule}


def forgotten(choices: Choices, told: Mapping[str, Any], facts: Facts) -> set[str]:
    """The answers that no longer hold, because a choice changes one that they are about."""
    chosen = _chosen(choices)
    changed = {name for name, value in chosen.items() if _same_form(name, value, facts) != told.get(name)}
    replaced = _replaced(chosen) & set(told)
    lost: set[str] = set()
    while True:
        gone = changed | replaced | lost
        more = {
            name for name, about in ABOUT.items()
            if name in told and name not in chosen and name not in gone and gone.intersection(about)
            # a claim that was named is that of the project's logins, whoever its members are
            and (name != "caller_claim" or told[name] == OWN_LOGINS)
        }  # fmt: skip
        if not more:
            return lost
        lost |= more


def with_remembered(choices: Choices, told: Mapping[str, Any], lost: Collection[str]) -> Choices:
    """The choices, with what the installed adapter was told where nothing else is chosen now."""
    chosen = _chosen(choices)
    # a rule for files is more than its name (`with_kept_files`)
    gone = {*lost, *_replaced(chosen), *chosen, "file_rule"}
    return replace(choices, **{name: value for name, value in told.items() if name not in gone})


def _chosen(choices: Choices) -> dict[str, Any]:
    return {name: value for name, value in asdict(choices).items() if value is not None}


def _replaced(chosen: Collection[str]) -> set[str]:
    """The answers that others replace which are chosen now."""
    return {name for group in EXCLUSIVE if any(one in chosen for one in group) for name in group if name not in chosen}


def _same_form(name: str, value: Any, facts: Facts) -> Any:
    """A choice as the adapter records it."""
    if name in ("table", "members_table"):
        return facts.name_of(value)
    return plain_name(value.partition("(")[0]) if name == "members_function" else value


def check_lost(
    host: Host, told: Mapping[str, Any], lost: Collection[str], asked: Collection[str], facts: Facts
) -> None:
    """Refuses that a forgotten answer becomes another one without a word.

    Args:
        host: as it was found by the new answers.
        told: what the adapter records.
        lost: the answers that are forgotten.
        asked: the options that a person was asked for just now.
        facts: of the project.

    Raises:
        HostError: there is one.
    """
    now = {**record_answers(host)["choices"], "file_rule": host.files.name}
    other = [
        name for name in OPTIONS
        if name in lost and OPTIONS[name] not in asked and now.get(name) != told[name]
        and _is_possible(name, told[name], host, facts)
    ]  # fmt: skip
    if other:
        before = name_some([f"{OPTIONS[name]} {told[name]}" for name in other], len(other))
        raise HostError(
            f"The adapter was told {before}, and beside the new answers this may no longer hold; nothing was written."
            f" Set {name_some([OPTIONS[name] for name in other], len(other))}, to the same or to another value."
        )


def _is_possible(name: str, value: str, host: Host, facts: Facts) -> bool:
    """Whether what was told could still be meant."""
    members = facts.tables.get(host.members.table) or facts.views.get(host.members.table)
    if name in ("where", "members_where"):
        return value != EVERY_ROW and (name == "where" or members is not None)
    if name in ("members_workspace", "members_user"):
        return members is not None and value in members.columns
    if name == "members_table":
        return value in facts.tables or value in facts.views
    if name == "bucket":
        return bool(host.path) and value in facts.buckets
    if name == "file_rule":
        return host.names_files
    return name in ("members_claim", "members_function") or value in facts.tables[host.table].columns


def with_kept_files(host: Host, chosen: Choices, facts: Facts) -> Host | None:
    """The host with the file rule of the installed adapter; None: a choice is about files, so the rule is found again.

    Users write the rows that a rule is found by, so another answer must not look at them again.
    """
    told = facts.answers
    if told is None or any(getattr(chosen, name) is not None for name in _LOOKS_AT_FILES):
        return None
    now, before = record_answers(host)["choices"], told["choices"]
    rule = FileRule(**{**told["files"], "buckets": tuple(told["files"]["buckets"])})
    about = [*_FILES_OF, *(["caller_claim"] if rule.uploader else [])]
    kept = replace(host, files=rule, storage_hosts=all_hosts(facts, chosen), users_see_files=told["users_see_files"])
    if any(now.get(name) != before.get(name) for name in about) or (kept.names_files and rule.name == "none"):
        return None
    return kept


def all_hosts(facts: Facts, chosen: Choices, found: Collection[str] = ()) -> tuple[str, ...]:
    """The hosts of Storage that the adapter knows, with what is named or found now. None is ever taken away."""
    told = facts.answers["storage_hosts"] if facts.answers else ()
    named = [host_of(chosen.project_url)] if chosen.project_url else []
    return tuple(dict.fromkeys((*told, *named, *found)))
