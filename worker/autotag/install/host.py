"""What autotag needs to know about a project's tables.

`propose` derives it from the project's schema, and asks for the rest. `adapter` writes it as SQL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autotag.install.answers import EVERY_ROW
from autotag.install.answers import Ask as Ask
from autotag.install.answers import Choices as Choices
from autotag.install.answers import HostError as HostError
from autotag.install.conditions import check_form
from autotag.install.evidence import snake
from autotag.install.facts import Facts, Table
from autotag.install.keys import KEY_TYPES, KINDS, check_table, check_written, find_id, key_columns, key_type
from autotag.install.members import Members as Members
from autotag.install.members import find_members, read_caller
from autotag.install.quoting import quote
from autotag.texts import name_some

#: Names that projects use for their tables and columns, the most likely first.
TABLES = ("assets", "images", "photos", "pictures", "media", "files", "uploads")
WORKSPACES = ("workspace_id", "organization_id", "organisation_id", "org_id", "tenant_id", "team_id", "account_id",
              "project_id", "library_id")  # fmt: skip
PATHS = ("storage_path", "file_path", "object_path", "image_path", "storage_key", "object_name", "path")
BUCKETS = ("storage_bucket", "bucket", "bucket_id", "bucket_name")
URLS = ("image_url", "public_url", "file_url", "photo_url", "source_url", "url", "src")
TAGS = ("tags", "ai_tags", "labels", "keywords")
#: Only this name is accepted. An app may keep its own data in a column of another name, which autotag must not replace.
RESULT = "tagging_result"
#: Columns that may hold the id of an object in Storage without a foreign key.
OBJECTS = ("object_id", "storage_object_id", "file_id", "storage_id")
OWNERS = ("user_id", "owner_id", "profile_id", "created_by", "uploaded_by", "author_id", "owner")
TEXT = ("text", "character varying")
#: Types of a column for tags, as Postgres prints them. citext[] may be in any schema.
TAG_TYPES = ("text[]", "character varying[]", "citext[]", "jsonb", "json")
#: Columns that mean that a row is in the trash, and columns that mean that it is archived.
TRASH = re.compile(r"(?:is_|was_|in_)?(?:soft_)?(?:deleted|trash|trashed|removed|discarded|binned)(?:_at|_on|_date)?")
PUT_AWAY = re.compile(r"(?:is_|was_)?(?:archived|hidden|unpublished|expired|rejected)(?:_at|_on|_date)?")
#: names that Storage accepts (its isValidBucketName)
BUCKET = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_!.*'() &$@=;:+,?-]{1,100}")


@dataclass(frozen=True)
class FileRule:
    """Which files a workspace's rows may name.

    Attributes:
        name: one of `files.RULES`, a function of the project, or ``none`` (rows name no files).
        buckets: the buckets that rows may name; empty: any bucket.
        prefix: the beginning of every path, before the folder (``images/``).
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
        result: the jsonb column for the whole answer, and for who gave each tag.
        members: who belongs to a workspace.
        files: which files a row may name.
        caller: the path of the claim that says who the caller is; empty: ``auth.uid()``.
        where: a condition on the rows ``a`` of the table. autotag leaves out rows that do not meet it. None: no
            condition.
        object: its column with the id of an object in Storage, instead of ``path``.
        full_paths: paths begin with the name of their bucket.
        storage_hosts: where the project serves its Storage; URLs of these hosts are files.
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
    caller: tuple[str, ...] = ()
    where: str | None = None
    object: str | None = None
    full_paths: bool = False
    storage_hosts: tuple[str, ...] = ()
    editors: str = "none"

    @property
    def names_files(self) -> bool:
        """Whether rows may name files in Storage."""
        return bool(self.path or self.object or self.storage_hosts)


