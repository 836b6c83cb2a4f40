"""Writes as SQL where the image of a row is: a file in Storage or a URL, as people leave it in their columns.

A path is read as supabase-js leaves it: without blanks around it, each run of slashes as one. An empty string is null.

A path may begin with the name of its bucket (``fullPath`` of an upload's reply). Whether it does is not looked up for
each image: `init` looks at the existing rows (`files.find_full_paths`). If they say no, or there are none, a path is
taken as it stands if the file rule allows it so; otherwise, if it begins with its bucket's name, without that name.
"""

from __future__ import annotations

from autotag.install.host import Host
from autotag.install.quoting import literal, quote

BLANKS, ENDS = r"e' \t\r\n'", r"e' \t\r\n/'"  # around a URL; around a path
IS_URL = r"'^\s*https?://'"
MAX_URL, MAX_PATH, MAX_BUCKET = 8192, 1024, 100  # bytes; docs/install.md names them
MAX_KEY = 1024  # bytes of a workspace's or user's id that is a text: an index takes no key over 2.7 kB


def location_code(host: Host, as_written: str | None, guard: str) -> str:
    """The joins behind the table ``a`` that give ``f`` (bucket, path, url).

    Args:
        host: the project's tables.
        as_written: the file rule for a path as it stands (``s``); None: the rule says nothing about that.
        guard: the condition that the values of a row may be read; they may be gigabytes.
    """
    joins = []
    if host.object:
        joins.append(f"left join storage.objects o on o.id = a.{quote(host.object)}")
    values = {"bucket": _bucket(host), "path": _path(host), "url": _url(host)}
    columns = ", ".join(f"case when {guard} then {code} end as {name}" for name, code in values.items())
    joins.append(f"cross join lateral (select {columns}) s")
    path = "s.path"
    if host.path and (host.full_paths or as_written):
        with_bucket = "starts_with(s.path, s.bucket || '/')"
        with_bucket += "" if host.full_paths else f" and not coalesce({as_written}, false)"
        path = f"case when {with_bucket} then substr(s.path, length(s.bucket) + 2) else s.path end"
    bucket, url = "case when s.path is not null then s.bucket end", "s.url"
    # `offset 0` keeps the planner from writing the expressions of f once for each use. Behind s it costs 2 µs an image.
    if host.storage_hosts:
        file = "case when s.path is null then autotag.storage_file(s.url) end"
        joins.append(f"cross join lateral (select {file} as file offset 0) u")
        bucket, path = f"coalesce(u.file[1], {bucket})", f"coalesce(u.file[2], {path})"
        url = "case when u.file is null then s.url end"
    joins.append(f"cross join lateral (select {bucket} as bucket, ({path})::text as path, {url} as url offset 0) f")
    return "\n      ".join(joins)


def _path(host: Host) -> str:
    if host.object:
        return "o.name"
    if not host.path:
        return "null::text"
    # Nearly every path has no double slash. Then it costs half a microsecond, and with a regular expression three.
    text = f"a.{quote(host.path)}"
    single = f"regexp_replace({text}, '/+', '/', 'g')"
    return (
        f"case when strpos({text}, '//') = 0 then nullif(btrim({text}, {ENDS}), '')"
        f" when {text} !~* {IS_URL} then nullif(btrim({single}, {ENDS}), '') end"
    )


def _bucket(host: Host) -> str:
    if host.object:
        return "o.bucket_id"
    names = [f"nullif(a.{quote(host.bucket_column)}::text, '')"] if host.bucket_column else []
    names += [literal(host.bucket)] if host.bucket else []
    if host.path and host.full_paths and not host.bucket:
        names.append(f"split_part({_path(host)}, '/', 1)")
    return f"coalesce({', '.join(names)})" if names else "null::text"


def _url(host: Host) -> str:
    """The URL of a row. A column of paths may have URLs in some rows."""
    column = f"nullif({_text(host.url)}, '')" if host.url else ""
    in_path = ""
    if host.path:
        text = f"a.{quote(host.path)}"
        in_path = f"case when strpos({text}, '//') > 0 and {text} ~* {IS_URL} then {_text(host.path)} end"
    both = [code for code in (in_path, column) if code]
    return f"coalesce({', '.join(both)})" if both else "null::text"


def _text(column: str) -> str:
    return f"btrim(a.{quote(column)}, {BLANKS})"


def too_long_code(host: Host) -> str:
    """The condition that a value is longer than a location can be. It reads no value, only its length."""
    limits = {host.url: MAX_URL, host.path: MAX_PATH, host.bucket_column: MAX_BUCKET}
    limits |= {host.workspace: MAX_KEY} if host.workspace_type == "text" else {}
    checks = [f"coalesce(octet_length(a.{quote(name)}) > {most}, false)" for name, most in limits.items() if name]
    return " or ".join(checks) or "false"


def mark_code(host: Host) -> str:
    """The mark of the picture of the row ``a``: a hash of its place."""
    return f"md5({written_place_code(host)})::uuid"


def written_place_code(host: Host) -> str:
    """The place of the picture of the row ``a``: the columns that say where it is, as they stand."""
    places = []
    if host.object:
        places.append(f"a.{quote(host.object)}::text")
    if host.path:
        default = literal(host.bucket or "")
        bucket = (
            f"coalesce(nullif(a.{quote(host.bucket_column)}::text, ''), {default})" if host.bucket_column else default
        )
        places.append(f"{bucket} || '/' || nullif({_text(host.path)}, '')")
    if host.url:  # a new signature of the same file is no new picture
        places.append(f"split_part(a.{quote(host.url)}, '?token=', 1)")
    return f"coalesce({', '.join(places)}, '')"
