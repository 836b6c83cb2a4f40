"""Writes the host adapter: fills a project's tables into the template ``host_adapter.sql``.

Names and strings of the project are quoted, so none of them becomes SQL.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autotag.install.answers import EVERY_ROW, OWN_LOGINS, HostError
from autotag.install.host import FileRule, Host, Members
from autotag.install.location import MAX_KEY, location_code, mark_code, too_long_code, written_place_code
from autotag.install.quoting import literal, quote, table_name

TEMPLATE = Path(__file__).parent / "host_adapter.sql"
#: Base type of users' ids -> a value that no user has.
NOBODY = {
    "uuid": "00000000-0000-0000-0000-000000000000", "bigint": str(-(2**63)), "integer": str(-(2**31)), "text": "",
}  # fmt: skip
#: The columns that the adapter may add to the table of images, each with the comment that it puts on the column.
#: `autotag uninstall` drops a column only if it has exactly this comment, so a released comment never changes.
MARKS = {
    "tagging_result": "autotag: what the model answered about this image, and which tags are autotag's",
    "tagging_stage": "autotag: how far the tagging of this image is",
    "tagging_progress": "autotag: percent of the tagging that is done",
    "tagging_eta": "autotag: when the tagging of this image will probably be done",
    "tagging_error": "autotag: why this image could not be tagged",
}
CHECK_MARK = "autotag: belongs to the column that autotag has added"
#: A function of the adapter, with its body as Postgres keeps it.
FUNCTION = re.compile(
    r"^create or replace function autotag\.(?P<name>\w+)\(.*?\nas \$\$(?P<body>.*?)\$\$;$", re.DOTALL | re.MULTILINE
)
WORD_BEGINS, WORD_ENDS = r"\m", r"\M"  # in Postgres's regular expressions


def render(template: str, host: Host) -> str:
    """Replaces the ``{{ names }}`` of a template by a host's names and code.

    Raises:
        HostError: a name of the host contains ``$$``.
    """
    values: dict[str, str] = {
        "table": table_name(host.table), "table_literal": literal(table_name(host.table)),
        "id": quote(host.id), "id_literal": literal(host.id), "workspace": quote(host.workspace),
        "id_type": host.id_type, "workspace_type": host.workspace_type, "user_type": host.user_type,
        "nobody": literal(NOBODY[host.user_type]),
        "editors": "autotag.is_member(p_workspace_id)" if host.editors == "members" else "false",
        "caller": _caller_code(host), "caller_text": _caller_text(host), "members": _members_code(host),
        "location": place_code(host, host.files), "mark": mark_code(host),
        "written_place": written_place_code(host), "too_long": too_long_code(host),
        "storage_hosts": _list_code(host.storage_hosts), "full_path_text": _full_path_text(host),
        "counts": f"({host.where})" if host.where else "true",
        "tags": quote(host.tags), "tags_type": host.tags_type, **_merge_code(host),
        "untagged": _untagged_code(host), "result": quote(host.result),
        "marks": literal(json.dumps(MARKS)), "check_mark": literal(CHECK_MARK),
        "file_rule": literal(host.files.name), "own_file": file_code(host, host.files),
        "users_see_files": "true" if host.users_see_files else "false", "policy_is_silent": _silent_policy_code(host),
        "file_columns": _list_code([name for name in (
            host.workspace, host.path, host.object, host.bucket_column, host.url) if name]),
    }  # fmt: skip
    for name, value in values.items():
        if "$$" in value:  # it would end the body of the function
            raise HostError(f"autotag cannot use a name with $$ ({name}: {value[:100]}); rename it.")
    text = re.sub(r"\{\{ (?!answers)(\w+) \}\}", lambda match: values[match[1]], template)
    return text.replace("{{ answers }}", literal(json.dumps(_answers(text, host), ensure_ascii=False)))


def record_answers(host: Host) -> dict[str, Any]:
    """The record in `autotag.adapter_answers` of a host's adapter, as it is read there, without the functions."""
    found: dict[str, Any] = json.loads(json.dumps(_answers("", host)))
    return found


def hash_body(body: str) -> str:
    """The hash of a function's body as Postgres keeps it (``md5(prosrc)``)."""
    return hashlib.md5(body.encode(), usedforsecurity=False).hexdigest()


