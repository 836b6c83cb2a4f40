"""An adapter remembers answers. An answer is forgotten when what it is about changes: another table loses the
condition."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from autotag.cli.options import CHOICES
from autotag.install.answers import Choices, HostError
from autotag.install.facts import Facts, Table
from autotag.install.host import Host
from autotag.install.members import Members
from autotag.install.remembered import ABOUT, check_lost, forgotten, with_remembered

FACTS = Facts(
    {name: Table(name, {"team": "uuid", "person": "uuid"}) for name in ("public.crew", "public.staff")}, ["a"]
)
IMAGES = {
    "table": "public.assets", "id": "id", "url": "image_url", "bucket": "a", "full_paths": False, "tags": "tags",
    "where": "deleted_at is null", "editors": "none", "caller_claim": "auth.uid()", "file_rule": "any",
}  # fmt: skip
TABLE = {
    "members_table": "public.crew",
    "members_workspace": "team",
    "members_user": "person",
    "members_where": "active",
}
CLAIM = {"members_claim": "orgs", "claim_form": "list"}
FUNCTION = {"members_function": "private.is_member"}
EVERY = {**IMAGES, "workspace": "org_id", "path": "storage_path"}
#: What an adapter was told, in each way to say who its members are.
TOLD = [
    {**EVERY, **TABLE}, {**EVERY, **CLAIM}, {**EVERY, **FUNCTION}, {**IMAGES, "owner": "user_id", "path": "storage_path"},
    {**IMAGES, **TABLE, "workspace": "org_id", "object": "object_id"},
]  # fmt: skip
ABOUT_MEMBERS = {*TABLE, *CLAIM, *FUNCTION, "owner", "caller_claim"}
ABOUT_ROWS = {"id", "workspace", "owner", "path", "object", "url", "bucket", "full_paths", "tags", "where", "file_rule"}
#: The answer that changes -> those that must not stay as they are.
FORGETS: dict[str, set[str]] = {
    "table": ABOUT_ROWS | ABOUT_MEMBERS, "workspace": ABOUT_MEMBERS | {"file_rule"},
    "owner": ABOUT_MEMBERS | {"workspace", "file_rule"}, "path": {"object", "bucket", "full_paths", "file_rule"},
    "object": {"path", "bucket", "full_paths", "file_rule"}, "members_table": ABOUT_MEMBERS | {"file_rule"},
    "members_claim": ABOUT_MEMBERS | {"file_rule"}, "members_function": ABOUT_MEMBERS | {"file_rule"},
    "caller_claim": {"members_user"},
    **{name: set() for name in ("id", "bucket", "url", "tags", "file_rule", "editors", "members_workspace", "members_user",
                                "members_where", "where", "full_paths", "project_url")},
}  # fmt: skip


def test_every_answer_says_what_it_is_about() -> None:
    assert {one.name for one in fields(Choices)} == set(ABOUT)
    assert set(FORGETS) == set(CHOICES)


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("changed", FORGETS)
def test_no_answer_outlives_what_it_is_about(told: dict[str, Any], changed: str) -> None:
    """Checks each pair of a changed answer and a remembered answer."""
    value = not told["full_paths"] if changed == "full_paths" else "public.staff"
    choices = Choices(**{changed: value})
    kept = with_remembered(choices, told, forgotten(choices, told, FACTS))
    for name, before in told.items():
        now = getattr(kept, name)
        if name == changed:
            assert now == value
        elif name in FORGETS[changed] and (
            name != "file_rule" or changed in ("table", "workspace", "owner", "path", "object")
        ):
            assert now is None, f"{name} goes along to another {changed}"
        elif name != "file_rule":  # its details are with the adapter
            assert now == before, f"{name} is forgotten with another {changed}"


@pytest.mark.parametrize("told", TOLD)
def test_an_answer_that_is_given_again_forgets_nothing(told: dict[str, Any]) -> None:
    """The same name may be written with or without its schema."""
    facts = replace(FACTS, tables={**FACTS.tables, "public.assets": Table("public.assets", {})})
    for name, value in told.items():
        if name != "claim_form":
            again = value.removeprefix("public.") if name in ("table", "members_table") else value
            assert forgotten(Choices(**{name: again}), told, facts) == set()


def test_the_logins_that_were_named_stay_those_of_the_project() -> None:
    told = {**EVERY, **TABLE, "caller_claim": "sub"}
    assert "caller_claim" not in forgotten(Choices(members_table="staff"), told, FACTS)


@pytest.mark.parametrize(("name", "told", "option"), [
    ("members_where", "active", "--members-where"), ("members_user", "person", "--members-user-column"),
    ("members_claim", "orgs", "--members-claim"), ("file_rule", "any", "--file-rule"), ("bucket", "a", "--bucket"),
    ("members_table", "public.crew", "--members-table"), ("where", "published", "--where"),
])  # fmt: skip
def test_what_is_forgotten_does_not_become_another_answer_without_a_word(name: str, told: str, option: str) -> None:
    images = Table("public.assets", {"id": "uuid", "workspace_id": "uuid"})
    facts = replace(FACTS, tables={**FACTS.tables, "public.assets": images})
    host = replace(Host(), members=Members("public.staff", "team", "user_id"))
    with pytest.raises(HostError, match=f"told {option} {told}"):
        check_lost(host, {name: told}, {name}, set(), facts)
    check_lost(host, {name: told}, {name}, {option}, facts)  # a person has just said it
    check_lost(host, {name: told}, set(), set(), facts)
    gone = {
        "members_where": "true",
        "where": "true",
        "members_user": "uid",
        "bucket": "b",
        "members_table": "public.gone",
    }
    if name in gone:  # there is nothing that it could still mean
        check_lost(host, {name: gone[name]}, {name}, set(), facts)
