"""A project's tables as autotag needs to know them.

`propose` derives them from the project's schema, and asks for what it does not show. `adapter` writes them as SQL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autotag.install.answers import Ask, HostError
from autotag.install.facts import Facts, Table
from autotag.install.keys import KEY_TYPES, check_table, check_written, find_id, key_columns, key_type
from autotag.texts import name_some

#: Names that projects use for their tables and columns, the most likely first.
TABLES = ("assets", "images", "photos", "pictures", "media", "files", "uploads")
WORKSPACES = ("workspace_id", "organization_id", "organisation_id", "org_id", "tenant_id", "team_id", "account_id",
              "project_id", "library_id")  # fmt: skip
PATHS = ("storage_path", "file_path", "object_path", "image_path", "storage_key", "object_name", "path")
BUCKETS = ("storage_bucket", "bucket", "bucket_id", "bucket_name")
URLS = ("image_url", "public_url", "file_url", "photo_url", "source_url", "url", "src")
TAGS = ("tags", "ai_tags", "labels", "keywords")
#: By this name only: what an app keeps in a column of another name is not for autotag to replace.
RESULT = "tagging_result"
USERS = ("user_id", "member_id", "profile_id", "auth_user_id")
TEXT = ("text", "character varying")
#: Types of a column for tags, as Postgres prints them; also citext[] of any schema.
TAG_TYPES = ("text[]", "character varying[]", "citext[]", "jsonb", "json")
BUCKET = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_!.*'() &$@=;:+,?-]{1,100}")  # what Storage takes (its isValidBucketName)
#: `auth.jwt() -> 'app_metadata' ->> 'org_id'` as Postgres prints it in a policy.
CLAIM = re.compile(r"jwt\(\)(?: AS jwt\))?\s*((?:\)*\s*->>?\s*'[^']+'(?:::text)?\s*)+)")

#: Columns which suggest that not every row of a table of members is a current member.
NOT_EVERY_ROW = re.compile(
    r"status|state|deleted|removed|revoked|left_at|accepted|approved|active|pending|invit|expire"
)


@dataclass(frozen=True)
class Members:
    """Who belongs to a workspace: the rows of a table, or a claim of the JWT (a string or an array of strings)."""

    table: str = ""
    workspace: str = ""
    user: str = ""
    claim: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"claim {'.'.join(self.claim)}" if self.claim else f"{self.table} ({self.workspace}, {self.user})"


@dataclass(frozen=True)
class FileRule:
    """Which files a workspace's rows may name.

    Attributes:
        name: one of `files.RULES`, a function of the project, or ``none`` (rows name no files).
        buckets: the buckets that rows may name; empty: any bucket.
        prefix: what every path begins with, before the folder (``images/``).
        depth: which segment of the path is the folder, counted from 1.
        uploader: the column with the user who uploaded an image; None: the folder or object of any member counts.
    """

    name: str = "workspace-folder"
    buckets: tuple[str, ...] = ("assets",)
    prefix: str = ""
    depth: int = 1
    uploader: str | None = None


@dataclass(frozen=True)
class Host:
    """A project's tables. The defaults are those of the stand-alone stack (``host_baseline``).

    Attributes:
        table: qualified name of the table of images.
        id, workspace: its columns with the keys.
        id_type, workspace_type, user_type: the base types of keys: ``uuid``, ``bigint``, ``integer`` or ``text``.
        path, bucket_column, url: its columns that say where an image is; None: it has no such column.
        bucket: the bucket of rows that name none.
        tags, tags_type: the column for tags, and its type (one of `TAG_TYPES`).
        result: the jsonb column for the whole answer, and for whose each tag is.
        members: who belongs to a workspace.
        files: which files a row may name.
        users_see_files: ask row level security whether the caller may see a file.
        editors: which users may change a workspace's vocabulary and profiles: ``members`` or ``none``.
    """

    table: str = "public.assets"
    id: str = "id"
    workspace: str = "workspace_id"
    id_type: str = "uuid"
    workspace_type: str = "uuid"
    user_type: str = "uuid"
    path: str | None = "storage_path"
    bucket_column: str | None = "storage_bucket"
    bucket: str | None = "assets"
    url: str | None = "image_url"
    tags: str = "tags"
    tags_type: str = "text[]"
    result: str = "tagging_result"
    members: Members = field(default_factory=lambda: Members("public.workspace_members", "workspace_id", "user_id"))
    files: FileRule = field(default_factory=FileRule)
    users_see_files: bool = True
    editors: str = "none"


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
    file_rule: str | None = None
    editors: str | None = None


def propose(facts: Facts, choices: Choices, ask: Ask) -> Host:
    """The host's tables, from its schema, with the default file rule.

    Args:
        facts: of the project.
        choices: what the caller decides.
        ask: answers what the schema does not show.

    Raises:
        HostError: a table or column is missing or has the wrong type, or ``ask`` raised it.
    """
    table = _table(facts, choices.table, ask)
    check_table(table)
    id_column = find_id(table, choices.id, ask)
    id_type = _key(table, id_column, "--id-column")
    workspace = choices.workspace or next((n for n in WORKSPACES if n in table.columns), None)
    if workspace is None:
        question = f"Which column of {table.name} is the workspace column?"
        workspace = ask("--workspace-column", question, key_columns(table))
    workspace_type = _key(table, workspace, "--workspace-column")
    path = _optional(table, "--path-column", choices.path, PATHS)
    url = _optional(table, "--url-column", choices.url, URLS)
    if not path and not url:
        answer = ask("--path-column", f"Which column of {table.name} holds the path in Storage?", table.texts())
        path = _existing(table, "--path-column", answer, TEXT)
    bucket_column = _optional(table, "", None, BUCKETS) if path else None
    bucket = _bucket(facts, choices.bucket, bucket_column, ask) if path else None
    tags = choices.tags or next((n for n in TAGS if _holds_tags(table.columns.get(n, ""))), "tags")
    tags_type = _tags_type(table, tags)
    check_written(table, tags, RESULT)
    members = _members(facts, table, workspace, choices, ask)
    return Host(
        table.name, id_column, workspace, id_type, workspace_type, path=path, bucket_column=bucket_column,
        bucket=bucket, url=url, tags=tags, tags_type=tags_type, result=RESULT, members=members,
        editors=_editors(choices.editors),
    )  # fmt: skip


def _holds_tags(kind: str) -> bool:
    return kind in TAG_TYPES or kind.endswith(".citext[]")


def _tags_type(table: Table, tags: str) -> str:
    """The type of the column for tags; text[] if it does not exist yet."""
    kind = table.columns.get(tags, "text[]")
    other = "name another column with --tags-column (ai_tags, for example: autotag adds it if it does not exist)"
    if tags in table.generated:
        raise HostError(f"{table.name}.{tags} is a generated column, which nobody can write; {other}.")
    if not _holds_tags(kind):
        raise HostError(
            f"{table.name}.{tags} is {kind}; tags go into a text[], varchar[], citext[], jsonb or json column; {other}."
        )
    return kind


def _editors(wanted: str | None) -> str:
    if wanted not in (None, "none", "members"):
        raise HostError(f"--editors is none or members, not {wanted}.")
    return wanted or "none"


def _table(facts: Facts, wanted: str | None, ask: Ask) -> Table:
    if not facts.tables:
        raise HostError(
            "The database has no table of images yet; create it first, or let autotag migrate --stand-alone create one."
        )
    if wanted is None:
        found = [f"public.{name}" for name in TABLES if f"public.{name}" in facts.tables]
        # `assets` is the usual name. A table of another name is taken only if it is the only candidate.
        if found and (found[0] == "public.assets" or len(found) == 1):
            wanted = found[0]
        else:
            wanted = ask("--table", "Which table holds the images?", found or sorted(facts.tables))
    name = wanted if "." in wanted else f"public.{wanted}"
    if name in facts.views:
        check_table(facts.views[name])
    if name not in facts.tables:
        raise HostError(f"There is no table {name}; name the table of the images with --table.")
    return facts.tables[name]


def _existing(table: Table, option: str, name: str, kinds: Sequence[str]) -> str:
    kind = table.columns.get(name)
    if kind is None:
        raise HostError(f"{table.name} has no column {name} ({option}); it has {name_some(list(table.columns))}.")
    if kind not in kinds:
        raise HostError(f"{table.name}.{name} is {kind}; autotag needs {' or '.join(kinds)} there ({option}).")
    return name


def _key(table: Table, name: str, option: str) -> str:
    """The base type of the ids in a column that must exist."""
    if name not in table.columns:
        _existing(table, option, name, ())
    return key_type(table, name, option)


def _optional(table: Table, option: str, wanted: str | None, likely: Sequence[str]) -> str | None:
    """A column that may be missing."""
    if wanted:
        return _existing(table, option, wanted, TEXT)
    return next((name for name in likely if table.columns.get(name) in TEXT), None)


def _bucket(facts: Facts, wanted: str | None, column: str | None, ask: Ask) -> str | None:
    if wanted and not BUCKET.fullmatch(wanted):
        raise HostError(f"{wanted!r} is not a valid name of a bucket (--bucket).")
    if wanted or (column and not facts.buckets):
        return wanted
    if len(facts.buckets) == 1:
        return facts.buckets[0]
    if column:
        return None  # every row names its bucket
    return ask("--bucket", "Which Storage bucket holds the images?", facts.buckets)


def _members(facts: Facts, table: Table, workspace: str, choices: Choices, ask: Ask) -> Members:
    if choices.members_claim:
        return Members(claim=tuple(choices.members_claim.split(".")))
    found: dict[str, Members] = {}
    doubts: dict[str, str] = {}
    for other in facts.tables.values():
        user = next((n for n in USERS if other.columns.get(n) == "uuid"), None)
        same = KEY_TYPES.get(other.base_type(workspace) or "") == KEY_TYPES[table.base_type(workspace) or ""]
        if user and other.name != table.name and same:
            found[other.name] = Members(other.name, workspace, user)
            doubts[other.name] = _doubts(other, workspace, user)
    if choices.members_table:
        return _chosen_members(choices.members_table, found, workspace)
    likely = [name for name in found if "member" in name] or list(found)
    if len(likely) == 1 and not doubts[likely[0]]:
        return found[likely[0]]
    if not likely:
        claim = _claim_in(table.policies)
        if claim:
            return Members(claim=claim)
        answer = ask(
            "--members-claim",
            "Which claim of the JWT names the workspaces of a user (for example app_metadata.org_ids)?", (),
        )  # fmt: skip
        return Members(claim=tuple(answer.split(".")))
    reasons = "; ".join(f"{name} {doubts[name]}" for name in sorted(likely) if doubts[name])
    question = "Which table lists the members of a workspace? Every user with a row in it may act for that workspace"
    answer = ask("--members-table", f"{question}{f' ({reasons})' if reasons else ''}.", sorted(likely))
    return _chosen_members(answer, found, workspace)


def _chosen_members(chosen: str, found: Mapping[str, Members], workspace: str) -> Members:
    name = chosen if "." in chosen else f"public.{chosen}"
    if name not in found:
        raise HostError(
            f"{name} needs a column {workspace} like that of the images, and one of the uuid columns {', '.join(USERS)}"
            " (--members-table)."
        )
    return found[name]


def _doubts(table: Table, workspace: str, user: str) -> str:
    """Why a row of a table may not be a membership; empty: every row is one."""
    if set(table.primary_key) != {workspace, user}:
        return f"has a key other than {workspace} and {user}"
    telling = [name for name in table.columns if NOT_EVERY_ROW.search(name)]
    return f"has the column {telling[0]}, so not every row may be a member" if telling else ""


def _claim_in(policies: Sequence[str]) -> tuple[str, ...]:
    """The claim that the table's policies compare with a column; empty: there is none."""
    for policy in policies:
        match = CLAIM.search(policy)
        if match and "user_metadata" not in match[1]:  # users write it themselves
            return tuple(re.findall(r"'([^']+)'", match[1]))
    return ()


