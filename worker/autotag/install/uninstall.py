"""Uninstalls autotag: finds autotag's objects and the host's objects that use them, and drops autotag's.

Tags stay. The host's objects are dropped only if the caller names them. Everything happens in one transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import psycopg
from psycopg import sql

from autotag.install.keys import RESULT_COLUMN, STAGE_COLUMNS
from autotag.install.losses import Loss, find_losses
from autotag.install.own import of_engine
from autotag.install.remains import POLICY, Connection, Remains, find_remains, one

DROP_ROLES = "drop role <the workers' logins>, autotag_worker, autotag_operator;"
LOCK_TIMEOUT = "2s"  # for the table of images, so that no session queues behind this one for long
REMOVED = "autotag was removed from this project before the image was tagged."
_HAS_TASKS = "select to_regclass('autotag.tasks') is not null"
_UNFINISHED = "select count(*) from autotag.tasks where finished_at is null"
#: For installations whose stage columns stay: marks images that are being tagged as failed.
_FAIL_UNFINISHED = """
    select autotag.show_stage(array_agg(t.asset_id), t.workspace_id, 'failed', 0, null, array_agg(%s::text))
    from autotag.tasks t where t.finished_at is null group by t.workspace_id"""
#: The same if the adapter no longer names the table. Only autotag writes a column that it has added.
_FAIL_RENAMED = """
    update {table} set tagging_stage = 'failed', tagging_progress = 0, tagging_eta = null, tagging_error = %s
    where tagging_stage in ('queued', 'preparing', 'submitted', 'processing', 'completing')"""
#: Every object that Postgres would drop together with autotag's. A view's rule counts as the view.
_DEPENDENTS = """
    with recursive own (class, id, part) as (
      select 'pg_namespace'::regclass::oid, n.oid, 0 from pg_namespace n where n.nspname = 'autotag' and %(schema)s
      union select 'pg_proc'::regclass::oid, f::oid, 0 from unnest(%(functions)s::bigint[]) f
      union select 'pg_class'::regclass::oid, to_regclass('public.' || v)::oid, 0 from unnest(%(views)s::text[]) v
      union select 'pg_type'::regclass::oid, to_regtype('public.' || t)::oid, 0 from unnest(%(types)s::text[]) t
      union select 'pg_class'::regclass::oid, a.attrelid, a.attnum::integer from pg_attribute a
        where a.attrelid = to_regclass(%(table)s) and a.attname = any (%(columns)s::text[])
          and not a.attisdropped),
    found (class, id, part) as (
      select class, id, part from own where id is not null
      union
      select case when r.ev_class is not null then 'pg_class'::regclass::oid else d.classid end,
        coalesce(r.ev_class, d.objid), case when r.ev_class is not null then 0 else d.objsubid end
      from found f
      join pg_depend d on d.refclassid = f.class and d.refobjid = f.id and (f.part = 0 or d.refobjsubid = f.part)
        and d.deptype in ('n', 'a', 'i', 'P', 'S')
      left join pg_rewrite r on d.classid = 'pg_rewrite'::regclass and r.oid = d.objid)
    select distinct pg_describe_object(f.class, f.id, f.part) as what
    from found f
    left join pg_trigger g on f.class = 'pg_trigger'::regclass and g.oid = f.id
    left join pg_policy p on f.class = 'pg_policy'::regclass and p.oid = f.id
    left join pg_constraint c on f.class = 'pg_constraint'::regclass and c.oid = f.id
    cross join lateral pg_identify_object(f.class, f.id, f.part) o
    where not exists (select from own o where o.class = f.class and o.id = f.id and o.part in (0, f.part))
      and coalesce(o.schema, '') not in ('autotag', 'pg_toast') and o.type not in ('toast table', 'default acl')
      and coalesce(not (g.tgname = 'autotag_collect' and g.tgfoid = coalesce(to_regproc('autotag.collect_inserted'), 0))
        and not g.tgisinternal, true)
      and coalesce(not (p.polname = %(policy)s and p.polrelid = coalesce(to_regclass('realtime.messages'), 0))
        and p.polrelid not in (select x.oid from pg_class x where x.relnamespace = to_regnamespace('autotag')), true)
      and coalesce(c.oid <> all (%(checks)s::bigint[]::oid[])
        and coalesce((select x.relnamespace from pg_class x where x.oid = c.conrelid), 0) <> to_regnamespace('autotag')
        and coalesce((select x.typnamespace from pg_type x where x.oid = c.contypid), 0) <> to_regnamespace('autotag'),
        true)
      and coalesce((select x.typtype = 'd' from pg_type x where f.class = 'pg_type'::regclass and x.oid = f.id), true)
      and not (f.class in ('pg_attrdef'::regclass, 'pg_rewrite'::regclass, 'pg_trigger'::regclass)
        and o.identity ~ '(^| )(on|for) autotag[.]')
    order by 1"""
#: The host's functions whose text names autotag or calls its functions. Postgres does not track these dependencies.
#: Calls of functions of the same name in other schemas do not count, nor do calls with a search_path without public.
_MENTIONS = r"""
    select 'function ' || p.oid::regprocedure from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where n.nspname <> 'autotag' and n.nspname not like 'pg\_%%' and n.nspname <> 'information_schema'
      and p.oid <> all (%(functions)s::bigint[]::oid[])
      and ((%(schema)s or to_regnamespace('autotag') is null) and p.prosrc ~ '(^|[^.\w"])"?autotag"?\.'
        or p.prosrc ~ ('(^|[^.\w"])"?public"?\s*\.\s*"?(' || %(names)s || ')"?\s*\(')
        or p.prosrc ~ ('(^|[^.\w"])"?(' || %(names)s || ')"?\s*\(') and not exists (
          select from unnest(p.proconfig) s where starts_with(s, 'search_path=') and s !~ '\mpublic\M'))
      and not exists (
        select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e')
    order by 1"""


@dataclass(frozen=True)
class Plan:
    """autotag's objects in a database, and the objects that use them.

    Attributes:
        schema: whether the schema autotag is there.
        objects: autotag's objects outside its schema.
        columns: "table.column" of the columns to drop.
        kept: "table.column" of those that stay.
        jobs: the names of pg_cron's jobs.
        migrations: rows of the migration history.
        yours: the host's objects that Postgres would drop with autotag's or that are in autotag's schema, and functions
            that call autotag.
        unfinished: images that are being tagged.
        losses: data that exists nowhere else and is dropped with the schema.
        unmarked: "table.column" of columns with autotag's names that the table had before; they stay.
    """

    schema: bool
    objects: list[str]
    columns: list[str]
    kept: list[str]
    jobs: list[str]
    migrations: list[str]
    yours: list[str]
    unfinished: int
    losses: list[Loss] = field(default_factory=list)
    unmarked: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to drop."""
        return not (self.schema or self.objects or self.columns or self.jobs or self.migrations)


class InUse(Exception):
    """Objects of the host use autotag, and the caller has not named them. The message lists them."""


def make_plan(url: str, *, keep_stages: bool = False, drop_results: bool = False) -> Plan:
    """Lists what `drop_autotag` would drop. Changes nothing.

    Args:
        url: connection URL of the database's owner.
        keep_stages: the columns with the stage of an image stay.
        drop_results: the column ``tagging_result`` goes.

    Raises:
        psycopg.Error: the database cannot be read.
    """
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        found = find_remains(connection)
        return _plan(connection, found, keep_stages=keep_stages, drop_results=drop_results)


def drop_autotag(
    url: str, *, keep_stages: bool = False, drop_results: bool = False, also: Collection[str] = ()
) -> Plan:
    """Drops autotag's objects in one transaction, and returns the plan that it carried out.

    Args:
        url: connection URL of the database's owner.
        keep_stages: the columns with the stage of an image stay.
        drop_results: the column ``tagging_result`` goes.
        also: the host's objects (as `Plan.yours` names them) that may be dropped or may stop working.

    Raises:
        InUse: an object of the host uses something that would be dropped, and ``also`` does not name it.
        psycopg.errors.LockNotAvailable: another session holds the table of images.
        psycopg.Error: nothing was dropped.
    """
    with psycopg.connect(url, connect_timeout=10) as connection:  # commits at the end
        connection.execute(sql.SQL("set local lock_timeout = {}").format(LOCK_TIMEOUT))
        found = find_remains(connection)
        plan = _plan(connection, found, keep_stages=keep_stages, drop_results=drop_results)
        unnamed = [name for name in plan.yours if name not in also]
        if unnamed:
            raise InUse(", ".join(unnamed))
        _drop(connection, found, plan)
    return plan


def _plan(connection: Connection, found: Remains, *, keep_stages: bool, drop_results: bool) -> Plan:
    gone = (() if keep_stages else tuple(STAGE_COLUMNS)) + ((RESULT_COLUMN,) if drop_results else ())
    dropped = [f"{found.table}.{column}" for column in found.made if column in gone]
    there = [(table, column) for table, columns in found.columns.items() for column in columns]
    others = found.columns.get(found.table or "", [])
    plan = Plan(
        schema=found.adapter,
        objects=[f"function {name}" for name in found.functions.values()]
        + ([f'policy "{POLICY}" on realtime.messages'] if found.policy else [])
        + [f"view public.{name}" for name in found.views] + [f"type public.{name}" for name in found.types],
        columns=dropped,
        kept=[name for name in (f"{table}.{column}" for table, column in there) if name not in dropped],
        jobs=[*found.jobs.values()],
        migrations=found.migrations,
        yours=[],
        unmarked=[f"{found.table}.{column}" for column in others if column in gone and column not in found.made],
        unfinished=int(one(connection, _UNFINISHED)) if found.engine and one(connection, _HAS_TASKS) else 0,
        losses=find_losses(connection) if found.engine else [],
    )  # fmt: skip
    return plan if plan.empty else replace(plan, yours=_users(connection, found, gone))


def _users(connection: Connection, found: Remains, gone: Sequence[str]) -> list[str]:
    """The host's objects that use something which would be dropped, or that are in autotag's schema."""
    functions = [*found.functions]
    used = connection.execute(
        _DEPENDENTS,
        {"schema": found.adapter, "functions": functions, "views": found.views, "types": found.types,
         "table": found.table, "columns": [column for column in found.made if column in gone],
         "checks": [*found.checks], "policy": POLICY},
    ).fetchall()  # fmt: skip
    calls = sorted({name.partition("(")[0].removeprefix("public.") for name in of_engine().functions
                    if name.startswith("public.")})  # fmt: skip
    mentions = connection.execute(
        _MENTIONS, {"functions": functions, "names": "|".join(calls), "schema": found.adapter}
    ).fetchall()
    return list(dict.fromkeys([*found.strangers, *(row[0] for row in [*used, *mentions])]))


def _drop(connection: Connection, found: Remains, plan: Plan) -> None:
    """Drops the objects of a plan and everything that uses them, which the caller has checked."""
    if plan.unfinished and found.table and f"{found.table}.tagging_stage" not in plan.columns:
        if found.resolved:
            connection.execute(_FAIL_UNFINISHED, (REMOVED,))
        elif "tagging_stage" in found.made:
            connection.execute(_FAIL_RENAMED.format(table=found.table).encode(), (REMOVED,))
        connection.execute("set constraints all immediate")  # a table with pending trigger events cannot be altered
    for job in found.jobs:
        connection.execute("select cron.unschedule(%s::bigint)", (job,))
    if found.policy:
        connection.execute(f'drop policy "{POLICY}" on realtime.messages'.encode())
    for name in found.functions.values():
        connection.execute(f"drop function {name} cascade".encode())
    for kind, names in (("view", found.views), ("type", found.types)):
        for name in names:
            connection.execute(f"drop {kind} if exists public.{name} cascade".encode())
    if found.adapter:
        connection.execute("drop schema autotag cascade")
    for name in found.checks.values():
        connection.execute(f"alter table {found.table} drop constraint {name}".encode())
    for column in plan.columns:
        connection.execute(f"alter table {found.table} drop column {column.rpartition('.')[2]} cascade".encode())
    if plan.migrations:
        connection.execute(
            "delete from supabase_migrations.schema_migrations where version || '_' || name = any (%s)",
            (plan.migrations,),
        )
