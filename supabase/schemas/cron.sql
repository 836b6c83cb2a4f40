-- Runs once a minute: releases what dead workers held, and wakes live workers for work that has become due.
create or replace function autotag.tick() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
begin
  perform autotag.expire_worker();
  perform autotag.split_oversized();
  perform autotag.end_empty_jobs();
  perform autotag.look_at_windows(v_now);
  perform autotag.broadcast_held(null);
  if exists (select from autotag.workspaces w where w.queued > 0 and (w.ready or w.ready_at <= v_now))
     or exists (select from autotag.tasks t where t.retry_at <= v_now) then
    perform pg_notify('autotag', 'realtime');
  end if;
  if exists (select from autotag.batches b where b.worker_id is null and b.not_before <= v_now
       and b.state in ('planned', 'preparing', 'uploading', 'creating', 'ended', 'harvesting'))
     or exists (select from autotag.batches b, autotag.provider_limits p
       where b.state = 'submitted' and greatest(p.next_poll_at, p.ask_after) <= v_now) then
    perform pg_notify('autotag', 'batch');
  end if;
  -- Two workers that stored the last answers of a batch at the same time did not see each other's.
  perform autotag.announce_stored(array(select b.id from autotag.batches b where b.state = 'done' and not b.stored));
  if exists (select from autotag.unstored u where u.next_at <= v_now) then
    perform pg_notify('autotag', 'store');
  end if;
  -- Last, because these lock the provider row.
  perform autotag.repair_queues();
  perform autotag.retry_features(v_now - (select s.model_check_interval from autotag.settings s));
  update autotag.clock set ticked_at = v_now where id;
end $$;

-- Lets batches that wait for their workspace's window start, if it has room already (a raised limit, a cancelled upload): of each size
-- as many as would fit. Called by tick(). Locks: batches (skip locked).
create or replace function autotag.look_at_windows(p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.batches b set not_before = p_now
  where b.id in (
    select w.id
    from (
      select x.workspace_id, x.image_count - x.express_count as images, array_agg(x.id order by x.created_at, x.ordinal) as ids
      from autotag.batches x
      where x.state = 'planned' and x.admitted_at is null and x.worker_id is null and x.waits_for_window and x.not_before > p_now
      group by 1, 2) g
    cross join lateral autotag.admit(g.workspace_id, 'batch', cardinality(g.ids), g.images, true, p_take => false) a
    join autotag.batches w on w.id = any (g.ids[1 : a.admitted])
    for no key update of w skip locked);
end $$;

-- Ends uploads without a task that could end: their tasks were deleted by hand. What is missing counts as failed. Called by tick().
-- Locks: jobs (skip locked).
create or replace function autotag.end_empty_jobs() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
  v_job autotag.jobs;
begin
  for v_job in
    select j.* from autotag.jobs j
    -- a look-up per live upload: a join may read all live images, and an order by id all uploads that were ever finished
    where j.finished_at is null and (select t.id from autotag.tasks t where t.job_id = j.id and t.finished_at is null limit 1) is null
    limit 100 for no key update skip locked
  loop
    -- a report may have ended the last one between the query and the lock
    select * into v_job from autotag.jobs j where j.id = v_job.id;
    if v_job.finished_at is null and not exists (select from autotag.tasks t where t.job_id = v_job.id and t.finished_at is null) then
      perform autotag.report_job(v_job.id, 0, v_job.image_count - v_job.completed - v_job.failed, null);
    end if;
  end loop;
end $$;

-- Runs daily: deletes what is no longer needed. An upload that a tenant's transaction holds is left to the next day.
-- Locks: finished jobs, windows, uploads and arrivals (all skip locked), usage; provider, then what is learned, briefs, workspaces and workers.
create or replace function autotag.housekeeping() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
begin
  delete from autotag.jobs j
  where j.id in (
    select f.id from autotag.jobs f
    where f.finished_at < v_now - (select s.keep_finished from autotag.settings s) order by f.id for update skip locked);
  delete from autotag.windows l
  using (
    select w.workspace_id, w.request_type from autotag.windows w
    where w.max_requests is null and w.max_units is null
      and coalesce(w.admitted_at[cardinality(w.admitted_at)], '-infinity') < v_now - interval '1 h'
    for update skip locked) old
  where l.workspace_id = old.workspace_id and l.request_type = old.request_type;
  delete from autotag.pictures p using autotag.jobs j
  where j.id = p.job_id and j.finished_at < v_now - (select s.repeat_window from autotag.settings s);
  delete from autotag.uploads u
  where u.id in (
    select o.id from autotag.uploads o
    where not exists (select from autotag.arrivals a where a.upload_id = o.id) for update skip locked);
  update autotag.arrivals r set upload_id = null
  where r.id in (
    select a.id from autotag.arrivals a
    where a.upload_id is not null and not exists (select from autotag.uploads u where u.id = a.upload_id) for update skip locked);
  delete from autotag.webhooks w where w.received_at < v_now - interval '4 days';  -- OpenAI retries for three days
  delete from autotag.durations d where d.started_at < v_now - interval '90 days';
  delete from autotag.outbox o where o.created_at < v_now - interval '1 day';
  delete from autotag.usage u
  where u.day < (v_now at time zone 'utc')::date - (select s.keep_usage from autotag.settings s);
  -- Last, because these need the provider row. Workspaces without work; a workspace whose upload has just begun comes back with it.
  perform from autotag.provider_limits for update;
  delete from autotag.learned l where l.learned_at < v_now - interval '90 days';  -- not used for 90 days
  delete from autotag.briefs b   -- no upload that is kept was asked this
  where b.created_at < v_now - interval '90 days' and not exists (select from autotag.learned l where l.brief_id = b.id)
    and b.id not in (select j.brief_id from autotag.jobs j where j.brief_id is not null);
  delete from autotag.workspaces w
  where w.queued = 0 and not exists (
    select from autotag.jobs j where j.workspace_id = w.workspace_id and j.finished_at is null);
  delete from autotag.workers w where w.lease_until < v_now - interval '2 days';   -- can_expire() lets them go after one
  update autotag.clock set housekeeping_at = v_now where id;
end $$;

-- The tasks of deleted jobs go with them.
create or replace function autotag.delete_tasks() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  delete from autotag.unstored u using autotag.tasks t, gone g where t.job_id = g.id and u.task_id = t.id;
  delete from autotag.tasks t using gone g where t.job_id = g.id;
  return null;
end $$;

create or replace trigger autotag_delete_tasks after delete on autotag.jobs referencing old table as gone
  for each statement execute function autotag.delete_tasks();

-- Whether tick() is overdue, or can expire a worker.
create or replace function autotag.is_tick_due(p_now timestamptz) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.clock c where c.ticked_at <= p_now - interval '59 s')
    or coalesce(autotag.can_expire(p_now), false);
