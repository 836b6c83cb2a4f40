-- What `autotag doctor` asks the database: everything that can be told from inside, each with what mends it.

-- One finding. level: ok, warning (works, but not as well as it should) or error (does not work).
create or replace function autotag.finding(p_check text, p_level text, p_message text, p_fix text default null) returns jsonb
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object('check', p_check, 'level', p_level, 'message', p_message,
    'fix', case when p_level <> 'ok' then p_fix end)
$$;

-- Whether pg_cron runs a job, and how its last run went; null without pg_cron. Looked up by name at run time,
-- because without the extension there is no such table to compile against.
create or replace function autotag.diagnose_cron() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_jobs text[];
  v_failed text;
begin
  if to_regclass('cron.job') is null then
    return autotag.finding('pg_cron', 'warning', 'pg_cron is not installed; a worker does its work while one runs.',
      'Enable pg_cron in the dashboard (Integrations), then: select autotag.schedule_cron();');
  end if;
  execute format('select array_agg(j.jobname::text order by j.jobname) from %I.job j
    where j.active and j.jobname like ''autotag-%%'' and j.database = current_database()', 'cron') into v_jobs;
  if v_jobs is distinct from array['autotag-housekeeping', 'autotag-tick'] then
    return autotag.finding('pg_cron', 'error',
      format('The jobs autotag-tick and autotag-housekeeping should be scheduled; there are: %s.',
        coalesce(array_to_string(v_jobs, ', '), 'none')),
      'select autotag.schedule_cron();');
  end if;
  execute format('select concat(x.jobname, '': '', x.return_message) from (
      select distinct on (j.jobid) j.jobname, d.status, d.return_message
      from %1$I.job j join %1$I.job_run_details d on d.jobid = j.jobid
      where j.jobname like ''autotag-%%'' and d.status in (''succeeded'', ''failed'')
      order by j.jobid, d.runid desc) x
    where x.status = ''failed'' limit 1', 'cron') into v_failed;
  if v_failed is not null then
    return autotag.finding('pg_cron', 'error', 'The last run of a job failed: ' || v_failed,
      'select * from cron.job_run_details order by runid desc limit 5;');
  end if;
  return autotag.finding('pg_cron', 'ok', 'Both jobs are scheduled, and no last run failed.');
end $$;

-- An image of the newest upload's workspace that lies in Storage, to see whether it can be read; null: there is none.
create or replace function autotag.sample_image() returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object('bucket', d.bucket, 'path', d.path)
  from (select j.workspace_id from autotag.jobs j order by j.created_at desc limit 1) j
  cross join autotag.describe_assets(autotag.list_assets(j.workspace_id, false, null, 20)) d
  where d.bucket is not null and d.path is not null limit 1
$$;

-- A broadcast that means nothing, to see whether broadcasts arrive.
create or replace function autotag.send_probe(p_nonce uuid) returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$ select autotag.broadcast('autotag-doctor', 'probe', jsonb_build_object('nonce', p_nonce), false) $$;

-- Whether rows name files of their own workspace, and who could write others.
create or replace function autotag.diagnose_files() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_rule text := autotag.file_rule();
  v_look record := autotag.look_at_files(10000);
  v_open text := case when v_look.may_write is not null
    then format(' Signed-in users can write rows that name any file (%s).', v_look.may_write) else '' end;
begin
  if v_rule = 'any' then
    return autotag.finding('files', 'warning',
      'A row may name any file of the project (rule any), and its workspace gets that picture''s tags.' || v_open,
      'Set a rule: autotag init --file-rule workspace-folder   (docs/install.md, "Whose a file is")');
  elsif v_look.broken > 0 then
    return autotag.finding('files', 'warning',
      format('%s of %s rows looked at name a file that is not their workspace''s (rule %s) and are not tagged, for example %s.',
        v_look.broken, v_look.looked_at, v_rule, array_to_string(v_look.examples, ', ')) || v_open,
      'Correct these rows, or the rule in autotag.describe_assets.');
  end if;
  return autotag.finding('files', case when v_open <> '' and v_rule in ('uploader-folder', 'owner') then 'warning' else 'ok' end,
    format('Rows name files of %s (rule %s; %s rows looked at).',
        case when v_rule in ('uploader-folder', 'owner') then 'members of their workspace' else 'their own workspace' end,
        v_rule, v_look.looked_at)
      || case when not autotag.users_see_files() and v_rule <> 'none'
        then ' Row level security of storage.objects is not asked (autotag.users_see_files).' else '' end
      || v_open || case
        when v_open = '' then ''
        when v_rule in ('uploader-folder', 'owner') then ' They get the tags of any file of a colleague, whatever its workspace.'
        else ' autotag does not tag them.' end,
    case when v_open <> '' and v_rule in ('uploader-folder', 'owner')
      then 'Let a policy of the table say that whoever inserts a row uploaded it (… = (select auth.uid())).' end);
end $$;

-- The model and the provider: the model's end, its price, how it has to be asked, and what the provider cannot do.
create or replace function autotag.diagnose_model(p_provider autotag.provider_limits) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := (select s.model from autotag.settings s);
  m autotag.models := autotag.find_model(v_model);
  v_end jsonb := autotag.describe_shutdown();
  v_lacks text := concat_ws(', ',
    case when p_provider.has_batches is false then 'a Batch API (everything goes as single calls)' end,
    case when p_provider.has_rate_headers is false then 'rate-limit headers (autotag.provider_limits is what holds)' end,
    case when p_provider.keep_files is null then 'expiring files' end);
  v_forms text := concat_ws(', ',
    case when m.cap_parameter = 'max_tokens' then 'max_tokens instead of max_completion_tokens'
         when m.cap_parameter = 'none' then 'no cap of the answer' end,
    case when m.answer_format = 'json_object' then 'json_object instead of json_schema'
         when m.answer_format = 'text' then 'no response_format' end,
    case when not m.sends_effort then 'no reasoning_effort' end,
    case when not m.sends_detail then 'no detail' end,
    case when not m.sends_tier then 'no service_tier' end);
begin
  return jsonb_build_array(
    case when v_end is not null then autotag.finding('model', v_end ->> 'level', v_end ->> 'message', v_end ->> 'fix')
      when m.shutdown_date is not null then autotag.finding('model', 'ok', format('%s shuts down on %s.', v_model, m.shutdown_date))
      else autotag.finding('model', 'ok', format('%s%s; no end is announced.', v_model,
        coalesce(' with reasoning effort ' || m.reasoning_effort, ''))) end,
    case when m.input_price is not null and m.output_price is not null then autotag.finding('price', 'ok',
        format('%s costs $%s and $%s per million tokens, about $%s for 1,000 images one by one.', v_model,
          to_char(m.input_price, 'FM9990.0099'), to_char(m.output_price, 'FM9990.0099'), to_char(1000 * autotag.expected_cost(), 'FM9990.009')))
      else autotag.finding('price',
        case when exists (select from autotag.quotas q where q.max_cost is not null) then 'error' else 'warning' end,
        format('What %s costs is not known, so costs are shown as unknown%s.', v_model,
          case when exists (select from autotag.quotas q where q.max_cost is not null)
            then ' and no quota in dollars is enforced' else '' end),
        case when m.name is null
          then format('insert into autotag.models (name, input_price, output_price) values (%L, …, …);   -- dollars per million tokens', v_model)
          else format('update autotag.models set input_price = …, output_price = … where name = %L;   -- dollars per million tokens', m.name) end) end,
    case when v_forms <> '' then autotag.finding('request', 'ok', format('%s is asked with %s.', v_model, v_forms))
      else autotag.finding('request', 'ok', format('%s is asked as OpenAI documents it.', v_model)) end,
    case when v_lacks <> '' then autotag.finding('provider', 'ok', format('This provider lacks %s.', v_lacks))
      else autotag.finding('provider', 'ok', 'Nothing is known to be missing.') end);
end $$;

-- Whether a login may do everything here: it is a superuser, or a member of the owner of autotag's schema or of the database.
create or replace function autotag.is_owner(p_login name) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select exists (
    select from pg_roles m
    where m.rolname = p_login and (m.rolsuper
      or pg_has_role(m.oid, (select n.nspowner from pg_namespace n where n.nspname = 'autotag'), 'member')
      or pg_has_role(m.oid, (select d.datdba from pg_database d where d.datname = current_database()), 'member')))
$$;

-- The logins that may work, but for superusers and the owner's own (a hosted project's cli_login_postgres is one), who may do
-- everything anyway.
create or replace function autotag.worker_logins() returns name[]
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select array(
    select m.rolname from pg_roles m
    where m.rolcanlogin and pg_has_role(m.oid, 'autotag_worker', 'member') and not autotag.is_owner(m.rolname)
    order by m.rolname)
