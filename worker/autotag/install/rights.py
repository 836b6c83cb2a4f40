"""Compares the members with the policies for update, because tagging an image writes to its row."""

from __future__ import annotations

import re

from autotag.install.details import Policy
from autotag.install.evidence import asks_for_row, called_functions, caller_code, claim_of, parts_of, plain
from autotag.install.facts import Facts
from autotag.install.host import Host
from autotag.install.quoting import quote, table_name
from autotag.texts import name_some


def note_on_updates(facts: Facts, host: Host) -> list[str]:
    """A note if members may see an image but, by the policies for update, not change it."""
    images, members = facts.tables[host.table], host.members
    updates = [policy for policy in images.row_policies if policy.updates and policy.permissive]
    reads = {plain(policy.using) for policy in images.row_policies if policy.reads and policy.permissive}
    if not images.row_security or not updates or any(_lets_update(policy, facts, host) for policy in updates):
        return []
    deciding = called_functions(updates, facts.member_functions)
    agree = reads <= {plain(policy.using) for policy in updates}
    # a person who has given a condition on the table has already decided who is left out
    decided = members.where and any(table_name(members.table) in (policy.using or "") for policy in updates)
    if decided or (agree and not (members.function and deciding)):
        return []
    vocabulary = ", and edit the vocabulary and the instructions" if host.editors == "members" else ""
    callable_ones = [name for name in deciding if not any(facts.member_functions[name].values())]
    leave_out = (
        f"--members-function {callable_ones[0]}" if callable_ones else "--members-where, or a function of yours,"
    )
    return [
        f"Attention: by its policies for update, not everybody who may see {host.table} may change it"
        f"{f' ({name_some(deciding)} decides that)' if deciding else ''}. Members ({members}) may tag its"
        f" images{vocabulary}; {leave_out} leaves the others out."
    ]


def note_on_storage(facts: Facts, host: Host) -> list[str]:
    """A note if the policies of Storage, which decide the check of files, fail for callers of another login service."""
    if not (host.caller and host.users_see_files) or not any(
        policy.reads and "auth.uid(" in (policy.using or "") for policy in facts.storage_policies
    ):
        return []
    return [
        "Attention: a policy of storage.objects asks auth.uid(), which raises an error (22P02) for a token whose sub is"
        f" no uuid, so enqueue_tagging fails for files. Let it compare the claim {'.'.join(host.caller)} (auth.jwt())."
    ]


def _lets_update(policy: Policy, facts: Facts, host: Host) -> bool:
    """Whether a policy lets exactly the members update an image: its condition, or one part of an OR, is the members'
    condition."""
    images, members, workspace = facts.tables[host.table], host.members, quote(host.workspace)
    parts = parts_of(policy.using or "", "OR")
    ways = [plain(part) for part in parts]
    if members.function:
        column = rf"(?:{re.escape(quote(images.name.partition('.')[2]))}\.)?{re.escape(workspace)}"
        call = rf"(?:SELECT )?{re.escape(table_name(members.function))} {column}(?: AS \S+)?"
        return any(re.fullmatch(call, way) for way in ways)
    if members.claim:
        return any(claim_of(way, workspace)[0] == members.claim for way in ways)
    if members.owner:
        caller = caller_code(host.caller)
        return any(way in (f"{workspace} = {caller}", f"{caller} = {workspace}") for way in ways)
    other = facts.tables.get(members.table) or facts.views[members.table]
    columns = members.workspace, members.user
    return any(asks_for_row(part, images, host.workspace, other, columns, host.caller) for part in parts)
