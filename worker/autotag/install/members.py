"""Finds who may act for a workspace.

A wrong guess would grant a permission. So without a person's answer, only two things count as certain. One is a table
whose key is exactly the workspace and the user, and in which every row must be a current member (`evidence`). The other
is a claim of the token, if all policies of the table of images compare only this claim with the workspace. In all other
cases, a person is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autotag.install.answers import EVERY_ROW, OWN_LOGINS, Ask, Choices, HostError
from autotag.install.conditions import check_form
from autotag.install.evidence import (
    WORKSPACE,
    claim_in,
    describe_functions,
    doubts_about,
    is_user,
    read_as,
    snake,
    sounds_like_members,
    states,
)
from autotag.install.facts import Facts, Table
from autotag.install.keys import KEY_TYPES, key_columns
from autotag.install.quoting import quote, table_name
from autotag.texts import name_some

USERS = ("user_id", "member_id", "profile_id", "auth_user_id")
#: A caller's id is cast to the type of the column. Not every integer is a smallint.
KEYS = tuple(kind for kind in KEY_TYPES if kind != "smallint")


@dataclass(frozen=True)
class Members:
    """Who belongs to a workspace: exactly one of these.

    Attributes:
        table, workspace, user: a table and its columns with the keys; a row is a membership.
        user_type: the type of the column with the user.
        where: a condition on the rows ``m`` of the table; None: every row is a membership.
        claim: the path of a claim of the JWT: a string, an array of strings, or an object whose keys are workspaces.
        claim_form: the form in which the policies of the images read the claim (``text``, ``list`` or ``keys``); empty:
            they do not read it, so any form counts.
        function: a function of the project that takes a workspace and returns whether the caller is a member.
        owner: each user has a workspace of their own.
    """

    table: str = ""
    workspace: str = ""
    user: str = ""
    claim: tuple[str, ...] = ()
    claim_form: str = ""
    user_type: str = "uuid"
    where: str | None = None
    function: str = ""
    owner: bool = False

    def __str__(self) -> str:
        if self.owner:
            return "each user has a workspace of their own"
        if self.function:
            return f"whom {self.function}(workspace) accepts"
        if self.claim:
            return f"claim {'.'.join(self.claim)}"
        return f"{self.table} ({self.workspace}, {self.user})" + (f" where {self.where}" if self.where else "")


@dataclass(frozen=True)
class Candidate:
    """A table that may list members, and why its rows may not be members."""

    members: Members
    doubts: list[str] = field(default_factory=list)


def read_claim(text: str, option: str) -> tuple[str, ...]:
    """The path of a claim: parts between dots. A name with ``://`` is one part, as Auth0's own names are.

    Raises:
        HostError: a part is empty or not printable, or users can write the claim themselves.
    """
    parts = (text,) if "://" in text else tuple(text.split("."))
    if not all(part and part.isprintable() and "$$" not in part for part in parts):
        raise HostError(f"{text!r} is not the name of a claim ({option}); write for example app_metadata.org_ids.")
    if any("user_meta" in part for part in parts):
        raise HostError(f"Users write {text} themselves, so it proves nothing; choose another claim ({option}).")
    return parts


def read_caller(choices: Choices) -> tuple[str, ...]:
    """The path of the claim that identifies the caller; empty: `auth.uid()`.

    Raises:
        HostError: it is not a claim.
    """
    wanted = choices.caller_claim
    return read_claim(wanted, "--caller-claim") if wanted and wanted != OWN_LOGINS else ()


def find_members(facts: Facts, table: Table, workspace: str, choices: Choices, ask: Ask) -> Members:
    """Who belongs to the workspace of an image.

    Args:
        facts: of the project.
        table: the table of images.
        workspace: its column with the workspace.
        choices: what the caller decides.
        ask: called for everything that is not certain.

    Raises:
        HostError: a choice does not fit the project, or ``ask`` raised it.
    """
    _refuse_several(choices)
    if choices.members_claim:
        return _claim(table, workspace, choices, choices.members_claim)
    if choices.members_function:
        return _function(facts, table, workspace, choices.members_function)
    if choices.members_table:
        chosen = _chosen_table(facts, table, workspace, choices, choices.members_table)
        other = facts.tables.get(chosen.table) or facts.views[chosen.table]
        return _current(chosen, states(other, (chosen.workspace, chosen.user)), choices, ask)
    others = [other for other in [*facts.tables.values(), *facts.views.values()] if other.name != table.name]
    candidates = [found for other in others if (found := _candidate(facts, table, workspace, other, choices))]
    certain = [c for c in candidates if not c.doubts]
    rivals = [c for c in candidates if c.doubts and _may_be_it(facts, table, c.members)]
    if len(certain) == 1 and not rivals:
        return _with_condition(certain[0].members, choices)
    claim, form = claim_in(table, workspace)
    if claim and not certain and not rivals:
        return Members(claim=claim, claim_form=form)
    return _ask(facts, table, workspace, choices, candidates, ask)


def _claim(table: Table, workspace: str, choices: Choices, wanted: str) -> Members:
    """The claim that a person names, in the form in which the policies read it."""
    claim, form = claim_in(table, workspace)
    named = read_claim(wanted, "--members-claim")
    form = form if claim == named else read_as(table, named)
    return Members(claim=named, claim_form=choices.claim_form or form)


def _may_be_it(facts: Facts, images: Table, members: Members) -> bool:
    """Whether a doubtful table may still be the list of members: by its name or, if no policy shows it, by its key."""
    other = facts.tables.get(members.table)
    keyed = other is not None and other.is_unique({members.workspace, members.user})
    return sounds_like_members(members.table) or (keyed and not images.row_security)


def _refuse_several(choices: Choices) -> None:
    named = {
        "--members-table": choices.members_table, "--members-claim": choices.members_claim,
        "--members-function": choices.members_function, "--owner-column": choices.owner,
    }  # fmt: skip
    given = [option for option, value in named.items() if value]
    if len(given) > 1:
        raise HostError(f"{' and '.join(given)} exclude each other: each says who may act for a workspace.")
    details = choices.members_workspace or choices.members_user or choices.members_where
    if details and any(option in given for option in given if option != "--members-table"):
        raise HostError(
            f"--members-workspace-column, --members-user-column and --members-where do not go with {given[0]}."
        )


def _ask(
    facts: Facts, table: Table, workspace: str, choices: Choices, candidates: Sequence[Candidate], ask: Ask
) -> Members:
    possible = _functions(facts, table.base_type(workspace) or "")
    asked = describe_functions(table, possible)
    functions = [*asked, *(name for name in possible if name not in asked and sounds_like_members(name))]
    tables = sorted(c.members.table for c in candidates)
    likely = [name for name in tables if sounds_like_members(name)] or tables
    if not likely and not functions:
        same = [
            other for other in facts.tables.values() if table.references.get(workspace) in other.references.values()
        ]
        joins = [join for other in same if other.name != table.name and (join := needs_join(facts, other, choices))]
        question = (f"{joins[0]}. " if joins else "") + (
            "Which claim of the JWT names the workspaces of a user (for example app_metadata.org_ids)? If a table lists"
            " the members, set --members-table, --members-workspace-column and --members-user-column; if a function"
            " decides, --members-function; if each user has a workspace of their own, --owner-column."
        )
        return _claim(table, workspace, choices, ask("--members-claim", question, ()))
    reasons = "; ".join(
        f"{c.members.table} {', and it '.join(c.doubts[:2])}"
        for c in candidates
        if c.doubts and c.members.table in likely
    )
    described = name_some([f"{name} {asked[name]}" if name in asked else name for name in functions])
    named = f" ({described})" if functions else ""
    others = f"For another way, set --members-function{named}, --members-claim or --owner-column."
    if likely:
        question = (
            "Which table lists the members of a workspace? Every user with a row in it may act for that workspace"
        )
        question = f"{question}{f' ({reasons})' if reasons else ''}. {others}"
        answer = ask("--members-table", question, likely)
    else:
        question = "Which function says whether the caller is a member of a workspace? If a table lists them, set"
        question += " --members-table; otherwise --members-claim or --owner-column."
        question += f" ({described})" if asked else ""
        answer = ask("--members-function", question, functions)
    if plain_name(answer) in functions:
        return _function(facts, table, workspace, answer)
    chosen = _chosen_table(facts, table, workspace, choices, answer)
    other = facts.tables.get(chosen.table) or facts.views[chosen.table]
    return _current(chosen, states(other, (chosen.workspace, chosen.user)), choices, ask)


def _current(chosen: Members, doubts: Sequence[str], choices: Choices, ask: Ask) -> Members:
    """Adds the condition on the rows of members. Asks for it if a row may not be a current member."""
    if choices.members_where or not doubts:
        return chosen
    question = (
        f"{chosen.table} {'; it '.join(doubts)}. Which of its rows are members now (status = 'active', for example;"
        f" {EVERY_ROW}: every row)?"
    )
    return _with_condition(chosen, replace(choices, members_where=ask("--members-where", question, [EVERY_ROW])))


def _function(facts: Facts, table: Table, workspace: str, wanted: str) -> Members:
    name, kind = plain_name(wanted.partition("(")[0]), table.base_type(workspace) or ""
    if name not in _functions(facts, kind):
        raise HostError(
            f"There is no function {name}({kind}) that returns boolean (--members-function); it gets a workspace, and"
            " answers whether the caller is a member."
        )
    problem = facts.member_functions[name][kind]
    if problem:
        raise HostError(problem)
    return Members(function=name)


def _functions(facts: Facts, kind: str) -> list[str]:
    return [name for name, kinds in facts.member_functions.items() if kind in kinds]


def _chosen_table(facts: Facts, table: Table, workspace: str, choices: Choices, wanted: str) -> Members:
    name = facts.name_of(wanted)
    other = facts.tables.get(name) or facts.views.get(name)
    if other is None:
        raise HostError(f"There is no table {name}; name the table of the members with --members-table.")
    found = _members_of(facts, table, workspace, other, choices)
    if other.name != table.name and (join := needs_join(facts, other, choices)):
        raise HostError(f"{join}.")
    if found is None or other.name == table.name:
        if choices.members_workspace or choices.members_user:
            raise HostError(
                f"{name} lacks one of the columns that the options name; it has {name_some(list(other.columns))}."
            )
        kind = table.base_type(workspace)
        raise HostError(
            f"{name} needs the {kind} columns {workspace} and one of {', '.join(USERS)} (--members-table); if they have"
            " other names, set --members-workspace-column and --members-user-column."
        )
    if other.as_caller:
        raise HostError(
            f"{name} is a view with security_invoker, which relies on row level security of the caller; autotag"
            " reads it as the owner of the database and would see every row. Name a table or another view"
            " (--members-table), or a security definer function (--members-function)."
        )
    return _with_condition(found, choices)


def needs_join(facts: Facts, other: Table, choices: Choices) -> str:
    """Advice if a table of members identifies users by the project's own keys, which no login has; or empty."""
    named = (choices.members_user, *USERS)
    user = next((n for n in named if n and other.base_type(n) in ("bigint", "integer", "smallint")), None)
    if (
        user is None
        or read_caller(choices)
        or (choices.members_user is None and _user_column(facts, other, None, choices))
    ):
        return ""
    to = other.references.get(user)
    people = facts.tables.get(to[0]) if to else None
    login = next(
        (n for n in (people.columns if people else {}) if people and people.references.get(n) == ("auth.users", "id")),
        None,
    )
    text = f"{other.name}.{user} is {other.base_type(user)}, and auth.uid() is a uuid"
    if not (to and login):
        return f"{text}; name a view with the uuids of the users (--members-table), or a function (--members-function)"
    columns = ", ".join(f"m.{quote(n)}" for n in other.columns if n != user)
    view = (
        f"as select {columns}, u.{quote(login)} as user_id from {table_name(other.name)} m"  # noqa: S608 - for people
        f" join {table_name(to[0])} u on u.{quote(to[1])} = m.{quote(user)};"
    )
    return (
        f"{text}, which is {to[0]}.{login}; make a view that joins them, and name it (--members-table private.members):"
        f" create schema if not exists private; create view private.members {view} or name a function"
        " (--members-function)"
    )