$$;

-- What the database can tell of the installation: {findings: [{check, level, message, fix}] in the order a
-- reader wants them, now (epoch seconds), model, sample}. sample is the one image that anybody is told of who has not
-- claimed it: bucket and path, without which the doctor could not try to read a file.
create or replace function autotag.diagnose() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_found jsonb := '[]'::jsonb;
  v_provider autotag.provider_limits;
  v_workers integer;
  v_polling integer;
  v_versions text;
  v_waiting integer;
  v_logins name[] := autotag.worker_logins();
  v_owners text;               -- logins of live workers that may do everything
  v_problem text;
  v_sample jsonb;
  v_ticked timestamptz := (select c.ticked_at from autotag.clock c);
begin
  select * into v_provider from autotag.provider_limits;

  -- roles and grants
  select string_agg(distinct w.login::text, ', ') into v_owners
  from autotag.workers w where w.lease_until > v_now and autotag.is_owner(w.login);
  v_found := v_found || case
    when v_logins = '{}' then autotag.finding('roles', 'warning',
      'No login of its own is granted autotag_worker; the worker then has to run as the owner, who may do everything.',
      'create role tagger login in role autotag_worker;   -- then its password with psql''s \password tagger')
    when v_owners is not null then autotag.finding('roles', 'warning',
      format('A worker is logged in as %s, who may do everything.', v_owners),
      format('Put a login that may only work (%s) into its DATABASE_URL and restart it.', array_to_string(v_logins, ', ')))
    else autotag.finding('roles', 'ok', format('Workers may log in as %s.', array_to_string(v_logins, ', '))) end;

  select string_agg(p.oid::regprocedure::text, ', ') into v_problem
  from pg_catalog.pg_proc p
  where p.pronamespace in ('autotag'::regnamespace) and has_function_privilege('anon', p.oid, 'execute');
  v_found := v_found || case
    when v_problem is not null then autotag.finding('grants', 'error', 'anon may call ' || v_problem || '.',
      'revoke execute on all functions in schema autotag from public, anon;')
    when exists (select from pg_catalog.pg_db_role_setting s cross join unnest(s.setconfig) c
        where c ~ '^pgrst[.]db_schemas=(.*[, ])?"?autotag"?([, ]|$)')
      then autotag.finding('grants', 'error', 'The API exposes the schema autotag; only its functions in public are for users.',
        'Take autotag out of the exposed schemas (Project Settings, Data API), or: alter role authenticator set pgrst.db_schemas = ''public'';')
    when not has_function_privilege('authenticated', 'public.enqueue_tagging(uuid[])', 'execute')
      then autotag.finding('grants', 'error', 'Signed-in users may not call enqueue_tagging.',
        'grant execute on function public.enqueue_tagging to authenticated;')
    else autotag.finding('grants', 'ok', 'Signed-in users may call the RPCs, anon may call nothing.') end;

  -- the host's tables
  begin
    perform from autotag.describe_assets(array['00000000-0000-0000-0000-000000000000']::uuid[]);
    perform autotag.is_member('00000000-0000-0000-0000-000000000000');
    perform from autotag.tagged_assets('00000000-0000-0000-0000-000000000000', 1);
    v_sample := autotag.sample_image();
    v_found := v_found || autotag.finding('host adapter', 'ok', 'The adapter''s functions fit the host''s tables.')
      || autotag.diagnose_files();
  exception when others then
    v_found := v_found || autotag.finding('host adapter', 'error',
      'The adapter does not fit the host''s tables: ' || sqlerrm,
      'Correct autotag.is_member, autotag.describe_assets, autotag.store_tags and autotag.show_stage.');
  end;

  -- the clock
  v_found := v_found || autotag.diagnose_cron();
  v_found := v_found || case
    when (select s.test_clock from autotag.settings s) then autotag.finding('clock', 'error',
      'settings.test_clock is on: any session can bend autotag''s time.', 'update autotag.settings set test_clock = false;')
    when v_ticked = '-infinity' then autotag.finding('clock', 'warning',
      'autotag has never ticked.', 'autotag worker   (or wait a minute for pg_cron)')
    when v_ticked < v_now - interval '5 min' then autotag.finding('clock', 'error',
      format('autotag last ticked %s ago; neither pg_cron nor a worker is running.',
        date_trunc('second', v_now - v_ticked)), 'autotag worker')
    else autotag.finding('clock', 'ok', 'autotag ticks.') end;

  -- broadcasts
  select count(*)::integer into v_waiting from autotag.outbox o where o.created_at < v_now - interval '1 min';
  v_found := v_found || case
    when to_regprocedure('realtime.send(jsonb,text,text,boolean)') is not null then
      autotag.finding('realtime.send', 'ok', 'Broadcasts leave with the transaction.')
    when v_waiting > 0 then autotag.finding('realtime.send', 'error',
      format('This stack has no realtime.send, and %s broadcasts wait for a worker.', v_waiting),
      'autotag worker   (with SUPABASE_URL and SUPABASE_SECRET_KEY set)')
    else autotag.finding('realtime.send', 'warning',
      'This stack has no realtime.send; workers deliver broadcasts over HTTP.', 'Upgrade Realtime.') end;

  -- workers
  select count(*)::integer, count(*) filter (where not w.listening)::integer, string_agg(distinct w.version, ', ')
  into v_workers, v_polling, v_versions
  from autotag.workers w where w.lease_until > v_now;
  v_found := v_found || case
    when v_workers = 0 then autotag.finding('workers', 'error', 'No worker is alive, so nothing is tagged.', 'autotag worker')
    when v_polling > 0 then autotag.finding('workers', 'warning',
      format('%s of %s workers poll, because their connection cannot LISTEN.', v_polling, v_workers),
      'Give them a direct or session-mode DATABASE_URL (port 5432).')
    else autotag.finding('workers', 'ok', format('%s alive, version %s.', v_workers, v_versions)) end;

  -- the provider's account
  v_found := v_found || case
    when v_provider.account_error is not null then autotag.finding('account', 'error',
      format('Tagging stands still since %s: %s', to_char(v_provider.account_error_at, 'YYYY-MM-DD HH24:MI TZ'),
        v_provider.account_error), 'Fix what it says; the workers notice by themselves.')
    else autotag.finding('account', 'ok', 'Neither the provider nor Storage refuses to work.') end;
  v_found := v_found || case
    when exists (select from autotag.quotas q where q.max_cost is not null and q.scope = 'workspace' and q.workspace_id is null)
      then autotag.finding('spending', 'ok', 'Every workspace has a limit in dollars.')
    else autotag.finding('spending', 'warning', 'No quota limits what a workspace may spend.',
      'insert into autotag.quotas (scope, period, max_cost) values (''workspace'', ''month'', 20);   -- dollars, every workspace') end
  || case
    when exists (
      select from unnest(v_logins) login where has_database_privilege(login, current_database(), 'temporary'))
      then autotag.finding('temporary objects', 'warning',
        'Workers'' logins may create temporary objects, which nothing of autotag needs.',
        format('revoke temporary on database %I from public;   -- then grant it to the roles that need it', current_database()))
    else autotag.finding('temporary objects', 'ok', 'Workers'' logins may create none.') end;
  return jsonb_build_object('findings', v_found || autotag.diagnose_model(v_provider), 'now', extract(epoch from v_now),
    'model', (select s.model from autotag.settings s), 'sample', v_sample);
end $$;
