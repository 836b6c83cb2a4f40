-- The version of the schema; the worker of the same release has the same version.
create or replace function autotag.schema_version() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select '0.1.0'::text $$;

select pg_notify('autotag', 'version');  -- running workers compare versions
