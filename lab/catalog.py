"""Lists the objects of an autotag database in a form in which two databases can be compared."""

from __future__ import annotations

from typing import Any

import psycopg

#: Each query returns an object's name and its definition.
PARTS = {
    "columns": """
        select c.oid::regclass || '.' || a.attname, concat_ws(' ', format_type(a.atttypid, a.atttypmod), a.attnotnull,
          a.attidentity, a.attgenerated, pg_get_expr(d.adbin, d.adrelid), a.attacl::text)
        from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
        where c.relkind in ('r', 'p', 'v', 'c') and {ours}""",
    "tables": """
        select c.oid::regclass::text, concat_ws(' ', c.relkind, c.relrowsecurity, c.relforcerowsecurity,
          (select string_agg(o, ',' order by o) from unnest(c.reloptions) o),
          (select string_agg(g::text, ',' order by g::text) from unnest(c.relacl) g))
        from pg_class c where c.relkind in ('r', 'p', 'v') and {ours}""",
    "views": "select c.oid::regclass::text, pg_get_viewdef(c.oid) from pg_class c where c.relkind = 'v' and {ours}",
    "constraints": """
        select c.oid::regclass || '.' || k.conname, pg_get_constraintdef(k.oid) from pg_constraint k
        join pg_class c on c.oid = k.conrelid where {ours}""",
    "indexes": """
        select i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid) from pg_index i
        join pg_class c on c.oid = i.indrelid where {ours}""",
    "triggers": """
        select c.oid::regclass || '.' || t.tgname, pg_get_triggerdef(t.oid) from pg_trigger t
        join pg_class c on c.oid = t.tgrelid where not t.tgisinternal and {ours}""",
    "policies": """
        select c.oid::regclass || '.' || p.polname, concat_ws(' ', p.polcmd, p.polroles::regrole[], p.polpermissive,
          pg_get_expr(p.polqual, c.oid), pg_get_expr(p.polwithcheck, c.oid))
        from pg_policy p join pg_class c on c.oid = p.polrelid""",
    "functions": """
        select p.oid::regprocedure::text, pg_get_functiondef(p.oid) || ' ' || coalesce(
          (select string_agg(g::text, ',' order by g::text) from unnest(p.proacl) g), 'default')
        from pg_proc p where p.prokind = 'f' and p.pronamespace in ('autotag'::regnamespace, 'public'::regnamespace)""",
    "schemas": """
        select nspname, (select string_agg(g::text, ',' order by g::text) from unnest(nspacl) g) from pg_namespace
        where nspname = 'autotag'""",
    "kinds of error": "select kind, to_jsonb(k)::text from autotag.error_kinds k",
    "models": "select name, to_jsonb(m)::text from autotag.models m",
    "settings": "select 'settings', to_jsonb(s)::text from autotag.settings s",
}
OURS = "(c.relnamespace = 'autotag'::regnamespace or c.oid = to_regclass('public.workspace_rate_limits'))"


def catalog(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """Every object by name. The order of columns is left out, because migrations append columns."""
    connection.execute("set search_path = pg_catalog")
    return {
        f"{part}: {name}": value or ""
        for part, statement in PARTS.items()
        for name, value in connection.execute(statement.format(ours=OURS).encode()).fetchall()
    }
