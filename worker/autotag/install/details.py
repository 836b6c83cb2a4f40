"""Reads the properties that show whether a table can be trusted: keys, references, constraints, and functions about
members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycopg import Connection

#: Schemas that belong to Supabase, to Postgres or to autotag.
NOT_THE_PROJECTS = (
    "autotag", "auth", "storage", "realtime", "extensions", "supabase_migrations", "vault", "cron", "net", "graphql",
    "graphql_public", "pgsodium", "information_schema", "supabase_functions", "_realtime", "_analytics", "pgbouncer",
)  # fmt: skip

_DETAILS = r"""
with recursive domains (oid, base) as (
  select t.oid, t.typbasetype from pg_type t where t.typtype = 'd'
  union all
  select d.oid, t.typbasetype from domains d join pg_type t on t.oid = d.base and t.typtype = 'd'
), bases as (
  select d.oid, d.base from domains d join pg_type t on t.oid = d.base and t.typtype <> 'd'
)
select n.nspname || '.' || c.relname, c.relkind::text, a.columns, a.base_types, a.required, a.labels,
  a.defaults,
  (select jsonb_agg(k.names) from (
     select (select jsonb_agg(u.attname) from pg_attribute u
             where u.attrelid = c.oid and u.attnum = any (i.indkey[0 : i.indnkeyatts - 1])) as names
     from pg_index i
     where i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
       and not exists (
         select from pg_attribute u
         where u.attrelid = c.oid and u.attnum = any (i.indkey[0 : i.indnkeyatts - 1])
           and not u.attnotnull)) k),
  (select jsonb_object_agg(s.attname, array[fn.nspname || '.' || fc.relname, t.attname])
   from pg_constraint f
   join pg_class fc on fc.oid = f.confrelid join pg_namespace fn on fn.oid = fc.relnamespace
   cross join lateral unnest(f.conkey, f.confkey) p (here, there)
   join pg_attribute s on s.attrelid = f.conrelid and s.attnum = p.here
   join pg_attribute t on t.attrelid = f.confrelid and t.attnum = p.there
   where f.conrelid = c.oid and f.contype = 'f'),
  (select jsonb_agg(pg_get_constraintdef(k.oid)) from pg_constraint k
   where k.conrelid = c.oid and k.contype = 'c'),
  a.generated, a.loose,
  (select pn.nspname || '.' || pc.relname from pg_inherits h
   join pg_class pc on pc.oid = h.inhparent join pg_namespace pn on pn.oid = pc.relnamespace
   where h.inhrelid = c.oid and c.relispartition),
  c.relkind = 'r' and exists (select from pg_inherits h where h.inhparent = c.oid), a.domain_checks,
  exists (
    select from pg_options_to_table(c.reloptions) o
    where o.option_name = 'security_invoker' and o.option_value::boolean),
  c.relrowsecurity, a.users_write, a.users_read
from pg_class c join pg_namespace n on n.oid = c.relnamespace
cross join lateral (
  select jsonb_agg(jsonb_build_array(a.attname, format_type(a.atttypid, null)) order by a.attnum) as columns,
    jsonb_object_agg(a.attname, format_type(coalesce(b.base, t.oid), null)) as base_types,
    jsonb_agg(a.attname) filter (where a.attnotnull) as required,
    jsonb_agg(a.attname) filter (where a.attgenerated <> '') as generated,
    jsonb_agg(a.attname) filter (where not l.collisdeterministic) as loose,
    jsonb_object_agg(a.attname, (
      select jsonb_agg(e.enumlabel) from pg_enum e where e.enumtypid = t.oid))
      filter (where t.typtype = 'e') as labels,
    jsonb_object_agg(a.attname, (
      select jsonb_agg(pg_get_constraintdef(k.oid)) from pg_constraint k where k.contypid = t.oid))
      filter (where t.typtype = 'd') as domain_checks,
    jsonb_object_agg(a.attname, pg_get_expr(d.adbin, d.adrelid)) filter (where d.oid is not null) as defaults,
    jsonb_agg(a.attname) filter (where exists (
      select from pg_roles r
      where r.rolname in ('anon', 'authenticated') and has_schema_privilege(r.oid, n.oid, 'usage')
        and has_column_privilege(r.oid, c.oid, a.attname, 'insert, update'))) as users_write,
    jsonb_agg(a.attname) filter (where exists (
      select from pg_roles r
      where r.rolname = 'authenticated' and has_schema_privilege(r.oid, n.oid, 'usage')
        and has_column_privilege(r.oid, c.oid, a.attname, 'select'))) as users_read
  from pg_attribute a join pg_type t on t.oid = a.atttypid
  left join bases b on b.oid = a.atttypid left join pg_collation l on l.oid = a.attcollation
  left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
  where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped) a
