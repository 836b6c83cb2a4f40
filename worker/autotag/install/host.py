"""What autotag has to know of a project's tables, and the host adapter that says it in SQL.

`propose` reads it off the project's schema as far as it can be seen; `render` fills it into the template
``host_adapter.sql``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autotag.install.facts import Facts, Table

#: Names under which projects keep these things, the likeliest first.
TABLES = ("assets", "images", "photos", "pictures", "media", "files", "uploads")
WORKSPACES = ("workspace_id", "organization_id", "organisation_id", "org_id", "tenant_id", "team_id", "account_id",
              "project_id", "library_id")  # fmt: skip
PATHS = ("storage_path", "file_path", "object_path", "image_path", "storage_key", "object_name", "path")
BUCKETS = ("storage_bucket", "bucket", "bucket_id", "bucket_name")
URLS = ("image_url", "public_url", "file_url", "photo_url", "source_url", "url", "src")
TAGS = ("tags", "ai_tags", "labels", "keywords")
RESULTS = ("tagging_result", "ai_result", "tags_detail")
USERS = ("user_id", "member_id", "profile_id", "auth_user_id")
TEXT = ("text", "character varying")
BUCKET = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_!.*'() &$@=;:+,?-]{1,100}")  # what Storage takes (its isValidBucketName)
#: `auth.jwt() -> 'app_metadata' ->> 'org_id'` as Postgres prints it in a policy.
CLAIM = re.compile(r"jwt\(\)(?: AS jwt\))?\s*((?:\)*\s*->>?\s*'[^']+'(?:::text)?\s*)+)")

#: Columns by which a row of a table of members may say that somebody is none (yet, or any more).
NOT_EVERY_ROW = re.compile(
    r"status|state|deleted|removed|revoked|left_at|accepted|approved|active|pending|invit|expire"
)
WORD_BEGINS, WORD_ENDS = r"\m", r"\M"  # of Postgres's regular expressions


class HostError(Exception):
    """The project's tables cannot be used, or do not tell enough; the message says what to do."""


@dataclass(frozen=True)
class Members:
    """Who belongs to a workspace: rows of a table, or a claim of the JWT (a string or an array of strings)."""

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
        buckets: those that rows may name; empty: the rule does not say.
        prefix: what every path begins with, before the folder (``images/``).
        depth: the folder is this segment of the path, from 1.
        uploader: the column that says who uploaded an image; None: any member's folder or object counts.
    """

    name: str = "workspace-folder"
    buckets: tuple[str, ...] = ("assets",)
    prefix: str = ""
    depth: int = 1
    uploader: str | None = None


@dataclass(frozen=True)
class Host:
    """A project's tables; the defaults are those of the stand-alone stack (``host_baseline``)."""

    table: str = "public.assets"
    id: str = "id"
    workspace: str = "workspace_id"
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


@dataclass(frozen=True)
class Choices:
    """What the caller knows better than the schema tells; None: look."""

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


#: Asks a question with its possible answers (empty: anything); raises HostError where nobody can be asked.
Ask = Callable[[str, str, Sequence[str]], str]


def propose(facts: Facts, choices: Choices, ask: Ask) -> Host:
    """The host's tables, from its schema; asks what cannot be seen.

    Raises:
        HostError: there is no such table or column, or ids are no uuids.
    """
    table = _table(facts, choices.table, ask)
    id_column = _column(table, "--id-column", choices.id, table.primary_key, ask, kinds=("uuid",))
    workspace = _column(table, "--workspace-column", choices.workspace, WORKSPACES, ask, kinds=("uuid",))
    path = _optional(table, "--path-column", choices.path, PATHS)
    url = _optional(table, "--url-column", choices.url, URLS)
    if not path and not url:
        answer = ask("--path-column", f"Which column of {table.name} holds the image's path in Storage?", table.texts())
        path = _known(table, "--path-column", answer, TEXT)
    bucket_column = _optional(table, "", None, BUCKETS) if path else None
    bucket = _bucket(facts, choices.bucket, bucket_column, ask) if path else None
    tags = choices.tags or next((n for n in TAGS if table.columns.get(n) in ("text[]", "jsonb")), "tags")
    tags_type = table.columns.get(tags, "text[]")
    if tags_type not in ("text[]", "jsonb"):
        raise HostError(f"{table.name}.{tags} is {tags_type}; tags go into a text[] or jsonb column (--tags-column).")
    result = next((n for n in RESULTS if table.columns.get(n) == "jsonb"), "tagging_result")
    members = _members(facts, table, workspace, choices, ask)
    return Host(table.name, id_column, workspace, path, bucket_column, bucket, url, tags, tags_type, result, members)


