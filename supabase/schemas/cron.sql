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
  if exists (select from autotag.workspaces ws where ws.queued > 0 and (ws.ready or ws.ready_at <= v_now))
     or exists (select from autotag.tasks t where t.retry_at <= v_now) then
    perform pg_notify('autotag', 'realtime');
  end if;
  if exists (select from autotag.batches b where b.worker_id is null and b.not_before <= v_now
       and b.state in ('planned', 'preparing', 'uploading', 'creating', 'ended', 'harvesting'))
     or exists (select from autotag.batches b, autotag.provider_limits p
       where b.state = 'submitted' and greatest(p.next_poll_at, p.ask_after) <= v_now) then
    perform pg_notify('autotag', 'batch');
  end if;
  -- If two workers store the last answers of a batch at the same time, neither sees that the batch is complete.
  perform autotag.announce_stored(array(select b.id from autotag.batches b where b.state = 'done' and not b.stored));
  if exists (select from autotag.unstored un where un.next_at <= v_now) then
    perform pg_notify('autotag', 'store');
  end if;
  -- Last, because these lock the provider row.
  perform autotag.follow_clock();
  perform autotag.repair_queues();
  perform autotag.retry_features(v_now - (select s.model_check_interval from autotag.settings s));
  update autotag.clock set ticked_at = v_now where id;
end $$;