end $$;

-- Called after a heartbeat that says so: runs tick() and housekeeping() if they are overdue. One caller at a time; others do not wait.
-- Returns whether another worker's lease has ended, so that the caller should call again.
create or replace function autotag.tick_if_due() returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_clock autotag.clock;
  v_now timestamptz := autotag.now();
begin
  select * into v_clock from autotag.clock;
  if not autotag.is_tick_due(v_now) then
    return false;
  end if;
  if not pg_try_advisory_xact_lock(hashtext('autotag.tick')) then
    return false;
  end if;
  if v_clock.housekeeping_at < v_now - interval '25 h' then
    perform autotag.housekeeping();   -- first, because tick() holds the provider row from its first expired worker on
  end if;
  perform autotag.tick();
  return coalesce(autotag.can_expire(v_now), false);
end $$;

-- Schedules both in pg_cron under fixed names, so that scheduling again changes nothing. False: pg_cron is not installed.
-- Dynamic SQL, because without the extension pg_cron's objects do not exist.
create or replace function autotag.schedule_cron() returns boolean
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if to_regclass('cron.job') is null then
    return false;
  end if;
  execute format('select %I.schedule($1, $2, $3)', 'cron')
    using 'autotag-tick', '* * * * *', 'select autotag.tick()';
  -- pg_cron keeps a row of every run forever, so the daily job also deletes the old ones of these two jobs.
  execute format('select %I.schedule($1, $2, $3)', 'cron')
    using 'autotag-housekeeping', '17 3 * * *', $run$select autotag.housekeeping();
      delete from cron.job_run_details where end_time < now() - interval '7 days'
        and jobid in (select jobid from cron.job where jobname in ('autotag-tick', 'autotag-housekeeping'))$run$;
  return true;
end $$;

do $$
begin
  if exists (select from pg_catalog.pg_available_extensions where name = 'pg_cron') then
    begin
      create extension if not exists pg_cron with schema pg_catalog;
    exception when others then
      raise notice 'pg_cron is available but cannot be created here (%); the workers'' heartbeats will run tick() instead', sqlerrm;
    end;
  end if;
  perform autotag.schedule_cron();
end $$;