def _table(facts: Facts, wanted: str | None, ask: Ask) -> Table:
    if wanted is None:
        found = [f"public.{name}" for name in TABLES if f"public.{name}" in facts.tables]
        # `assets` is what Supabase's image libraries call it; anything else has to be the only candidate.
        if found and (found[0] == "public.assets" or len(found) == 1):
            wanted = found[0]
        else:
            wanted = ask("--table", "Which table holds the images?", found or sorted(facts.tables))
    name = wanted if "." in wanted else f"public.{wanted}"
    if name not in facts.tables:
        raise HostError(f"There is no table {name}; name the one that holds the images with --table.")
    return facts.tables[name]


def _known(table: Table, option: str, name: str, kinds: Sequence[str]) -> str:
    kind = table.columns.get(name)
    if kind is None:
        raise HostError(f"{table.name} has no column {name} ({option}); it has {', '.join(table.columns)}.")
    if kind not in kinds:
        raise HostError(f"{table.name}.{name} is {kind}; autotag needs {' or '.join(kinds)} there ({option}).")
    return name


def _column(
    table: Table, option: str, wanted: str | None, likely: Sequence[str], ask: Ask, kinds: Sequence[str]
) -> str:
    """A column that has to be there."""
    name = wanted or next((n for n in likely if n in table.columns), None)
    if name is None:
        possible = [n for n, kind in table.columns.items() if kind in kinds]
        name = ask(option, f"Which column of {table.name} is meant by {option}?", possible)
    return _known(table, option, name, kinds)


def _optional(table: Table, option: str, wanted: str | None, likely: Sequence[str]) -> str | None:
    """A column that may be there."""
    if wanted:
        return _known(table, option, wanted, TEXT)
    return next((name for name in likely if table.columns.get(name) in TEXT), None)


def _bucket(facts: Facts, wanted: str | None, column: str | None, ask: Ask) -> str | None:
    if wanted and not BUCKET.fullmatch(wanted):
        raise HostError(f"{wanted!r} is no name of a bucket (--bucket).")
    if wanted or (column and not facts.buckets):
        return wanted
    if len(facts.buckets) == 1:
        return facts.buckets[0]
    if column:
        return None  # every row names its own
    return ask("--bucket", "Which Storage bucket holds the images?", facts.buckets)


def _members(facts: Facts, table: Table, workspace: str, choices: Choices, ask: Ask) -> Members:
    if choices.members_claim:
        return Members(claim=tuple(choices.members_claim.split(".")))
    found, doubts = {}, {}
    for other in facts.tables.values():
        user = next((n for n in USERS if other.columns.get(n) == "uuid"), None)
        if user and other.name != table.name and other.columns.get(workspace) == "uuid":
            found[other.name] = Members(other.name, workspace, user)
            doubts[other.name] = _doubts(other, workspace, user)
    if choices.members_table:
        name = choices.members_table if "." in choices.members_table else f"public.{choices.members_table}"
        if name not in found:
            raise HostError(f"{name} needs the uuid columns {workspace} and one of {', '.join(USERS)} to tell members.")
        return found[name]
    likely = [name for name in found if "member" in name] or list(found)
    sure = [name for name in likely if not doubts[name]]
    if len(sure) == 1 == len(likely):
        return found[sure[0]]
    if not likely:
        claim = _claim_in(table.policies)
        if claim:
            return Members(claim=claim)
        answer = ask(
            "--members-claim",
            "Which claim of the JWT names the workspaces of a user (for example app_metadata.org_ids)?", (),
        )  # fmt: skip
        return Members(claim=tuple(answer.split(".")))
    said = "; ".join(f"{name} {doubts[name]}" for name in sorted(likely) if doubts[name])
    question = "Which table says who belongs to a workspace? Whoever has a row in it may act for that workspace"
    return found[ask("--members-table", f"{question}{f' ({said})' if said else ''}.", sorted(likely))]


