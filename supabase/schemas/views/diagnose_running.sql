-- The doctor's checks of what runs: pg_cron, the clock, broadcasts, workers.

-- Whether pg_cron runs both jobs, and whether their last runs succeeded. The queries are dynamic, because without the extension
-- its tables do not exist.
create or replace function autotag.diagnose_cron() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_jobs text[];
  v_failed text;
begin
  if to_regclass('cron.job') is null then
    return autotag.finding('pg_cron', 'warning', 'pg_cron is not installed; a running worker does its work instead.',
      'Enable pg_cron in the dashboard (Integrations), then: select autotag.schedule_cron();');
  end if;
  execute format('select array_agg(j.jobname::text order by j.jobname) from %I.job j
    where j.active and j.jobname like ''autotag-%%'' and j.database = current_database()', 'cron') into v_jobs;
  if v_jobs is distinct from array['autotag-housekeeping', 'autotag-tick'] then
    return autotag.finding('pg_cron', 'error',
      format('The jobs autotag-tick and autotag-housekeeping should be scheduled; these are: %s.',
        coalesce(autotag.name_some(v_jobs), 'none')),
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

-- Whether tick() runs, and autotag.now() is the real time.
create or replace function autotag.diagnose_clock() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_ticked timestamptz := (select c.ticked_at from autotag.clock c);
begin
  return case
    when (select s.test_clock from autotag.settings s) then autotag.finding('clock', 'error',
      'settings.test_clock is on: any session can change autotag''s time.', 'update autotag.settings set test_clock = false;')
    when v_ticked = '-infinity' then autotag.finding('clock', 'warning',
      'autotag.tick() has never run.', 'autotag worker   (or wait a minute for pg_cron)')
    when v_ticked < v_now - interval '5 min' then autotag.finding('clock', 'error',
      format('autotag.tick() last ran %s ago; neither pg_cron nor a worker is running.',
        date_trunc('second', v_now - v_ticked)), 'autotag worker')
    else autotag.finding('clock', 'ok', 'autotag.tick() runs regularly.') end;
end $$;

-- Sends a broadcast without a meaning, so that the doctor can check whether broadcasts arrive. More than five a second are ignored.
create or replace function autotag.send_test_broadcast(p_nonce uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.clock c set probed_at = autotag.now() where c.probed_at <= autotag.now() - interval '200 ms';
  if found then
    perform autotag.broadcast('autotag-doctor', 'probe', jsonb_build_object('nonce', p_nonce), false);
  end if;
end $$;

-- Whether broadcasts are sent.
create or replace function autotag.diagnose_broadcasts() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_waiting integer;
begin
  select count(*)::integer into v_waiting from autotag.outbox ob where ob.created_at < v_now - interval '1 min';
  return case
    when to_regprocedure('realtime.send(jsonb,text,text,boolean)') is not null then
      autotag.finding('realtime.send', 'ok', 'Broadcasts are sent when their transaction commits.')
    when v_waiting > 0 then autotag.finding('realtime.send', 'error',
      format('This stack has no realtime.send, and %s broadcasts wait for a worker to send them.', v_waiting),
      'autotag worker   (with SUPABASE_URL and SUPABASE_SECRET_KEY set)')
    else autotag.finding('realtime.send', 'warning',
      'This stack has no realtime.send; workers send broadcasts over HTTP.', 'Upgrade Realtime.') end;
end $$;

-- Whether workers are alive and can receive notifications.
create or replace function autotag.diagnose_workers() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_workers integer;
  v_polling integer;
  v_versions text;
begin
  select count(*)::integer, count(*) filter (where not wk.listening)::integer, autotag.name_some(array_agg(distinct wk.version))
  into v_workers, v_polling, v_versions
  from autotag.workers wk where wk.lease_until > v_now;
  return case
    when v_workers = 0 then autotag.finding('workers', 'error', 'No worker is alive, so nothing is tagged.', 'autotag worker')
    when v_polling > 0 then autotag.finding('workers', 'warning',
      format('%s of %s workers poll, because their connection cannot LISTEN.', v_polling, v_workers),
      'Give them a direct or session-mode DATABASE_URL (port 5432).')
    else autotag.finding('workers', 'ok', format('%s alive, version %s.', v_workers, v_versions)) end;
end $$;

-- Whether work waits that only a change of limits can release (list_waiting).
create or replace function autotag.diagnose_waiting() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_stuck jsonb := (
    select jsonb_agg(w) from jsonb_array_elements(autotag.list_waiting(200, autotag.now())) w where w -> 'until' = 'null');
begin
  return case when v_stuck is null then autotag.finding('waiting', 'ok', 'Everything that waits has a time when it goes on.')
    else autotag.finding('waiting', 'warning',
      format('%s images of workspace %s wait without a time. %s', v_stuck #>> '{0,images}', v_stuck #>> '{0,workspace_id}', v_stuck #>> '{0,reason}'),
      'Raise its max_units in public.workspace_rate_limits.') end;
end $$;