def _with_condition(members: Members, choices: Choices) -> Members:
    where = choices.members_where
    return replace(members, where=check_form(where, "--members-where")) if where and where != EVERY_ROW else members


def _candidate(facts: Facts, table: Table, workspace: str, other: Table, choices: Choices) -> Candidate | None:
    """The table as a candidate for the list of members; None: it lacks the columns."""
    members = _members_of(facts, table, workspace, other, choices)
    if members is None or members.workspace == members.user:
        return None
    columns = members.workspace, members.user
    doubts = doubts_about(facts, table, workspace, other, columns, read_caller(choices))
    return Candidate(members, doubts + ([] if table.row_security else _beside(facts, table, workspace, other)))


def _beside(facts: Facts, table: Table, workspace: str, other: Table) -> list[str]:
    """Lists of members of something else that an image belongs to. No policy shows which list decides."""
    found = []
    for column in key_columns(table):
        target = table.references.get(column)
        container = not is_user(facts, target) if target else WORKSPACE.fullmatch(snake(column).removesuffix("_id"))
        if column == workspace or not container:
            continue
        for rival in facts.tables.values():
            members = _members_of(facts, table, column, rival, Choices())
            if members and rival.name not in (table.name, other.name) and sounds_like_members(rival.name):
                found.append(f"is not alone: {rival.name} lists the members of {column}")
    return found


