"""The input of a survey (`Choices`), its questions (`Ask`), and its error (`HostError`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Called with the option, the question and the possible answers (empty: any); returns the answer. Raises HostError if
#: no person can be asked.
Ask = Callable[[str, str, Sequence[str]], str]
#: The condition that every row meets. A person who gives it has seen the question about the rows.
EVERY_ROW = "true"
#: The answer that Supabase's own logins identify the caller.
OWN_LOGINS = "auth.uid()"


class HostError(Exception):
    """The project's tables cannot be used, or an option is missing or wrong. The message says what to do."""


@dataclass(frozen=True)
class Choices:
    """What the caller decides; None: `propose` and `files.find_rule` decide."""

    table: str | None = None
    id: str | None = None
    workspace: str | None = None
    path: str | None = None
    bucket: str | None = None
    url: str | None = None
    tags: str | None = None
    members_table: str | None = None
    members_claim: str | None = None
    claim_form: str | None = None  # no option sets this; an adapter remembers it
    file_rule: str | None = None
    editors: str | None = None
    owner: str | None = None
    members_workspace: str | None = None
    members_user: str | None = None
    members_where: str | None = None
    members_function: str | None = None
    caller_claim: str | None = None
    where: str | None = None
    object: str | None = None
    full_paths: bool | None = None
    project_url: str | None = None