def propose(facts: Facts, choices: Choices, ask: Ask) -> Host:
    """The host's tables, from its schema, with the default file rule.

    Args:
        facts: of the project.
        choices: what the caller decides.
        ask: answers questions that the schema does not answer.

    Raises:
        HostError: a table or column is missing or has the wrong type, or ``ask`` raised it.
    """
    table = _table(facts, choices.table, ask)
    check_table(table)
    id_column = find_id(table, choices.id, ask)
    caller = read_caller(choices)
    workspace, owned = _workspace(table, choices, ask)
    path, url, object_column = _places(table, choices, ask)
    bucket_column = _optional(table, "", None, BUCKETS) if path else None
    bucket = _bucket(facts, choices, bucket_column, ask) if path else None
    tags = choices.tags or next((n for n in TAGS if _holds_tags(table.columns.get(n, ""))), "tags")
    tags_type = _tags_type(table, tags)
    check_written(table, tags, RESULT)
    workspace_type = _key(table, workspace, "--owner-column" if owned else "--workspace-column")
    members = (
        Members(owner=True, user_type=workspace_type) if owned else find_members(facts, table, workspace, choices, ask)
    )
    return Host(
        table.name, id_column, workspace, _key(table, id_column, "--id-column"), workspace_type,
        user_type(members, caller), path=path, bucket_column=bucket_column, bucket=bucket, url=url, tags=tags,
        tags_type=tags_type, result=RESULT, members=members, caller=caller,
        where=_where(table, choices, ask), object=object_column,
        full_paths=bool(choices.full_paths), editors=_editors(choices.editors),
    )  # fmt: skip


def user_type(members: Members, caller: Sequence[str]) -> str:
    """The base type of users' ids: uuid for Supabase's own users, otherwise the type of the stored ids."""
    if not caller:
        return "uuid"
    kind = "text" if members.claim or members.function else members.user_type
    return KEY_TYPES.get(kind, kind)


def _where(table: Table, choices: Choices, ask: Ask) -> str | None:
    """The condition on the rows to tag. Rows in the trash must never be tagged, so this asks for the condition if a
    column marks such rows."""
    where = choices.where
    if where is None:
        kept = [condition for name in table.columns if (condition := _not_in(table, name, TRASH))]
        if kept:
            question = (
                f"{table.name} seems to have rows in the trash. Which rows are to be tagged ({EVERY_ROW}: every row)?"
            )
            where = ask("--where", question, [" and ".join(kept), EVERY_ROW])
    return check_form(where, "--where") if where and where != EVERY_ROW else None


def _not_in(table: Table, name: str, words: re.Pattern[str]) -> str | None:
    """The condition that a row does not have the state in a column's name; None: the name or type has no such
    meaning."""
    kind = table.base_type(name) or ""
    if not words.fullmatch(snake(name)):
        return None
    if kind == "boolean":
        return f"{quote(name)} is not true"
    return f"{quote(name)} is null" if kind.startswith(("timestamp", "date")) else None


def notes_on_rows(table: Table, host: Host) -> list[str]:
    """Notes for a person about the rows that will be tagged."""
    if host.where:
        return []
    kept = [condition for name in table.columns if (condition := _not_in(table, name, PUT_AWAY))]
    if not kept:
        return []
    return [
        f'Every row is tagged, also where this is not so: {" and ".join(kept)}. --where "{kept[0]}" leaves others out.'
    ]


def notes_on_tags(facts: Facts, host: Host) -> list[str]:
    """Notes for a person about tags in other tables."""
    about = {table.name for table in facts.tables.values() if host.table in {to for to, _ in table.references.values()}}
    other = sorted(name for name in about if re.search(r"tag|label|keyword", snake(name.rpartition(".")[2])))
    if not other or host.tags in facts.tables[host.table].columns:
        return []
    return [
        f"{name_some(other)} seems to have the tags that people gave. They stay there, and autotag does not see them:"
        f" its own go to the new column {host.table}.{host.tags}."
    ]


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


def _workspace(table: Table, choices: Choices, ask: Ask) -> tuple[str, bool]:
    """The column with the workspace, and whether each user has a workspace of their own."""
    if choices.owner:
        if choices.workspace:
            raise HostError("--owner-column and --workspace-column exclude each other: the owner is the workspace.")
        return _key_column(table, "--owner-column", choices.owner), True
    if not choices.workspace and not any(_likely(table.columns, WORKSPACES)):
        owners = [name for name in _likely(table.columns, OWNERS) if name in key_columns(table)]
        if owners:
            question = (
                f"{table.name} has no column with a workspace. If each user has images of their own and no others see"
                " them, name the column with the user; otherwise set --workspace-column."
            )
            answer = ask("--owner-column", question, owners)
            return _key_column(table, "--owner-column", answer), answer in owners
    name = choices.workspace or next(iter(_likely(table.columns, WORKSPACES)), None)
    if name is None:
        question = f"Which column of {table.name} is the workspace column?"
        name = ask("--workspace-column", question, key_columns(table))
    return _key_column(table, "--workspace-column", name), False


