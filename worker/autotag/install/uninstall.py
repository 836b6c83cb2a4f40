"""Takes autotag out of a database: finds what is autotag's, what of the host's uses it, and drops the first.

Tags stay. Nothing of the host's is dropped unless the caller names it. Everything happens in one transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from autotag.install.losses import Loss, find_losses

STAGE_COLUMNS = ("tagging_stage", "tagging_progress", "tagging_eta", "tagging_error")
STAGE_CHECKS = ("assets_tagging_stage_check", "assets_tagging_progress_check")
RESULT_COLUMN = "tagging_result"
DROP_ROLES = "drop role <the workers' logins>, autotag_worker, autotag_operator;"
LOCK_TIMEOUT = "2s"  # for the table of images, so that no session queues behind this one for long
#: The functions that autotag has in public. One of the host's with the same name does not call autotag.
RPCS = (
    "enqueue_tagging", "cancel_tagging", "retry_tagging", "tagging_job", "tagging_jobs", "tagging_strategy",
    "check_rate_limit", "peek_rate_limit", "tagging_usage", "tagging_profile", "set_tagging_profile",
    "tagging_vocabulary",
    "set_tagging_vocabulary", "edit_tagging_vocabulary", "openai_webhook",
)  # fmt: skip
#: The views and types that autotag has in public (supabase/schemas/api_types.sql, tables/limits.sql).
VIEWS = (
    "workspace_rate_limits", "tagging_stage_counts", "tagging_batch_result", "tagging_vocabulary_tag",
    "tagging_job_result", "tagging_upload_result", "tagging_cancel_result", "tagging_strategy_result",
    "tagging_limit_result", "tagging_usage_result", "tagging_profile_result", "tagging_vocabulary_result",
    "tagging_vocabulary_change", "tagging_webhook_result",
)  # fmt: skip
#: With their labels: an enum that a removal by hand has left is autotag's only if it has just these.
TYPES = {
    "tagging_stage": ["queued", "preparing", "submitted", "processing", "completing", "completed", "failed"],
    "tagging_strategy_name": ["realtime", "realtime-chunked", "batch", "batch-parallel"],
    "tagging_request_type": ["realtime", "batch"],
    "tagging_job_status": ["running", "cancelling", "completed", "cancelled"],
}
_ENUMS = """
    select t.typname::text, array_agg(e.enumlabel::text order by e.enumsortorder)
    from pg_type t join pg_enum e on e.enumtypid = t.oid
    where t.typnamespace = 'public'::regnamespace and t.typname = any (%s) group by t.typname order by 1"""
_FUNCTIONS = """
    select p.oid::regprocedure::text, 'function ' || p.oid::regprocedure from pg_proc p
    where p.pronamespace = 'public'::regnamespace and p.proname = any (%s)
      and coalesce(pg_get_function_sqlbody(p.oid), p.prosrc) like '%%autotag.%%' order by 1"""
_POLICIES = """
    select format('%I on %I.%I', policyname, schemaname, tablename),
      format('policy "%s" on %s.%s', policyname, schemaname, tablename)
    from pg_policies where policyname like 'autotag: %' order by 1"""
#: With those of autotag's columns that they have, whether or not this login may use them.
_TABLES = """
    select a.attrelid::regclass::text,
      array_agg(a.attname::text order by array_position(%(all)s::text[], a.attname::text))
    from pg_attribute a join pg_class c on c.oid = a.attrelid
    where c.relkind in ('r', 'p') and not c.relispartition and not a.attisdropped and a.attname = any (%(all)s)
      and c.relnamespace::regnamespace::text not in ('autotag', 'pg_catalog', 'information_schema')
    group by a.attrelid having array_agg(a.attname::text) @> %(stages)s::text[] order by 1"""
#: While the adapter is there, it says which table has the images. A copy of that table has the same columns.
_IMAGE_TABLE = "select autotag.image_table()::text"
#: The columns of the stages stay: an image that is being tagged has to say that nobody will.
_FAIL_UNFINISHED = """
    select autotag.show_stage(array_agg(t.asset_id), t.workspace_id, 'failed', 0, null,
      array_agg('autotag was removed from this project before the image was tagged.'::text))
    from autotag.tasks t where t.finished_at is null group by t.workspace_id"""
_HISTORY = """
    select version, version || '_' || name from supabase_migrations.schema_migrations
    where name like 'autotag\\_%' and name <> 'autotag_host_baseline' order by 1"""
_JOBS = "select jobid, jobname::text from cron.job where jobname like 'autotag-%' order by 2"
_HAS_RELATION = "select to_regclass(%s) is not null"
#: Every object that Postgres would drop with autotag's. A rule of a view stands for its view.
_DEPENDENTS = """
    with recursive own (class, id, part) as (
      select 'pg_namespace'::regclass::oid, n.oid, 0 from pg_namespace n where n.nspname = 'autotag'
      union select 'pg_proc'::regclass::oid, f::regprocedure::oid, 0 from unnest(%(functions)s::text[]) f
      union select 'pg_class'::regclass::oid, to_regclass('public.' || v)::oid, 0 from unnest(%(views)s::text[]) v
      union select 'pg_type'::regclass::oid, to_regtype('public.' || t)::oid, 0 from unnest(%(types)s::text[]) t
      union select 'pg_class'::regclass::oid, a.attrelid, a.attnum::integer from pg_attribute a
        where a.attrelid = any (%(tables)s::text[]::regclass[]) and a.attname = any (%(columns)s)
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
      and coalesce(g.tgname not like 'autotag\\_%%' and not g.tgisinternal, true)
      and coalesce(p.polname not like 'autotag: %%'
        and p.polrelid not in (select x.oid from pg_class x where x.relnamespace = to_regnamespace('autotag')), true)
      and coalesce(c.conname <> all (%(checks)s::text[])
        and coalesce((select x.relnamespace from pg_class x where x.oid = c.conrelid), 0) <> to_regnamespace('autotag')
        and coalesce((select x.typnamespace from pg_type x where x.oid = c.contypid), 0) <> to_regnamespace('autotag'),
        true)
      and coalesce((select x.typtype = 'd' from pg_type x where f.class = 'pg_type'::regclass and x.oid = f.id), true)
      and not (f.class in ('pg_attrdef'::regclass, 'pg_rewrite'::regclass, 'pg_trigger'::regclass)
        and o.identity ~ '(^| )(on|for) autotag[.]')
    order by 1"""
#: Functions and jobs of the host whose text names autotag: Postgres does not know that they use it.
_MENTIONS = """
    select 'function ' || p.oid::regprocedure from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where n.nspname <> 'autotag' and n.nspname not like 'pg\\_%%' and n.nspname <> 'information_schema'
      and p.oid::regprocedure::text <> all (%(functions)s::text[])
      and p.prosrc ~ ('\\mautotag\\.|\\m(' || array_to_string(%(names)s::text[], '|') || ')\\s*\\(')
      and not exists (
        select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e')
    order by 1"""

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Plan:
    """What is autotag's in a database, and what uses it.

    Attributes:
        schema: whether the schema autotag is there.
        objects: autotag's objects outside its schema.
        columns: "table.column" of the columns to drop.
        kept: "table.column" of those that stay.
        jobs: the names of pg_cron's jobs.
        migrations: rows of the migration history.
        yours: objects of the host that Postgres would drop with autotag's, and functions that call it.
        unfinished: images that are being tagged.
        losses: what is nowhere else and goes with the schema.
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

    @property
    def empty(self) -> bool:
        """Whether there is nothing to drop."""
        return not (self.schema or self.objects or self.columns or self.jobs or self.migrations)


class InUse(Exception):
    """Objects of the host use autotag, and the caller has not named them. The message lists them."""


def make_plan(url: str, *, keep_stages: bool = False, drop_results: bool = False) -> Plan:
    """What `drop_autotag` would drop. Changes nothing.

    Args:
        url: connection URL of the database's owner.
        keep_stages: the columns with the stage of an image stay.
        drop_results: the column ``tagging_result`` goes.

    Raises:
        psycopg.Error: the database cannot be read.
    """
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        return _plan(connection, keep_stages=keep_stages, drop_results=drop_results)


def drop_autotag(
    url: str, *, keep_stages: bool = False, drop_results: bool = False, also: Collection[str] = ()
) -> Plan:
    """Drops what is autotag's, in one transaction, and returns what that was.

    Args:
        url: connection URL of the database's owner.
        keep_stages: the columns with the stage of an image stay.
        drop_results: the column ``tagging_result`` goes.
        also: the host's objects (as `Plan.yours` names them) that may be dropped or may stop working.

    Raises:
        InUse: the host uses something that would go, and ``also`` does not name it.
        psycopg.errors.LockNotAvailable: another session holds the table of images.
        psycopg.Error: nothing was dropped.
    """
    with psycopg.connect(url, connect_timeout=10) as connection:  # commits at the end
        connection.execute(sql.SQL("set local lock_timeout = {}").format(LOCK_TIMEOUT))
        plan = _plan(connection, keep_stages=keep_stages, drop_results=drop_results)
        unnamed = [name for name in plan.yours if name not in also]
        if unnamed:
            raise InUse(", ".join(unnamed))
        _drop(connection, plan)
    return plan


def _plan(connection: Connection, *, keep_stages: bool, drop_results: bool) -> Plan:
    schema = _exists(connection, "select to_regnamespace('autotag') is not null")
    functions = connection.execute(_FUNCTIONS, (list(RPCS),)).fetchall()
    policies = connection.execute(_POLICIES).fetchall()
    tables = _tables(connection)
    gone = (() if keep_stages else STAGE_COLUMNS) + ((RESULT_COLUMN,) if drop_results else ())
    there = [(table, column) for table, columns in _like_images(connection).items() for column in columns]
    views = [name for name in VIEWS if schema and _exists(connection, _HAS_RELATION, (f"public.{name}",))]
    enums = connection.execute(_ENUMS, (list(TYPES),)).fetchall()
    types = [name for name, labels in enums if schema or labels == TYPES[name]]
    names = [row[0] for row in functions]
    used = connection.execute(
        _DEPENDENTS,
        {"functions": names, "views": views, "types": types, "tables": tables, "columns": list(gone),
         "checks": list(STAGE_CHECKS)},
    ).fetchall()  # fmt: skip
    yours = [row[0] for row in used]
    mentions = connection.execute(_MENTIONS, {"functions": names, "names": list(RPCS)}).fetchall()
    yours += [row[0] for row in mentions if row[0] not in yours]
    waiting = schema and _exists(connection, "select to_regclass('autotag.tasks') is not null")
    count = "select count(*) from autotag.tasks where finished_at is null"
    return Plan(
        schema=schema,
        objects=[label for _, label in functions] + [label for _, label in policies]
        + [f"view public.{name}" for name in views] + [f"type public.{name}" for name in types],
        columns=[f"{table}.{column}" for table, column in there if column in gone and table in tables],
        kept=[f"{table}.{column}" for table, column in there if column not in gone or table not in tables],
        jobs=_names(connection, "cron.job", _JOBS),
        migrations=_names(connection, "supabase_migrations.schema_migrations", _HISTORY),
        yours=yours,
        unfinished=int(_one(connection, count)) if waiting else 0,
        losses=find_losses(connection),
    )  # fmt: skip


def _drop(connection: Connection, plan: Plan) -> None:
    """Drops what a plan names. What uses it goes, too; the caller has checked that."""
    tables = _tables(connection)
    if plan.unfinished and tables and not any(column.endswith(".tagging_stage") for column in plan.columns):
        connection.execute(_FAIL_UNFINISHED)
        connection.execute("set constraints all immediate")  # with events of triggers waiting, no table can be altered
    if plan.jobs:
        connection.execute("select cron.unschedule(jobid) from cron.job where jobname = any (%s)", (plan.jobs,))
    for identity, _ in connection.execute(_POLICIES).fetchall():
        connection.execute(f"drop policy {identity}".encode())
    for identity, _ in connection.execute(_FUNCTIONS, (list(RPCS),)).fetchall():
        connection.execute(f"drop function {identity} cascade".encode())
    for label in plan.objects:
        kind, _, name = label.partition(" ")
        if kind in ("view", "type"):
            connection.execute(f"drop {kind} if exists {name} cascade".encode())
    connection.execute("drop schema if exists autotag cascade")
    for table in tables:
        for check in STAGE_CHECKS:
            connection.execute(f"alter table {table} drop constraint if exists {check}".encode())
    for column in plan.columns:
        table, _, name = column.rpartition(".")
        connection.execute(f"alter table {table} drop column {name} cascade".encode())
    if plan.migrations:
        connection.execute(
            "delete from supabase_migrations.schema_migrations where version || '_' || name = any (%s)",
            (plan.migrations,),
        )


def _tables(connection: Connection) -> list[str]:
    """The table of images. Where the adapter is gone already: the only table with autotag's stage columns, or none."""
    found = [*_like_images(connection)]
    if _exists(connection, "select to_regprocedure('autotag.image_table()') is not null"):
        try:
            with connection.transaction():
                return [name for name in found if name == _one(connection, _IMAGE_TABLE)]
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            return []
    return found if len(found) == 1 else []


def _like_images(connection: Connection) -> dict[str, list[str]]:
    """The table of images and copies of it: those with autotag's stage columns. With autotag's columns in each."""
    every = {"stages": list(STAGE_COLUMNS), "all": [*STAGE_COLUMNS, RESULT_COLUMN]}
    return dict(connection.execute(_TABLES, every).fetchall())


def _names(connection: Connection, table: str, statement: str) -> list[str]:
    """The second column of a statement's rows; none if its table is missing."""
    if not _exists(connection, _HAS_RELATION, (table,)):
        return []
    return [row[1] for row in connection.execute(statement.encode()).fetchall()]


def _exists(connection: Connection, statement: str, values: Sequence[Any] = ()) -> bool:
    return bool(_one(connection, statement, values))


def _one(connection: Connection, statement: str, values: Sequence[Any] = ()) -> Any:
    row = connection.execute(statement.encode(), values or None).fetchone()
    return row and row[0]