def _doubts(table: Table, workspace: str, user: str) -> str:
    """Why a row of a table may be no membership; empty: it is one."""
    if set(table.primary_key) != {workspace, user}:
        return f"has another key than {workspace} and {user}"
    stated = [name for name in table.columns if NOT_EVERY_ROW.search(name)]
    return f"has the column {stated[0]}, so that not every row may count" if stated else ""


def _claim_in(policies: Sequence[str]) -> tuple[str, ...]:
    """The claim that the table's own policies compare with."""
    for policy in policies:
        match = CLAIM.search(policy)
        if match and "user_metadata" not in match[1]:  # which users write themselves
            return tuple(re.findall(r"'([^']+)'", match[1]))
    return ()


def describe(host: Host, facts: Facts) -> dict[str, str]:
    """What was found, for people."""
    columns = facts.tables[host.table].columns if host.table in facts.tables else {}
    where = [f"bucket {host.bucket_column or host.bucket}, path {host.path}"] if host.path else []
    where += [f"url {host.url}"] if host.url else []
    added = [name for name in (host.tags, host.result) if name not in columns]
    return {
        "images": f"{host.table} (id {host.id}, workspace {host.workspace})",
        "where an image is": "; ".join(where),
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
    said = f"{rule.name}" + (f": {above}{folder}/…" if folder else "")
    said += f" in {', '.join(rule.buckets)}" if rule.buckets else ""
    return said + ("" if host.users_see_files else "; row level security of storage.objects is not asked")


def render(template: str, host: Host) -> str:
    """A template with its ``{{ names }}`` filled in for a host."""
    values: dict[str, str] = {
        "table": table_name(host.table), "table_literal": literal(table_name(host.table)),
        "id": quote(host.id), "workspace": quote(host.workspace),
        "bucket": _bucket_code(host), "path": _path_code(host), "url": _url_code(host),
        "tags": quote(host.tags), "tags_type": host.tags_type, "tags_value": _tags_code(host.tags_type),
        "result": quote(host.result), "members": _members_code(host.members),
        "file_rule": literal(host.files.name), "own_file": file_code(host, host.files),
        "users_see_files": "true" if host.users_see_files else "false", "policy_is_silent": _unsaid_code(host),
    }  # fmt: skip
    for name, value in values.items():
        if "$$" in value:  # it would end the function that it stands in
            raise HostError(f"A name with $$ cannot be used here ({name}: {value[:100]}); rename it.")
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], template)


def _members_code(members: Members) -> str:
    if members.claim:
        path = literal("{" + ",".join(members.claim) + "}")
        return f"select coalesce((select auth.jwt()) #> {path} ? p_workspace_id::text, false)"
    return (
        f"select exists (select from {table_name(members.table)} m where m.{quote(members.workspace)} ="
        f" p_workspace_id and m.{quote(members.user)} = (select auth.uid()))"
    )


