"""The answers of `init` that an installed adapter remembers, and which of them are still valid with new answers.

Some answers depend on others: a condition on members depends on their table. If an answer changes, those that depend on
it are forgotten and found again, as at the first installation. If that finds something else than the old answer, and
the old answer is still possible, nothing is guessed: the person has to name the option again.
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

#: Groups of answers that exclude each other: a new one replaces the others.
EXCLUSIVE = (
    ("members_table", "members_claim", "members_function", "owner"),
    ("path", "object"),
    ("workspace", "owner"),
)
_WORKSPACE = ("table", "workspace", "owner")
_PLACE = ("table", "path", "object")
_MEMBERS = ("members_table", "members_claim", "members_function", "owner")
#: Answer -> the answers that it depends on.
ABOUT: dict[str, tuple[str, ...]] = {
    "table": (), "editors": (), "project_url": (),
    **dict.fromkeys(("id", "workspace", "owner", "path", "object", "url", "tags", "where"), ("table",)),
    "bucket": _PLACE, "full_paths": _PLACE, "file_rule": (*_WORKSPACE, "path", "object"),
    **dict.fromkeys(("members_table", "members_claim", "members_function"), _WORKSPACE),
    "members_workspace": ("members_table", *_WORKSPACE), "members_user": ("members_table", "caller_claim"),
    "members_where": ("members_table",), "claim_form": ("members_claim", *_WORKSPACE),
    "caller_claim": _MEMBERS,
}  # fmt: skip
#: Answer -> its option, for answers that must not change silently.
OPTIONS = {
    "id": "--id-column", "workspace": "--workspace-column", "owner": "--owner-column", "path": "--path-column",
    "object": "--object-column", "url": "--url-column", "tags": "--tags-column", "bucket": "--bucket",
    "where": "--where", "members_table": "--members-table", "members_claim": "--members-claim",
    "members_function": "--members-function", "members_workspace": "--members-workspace-column",
    "members_user": "--members-user-column", "members_where": "--members-where", "file_rule": "--file-rule",
}  # fmt: skip
#: Choices that make `init` look at the rows again to find the file rule.
_LOOKS_AT_FILES = ("file_rule", "bucket", "path", "object", "url", "full_paths", "workspace", "owner")
#: Answers that the file rule depends on.
_FILES_OF = ("table", "workspace", "owner", "path", "object")


def told_answers(facts: Facts) -> dict[str, Any]:
    """The answers that the installed adapter records, by their names in `Choices`.

    Raises:
        HostError: it records no answers.
    """
    if facts.answers is None:
        raise HostError(
            "The adapter does not record its answers (autotag.adapter_answers), so init cannot change them; edit its"
            " functions in a migration of your own."
        )
    known = {one.name for one in fields(Choices)}
    recorded = {name: value for name, value in facts.answers["choices"].items() if name in known}
    rule = facts.answers["files"]["name"]
    return recorded if rule == "none" else {**recorded, "file_rule": rule}


def forgotten(choices: Choices, recorded: Mapping[str, Any], facts: Facts) -> set[str]:
    """The answers that are no longer valid, because a choice changes an answer that they depend on."""
    chosen = _chosen(choices)
    changed = {name for name, value in chosen.items() if _same_form(name, value, facts) != recorded.get(name)}
    replaced = _replaced(chosen) & set(recorded)
    lost: set[str] = set()
    while True:
        gone = changed | replaced | lost
        more = {
            name for name, about in ABOUT.items()
            if name in recorded and name not in chosen and name not in gone and gone.intersection(about)
            # a claim that a person has named depends on the project's logins, not on its members
            and (name != "caller_claim" or recorded[name] == OWN_LOGINS)
        }  # fmt: skip
        if not more:
            return lost
        lost |= more


def with_remembered(choices: Choices, recorded: Mapping[str, Any], lost: Collection[str]) -> Choices:
    """The choices, completed with the remembered answers for everything that is not chosen now."""
    chosen = _chosen(choices)
    # a file rule is more than its name (`with_kept_files`)
    gone = {*lost, *_replaced(chosen), *chosen, "file_rule"}
    return replace(choices, **{name: value for name, value in recorded.items() if name not in gone})


def _chosen(choices: Choices) -> dict[str, Any]:
    return {name: value for name, value in asdict(choices).items() if value is not None}


def _replaced(chosen: Collection[str]) -> set[str]:
    """The answers that are replaced by the new choices."""
    return {name for group in EXCLUSIVE if any(one in chosen for one in group) for name in group if name not in chosen}


def _same_form(name: str, value: Any, facts: Facts) -> Any:
    """A choice in the form that the adapter records."""
    if name in ("table", "members_table"):
        return facts.name_of(value)
    return plain_name(value.partition("(")[0]) if name == "members_function" else value


def check_lost(
    host: Host, recorded: Mapping[str, Any], lost: Collection[str], asked: Collection[str], facts: Facts
) -> None:
    """Refuses to change a forgotten answer silently.

    Args:
        host: the tables according to the new answers.
        recorded: the answers that the adapter records.
        lost: the answers that are forgotten.
        asked: the options that a person has just been asked for.
        facts: of the project.

    Raises:
        HostError: there is one.
    """
    now = {**record_answers(host)["choices"], "file_rule": host.files.name}
    other = [
        name for name in OPTIONS
        if name in lost and OPTIONS[name] not in asked and now.get(name) != recorded[name]
        and _is_possible(name, recorded[name], host, facts)
    ]  # fmt: skip
    if other:
        before = name_some([f"{OPTIONS[name]} {recorded[name]}" for name in other], len(other))
        raise HostError(
            f"The adapter was told {before}, and beside the new answers this may no longer hold; nothing was written."
            f" Set {name_some([OPTIONS[name] for name in other], len(other))}, to the same or to another value."
        )


def _is_possible(name: str, value: str, host: Host, facts: Facts) -> bool:
    """Whether an old answer is still possible."""
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
    """The host with the file rule of the installed adapter; None: a choice is about files, so the rule must be found
    again.

    Otherwise it is not found again, because users write the rows from which it is derived.
    """
    recorded = facts.answers
    if recorded is None or any(getattr(chosen, name) is not None for name in _LOOKS_AT_FILES):
        return None
    now, before = record_answers(host)["choices"], recorded["choices"]
    rule = FileRule(**{**recorded["files"], "buckets": tuple(recorded["files"]["buckets"])})
    about = [*_FILES_OF, *(["caller_claim"] if rule.uploader else [])]
    kept = replace(
        host, files=rule, storage_hosts=all_hosts(facts, chosen), users_see_files=recorded["users_see_files"]
    )
    if any(now.get(name) != before.get(name) for name in about) or (kept.names_files and rule.name == "none"):
        return None
    return kept


def all_hosts(facts: Facts, chosen: Choices, found: Collection[str] = ()) -> tuple[str, ...]:
    """The hosts of Storage that the adapter knows, and those that are named or found now. No host is ever removed."""
    recorded = facts.answers["storage_hosts"] if facts.answers else ()
    named = [host_of(chosen.project_url)] if chosen.project_url else []
    return tuple(dict.fromkeys((*recorded, *named, *found)))
