"""Changes an installed adapter to new answers: replaces the functions that they change, in a migration of its own.

The adapter belongs to its project. It records the answers that `init` got, and a hash of each function
(`autotag.adapter_answers`). So answers that are not given again stay, and a function that the project has changed is
never replaced.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg

from autotag.install.adapter import FUNCTION, TEMPLATE, hash_body, render
from autotag.install.answers import HostError
from autotag.install.facts import Facts
from autotag.install.host import Host
from autotag.install.migrations import VERSION, Migration, version_time
from autotag.install.user_type import SWAP, stores_users
from autotag.install.written import Written, written_migrations
from autotag.texts import name_some

CHANGE = "adapter_change_"
_ADDS = re.compile(r"^do \$\$\n.*?^end \$\$;\n", re.MULTILINE | re.DOTALL)  # the adapter's block that adds columns
_HEAD = """\
-- Changes the host adapter to new answers of `autotag init`. It replaces {names}; everything else stays as it is.
set local lock_timeout = '1s';
set local statement_timeout = '30s';
set local check_function_bodies = off;
"""


def plan_change(url: str, facts: Facts, host: Host, folder: Path | None) -> Migration | None:
    """The migration that adapts the installed adapter to a host; None: it already fits.

    Args:
        url: connection URL of the database's owner.
        facts: of the project.
        host: its tables according to the new answers.
        folder: the project's migrations, if it has such a folder.

    Raises:
        HostError: these answers cannot change, the project has edited a function that would change, or an earlier
            change is written but not applied.
        psycopg.OperationalError: the database cannot be reached.
    """
    swap = _check_fixed(url, facts, host)
    written = {} if facts.answers is None else facts.answers["functions"]
    adapter = render(TEMPLATE.read_text("utf-8"), host)
    functions = {found["name"]: (found[0], hash_body(found["body"])) for found in FUNCTION.finditer(adapter)}
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        rows = connection.execute(
            "select p.proname::text, md5(replace(p.prosrc, e'\\r', '')) from pg_proc p"  # git may write CRLF
            " where p.pronamespace = 'autotag'::regnamespace and p.proname = any (%s)", (list(functions),),
        ).fetchall()  # fmt: skip
    installed = {str(name): str(found) for name, found in rows}
    changed = [
        name for name, (_, new) in functions.items()
        if name != "adapter_answers" and new not in (installed.get(name), written.get(name))
    ]  # fmt: skip
    edited = [f"autotag.{name}" for name in changed if installed.get(name) not in (None, written.get(name))]
    if edited:
        raise HostError(
            f"The project has changed {name_some(edited)} since autotag wrote it, and the new answers change it, too."
            " Nothing was written; put the new answers into it in a migration of your own."
        )
    columns = facts.tables[host.table].columns
    added = [] if {host.tags, host.result} <= set(columns) else _ADDS.findall(adapter)
    waiting = [file for name, file in _changes(folder).items() if name not in facts.applied]
    if not changed and not added:
        if waiting:
            raise HostError(
                f"{waiting[0].path.name} is not applied yet and changes the adapter to other answers; apply it"
                " (supabase db push) or delete it first."
            )
        return None
    names = name_some([f"autotag.{name}" for name in changed], len(changed))
    texts = [functions[name][0] for name in (*changed, "adapter_answers")]
    return _number(
        "\n".join([_HEAD.format(names=names), *swap, *added, *(f"{text}\n" for text in texts)]), facts, folder
    )


def _check_fixed(url: str, facts: Facts, host: Host) -> list[str]:
    """Refuses changes of answers on which stored data depends: other types of keys, another table, another column for
    tags.

    Returns the statement that changes the type of users' ids, if it can change.
    """
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        types = connection.execute(
            "select format_type(atttypid, null) from pg_attribute"
            " where attrelid = 'autotag.keys'::regclass and attname = any (%s)"
            " order by array_position(%s, attname::text)", (_KEYS, _KEYS),
        ).fetchall()  # fmt: skip
        present = [kind for (kind,) in types]
        swaps = present[2:] != [host.user_type] and not stores_users(connection)
    wanted = [host.id_type, host.workspace_type, host.user_type]
    if present != wanted and not (swaps and present[:2] == wanted[:2]):
        raise HostError(
            f"The new answers need ids of other types ({', '.join(wanted)}), and autotag has stored ids of the present"
            " ones; uninstall it first (docs/install.md)."
        )
    recorded = facts.answers["choices"] if facts.answers else {}
    if recorded.get("table") != host.table and recorded.get("table") in facts.tables:
        raise HostError(
            f"autotag tags {recorded['table']}, which is still there; to use {host.table}, uninstall it first"
            " (docs/install.md)."
        )
    if recorded.get("tags") != host.tags and recorded.get("tags") in facts.tables[host.table].columns:
        raise HostError(
            f"autotag remembers whose each tag in {recorded['tags']} is, so the tags cannot move to {host.tags}: they"
            f" would all count as removed. Rename {recorded['tags']} instead, and run this again."
        )
    return [SWAP.format(kind=host.user_type)] if swaps else []


_KEYS = ["asset_id", "workspace_id", "user_id"]


def _changes(folder: Path | None) -> dict[str, Written]:
    """The files that contain changes of the adapter, by name."""
    return {name: file for name, file in written_migrations(folder).items() if name.startswith(CHANGE)}


def _number(sql: str, facts: Facts, folder: Path | None) -> Migration:
    """The change as the next migration, or the same change if its file exists and is not applied yet."""
    files = _changes(folder)
    waiting = [name for name in files if name not in facts.applied]
    numbers = [int(name.removeprefix(CHANGE)) for name in {*files, *facts.applied} if name.startswith(CHANGE)]
    name = f"{CHANGE}{1 + max(numbers, default=0)}"
    for other in waiting:
        if files[other].sql != sql:
            raise HostError(
                f"{files[other].path.name} is not applied yet; apply it (supabase db push) or delete it first."
            )
        name = other
    later = [version_time(version) + timedelta(seconds=1) for version in facts.applied.values()]
    return Migration(max([datetime.now(UTC).replace(tzinfo=None), *later]).strftime(VERSION), name, sql)
