"""Writes the SQL that finds the image of a row: a file in Storage or a URL, in the forms that apps store.

Blanks around a path are removed, and several slashes count as one, as in supabase-js. An empty string is null. A path
may begin with the name of its bucket (``fullPath`` of an upload's reply). The adapter does not look that up for each
image; instead, `init` looks at the existing rows (`files.find_full_paths`). If their paths do not begin with it, or
there are no rows, a path is taken unchanged if the file rule allows that. Otherwise, if it begins with its bucket's
name, that name is removed.
"""

from __future__ import annotations

from autotag.install.host import Host
from autotag.install.quoting import literal, quote

BLANKS, ENDS = r"e' \t\r\n'", r"e' \t\r\n/'"  # characters to remove around a URL, and around a path
IS_URL = r"E'^\\s*https?://'"
MAX_URL, MAX_PATH, MAX_BUCKET = 8192, 1024, 100  # bytes; docs/install.md names them
MAX_KEY = 1024  # bytes of a text id of a workspace or user; an index cannot hold a key over 2.7 kB


def location_code(host: Host, as_written: str | None, guard: str) -> str:
    """The joins after the table ``a`` that compute ``f`` (bucket, path, url).

    Args:
        host: the project's tables.
        as_written: the file rule for an unchanged path (``s``); None: the rule does not decide that.
        guard: the condition that the values of a row may be read, because they may have gigabytes.
    """
    joins = []
    if host.object:
        joins.append(f"left join storage.objects o on o.id = a.{quote(host.object)}")
    values = {"bucket": _bucket(host), "path": _path(host), "url": _url(host)}
    columns = ", ".join(f"case when {guard} then {code} end as {name}" for name, code in values.items())
    path = "s.path"
    if host.path and (host.full_paths or as_written):
        with_bucket = "starts_with(s.path, s.bucket || '/')"
        with_bucket += "" if host.full_paths else f" and not coalesce({as_written}, false)"
        path = f"case when {with_bucket} then substr(s.path, length(s.bucket) + 2) else s.path end"
    bucket, url = "case when s.path is not null then s.bucket end", "s.url"
    # `offset 0` prevents the planner from repeating the expressions of s and f for each use. A join of its own costs
    # 1 µs an image, so s stands within f.
    source = f"from (select {columns} offset 0) s"
    if host.storage_hosts:
        file = "case when s.path is null then autotag.storage_file(s.url) end"
        source += f" cross join lateral (select {file} as file offset 0) u"
        bucket, path = f"coalesce(u.file[1], {bucket})", f"coalesce(u.file[2], {path})"
        url = "case when u.file is null then s.url end"
    fields = f"{bucket} as bucket, ({path})::text as path, {url} as url"
    joins.append(f"cross join lateral (select {fields} {source} offset 0) f")
    return "\n      ".join(joins)


def _path(host: Host) -> str:
    if host.object:
        return "o.name"
    if not host.path:
        return "null::text"
    # Nearly no path has a double slash. Testing for one takes half a microsecond; the regular expression takes three.
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
    """The condition that a value is too long for a location. It reads only the length of the value."""
    limits = {host.url: MAX_URL, host.path: MAX_PATH, host.bucket_column: MAX_BUCKET}
    limits |= {host.workspace: MAX_KEY} if host.workspace_type == "text" else {}
    checks = [f"coalesce(octet_length(a.{quote(name)}) > {most}, false)" for name, most in limits.items() if name]
    return " or ".join(checks) or "false"


def mark_code(host: Host) -> str:
    """The mark of the picture of the row ``a``: a hash of its location."""
    return f"md5({written_place_code(host)})::uuid"


def written_place_code(host: Host) -> str:
    """The location of the picture of the row ``a``, from the unchanged columns."""
    places = []
    if host.object:
        places.append(f"a.{quote(host.object)}::text")
    if host.path:
        default = literal(host.bucket or "")
        bucket = (
            f"coalesce(nullif(a.{quote(host.bucket_column)}::text, ''), {default})" if host.bucket_column else default
        )
        places.append(f"{bucket} || '/' || nullif({_text(host.path)}, '')")
    if host.url:  # without the token: a new signature of the same file does not make it a new picture
        places.append(f"split_part(a.{quote(host.url)}, '?token=', 1)")
    return f"coalesce({', '.join(places)}, '')"
