-- The version of the schema, which is that of the worker it was released with.
create or replace function autotag.schema_version() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select '0.1.0'::text $$;

select pg_notify('autotag', 'version');  -- workers that run see whether they still fit
