"""Finds code of the project that would fail once the table of images has more columns, because it takes whole rows.

Triggers that act only inside the database are tried, in a transaction that is rolled back: one row is updated to itself
after the columns were added. SQL functions are checked against the new columns, but not run. If neither is possible,
the text of a function is searched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import Connection

from autotag.install.answers import HostError
from autotag.install.details import NOT_THE_PROJECTS
from autotag.install.host import Host
from autotag.install.quoting import literal, quote, table_name
from autotag.texts import name_some, printable

#: Extensions whose functions do nothing outside of their transaction. With any other extension, triggers are not tried,
#: because a request that a trigger waits for cannot be rolled back. (pg_net sends its requests when the transaction
#: commits.)
INSIDE = (
    "address_standardizer", "autoinc", "bloom", "btree_gin", "btree_gist", "citext", "cube", "dict_int", "dict_xsyn",
    "earthdistance", "fuzzystrmatch", "hstore", "hypopg", "index_advisor", "insert_username", "intarray", "isn", "lo",
    "ltree", "moddatetime", "pg_cron", "pg_graphql", "pg_hashids", "pg_jsonschema", "pg_net", "pg_stat_statements",
    "pg_trgm", "pgaudit", "pgcrypto", "pgjwt", "pgmq", "pgroonga", "pgrouting", "pgsodium", "pgtap", "plpgsql",
    "plpgsql_check", "plv8", "postgis", "postgis_topology", "refint", "rum", "seg", "supabase_vault", "tablefunc",
    "tcn", "tsm_system_rows", "tsm_system_time", "unaccent", "uuid-ossp", "vector",
)  # fmt: skip
_LEAVES = """
    select exists (select from pg_extension where extname <> all (%s)) or exists (select from pg_foreign_server)
      or exists (
        select from pg_proc p join pg_language l on l.oid = p.prolang
        where p.pronamespace <> 'pg_catalog'::regnamespace
          and not l.lanpltrusted and l.lanname not in ('internal', 'sql')
          and not exists (
            select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e'))"""
#: Functions that may take rows of the table: those of its triggers, and those that name it. Each with its return type.
_FUNCTIONS = """
    select p.oid::regprocedure::text, l.lanname::text, p.prosrc,
      p.prorettype = (select c.reltype from pg_class c where c.oid = %(table)s::regclass),
      (select string_agg(format('trigger %%I', t.tgname), ', ' order by t.tgname) from pg_trigger t
       where t.tgfoid = p.oid and t.tgrelid = %(table)s::regclass and not t.tgisinternal and t.tgenabled <> 'D')
    from pg_proc p join pg_language l on l.oid = p.prolang join pg_namespace n on n.oid = p.pronamespace
    where l.lanname in ('sql', 'plpgsql') and p.prosqlbody is null and n.nspname <> all (%(system)s)
      and n.nspname not like 'pg\\_%%'
      and not exists (
        select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e')
      and (strpos(lower(p.prosrc), lower(%(name)s)) > 0 or exists (
        select from pg_trigger t
        where t.tgfoid = p.oid and t.tgrelid = %(table)s::regclass and not t.tgisinternal and t.tgenabled <> 'D'))
    order by 1"""
#: Whether the table has triggers that an update fires.
_FIRES = """
    select exists (
      select from pg_trigger
      where tgrelid = %s::regclass and not tgisinternal and tgtype & 16 <> 0 and tgenabled <> 'D')"""
#: A trigger's row as a list of columns, and uses of it that more columns do not break: in a comparison with another
#: row, or as the argument of a function (to_jsonb(new.*)).
_WHOLE_ROW = re.compile(r"(?:\b(?:old|new)|\(\s*(?:old|new|\$\d+)\s*\))\s*\.\s*\*", re.IGNORECASE)
_ROW = r"(?:row\s*\(\s*)?\(?\s*(?:old|new)\s*\)?\s*\.\s*\*\s*\)?"
_HARMLESS = re.compile(
    rf"{_ROW}\s*(?:is\s+(?:not\s+)?distinct\s+from|=|<>|!=)\s*{_ROW}"
    r"|\b(?!values\b|row\b|select\b)\w+\s*\(\s*(?:old|new)\s*\.\s*\*\s*\)",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
TRIED = "AT003"  # the sqlstate that rolls the trial back
#: Adds the columns and reports, as JSON, what fails only with them: functions, and the error of an update with its
#: context.
_TRIAL = """
begin;
set local statement_timeout = '5s';
set local lock_timeout = '1s';
do {body};
"""
_BODY = """
declare
  v_functions oid[] := {functions}::regprocedure[]::oid[];
  v_oid oid;
  v_failed oid[] := '{{}}';
  v_error text;
  v_context text;
  v_update text := (
    select format('update {table} set %s where {id} = (select {id} from {table} limit 1)',
      string_agg(format('%1$I = %1$I', a.attname), ', '))
    from pg_attribute a
    where a.attrelid = {table_text}::regclass and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
      and a.attidentity <> 'a');
begin
  begin
    execute {columns};
    set local check_function_bodies = on;  -- the adapter turns it off
    foreach v_oid in array v_functions loop
      begin
        perform pg_catalog.fmgr_sql_validator(v_oid);
      exception when others then
        v_failed := v_failed || v_oid;
      end;
    end loop;
    if {tries} then
      begin
        execute v_update;
        set constraints all immediate;
      exception when others or assert_failure then
        get stacked diagnostics v_error = message_text, v_context = pg_exception_context;
      end;
    end if;
    raise exception using errcode = 'AT002';
  exception when sqlstate 'AT002' then null;
  end;
  -- what fails without the columns, too, is not about them
  foreach v_oid in array v_failed loop
    begin
      perform pg_catalog.fmgr_sql_validator(v_oid);
    exception when others then
      v_failed := array_remove(v_failed, v_oid);
    end;
  end loop;
  if v_error is not null then
    begin
      execute v_update;
      set constraints all immediate;
    exception when others or assert_failure then
      v_error := null;
    end;
  end if;
  raise exception using errcode = 'AT003', message = jsonb_build_object(
    'functions', v_failed::regprocedure[]::text[], 'error', v_error, 'context', v_context)::text;
end"""


def check_rows(connection: Connection[Any], host: Host, adapter: str) -> list[str]:
    """Finds code of the project that fails, or may fail, once the table of images has autotag's columns.

    Args:
        connection: of the database's owner, in autocommit mode. It cannot be used afterwards.
        host: the project's tables.
        adapter: the SQL of the adapter for them.

    Returns:
        What a person should know.

    Raises:
        HostError: the update of a row fails only with these columns.
    """
    table = table_name(host.table)
    found = connection.execute(
        _FUNCTIONS.encode(), {"table": table, "system": list(NOT_THE_PROJECTS), "name": host.table.partition(".")[2]}
    ).fetchall()
    checked = [name for name, language, *_ in found if language == "sql"]
    fires = connection.execute(_FIRES.encode(), (table,)).fetchone() == (True,)
    tries = fires and connection.execute(_LEAVES.encode(), (list(INSIDE),)).fetchone() == (False,)
    notes, failed = [], list[str]()
    if checked or tries:
        try:
            trial = _try(connection, host, adapter, checked, tries=tries)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
            notes.append(
                f"Whether {host.table} takes new columns was not tried, because another session holds it, or because"
                " its triggers take long; to try it, run this again."
            )
        except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction):
            raise
        except psycopg.Error:
            pass  # the adapter cannot be applied either, and preview.py reports the reason
        else:
            _refuse(host, trial)
            failed = trial["functions"]
    if failed:
        notes.append(
            f"Attention: {name_some(failed)} will fail once {host.table} has autotag's columns, because it takes whole"
            " rows (select *); let it name its columns before you apply the files."
        )
    doubtful = [
        f"{name} ({triggers})" if triggers else name
        for name, language, text, rows, triggers in found
        if name not in failed and _takes_rows(text, host.table, language, rows=rows, trigger=bool(triggers))
    ]
    if doubtful:
        notes.append(
            f"Attention: {name_some(doubtful)} takes whole rows of {host.table} (old.*, new.*, select *). If these go"
            " to a table or a result with just as many columns, that fails once autotag has added its own; let it name"
            " its columns before you apply the files."
        )
    return notes


def _try(
    connection: Connection[Any], host: Host, adapter: str, functions: Sequence[str], *, tries: bool
) -> dict[str, Any]:
    columns = adapter.partition("create or replace function")[0]  # the statements before the functions change the table
    table = table_name(host.table)
    body = _BODY.format(
        functions=f"array[{', '.join(map(literal, functions))}]" if functions else "'{}'", columns=literal(columns),
        id=_in_format(quote(host.id)), table=_in_format(table), table_text=literal(table), tries=str(tries).lower(),
    )  # fmt: skip
    try:
        connection.execute(_TRIAL.format(body=literal(body)).encode())
    except psycopg.Error as error:
        if error.sqlstate == TRIED:
            found: dict[str, Any] = json.loads(error.diag.message_primary or "{}")
            return found
        raise
    finally:
        connection.rollback()
    return {"functions": [], "error": None}


def _in_format(name: str) -> str:
    """A name inside a string that is the first argument of format()."""
    return name.replace("'", "''").replace("%", "%%")


def _refuse(host: Host, trial: dict[str, Any]) -> None:
    if not trial["error"]:
        return
    where = re.search(r"function (\S+\))", trial["context"] or "")
    raise HostError(
        f"Once {host.table} has autotag's columns, an update of a row fails{f' in {where[1]}' if where else ''}"
        f" ({printable(trial['error'], 200)}), so your app could not write there. Nothing was changed; let that"
        " function name its columns (insert into … (a, b) select old.a, old.b), then run this again."
    )


def _takes_rows(text: str, table: str, language: str, *, rows: bool, trigger: bool) -> bool:
    """Whether a function takes rows of the table as a list of its columns, as far as its text shows."""
    text = _COMMENT.sub(" ", text)
    if trigger:
        return bool(_WHOLE_ROW.search(_HARMLESS.sub(" ", text)))
    if language == "sql":
        return False  # it was checked
    name = re.escape(table.partition(".")[2])
    every = rf"select\s+(?:[^;]*?[\s,.])?\*[^;]*?\bfrom\s+(?:\"?\w+\"?\.)?\"?{name}\"?(?!\w)"
    if re.search(rf"\binsert\s+into\b[^;]*?\b{every}", text, re.IGNORECASE):
        return True
    query = rf"select\s+(?!\*|\w+\.\*)[^;]*?\bfrom\s+(?:\"?\w+\"?\.)?\"?{name}\"?(?!\w)" if rows else every
    return bool(re.search(rf"\breturn\s+query\s+{query}", text, re.IGNORECASE))