def _answers(text: str, host: Host) -> dict[str, Any]:
    """The record for a later `init`: the answers as attributes of `Choices`, and a hash of each function."""
    members = host.members
    choices = {
        "table": host.table, "id": host.id, "workspace": None if members.owner else host.workspace,
        "owner": host.workspace if members.owner else None, "path": host.path, "bucket": host.bucket, "url": host.url,
        "object": host.object, "full_paths": host.full_paths, "tags": host.tags, "where": host.where or EVERY_ROW,
        "members_table": members.table or None, "members_workspace": members.workspace or None,
        "members_user": (members.table and members.user) or None,
        "members_where": (members.where or EVERY_ROW) if members.table else None,
        "members_claim": ".".join(members.claim) or None, "claim_form": members.claim_form or None,
        "members_function": members.function or None,
        "caller_claim": ".".join(host.caller) or OWN_LOGINS, "editors": host.editors,
    }  # fmt: skip
    return {
        "choices": {name: value for name, value in choices.items() if value is not None},
        "storage_hosts": list(host.storage_hosts), "users_see_files": host.users_see_files,
        "files": asdict(host.files),
        "functions": {found["name"]: hash_body(found["body"]) for found in FUNCTION.finditer(text)
                      if found["name"] != "adapter_answers"},
    }  # fmt: skip


def _caller_code(host: Host) -> str:
    if not host.caller:
        return "(select auth.uid())"
    claim = f"nullif((select auth.jwt()) #>> {_claim_path(host.caller)}, '')"
    if host.user_type != "text":
        return claim
    # an index cannot hold a longer key
    return f"(select case when octet_length(c.id) <= {MAX_KEY} then c.id end from (select {claim}) c (id))"


def _caller_text(host: Host) -> str:
    return f"the claim {'.'.join(host.caller)} of their token" if host.caller else "auth.uid(), Supabase's own logins"


def _claim_path(claim: Sequence[str]) -> str:
    """A path of claims as an array of SQL."""
    if all(re.fullmatch(r"\w+", part) for part in claim):
        return literal("{" + ",".join(claim) + "}")
    return f"array[{', '.join(map(literal, claim))}]"


def _members_code(host: Host) -> str:
    members = host.members
    if members.owner:
        return f"select coalesce(p_workspace_id = {_caller_as(host, host.workspace_type)}, false)"
    if members.function:
        return _unless_nobody(f"{table_name(members.function)}(p_workspace_id)")
    if members.claim:
        return _claim_code(members)
    condition = f"m.{quote(members.user)} = (select {_caller_as(host, members.user_type)})"
    return f"select exists (select {of_members(members, 'p_workspace_id')} and {condition})"


def _unless_nobody(condition: str) -> str:
    """A condition that is false without a caller, because uploads and quotas belong to users.

    (A function of the project usually reads auth.uid(), too, which raises an error if `sub` is not a uuid.)
    """
    return f"select case when autotag.caller() is null then false else coalesce({condition}, false) end"


def _claim_code(members: Members) -> str:
    """The condition that a claim names the workspace, in the form that the policies use, or in any form."""
    claim, workspace = f"((select auth.jwt()) #> {_claim_path(members.claim)})", "p_workspace_id::text"
    listed = f"exists (select from jsonb_array_elements_text{claim} e (id) where e.id = {workspace})"
    forms = {
        "text": f"{claim} #>> '{{}}' = {workspace}",
        "list": f"case jsonb_typeof{claim} when 'array' then {listed} end",
        "keys": f"{claim} ? {workspace}",
        "": f"case jsonb_typeof{claim} when 'array' then {listed}"
        f" when 'object' then {claim} ? {workspace} else {claim} #>> '{{}}' = {workspace} end",
    }
    return _unless_nobody(forms[members.claim_form])


def _caller_as(host: Host, kind: str) -> str:
    """The caller, cast to the type of the column that it is compared with, so that the column's index is used."""
    return "autotag.caller()" if kind == host.user_type else f"autotag.caller()::{kind}"


def place_code(host: Host, rule: FileRule, guard: str = "not c.too_long") -> str:
    """The joins that compute the location ``f`` (bucket, path, url) of the image of the row ``a``."""
    as_written = file_code(host, rule, "s") if rule.name not in ("any", "none", "workspace-bucket") else None
    return location_code(host, as_written, guard)


def no_members(rule: str, host: Host) -> HostError:
    """The error if a rule is about members, but nothing lists them."""
    return HostError(
        f"The file rule {rule} needs a table of members (--members-table); choose another --file-rule, or write a"
        f" function ({host.workspace_type}, text, text) that returns boolean."
    )