def _members_of(facts: Facts, table: Table, workspace: str, other: Table, choices: Choices) -> Members | None:
    kind, target = table.base_type(workspace), table.references.get(workspace)
    column = choices.members_workspace
    if column is None:
        same = [n for n, to in other.references.items() if target and to == target]
        same += [n for n in other.columns if snake(n) == snake(workspace)]
        # the table of workspaces itself, with a column for the owner
        own = [target[1]] if target and target[0] == other.name else []
        column = next((n for n in [*same, *own] if other.base_type(n) == kind), None)
    user = choices.members_user or _user_column(facts, other, column, choices)
    if column is None or user is None or other.base_type(column) != kind or other.base_type(user) not in KEYS:
        return None
    return Members(other.name, column, user, user_type=other.base_type(user) or "")


def _user_column(facts: Facts, other: Table, workspace: str | None, choices: Choices) -> str | None:
    """The column with the user, found by its key, then by its reference, then by its name."""
    kinds = KEYS if read_caller(choices) else ("uuid", "text", "character varying")
    possible = [n for n in other.columns if n != workspace and other.base_type(n) in kinds]
    named = [n for name in USERS for n in possible if snake(n) == name]
    referring = [n for n in possible if n in other.references and is_user(facts, other.references[n])]
    keyed = [n for n in [*named, *referring] if workspace and other.is_unique({workspace, n})]
    owners = [n for n in possible if snake(n) in ("owner_id", "owner", "owner_user_id", "created_by")]
    return next(iter([*keyed, *named, *referring, *owners]), None)


def plain_name(name: str) -> str:
    """A qualified name without quotes."""
    bare = name.replace('"', "").strip()
    return bare if "." in bare else f"public.{bare}"
