-- The doctor's checks of logins and rights.

-- Whether a login may do everything: it is a superuser, or a member of the role that owns autotag's schema or the database.
create or replace function autotag.is_owner(p_login name) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select exists (
    select from pg_roles m
    where m.rolname = p_login and (m.rolsuper
      or pg_has_role(m.oid, (select n.nspowner from pg_namespace n where n.nspname = 'autotag'), 'member')
      or pg_has_role(m.oid, (select d.datdba from pg_database d where d.datname = current_database()), 'member')))
$$;

-- The logins of workers: those in autotag_worker that are not owners (is_owner). On a hosted project, cli_login_postgres is an
-- owner, too.
create or replace function autotag.worker_logins() returns name[]
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select array(
    select m.rolname from pg_roles m
    where m.rolcanlogin and pg_has_role(m.oid, 'autotag_worker', 'member') and not autotag.is_owner(m.rolname)
    order by m.rolname)
$$;

-- Whether workers have logins of their own (p_logins: worker_logins).
create or replace function autotag.diagnose_roles(p_logins name[]) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_owners text;               -- logins of live workers that may do everything
begin
  select autotag.name_some(array_agg(distinct wk.login::text)) into v_owners
  from autotag.workers wk where wk.lease_until > v_now and autotag.is_owner(wk.login);
  return case
    when p_logins = '{}' then autotag.finding('roles', 'warning',
      'No separate login has the role autotag_worker, so workers have to log in as the owner, which may do everything.',
      E'create role tagger login in role autotag_worker;   -- then its password with psql''s \\password tagger')
    when v_owners is not null then autotag.finding('roles', 'warning',
      format('A worker is logged in as %s, which may do everything.', v_owners),
      format('Use a login for workers (%s) in its DATABASE_URL and restart it.', autotag.name_some(p_logins::text[])))
    else autotag.finding('roles', 'ok', format('Workers may log in as %s.', autotag.name_some(p_logins::text[]))) end;
end $$;

-- Whether signed-in users may call the RPCs, anon may call none of autotag's functions, and the API does not expose their schema.
create or replace function autotag.diagnose_grants() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_problem text;
begin
  select autotag.name_some(array_agg(p.oid::regprocedure::text)) into v_problem
  from pg_catalog.pg_proc p
  where p.pronamespace in ('autotag'::regnamespace) and has_function_privilege('anon', p.oid, 'execute');
  return case
    when v_problem is not null then autotag.finding('grants', 'error', 'anon may call ' || v_problem || '.',
      'revoke execute on all functions in schema autotag from public, anon;')
    when exists (select from pg_catalog.pg_db_role_setting s cross join unnest(s.setconfig) c
        where c ~ '^pgrst[.]db_schemas=(.*[, ])?"?autotag"?([, ]|$)')
      then autotag.finding('grants', 'error', 'The API exposes the schema autotag; only its functions in public are for users.',
        'Remove autotag from the exposed schemas (Project Settings, Data API), or: alter role authenticator set pgrst.db_schemas = ''public'';')
    when not has_function_privilege('authenticated', 'public.enqueue_tagging'::regproc, 'execute')
      then autotag.finding('grants', 'error', 'Signed-in users may not call enqueue_tagging.',
        'grant execute on function public.enqueue_tagging to authenticated;')
    else autotag.finding('grants', 'ok', 'Signed-in users may call the RPCs, anon may call nothing.') end;
end $$;

-- Whether workers' logins may create temporary objects.
create or replace function autotag.diagnose_temporary(p_logins name[]) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when exists (
      select from unnest(p_logins) login where has_database_privilege(login, current_database(), 'temporary'))
      then autotag.finding('temporary objects', 'warning',
        'Workers'' logins may create temporary objects, which autotag does not need.',
        format('revoke temporary on database %I from public;   -- then grant it to the roles that need it', current_database()))
    else autotag.finding('temporary objects', 'ok', 'Workers'' logins may not create temporary objects.') end;
end $$;
