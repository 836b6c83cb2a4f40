"""A project's tables as text for people."""

from __future__ import annotations

from autotag.install.facts import Facts
from autotag.install.host import Host
from autotag.install.quoting import quote, table_name


def describe(host: Host, facts: Facts) -> dict[str, str]:
    """The host as text for people: the name of a fact -> the fact."""
    columns = facts.tables[host.table].columns if host.table in facts.tables else {}
    bucket = host.bucket_column or host.bucket or "in the path"
    places = [f"bucket {bucket}, path {host.path}"] if host.path else []
    if host.path and host.full_paths and bucket != "in the path":
        places[0] += ", which begins with the bucket"
    places += [f"object of Storage {host.object}"] if host.object else []
    places += [f"url {host.url}"] if host.url else []
    places += [f"URLs of {', '.join(host.storage_hosts)} are files"] if host.storage_hosts else []
    added = [name for name in (host.tags, host.result) if name not in columns]
    return {
        "images": f"{host.table} (id {host.id}, workspace {host.workspace})",
        "where an image is": "; ".join(places),
        "tags go to": f"{host.tags} ({host.tags_type}), {host.result}"
        + (f"; added: {', '.join(added)}" if added else ""),
        "members": str(host.members),
        "which images they may tag": _describe_rows(host, facts),
        "whose a file is": _describe_files(host),
        **({"who a caller is": f"claim {'.'.join(host.caller)} ({host.user_type})"} if host.caller else {}),
        **({"only rows where": host.where} if host.where else {}),
    }


def _describe_rows(host: Host, facts: Facts) -> str:
    """Which images of their workspace the members may tag: those that they see (``autotag.visible_assets``)."""
    table = facts.tables.get(host.table)
    if table is None or not table.users_read:
        return "all of their workspace (signed-in users have no privilege to read the table)"
    if not table.row_security:
        return "all of their workspace (row level security is off)"
    if host.id not in table.users_read:
        grant = f"grant select ({quote(host.id)}) on {table_name(host.table)} to authenticated;"
        return f"none (signed-in users may read columns of the table, but not its ids: {grant})"
    return "those whose rows they see under row level security"


def _describe_files(host: Host) -> str:
    rule = host.files
    if rule.name == "none":
        return "rows name no files in Storage"
    folder = {"workspace-folder": "<workspace>", "uploader-folder": f"<{rule.uploader or 'member'}>"}.get(rule.name)
    above = rule.prefix or "*/" * (rule.depth - 1)
    text = f"{rule.name}" + (f": {above}{folder}/…" if folder else "")
    text += f" in {', '.join(rule.buckets)}" if rule.buckets else ""
    return text + ("" if host.users_see_files else "; row level security of storage.objects is not asked")
