"""Reads the shape of the project's tables: what they are, their keys, and the types below their domains."""

from __future__ import annotations

from typing import Any

from psycopg import Connection

_SHAPES = r"""
with recursive domains (oid, base) as (
  select t.oid, t.typbasetype from pg_type t where t.typtype = 'd'
  union all
  select d.oid, t.typbasetype from domains d join pg_type t on t.oid = d.base and t.typtype = 'd'
), bases as (
  select d.oid, d.base from domains d join pg_type t on t.oid = d.base and t.typtype <> 'd'
)
select n.nspname || '.' || c.relname as name, c.relkind::text as kind, a.columns, a.base_types,
  a.required, a.generated, a.loose,
  (select pn.nspname || '.' || pc.relname from pg_inherits h
   join pg_class pc on pc.oid = h.inhparent join pg_namespace pn on pn.oid = pc.relnamespace
   where h.inhrelid = c.oid and c.relispartition) as partition_of,
  c.relkind = 'r' and exists (select from pg_inherits h where h.inhparent = c.oid) as has_children,
  coalesce((select jsonb_agg(k.names) from (
    select (select jsonb_agg(u.attname) from pg_attribute u
            where u.attrelid = c.oid and u.attnum = any (i.indkey[0 : i.indnkeyatts - 1])) as names
    from pg_index i
    where i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
      and not exists (select from pg_attribute u where u.attrelid = c.oid
        and u.attnum = any (i.indkey[0 : i.indnkeyatts - 1]) and not u.attnotnull)) k), '[]') as keys
from pg_class c join pg_namespace n on n.oid = c.relnamespace
cross join lateral (
  select jsonb_object_agg(a.attname, format_type(a.atttypid, null)) as columns,
    jsonb_object_agg(a.attname, format_type(coalesce(b.base, a.atttypid), null)) as base_types,
    coalesce(jsonb_agg(a.attname) filter (where a.attnotnull), '[]') as required,
    coalesce(jsonb_agg(a.attname) filter (where a.attgenerated <> ''), '[]') as generated,
    coalesce(jsonb_agg(a.attname) filter (where not l.collisdeterministic), '[]') as loose
  from pg_attribute a left join bases b on b.oid = a.atttypid left join pg_collation l on l.oid = a.attcollation
  where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped) a
where c.relkind in ('r', 'p', 'v', 'm', 'f') and a.columns is not null
  and n.nspname !~ '^pg_' and n.nspname <> 'information_schema'"""


def read_shapes(connection: Connection[tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Attributes of `facts.Table` for every table and view: qualified name -> attribute -> value."""
    return {
        name: {
            "kind": kind, "columns": columns, "base_types": base_types, "required": frozenset(required),
            "generated": frozenset(generated), "loose": frozenset(loose), "partition_of": partition_of,
            "has_children": has_children, "keys": [frozenset(key) for key in keys],
        }
        for name, kind, columns, base_types, required, generated, loose, partition_of, has_children, keys
        in connection.execute(_SHAPES.encode())
    }  # fmt: skip