-- Lets batches start that wait for their workspace's window, if it has room earlier than expected (the limit was raised, or an upload
-- was cancelled): of each size as many as would fit. Called by tick(). Locks: batches (skip locked).
create or replace function autotag.look_at_windows(p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.batches b set not_before = p_now
  where b.id in (
    select fitting.id
    from (
      select waiting.workspace_id, waiting.image_count - waiting.express_count as images,
        array_agg(waiting.id order by waiting.created_at, waiting.ordinal) as ids
      from autotag.batches waiting
      where waiting.state = 'planned' and waiting.admitted_at is null and waiting.worker_id is null
        and waiting.waits_for_window and waiting.not_before > p_now
      group by 1, 2) g
    cross join lateral autotag.admit(g.workspace_id, 'batch', cardinality(g.ids), g.images, true, p_take => false) a
    join autotag.batches fitting on fitting.id = any (g.ids[1 : a.admitted])
    for no key update of fitting skip locked);
end $$;

-- After the server's clock was set back: moves every time of the old clock back, too. Otherwise, nothing would happen until the new clock
-- has reached these times. Rows that another transaction holds get a new time from it. Called by
-- tick(). Locks: provider, then batches, tasks, jobs, unstored, uploads, windows, workers (all skip locked), workspaces, queues, clock.
create or replace function autotag.follow_clock() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz;
  v_back interval;
begin
  if autotag.clock_setback(autotag.now()) is null then
    return;
  end if;
  perform from autotag.provider_limits for update;   -- only its holder writes refilled_at, so the clock is compared once more
  v_now := autotag.now();
  v_back := autotag.clock_setback(v_now);
  if v_back is null then
    return;
  end if;
  raise warning 'autotag: the clock was set back by %. Everything that waits is due earlier by this time.', v_back;
  perform autotag.move_work(v_back, v_now);
  update autotag.provider_limits p
  set refilled_at = autotag.earlier(p.refilled_at, v_back, v_now), blocked_until = autotag.earlier(p.blocked_until, v_back, v_now),
    limited_since = autotag.earlier(p.limited_since, v_back, v_now), limited_at = autotag.earlier(p.limited_at, v_back, v_now),
    day_seen_at = autotag.earlier(p.day_seen_at, v_back, v_now), question_since = autotag.earlier(p.question_since, v_back, v_now),
    fingerprint_since = autotag.earlier(p.fingerprint_since, v_back, v_now), proven_at = autotag.earlier(p.proven_at, v_back, v_now),
    account_error_at = autotag.earlier(p.account_error_at, v_back, v_now), degraded_at = autotag.earlier(p.degraded_at, v_back, v_now),
    checked_at = autotag.earlier(p.checked_at, v_back, v_now), probe_at = autotag.earlier(p.probe_at, v_back, v_now),
    next_poll_at = autotag.earlier(p.next_poll_at, v_back, v_now), ask_after = autotag.earlier(p.ask_after, v_back, v_now),
    waiting_at = autotag.earlier(p.waiting_at, v_back, v_now)
  where p.id;
  update autotag.workspaces ws set ready_at = ws.ready_at - v_back where ws.ready_at > v_now;
  update autotag.queues q set ready_at = autotag.earlier(q.ready_at, v_back, v_now), overdue_at = autotag.earlier(q.overdue_at, v_back, v_now)
  where greatest(q.ready_at, q.overdue_at) > v_now;
  -- Heartbeats may have written the lease in the new clock already. A lease that ended in the past would end the worker at once.
  update autotag.workers wk
  set lease_until = least(wk.lease_until, v_now + (select s.lease from autotag.settings s)), last_heartbeat_at = least(wk.last_heartbeat_at, v_now),
    resumed_at = autotag.earlier(wk.resumed_at, v_back, v_now), poll_assigned_at = autotag.earlier(wk.poll_assigned_at, v_back, v_now)
  where wk.id in (select worker.id from autotag.workers worker for no key update skip locked);
  update autotag.clock c
  set housekeeping_at = autotag.earlier(c.housekeeping_at, v_back, v_now), probed_at = autotag.earlier(c.probed_at, v_back, v_now) where c.id;
  perform pg_notify('autotag', channel.name) from unnest(array['realtime', 'batch', 'store']) channel (name);
end $$;

-- By how much the clock was set back since the last tick or refill; null: by at most a minute.
create or replace function autotag.clock_setback(p_now timestamptz) returns interval
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_last timestamptz := (select greatest(c.ticked_at, p.refilled_at) from autotag.clock c, autotag.provider_limits p);
begin
  return case when isfinite(v_last) and v_last > p_now + interval '1 min' then v_last - p_now end;
end $$;

-- follow_clock() for the work of the workspaces. A window's entries and the reservations in them move together (correct_window).
create or replace function autotag.move_work(p_back interval, p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.batches b
  set not_before = autotag.earlier(b.not_before, p_back, p_now), submitted_at = autotag.earlier(b.submitted_at, p_back, p_now),
    running_at = autotag.earlier(b.running_at, p_back, p_now), progress_at = autotag.earlier(b.progress_at, p_back, p_now),
    ended_at = autotag.earlier(b.ended_at, p_back, p_now), cancel_sent_at = autotag.earlier(b.cancel_sent_at, p_back, p_now),
    last_missing_poll_at = autotag.earlier(b.last_missing_poll_at, p_back, p_now), created_at = autotag.earlier(b.created_at, p_back, p_now),
    admitted_at = autotag.earlier(b.admitted_at, p_back, p_now), asked_at = autotag.earlier(b.asked_at, p_back, p_now),
    finished_at = autotag.earlier(b.finished_at, p_back, p_now)
  where b.id in (
    select batch.id from autotag.batches batch
    where batch.finished_at is null or batch.finished_at > p_now for no key update skip locked);
  update autotag.tasks t
  set retry_at = autotag.earlier(t.retry_at, p_back, p_now), reserved_at = autotag.earlier(t.reserved_at, p_back, p_now)
  where t.id in (
    select task.id from autotag.tasks task
    where task.finished_at is null and greatest(task.retry_at, task.reserved_at) > p_now for no key update skip locked);
  update autotag.jobs j set broadcast_at = autotag.earlier(j.broadcast_at, p_back, p_now), created_at = autotag.earlier(j.created_at, p_back, p_now)
  where j.id in (select job.id from autotag.jobs job where job.finished_at is null for no key update skip locked);
  update autotag.unstored un
  set next_at = autotag.earlier(un.next_at, p_back, p_now), kept_at = autotag.earlier(un.kept_at, p_back, p_now)
  where un.task_id in (select outcome.task_id from autotag.unstored outcome for no key update skip locked);
  update autotag.uploads up set seal_at = up.seal_at - p_back
  where up.id in (select upload.id from autotag.uploads upload where upload.seal_at > p_now for no key update skip locked);
  update autotag.windows wn
  set admitted_at = array(select autotag.earlier(u.at, p_back, p_now) from unnest(wn.admitted_at) with ordinality u (at, place) order by u.place)
  where (wn.workspace_id, wn.request_type) in (
    select ahead.workspace_id, ahead.request_type from autotag.windows ahead
    where ahead.admitted_at[cardinality(ahead.admitted_at)] > p_now for no key update skip locked);
end $$;

-- A time of a clock that was set back by p_back: a future time moves with it, a past one stays.
create or replace function autotag.earlier(p_time timestamptz, p_back interval, p_now timestamptz) returns timestamptz
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_time > p_now then p_time - p_back else p_time end;
end $$;

-- Ends uploads that have no unfinished task, because somebody deleted their tasks by hand. Missing images count as failed. Called by
-- tick(). Locks: jobs (skip locked).
create or replace function autotag.end_empty_jobs() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
  v_job autotag.jobs;
begin
  for v_job in
    select j.* from autotag.jobs j
    -- This is a look-up per live upload. A join may read all live images, and an order by id all uploads that ever finished.
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
    select finished.id from autotag.jobs finished
    where finished.finished_at < v_now - (select s.keep_finished from autotag.settings s) order by finished.id for update skip locked);
  delete from autotag.windows wn
  using (
    select unused.workspace_id, unused.request_type from autotag.windows unused
    where unused.max_requests is null and unused.max_units is null
      and coalesce(unused.admitted_at[cardinality(unused.admitted_at)], '-infinity') < v_now - interval '1 h'
    for update skip locked) old
  where wn.workspace_id = old.workspace_id and wn.request_type = old.request_type;
  delete from autotag.pictures pi using autotag.jobs j
  where j.id = pi.job_id and j.finished_at < v_now - (select s.repeat_window from autotag.settings s);
  delete from autotag.uploads up
  where up.id in (
    select empty.id from autotag.uploads empty
    where not exists (select from autotag.arrivals ar where ar.upload_id = empty.id) for update skip locked);
  update autotag.arrivals ar set upload_id = null
  where ar.id in (
    select orphan.id from autotag.arrivals orphan
    where orphan.upload_id is not null and not exists (select from autotag.uploads up where up.id = orphan.upload_id) for update skip locked);
  delete from autotag.webhooks wh where wh.received_at < v_now - interval '4 days';  -- OpenAI retries for three days
  delete from autotag.durations d where d.started_at < v_now - interval '90 days';
  delete from autotag.outbox ob where ob.created_at < v_now - interval '1 day';
  delete from autotag.usage us
  where us.day < (v_now at time zone 'utc')::date - (select s.keep_usage from autotag.settings s);
  -- These come last, because they need the provider row. A deleted workspace comes back with its next upload.
  perform from autotag.provider_limits for update;
  delete from autotag.learned l where l.learned_at < v_now - interval '90 days';  -- not used for 90 days
  delete from autotag.briefs br   -- no upload that is kept was asked this
  where br.created_at < v_now - interval '90 days' and not exists (select from autotag.learned l where l.brief_id = br.id)
    and br.id not in (select j.brief_id from autotag.jobs j where j.brief_id is not null);
  delete from autotag.workspaces ws
  where ws.queued = 0 and not exists (
    select from autotag.jobs j where j.workspace_id = ws.workspace_id and j.finished_at is null);
  delete from autotag.workers wk where wk.lease_until < v_now - interval '2 days';   -- can_expire() lets them go after one
  update autotag.clock set housekeeping_at = v_now where id;
end $$;

-- Deletes the tasks of deleted jobs.
create or replace function autotag.delete_tasks() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  delete from autotag.unstored un using autotag.tasks t, gone g where t.job_id = g.id and un.task_id = t.id;
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
    or autotag.clock_setback(p_now) is not null or coalesce(autotag.can_expire(p_now), false);
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

-- Schedules tick() and housekeeping() in pg_cron under fixed names, so that scheduling again changes nothing. False: pg_cron is
-- not installed. The SQL is dynamic, because without the extension pg_cron's objects do not exist.
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
