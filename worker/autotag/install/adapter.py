"""Writes the host adapter: fills a project's tables into the template ``host_adapter.sql``.

Names and strings of the project are quoted, so none of them becomes SQL.
"""

from __future__ import annotations

import re

from autotag.install.answers import HostError
from autotag.install.host import FileRule, Host, Members

#: Base type of users' ids -> a value that is no user's id.
NOBODY = {
    "uuid": "00000000-0000-0000-0000-000000000000", "bigint": str(-(2**63)), "integer": str(-(2**31)), "text": "",
}  # fmt: skip
WORD_BEGINS, WORD_ENDS = r"\m", r"\M"  # in Postgres's regular expressions


def render(template: str, host: Host) -> str:
    """Replaces the ``{{ names }}`` of a template by a host's names and code.

    Raises:
        HostError: a name of the host contains ``$$``.
    """
    values: dict[str, str] = {
        "table": table_name(host.table), "table_literal": literal(table_name(host.table)),
        "id": quote(host.id), "workspace": quote(host.workspace),
        "id_type": host.id_type, "workspace_type": host.workspace_type, "user_type": host.user_type,
        "caller": "(select auth.uid())", "nobody": literal(NOBODY[host.user_type]),
        "bucket": _bucket_code(host), "path": _path_code(host), "url": _url_code(host),
        "tags": quote(host.tags), "tags_type": host.tags_type, **_merge_code(host),
        "result": quote(host.result), "members": _members_code(host.members),
        "editors": "autotag.is_member(p_workspace_id)" if host.editors == "members" else "false",
        "file_rule": literal(host.files.name), "own_file": file_code(host, host.files),
        "users_see_files": "true" if host.users_see_files else "false", "policy_is_silent": _silent_policy_code(host),
    }  # fmt: skip
    for name, value in values.items():
        if "$$" in value:  # it would end the body of the function
            raise HostError(f"autotag cannot use a name with $$ ({name}: {value[:100]}); rename it.")
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], template)


def _members_code(members: Members) -> str:
    if members.claim:
        path = literal("{" + ",".join(members.claim) + "}")
        return (
            f"select coalesce(c.claim ? p_workspace_id::text or c.claim @> to_jsonb(p_workspace_id), false)"
            f" from (select (select auth.jwt()) #> {path}) c (claim)"
        )
    return (
        f"select exists (select from {table_name(members.table)} m where m.{quote(members.workspace)} ="
        f" p_workspace_id and m.{quote(members.user)} = (select autotag.caller()))"
    )


def file_code(host: Host, rule: FileRule) -> str:
    """The condition that the row ``a`` may name the file (``f.bucket``, ``f.path``)."""
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
        conditions.append(_in_folder(rule, f"{workspace}::text", host.workspace_type))
    elif uploader:
        conditions.append(
            _in_folder(rule, f"{uploader}::text", host.user_type)
            if rule.name == "uploader-folder"
            else _owned(f"= {uploader}::text")
        )
    else:
        conditions.append(f"starts_with(f.path, {literal(rule.prefix)})" if rule.prefix else "")
        is_member = f"in (select m.{quote(host.members.user)}::text {of_members(host.members, workspace)})"
        folder = f"split_part(f.path, '/', {rule.depth})"
        conditions.append(f"{folder} {is_member}" if rule.name == "uploader-folder" else _owned(is_member))
    if rule.name != "workspace-folder" and uploader:
        conditions.append(
            f"exists (select {of_members(host.members, workspace)} and m.{quote(host.members.user)} = {uploader})"
        )
    return " and ".join(filter(None, conditions))


def of_members(members: Members, workspace: str) -> str:
    """The ``from`` clause with the rows ``m`` of a workspace's members."""
    return f"from {table_name(members.table)} m where m.{quote(members.workspace)} = {workspace}"


def _in_folder(rule: FileRule, folder: str, key_type: str) -> str:
    """The condition that a path is in a folder that is named as a key."""
    if rule.prefix or rule.depth == 1:
        before = f"{literal(rule.prefix)} || " if rule.prefix else ""
        # the folder of the key `a` contains no folder of the key `a/b`
        own = f" and strpos({folder}, '/') = 0" if key_type == "text" else ""
        return f"starts_with(f.path, {before}{folder} || '/'){own}"
    return f"split_part(f.path, '/', {rule.depth}) = {folder}"


def _owned(condition: str) -> str:
    """The condition that an object's owner meets ``condition``. Older releases of Storage only have ``owner``."""
    owner = "coalesce(to_jsonb(o) ->> 'owner_id', to_jsonb(o) ->> 'owner')"
    this_file = "o.bucket_id = f.bucket and o.name = f.path"
    return f"exists (select from storage.objects o where {this_file} and {owner} {condition})"


def lateral_code(host: Host) -> str:
    """The bucket and path of the image of the row ``a``, as columns."""
    return f"{_bucket_code(host)}::text as bucket, {_path_code(host)}::text as path"


def _path_code(host: Host) -> str:
    return f"a.{quote(host.path)}" if host.path else "null"


def _url_code(host: Host) -> str:
    return f"a.{quote(host.url)}" if host.url else "null"


def _silent_policy_code(host: Host) -> str:
    """The condition that a policy leaves the file of a row open, or the uploader where the rule needs one."""
    if not host.path:
        return "false"
    missing = [_not_in_policy(name) for name in (host.path, host.files.uploader) if name]
    return missing[0] if len(missing) == 1 else f"({' or '.join(missing)})"


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


def _merge_code(host: Host) -> dict[str, str]:
    """How the tags of a run are merged into a column of this type: the function, and the column's value."""
    column, is_json = f"a.{quote(host.tags)}", host.tags_type in ("jsonb", "json")
    new = "r.result -> 'tags'" if is_json else "array(select jsonb_array_elements_text(r.result -> 'tags'))"
    limited = host.tags_type == "character varying[]"
    # the length of a varchar(n): of the column as it is when tags are stored
    longest = (
        "(select nullif(c.atttypmod, -1) - 4 from pg_attribute c"
        f" where c.attrelid = {literal(table_name(host.table))}::regclass and c.attname = {literal(host.tags)})"
        if limited
        else "null"
    )
    return {
        "merge": "merge_json" if is_json else "merge_array",
        "longest_tag": "" if is_json else f", {longest}",
        "and_no_limit": f" and {longest} is null" if limited else "",
        "or_limit": f" or {longest} is not null" if limited else "",
        "tags_json": f"autotag.read_json({column})" if host.tags_type == "json" else f"to_jsonb({column})",
        "current_tags": f"{column}::{'json' if is_json else 'text[]'}",
        "new_tags": f"({new})::{host.tags_type}",
        "merged_tags": f"case when m.tags is null then {column} else m.tags::{host.tags_type} end",
    }


def table_name(name: str) -> str:
    """A qualified name as SQL writes it."""
    return ".".join(quote(part) for part in name.split(".", 1))


def quote(name: str) -> str:
    """An identifier as SQL writes it."""
    return name if re.fullmatch(r"[a-z_][a-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string as SQL writes it. It contains no ``$``, so it can be in the ``$$`` body of a function."""
    if "$" not in text:
        return "'" + text.replace("'", "''") + "'"
    return "E'" + text.replace("\\", "\\\\").replace("'", "''").replace("$", "\\044") + "'"
