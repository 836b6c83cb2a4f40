"""Finds out whether Supabase's own logins identify the caller, or a claim in another service's token."""

from __future__ import annotations

import re
from dataclasses import replace

from autotag.install.answers import OWN_LOGINS, Ask, Choices, HostError
from autotag.install.conditions import UUID, find_user
from autotag.install.evidence import called_functions, plain
from autotag.install.facts import Facts
from autotag.install.host import Host, user_type
from autotag.install.members import read_caller

#: The claim that identifies the user, in the output of `evidence.plain`.
SUB = re.compile(r"auth\.jwt ->>? 'sub'|'request\.jwt\.claims?'.*'sub'|'request\.jwt\.claim\.sub'")


def with_caller(url: str, facts: Facts, host: Host, choices: Choices, ask: Ask) -> Host:
    """Adds the claim that identifies the caller to the host. Asks for it if it does not seem to be `auth.uid()`.

    Raises:
        HostError: the answer is not a claim, the owner of an image is a number, or ``ask`` raised it.
        psycopg.OperationalError: the database cannot be reached.
    """
    if choices.caller_claim:
        return host
    if host.members.owner and host.members.user_type in ("bigint", "integer", "smallint"):
        raise HostError(
            f"{host.table}.{host.workspace} is {host.members.user_type}, and auth.uid() is a uuid, so no caller is such"
            f" an owner; set --caller-claim to the claim with that number, or --workspace-column with a view"
            f" of ({host.workspace}, uuid of the user) as --members-table."
        )
    reason = _doubt(url, facts, host)
    if not reason:
        return host
    question = (
        f"{reason}, and auth.uid() knows only ids that are uuids. Which claim of the token says who the caller"
        f" is (sub where Clerk, Auth0, Firebase or WorkOS sign people in; {OWN_LOGINS}: Supabase's own logins)?"
    )
    caller = read_caller(replace(choices, caller_claim=ask("--caller-claim", question, ["sub", OWN_LOGINS])))
    return replace(host, caller=caller, user_type=user_type(host.members, caller))


def note_on_tokens(facts: Facts, host: Host) -> list[str]:
    """A note if only a token says who is a member, and nothing shows which service signs the token."""
    claim = host.members.claim
    if not claim or host.caller or claim[0] == "app_metadata" or _reads(facts, host)[0]:
        return []
    return [
        f"A caller is who auth.uid() says. If another service than Supabase signs the tokens with {'.'.join(claim)},"
        " its users have no uuid: autotag then accepts none of them. Set --caller-claim sub."
    ]


def _doubt(url: str, facts: Facts, host: Host) -> str:
    """Why `auth.uid()` may not be the caller, as the beginning of a sentence; empty: it seems to be."""
    members = host.members
    of_users = {"owner": (host.table, host.workspace), "table": (members.table, members.user)}
    table, column = of_users["owner"] if members.owner else of_users["table"]
    if column and members.user_type == "uuid":
        return ""
    own, other = _reads(facts, host)
    if own:
        return ""
    if other:
        return f"{other} reads the claim sub"
    if column and members.user_type in ("text", "character varying"):
        user = find_user(url, table, column)
        if user is None or not re.fullmatch(UUID, user, re.IGNORECASE):
            return f"{table}.{column} is {members.user_type}"
    return ""


def _reads(facts: Facts, host: Host) -> tuple[str, str]:
    """The policies, defaults and functions that read `auth.uid()`, and those that read the claim ``sub``, as texts."""
    own, other = "", ""
    for name in dict.fromkeys(filter(None, (host.table, host.members.table))):
        table = facts.tables.get(name)
        policies = table.row_policies if table else []
        texts = {f"A policy of {name}": f"{policy.using} {policy.check}" for policy in policies}
        texts |= {f"The default of {name}.{column}": text for column, text in (table.defaults if table else {}).items()}
        for place, text in texts.items():
            called = [facts.caller_functions[one] for one in called_functions([text], facts.caller_functions)]
            own = place if "auth.uid(" in text or "uid" in called else own
            other = place if SUB.search(plain(text)) or "sub" in called else other
    kind = facts.caller_functions.get(host.members.function)
    own = host.members.function if kind == "uid" else own
    return own, host.members.function if kind == "sub" else other