where c.relkind in ('r', 'p', 'v', 'm', 'f') and n.nspname <> all (%s) and n.nspname not like 'pg\_%%'
  and a.columns is not null"""


@dataclass(frozen=True)
class Gin:
    """A GIN index: it finds rows by the elements of its columns.

    Attributes:
        name: without the schema, which is the table's.
        columns: its plain columns; expressions are left out.
        valid: it is built.
        partial: it covers only some rows.
    """

    name: str
    columns: frozenset[str]
    valid: bool
    partial: bool

    @property
    def complete(self) -> bool:
        """Whether every row can be found with it."""
        return self.valid and not self.partial


@dataclass(frozen=True)
class Policy:
    """A policy of a table.

    Attributes:
        using, check: its expressions, with the schema of every name; None: it has no such expression.
        reads, updates: it lets signed-in users select rows, or update them.
        writes: it lets signed-in users, or callers without a login, insert or update rows.
        permissive: it allows; False: it restricts.
    """

    using: str | None
    check: str | None
    reads: bool
    updates: bool
    writes: bool
    permissive: bool


def read_policies(connection: Connection[tuple[Any, ...]]) -> dict[str, list[Policy]]:
    """The policies for users of the API: qualified name of the table -> its policies."""
    found: dict[str, list[Policy]] = {}
    with connection.transaction():
        connection.execute("set local search_path = ''")  # so that expressions contain the schema of every name
        for name, *policy in connection.execute("""
            select n.nspname || '.' || c.relname, pg_get_expr(p.polqual, c.oid), pg_get_expr(p.polwithcheck, c.oid),
              u.signed_in and p.polcmd in ('r', '*'), u.signed_in and p.polcmd in ('w', '*'),
              p.polcmd in ('a', 'w', '*'), p.polpermissive
            from pg_policy p join pg_class c on c.oid = p.polrelid join pg_namespace n on n.oid = c.relnamespace
            cross join lateral (
              select bool_or(a.rolname = 'authenticated') as signed_in
              from pg_roles a cross join unnest(p.polroles) r (role)
              where a.rolname in ('anon', 'authenticated')
                and case r.role when 0 then true else pg_has_role(a.oid, r.role, 'usage') end) u
            where u.signed_in is not null
            order by p.oid"""):
            found.setdefault(name, []).append(Policy(*policy))
    return found


def read_details(connection: Connection[tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Attributes of `facts.Table` for every table and view: qualified name -> ``columns``, and the attributes after
    ``rules``."""
    rows = connection.execute(_DETAILS.encode(), (list(NOT_THE_PROJECTS),)).fetchall()
    return {
        row[0]: {
            "kind": row[1], "columns": dict(row[2]), "base_types": row[3], "required": frozenset(row[4] or []),
            "labels": row[5] or {}, "defaults": row[6] or {}, "keys": [frozenset(key) for key in row[7] or []],
            "references": {column: tuple(target) for column, target in (row[8] or {}).items()}, "checks": row[9] or [],
            "generated": frozenset(row[10] or []), "loose": frozenset(row[11] or []), "partition_of": row[12],
            "has_children": row[13],
            "domain_checks": {column: checks or [] for column, checks in (row[14] or {}).items()}, "as_caller": row[15],
            "row_security": row[16], "users_write": frozenset(row[17] or []),
            "users_read": frozenset(row[18] or []),
        }
        for row in rows
    }  # fmt: skip


