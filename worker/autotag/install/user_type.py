"""Changes the type of users' ids in an installed schema, for example from uuid to text, as long as no id is stored."""

from __future__ import annotations

from typing import Any

from psycopg import Connection

#: The type is part of signatures, so the functions that use it are created again, with their owners and rights. A new
#: owner needs `create` on the schema while it gets a function.
SWAP = """
-- The ids of users become {kind}. None is stored yet.
do $swap$
declare
  v_types oid[] := (select array[t.oid, t.typarray] from pg_type t where t.oid = 'autotag.user_id'::regtype);
  v_drop text[]; v_create text[]; v_rights text[]; v_column record; v_stored boolean; v_statement text;
begin
  select array_agg('drop function ' || p.oid::regprocedure), array_agg(pg_get_functiondef(p.oid)),
    array_agg(
      case when pg_get_userbyid(p.proowner) = current_user then ''
        when has_schema_privilege(p.proowner, p.pronamespace, 'create') then format('%s; ', g.give)
        else format('grant create on schema %1$s to %2$s; %3$s; revoke create on schema %1$s from %2$s; ',
          p.pronamespace::regnamespace, p.proowner::regrole, g.give) end
      || format('revoke all on function %s from public, anon, authenticated, service_role, %s', g.name,
        p.proowner::regrole)
      || (select coalesce(string_agg(format('; grant execute on function %s to %s%s', g.name,
            case a.grantee when 0 then 'public' else a.grantee::regrole::text end,
            case when a.is_grantable then ' with grant option' end), ''), '')
          from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a))
  into v_drop, v_create, v_rights
  from pg_proc p
  cross join lateral (select p.oid::regprocedure::text as name,
    format('alter function %s owner to %s', p.oid::regprocedure, p.proowner::regrole) as give) g
  where exists (
    select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid
      and d.refclassid = 'pg_type'::regclass and d.refobjid = any (v_types));
  foreach v_statement in array v_drop loop
    execute v_statement;
  end loop;
  alter domain autotag.user_id rename to user_id_before;
  create domain autotag.user_id as {kind};
  for v_column in
    select a.attrelid::regclass as in_table, quote_ident(a.attname) as name
    from pg_attribute a join pg_class c on c.oid = a.attrelid
    where a.atttypid = v_types[1] and c.relkind = 'r' and not a.attisdropped
  loop
    execute format('select exists (select from %s where %s is not null)', v_column.in_table, v_column.name)
      into v_stored;
    if v_stored then
      raise exception 'autotag has stored ids of users by now (%), so their type cannot change', v_column.in_table;
    end if;
    execute format('alter table %s alter column %s type autotag.user_id using null', v_column.in_table, v_column.name);
  end loop;
  alter type autotag.keys alter attribute user_id type {kind};
  drop domain autotag.user_id_before;
  foreach v_statement in array v_create || v_rights loop
    execute v_statement;
  end loop;
end $swap$;
"""


def stores_users(connection: Connection[tuple[Any, ...]]) -> bool:
    """Whether the installed schema has stored an id of a user."""
    columns = connection.execute(
        "select a.attrelid::regclass::text, quote_ident(a.attname) from pg_attribute a"
        " join pg_class c on c.oid = a.attrelid"
        " where a.atttypid = 'autotag.user_id'::regtype and c.relkind = 'r' and not a.attisdropped"
    ).fetchall()
    return any(
        connection.execute(f"select from {table} where {column} is not null limit 1".encode()).fetchone() is not None
        for table, column in columns
    )