def _places(table: Table, choices: Choices, ask: Ask) -> tuple[str | None, str | None, str | None]:
    """The columns that say where an image is: path, URL, object of Storage."""
    path = _optional(table, "--path-column", choices.path, PATHS)
    url = _optional(table, "--url-column", choices.url, URLS)
    referring = [name for name, target in table.references.items() if target == ("storage.objects", "id")]
    if choices.object:
        if choices.path:
            raise HostError("--object-column and --path-column exclude each other: each says which file a row names.")
        return None, url, _existing(table, "--object-column", choices.object, ("uuid",))
    if not path and len(referring) == 1:
        return None, url, referring[0]
    if not path and not url:
        objects = [name for name in _likely(table.columns, OBJECTS) if table.columns[name] == "uuid"]
        if objects:
            question = f"Which column of {table.name} has the id of an object in Storage (or set --path-column)?"
            answer = ask("--object-column", question, objects)
            return None, None, _existing(table, "--object-column", answer, ("uuid",))
        answer = ask("--path-column", f"Which column of {table.name} holds the path in Storage?", table.texts())
        path = _existing(table, "--path-column", answer, TEXT)
    return path, url, None


def _table(facts: Facts, wanted: str | None, ask: Ask) -> Table:
    if not facts.tables:
        alone = "" if facts.lacking else ", or let autotag migrate --stand-alone create one"
        raise HostError(f"The database has no table of images yet; create it first{alone}.")
    if wanted is None:
        found = _named_like_images(facts.tables)
        # `assets` is the usual name. A table of another name is taken only if it is the only candidate.
        views = [f"{name} is {KINDS[facts.views[name].kind]}" for name in _named_like_images(facts.views)]
        if found and (found[0] in ("public.assets", "public.Asset") or len(found) == 1):
            wanted = found[0]
        else:
            why = f" ({name_some(views)}, so name the table behind it)" if views else ""
            wanted = ask("--table", f"Which table holds the images{why}?", found or sorted(facts.tables))
    name = facts.name_of(wanted)
    if name in facts.views:
        check_table(facts.views[name])
    if name not in facts.tables:
        raise HostError(f"There is no table {name}; name the table of the images with --table.")
    return facts.tables[name]


def _named_like_images(names: Iterable[str]) -> list[str]:
    """The tables in the schema public, or otherwise in other schemas, with a name for images; most likely first."""
    likely = (*TABLES, *(name.removesuffix("s") for name in TABLES))
    for schemas in (["public"], sorted({name.partition(".")[0] for name in names} - {"public"})):
        found = []
        for schema in schemas:
            own = {name.partition(".")[2]: name for name in names if name.partition(".")[0] == schema}
            found += [own[name] for name in _likely(own, likely)]
        if found:
            return found
    return []


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


def _key_column(table: Table, option: str, name: str) -> str:
    """A column that must exist and hold ids."""
    _key(table, name, option)
    return name


def _optional(table: Table, option: str, wanted: str | None, likely: Sequence[str]) -> str | None:
    """A column that may be missing."""
    if wanted:
        return _existing(table, option, wanted, TEXT)
    return next((name for name in _likely(table.columns, likely) if table.columns[name] in TEXT), None)


def _likely(columns: Iterable[str], likely: Sequence[str]) -> list[str]:
    """The columns with a likely name, most likely first. ``workspaceId`` counts as ``workspace_id``."""
    names: dict[str, str] = {}
    for name in columns:
        names.setdefault(snake(name), name)
    exact = set(columns)
    found = (name if name in exact else names.get(snake(name)) for name in likely)
    return [name for name in dict.fromkeys(found) if name is not None]


def _bucket(facts: Facts, choices: Choices, column: str | None, ask: Ask) -> str | None:
    wanted = choices.bucket
    if wanted and not BUCKET.fullmatch(wanted):
        raise HostError(f"{wanted!r} is not a valid name of a bucket (--bucket).")
    if wanted or (column and not facts.buckets):
        return wanted
    if len(facts.buckets) == 1:
        return facts.buckets[0]
    if column or choices.full_paths:
        return None  # every row names its bucket
    return ask("--bucket", "Which Storage bucket holds the images?", facts.buckets)