def describe(host: Host, facts: Facts) -> dict[str, str]:
    """The host as text for people: the name of a fact -> the fact."""
    columns = facts.tables[host.table].columns if host.table in facts.tables else {}
    places = [f"bucket {host.bucket_column or host.bucket}, path {host.path}"] if host.path else []
    places += [f"url {host.url}"] if host.url else []
    added = [name for name in (host.tags, host.result) if name not in columns]
    return {
        "images": f"{host.table} (id {host.id}, workspace {host.workspace})",
        "where an image is": "; ".join(places),
        "tags go to": f"{host.tags} ({host.tags_type}), {host.result}"
        + (f"; added: {', '.join(added)}" if added else ""),
        "members": str(host.members),
        "whose a file is": _describe_files(host),
    }


def _describe_files(host: Host) -> str:
    rule = host.files
    if rule.name == "none":
        return "rows name no files in Storage"
    folder = {"workspace-folder": "<workspace>", "uploader-folder": f"<{rule.uploader or 'member'}>"}.get(rule.name)
    above = rule.prefix or "*/" * (rule.depth - 1)
    text = f"{rule.name}" + (f": {above}{folder}/…" if folder else "")
    text += f" in {', '.join(rule.buckets)}" if rule.buckets else ""
    return text + ("" if host.users_see_files else "; row level security of storage.objects is not asked")