def read_indexes(connection: Connection[tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """The attributes ``indexes`` and ``gin`` of `facts.Table`, for every table that has indexes: qualified name ->
    both."""
    rows = connection.execute(
        """
        select n.nspname || '.' || c.relname, x.relname::text, m.amname = 'gin', i.indisvalid, i.indpred is not null,
          array(select u.attname::text from pg_attribute u where u.attrelid = c.oid and u.attnum = any (i.indkey))
        from pg_index i join pg_class c on c.oid = i.indrelid join pg_namespace n on n.oid = c.relnamespace
        join pg_class x on x.oid = i.indexrelid join pg_am m on m.oid = x.relam
        where n.nspname <> all (%s) and n.nspname not like 'pg\\_%%'""",
        (list(NOT_THE_PROJECTS),),
    ).fetchall()
    found: dict[str, dict[str, Any]] = {}
    for table, name, is_gin, valid, partial, columns in rows:
        indexes = found.setdefault(table, {"indexes": set(), "gin": []})
        indexes["indexes"].add(name)
        if is_gin:
            indexes["gin"].append(Gin(name, frozenset(columns), valid, partial))
    return found


def read_caller_functions(connection: Connection[tuple[Any, ...]]) -> dict[str, str]:
    """The project's functions that read the caller: name -> ``uid`` (by auth.uid()) or ``sub`` (by the token's
    claim)."""
    rows = connection.execute(
        r"""
        select n.nspname || '.' || p.proname, case when s.text ~ '\mauth\.uid\(' then 'uid' else 'sub' end
        from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        cross join lateral (select coalesce(pg_get_function_sqlbody(p.oid), p.prosrc) as text) s
        where p.prokind = 'f' and n.nspname <> all (%s) and n.nspname not like 'pg\_%%'
          and (s.text ~ '\mauth\.uid\(' or s.text ~ 'jwt' and s.text ~ '''sub''|claim\.sub')
        order by 1, 2 desc""",
        (list(NOT_THE_PROJECTS),),
    ).fetchall()
    return {str(name): str(kind) for name, kind in rows}


def read_member_functions(connection: Connection[tuple[Any, ...]]) -> dict[str, dict[str, str]]:
    """The project's functions that can be called with one argument and return one boolean.

    Returns: name -> the types of its argument, each with the reason why autotag cannot call the function (empty: it
    can).
    """
    rows = connection.execute(
        """
        select n.nspname || '.' || p.proname, format_type(p.proargtypes[0], null), p.oid::regprocedure::text,
          p.prosecdef, exists (
            select from pg_proc q
            where q.pronamespace = p.pronamespace and q.proname = p.proname and q.oid <> p.oid and q.pronargs >= 1
              and q.proargtypes[0] = p.proargtypes[0] and q.pronargs - q.pronargdefaults <= 1)
        from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where p.prorettype = 'boolean'::regtype and p.prokind = 'f' and not p.proretset and p.pronargs >= 1
          and p.pronargs - p.pronargdefaults <= 1 and n.nspname <> all (%s) and n.nspname not like 'pg\\_%%'
          and not exists (
            select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e')
        order by 1, 2""",
        (list(NOT_THE_PROJECTS),),
    ).fetchall()
    found: dict[str, dict[str, str]] = {}
    for name, kind, call, definer, several in rows:
        problem = ""
        if several:
            problem = (
                f"There are several functions {name} that can be called with one {kind}, so a call is ambiguous; name a"
                " function that is alone (--members-function)."
            )
        elif not definer:
            problem = (
                f"{call} runs with the rights of its caller, and autotag calls it as the owner of the database, for"
                f" whom row level security hides nothing: alter function {call} security definer set search_path ="
                " public; or name a table (--members-table)."
            )
        found.setdefault(name, {})[kind] = problem
    return found