def file_code(host: Host, rule: FileRule, f: str = "f") -> str:
    """The condition that the row ``a`` may name the file (``f.bucket``, ``f.path``).

    Raises:
        HostError: the rule is about members, and nothing lists them.
    """
    workspace = f"a.{quote(host.workspace)}"
    if "." in rule.name:
        return f"{table_name(rule.name)}({workspace}, {f}.bucket, {f}.path)"
    if rule.name in ("any", "none"):
        return "true"
    if rule.name == "workspace-bucket":
        return f"{f}.bucket = {workspace}::text"
    own = host.members.owner and rule.uploader == host.workspace
    if rule.name != "workspace-folder" and not (host.members.table or own):
        raise no_members(rule.name, host)
    conditions = [f"{f}.bucket in ({', '.join(map(literal, rule.buckets))})"] if rule.buckets else []
    uploader = f"a.{quote(rule.uploader)}" if rule.uploader else ""
    if rule.name == "workspace-folder":
        conditions.append(_in_folder(rule, f"{workspace}::text", host.workspace_type, f))
    elif uploader:
        conditions.append(
            _in_folder(rule, f"{uploader}::text", host.user_type, f)
            if rule.name == "uploader-folder"
            else _owned(f"= {uploader}::text", f)
        )
    else:
        conditions.append(f"starts_with({f}.path, {literal(rule.prefix)})" if rule.prefix else "")
        is_member = f"in (select m.{quote(host.members.user)}::text {of_members(host.members, workspace)})"
        folder = f"split_part({f}.path, '/', {rule.depth})"
        conditions.append(f"{folder} {is_member}" if rule.name == "uploader-folder" else _owned(is_member, f))
    if rule.name != "workspace-folder" and uploader and host.members.table:
        conditions.append(
            f"exists (select {of_members(host.members, workspace)} and m.{quote(host.members.user)} = {uploader})"
        )
    return " and ".join(filter(None, conditions))


def of_members(members: Members, workspace: str) -> str:
    """The ``from`` clause with the rows ``m`` of a workspace's members."""
    current = f" and ({members.where})" if members.where else ""
    return f"from {table_name(members.table)} m where m.{quote(members.workspace)} = {workspace}{current}"


def _in_folder(rule: FileRule, folder: str, key_type: str, f: str) -> str:
    """The condition that a path is in a folder whose name is a key."""
    if rule.prefix or rule.depth == 1:
        before = f"{literal(rule.prefix)} || " if rule.prefix else ""
        # the folder of the key `a` contains no folder of the key `a/b`
        own = f" and strpos({folder}, '/') = 0" if key_type == "text" else ""
        return f"starts_with({f}.path, {before}{folder} || '/'){own}"
    return f"split_part({f}.path, '/', {rule.depth}) = {folder}"


def _owned(condition: str, f: str) -> str:
    """The condition that an object's owner meets ``condition``. Older releases of Storage have only ``owner``."""
    owner = "coalesce(to_jsonb(o) ->> 'owner_id', to_jsonb(o) ->> 'owner')"
    this_file = f"o.bucket_id = {f}.bucket and o.name = {f}.path"
    return f"exists (select from storage.objects o where {this_file} and {owner} {condition})"


def _silent_policy_code(host: Host) -> str:
    """The condition that the policies do not decide about a row's file, or about the uploader if the rule needs one."""
    if host.files.name == "none":
        return "false"
    places = (host.path, host.object, host.url if host.storage_hosts else None)
    missing = [_not_in_policy(name) for name in (*places, host.files.uploader) if name]
    return missing[0] if len(missing) == 1 else f"({' or '.join(missing)})"


def _not_in_policy(column: str) -> str:
    expression = "pg_get_expr(coalesce(p.polwithcheck, p.polqual), c.oid)"
    if re.fullmatch(r"\w+", column):
        return f"{expression} !~ {literal(WORD_BEGINS + column + WORD_ENDS)}"
    return f"strpos({expression}, {literal(column)}) = 0"


def _list_code(values: Sequence[str]) -> str:
    return f"array[{', '.join(map(literal, values))}]" if values else "'{}'"


def _full_path_text(host: Host) -> str:
    if host.full_paths:
        return "Paths begin with the name of their bucket (fullPath)."
    text = "A path that\n-- breaks the file rule and begins with the name of its bucket is read without that name"
    return f"{text} (fullPath)."


def _untagged_code(host: Host) -> str:
    """The condition that the row ``a`` has no tags: null or an empty list of any type. Rows for which autotag found no
    fitting tag in a closed vocabulary do not count."""
    tags = f"a.{quote(host.tags)}"
    as_json = f"autotag.read_json({tags})" if host.tags_type == "json" else tags
    empty = f"cardinality({tags}) = 0" if host.tags_type.endswith("[]") else f"{as_json} in ('[]', 'null')"
    asked = f"jsonb_typeof(a.{quote(host.result)} -> 'given') = 'array'"
    return f"({tags} is null or {empty}) and {asked} is not true"


def _merge_code(host: Host) -> dict[str, str]:
    """The SQL that merges the tags of a run into a column of this type: the function, and the column's value."""
    column, is_json = f"a.{quote(host.tags)}", host.tags_type in ("jsonb", "json")
    new = "r.result -> 'tags'" if is_json else "array(select jsonb_array_elements_text(r.result -> 'tags'))"
    limited = host.tags_type == "character varying[]"
    # the length of a varchar(n), read when tags are stored, because the column may change
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
        "merged_tags": f"case when merged.tags is null then {column} else merged.tags::{host.tags_type} end",
    }