def file_code(host: Host, rule: FileRule) -> str:
    """The condition that a file (``f.bucket``, ``f.path``) is one that the row ``a`` may name."""
    workspace = f"a.{quote(host.workspace)}"
    if "." in rule.name:
        return f"{table_name(rule.name)}({workspace}, f.bucket, f.path)"
    if rule.name in ("any", "none"):
        return "true"
    if rule.name == "workspace-bucket":
        return f"f.bucket = {workspace}::text"
    conditions = [f"f.bucket in ({', '.join(map(literal, rule.buckets))})"] if rule.buckets else []
    uploader = f"a.{quote(rule.uploader)}" if rule.uploader else ""
    if rule.name == "workspace-folder":
        conditions.append(_in_folder(rule, f"{workspace}::text"))
    elif uploader:
        conditions.append(
            _in_folder(rule, f"{uploader}::text") if rule.name == "uploader-folder" else _owned(f"= {uploader}::text")
        )
    else:
        conditions.append(f"starts_with(f.path, {literal(rule.prefix)})" if rule.prefix else "")
        theirs = f"in (select m.{quote(host.members.user)}::text {of_members(host.members, workspace)})"
        folder = f"split_part(f.path, '/', {rule.depth})"
        conditions.append(f"{folder} {theirs}" if rule.name == "uploader-folder" else _owned(theirs))
    if rule.name != "workspace-folder" and uploader:
        conditions.append(
            f"exists (select {of_members(host.members, workspace)} and m.{quote(host.members.user)} = {uploader})"
        )
    return " and ".join(filter(None, conditions))


def of_members(members: Members, workspace: str) -> str:
    """The rows ``m`` of the members of a workspace, from ``from`` on."""
    return f"from {table_name(members.table)} m where m.{quote(members.workspace)} = {workspace}"


def _in_folder(rule: FileRule, folder: str) -> str:
    if rule.prefix or rule.depth == 1:
        before = f"{literal(rule.prefix)} || " if rule.prefix else ""
        return f"starts_with(f.path, {before}{folder} || '/')"
    return f"split_part(f.path, '/', {rule.depth}) = {folder}"


def _owned(theirs: str) -> str:
    """Whether the object's owner is one of these; older releases of Storage know `owner` only."""
    owner = "coalesce(to_jsonb(o) ->> 'owner_id', to_jsonb(o) ->> 'owner')"
    return (
        f"exists (select from storage.objects o where o.bucket_id = f.bucket and o.name = f.path and {owner} {theirs})"
    )


def lateral_code(host: Host) -> str:
    """Where the image of the row ``a`` lies."""
    return f"{_bucket_code(host)}::text as bucket, {_path_code(host)}::text as path"


def _path_code(host: Host) -> str:
    return f"a.{quote(host.path)}" if host.path else "null"


def _url_code(host: Host) -> str:
    return f"a.{quote(host.url)}" if host.url else "null"


def _unsaid_code(host: Host) -> str:
    """The condition that a policy leaves open which file a row names, or who uploaded it where the rule needs that."""
    if not host.path:
        return "false"
    unsaid = [_not_in_policy(name) for name in (host.path, host.files.uploader) if name]
    return unsaid[0] if len(unsaid) == 1 else f"({' or '.join(unsaid)})"


def _not_in_policy(column: str) -> str:
    expression = "pg_get_expr(coalesce(p.polwithcheck, p.polqual), c.oid)"
    if re.fullmatch(r"\w+", column):
        return f"{expression} !~ {literal(WORD_BEGINS + column + WORD_ENDS)}"
    return f"strpos({expression}, {literal(column)}) = 0"


def _bucket_code(host: Host) -> str:
    if not host.path:
        return "null"
    default = literal(host.bucket) if host.bucket else ""
    column = f"a.{quote(host.bucket_column)}" if host.bucket_column else ""
    value = f"coalesce({column}, {default})" if column and default else column or default
    return f"case when a.{quote(host.path)} is not null then {value} end"


def _tags_code(kind: str) -> str:
    return "r.result -> 'tags'" if kind == "jsonb" else "array(select jsonb_array_elements_text(r.result -> 'tags'))"


def table_name(name: str) -> str:
    return ".".join(quote(part) for part in name.split(".", 1))


def quote(name: str) -> str:
    """An identifier as SQL writes it."""
    return name if re.fullmatch(r"[a-z_][a-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string as SQL writes it, also inside a function's ``$$`` body: no ``$`` is left in it."""
    if "$" not in text:
        return "'" + text.replace("'", "''") + "'"
    return "E'" + text.replace("\\", "\\\\").replace("'", "''").replace("$", "\\044") + "'"
