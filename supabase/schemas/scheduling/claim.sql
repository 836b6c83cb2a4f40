-- The only function that releases single calls, within every limit and in fair order.

-- claim: releases up to p_slots images (at most 1,000) of all workspaces to a worker as single calls, within the provider's
-- bucket and each workspace's window. The workspace with the lowest virtual time is served first, a few images at a time; within
-- it, the job with the fewest released images.
-- p_claim: the number of the claim: the worker's last one plus 1. If the reply was lost, a second call with the same number returns
-- the same images. p_question: the version of the question that the worker has; null: none.
--   tasks: ids of the released tasks; describe_tasks() says what they are.
--   wait: seconds until the next claim, unless a notification comes first; null: nothing is queued.
--   bound: why not more images were released; null: no more are queued.
--   question: what to ask about these images (describe_question() and its `version`); null: the worker has this version.
--
-- While the question is not proven (it is new, or tagging is paused), one image tries it. The next one does if the first has no
-- result after account_probe_interval. So a mistake in the configuration costs one call, and fails no image.
--
-- It holds the provider row, which every tenant needs. So it never waits for a lock that a tenant's transaction can hold, and
-- does not read the host's tables.
--
-- Plans are cached (force_generic_plan), because planning each release again takes a third of the claim. They always use the
-- indexes (enable_seqscan = off), because a plan made while the tables are almost empty must serve a million images. That makes
-- the scan of the one row of settings look expensive, which would start jit, so jit is off.
-- Locks: provider, windows (skip locked), then queued tasks (next_queue() keeps off those of a job that is being cancelled).
create or replace function autotag.claim(
  p_worker uuid, p_slots integer, p_claim integer, out tasks bigint[], out wait double precision, out bound text,
  p_question bigint default null, out question jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan' set random_page_cost = 1.1
  set enable_seqscan = off set jit = off
as $$
declare
  v_provider autotag.provider_limits;
  v_now timestamptz;
  v_released record;
begin
  tasks := '{}';
  p_slots := least(p_slots, 1000);   -- even with an escaped URL of 8 kB for each, describe_tasks() returns less than 50 MB
  if p_slots is null or p_slots < 1 or p_claim is null then
    return;
  end if;
  v_provider := autotag.sync_question(autotag.lock_provider());
  v_now := v_provider.refilled_at;
  if v_provider.question_version is distinct from p_question then
    question := v_provider.question || jsonb_build_object('version', v_provider.question_version);
  end if;
  if not autotag.lock_worker(p_worker) then
    wait := 1;  -- its next heartbeat returns false, and it registers again
    bound := 'lease';
    return;
  end if;
  if (select wk.claim from autotag.workers wk where wk.id = p_worker) >= p_claim then
    tasks := array(select t.id from autotag.tasks t where t.id = any (autotag.leased_tasks(p_worker)) and t.claim = p_claim order by t.id);
    wait := 0;
    return;
  end if;
  if autotag.asks_another_provider(p_worker, v_provider) then
    wait := autotag.real_seconds((select s.account_probe_interval from autotag.settings s));
    bound := 'superseded';
    return;
  end if;
  perform autotag.requeue_due(v_now, v_provider.virtual_time);
  perform autotag.join_queues(v_provider.virtual_time);
  if not v_provider.rerouted and autotag.reroute_upload(v_provider) then
    update autotag.provider_limits set rerouted = true where id;
    wait := 0;
    return;
  end if;

  update autotag.workspaces ws set ready = true where not ws.ready and ws.queued > 0 and ws.ready_at <= v_now;
  update autotag.workers wk set claim = p_claim where wk.id = p_worker;
  v_released := autotag.release_in_turn(p_worker, p_slots, v_provider);
  v_provider.virtual_time := v_released.virtual_time;
  v_provider := autotag.take_from_bucket(v_provider, cardinality(v_released.ids), v_released.tokens);
  tasks := v_released.ids;
  update autotag.workers wk
  set unsent = wk.unsent + cardinality(tasks),
      unsent_extra = wk.unsent_extra + greatest(v_released.tokens - cardinality(tasks)::bigint * v_provider.tokens_per_image, 0)
  where wk.id = p_worker and tasks <> '{}';
  bound := case when cardinality(tasks) = p_slots then 'slots' else autotag.describe_bound(v_provider) end;
  -- After an upload was rerouted, another one may be due.
  wait := case when v_provider.rerouted then 0 else autotag.real_seconds(autotag.next_release(v_provider) - v_now) end;
end $$;

-- Changes how one upload is processed, if that is due. True: the claim releases nothing and is called again at once. The next claim
-- only releases, so that no number of due uploads delays other images. False: nothing is due. Called by claim(), which holds the
-- provider row. Locks: one upload's job, batches, tasks (all skip locked).
create or replace function autotag.reroute_upload(p_provider autotag.provider_limits) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := p_provider.refilled_at;
  v_wait interval;
begin
  -- 429s have persisted for realtime_max_wait: single calls that have waited as long go into batches.
  if p_provider.limited_since <= v_now - (select s.realtime_max_wait from autotag.settings s)
     and p_provider.limited_at > v_now - interval '1 min' and p_provider.has_batches is distinct from false
     and autotag.single_calls_to_batch(v_now, null, 'The AI service kept refusing single calls, so the rest of these images go by batch.') then
    return true;
  end if;
  v_wait := coalesce(autotag.wait_when_day_is_used_up(p_provider), interval '0');   -- not null, because `null and f()` calls f()
  if p_provider.has_batches is distinct from false and v_wait > (select s.realtime_max_wait from autotag.settings s)
    and autotag.single_calls_to_batch(v_now, v_wait,
      'The AI service allows no more single calls today, so the rest of these images go by batch.') then
    return true;
  end if;
  -- When these batches were planned, nobody knew that the provider has no Batch API.
  if p_provider.has_batches is false and autotag.batches_to_single_calls(v_now) then
    return true;
  end if;
  -- The question is not proven and only batches wait: one of their images tries it as a single call.
  return p_provider.proven_at is null and coalesce(p_provider.probe_at, v_now) <= v_now and autotag.release_probe();
end $$;

-- Subtracts released images from the mirror of the provider's bucket, and returns the provider's new row. At most once a second
-- it also counts the waiting images, for predict_wait(). Called by claim(), which holds the provider row.
create or replace function autotag.take_from_bucket(p_provider autotag.provider_limits, p_images integer, p_tokens bigint)
returns autotag.provider_limits
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  p_provider.requests_left := p_provider.requests_left - p_images;
  p_provider.tokens_left := p_provider.tokens_left - p_tokens;
  p_provider.day_left := p_provider.day_left - p_images;
  if p_provider.proven_at is null and p_images > 0 then
    p_provider.probe_at := p_provider.refilled_at + (select s.account_probe_interval from autotag.settings s);
  end if;
  if p_provider.waiting_at < p_provider.refilled_at - interval '1 s' then
    select c.workspaces, c.images, p_provider.refilled_at
    into p_provider.waiting_workspaces, p_provider.waiting_images, p_provider.waiting_at
    from autotag.count_waiting() c;
  end if;
  update autotag.provider_limits p
  set requests_left = p_provider.requests_left,
      tokens_left = p_provider.tokens_left,
      day_left = p_provider.day_left,
      refilled_at = p_provider.refilled_at,
      virtual_time = p_provider.virtual_time,
      waiting_workspaces = p_provider.waiting_workspaces,
      waiting_images = p_provider.waiting_images,
      waiting_at = p_provider.waiting_at,
      rerouted = false,
      probe_at = p_provider.probe_at
  where p.id;
  return p_provider;
end $$;

-- describe_tasks: what a worker needs for the tasks that a claim has released to it, by id: [{task, attempt, workspace, job,
-- traceparent, waited (seconds since the upload), asset_id, bucket, path, url, refused, mark, cap (max tokens of the answer), brief}]. An
-- asset that does not exist any more has neither path nor url. This function reads the host's tables, and claim() does not. So a
-- transaction that holds a whole table delays only this call.
create or replace function autotag.describe_tasks(p_worker uuid, p_tasks bigint[]) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set random_page_cost = 1.1 set enable_seqscan = off set jit = off
as $$
begin
  perform set_config('request.jwt.claims', '', true);   -- the host's file rule trusts these claims
  perform autotag.check_ids(cardinality(p_tasks));
  if not autotag.is_own_worker(p_worker) then
    return '[]'::json;
  end if;
  return (
    with released as materialized (
      select t.id, t.attempt, t.asset_id, t.workspace_id, t.visible_mark, t.job_id, t.output_tokens from autotag.tasks t
      where t.id = any (p_tasks) and t.worker_id = p_worker
    ), uploads as materialized (
      select j.id, j.user_id, j.traceparent, j.brief_id, round(autotag.real_seconds(autotag.now() - j.created_at)::numeric, 3) as waited
      from autotag.jobs j where j.id = any (array(select r.job_id from released r))
    )
    select coalesce(json_agg(i order by i.task), '[]')
    from (
      select r.id as task, r.attempt, r.workspace_id::text as workspace, u.id as job, u.traceparent, u.waited, r.asset_id::text, r.output_tokens as cap, u.brief_id as brief,
        d.bucket, d.path, d.url, d.refused, d.mark
      from released r join uploads u on u.id = r.job_id
      left join autotag.locate(array(select asset_id from released order by id),
        array(select workspace_id from released order by id), array(select visible_mark from released order by id),
        array(select u.user_id from released o join uploads u on u.id = o.job_id order by o.id), true) d
        on d.asset_id = r.asset_id) i);
end $$;

-- Counts a failure for each of these images, and tries them again later. A worker calls it after describe_tasks() ended its session for
-- each of them alone (a damaged row crashes the server process). Ignores tasks that the worker does not hold. Locks: tasks by id (skip
-- locked).
create or replace function autotag.report_unreadable(p_worker uuid, p_tasks bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_settings autotag.settings;
  v_tries jsonb;
begin
  perform autotag.check_ids(cardinality(p_tasks));
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  select * into v_settings from autotag.settings;
  select jsonb_agg(jsonb_build_object('task', h.id, 'failures', 1, 'delay', autotag.growing_delay(h.failures, v_settings),
    'code', 'unreadable_row', 'message', 'The image''s row in the database cannot be read.'))
  into v_tries
  from (
    select t.id, t.failures from autotag.tasks t where t.id = any (p_tasks) and t.worker_id = p_worker
    order by t.id for update skip locked) h;
  if v_tries is not null then
    perform autotag.keep(autotag.requeue(v_tries), false);
    perform pg_notify('autotag', 'realtime');
  end if;
end $$;

-- Why a claim with free slots released no more; null: nothing is queued. p_provider: the row after the claim.
create or replace function autotag.describe_bound(p_provider autotag.provider_limits) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when not exists (select from autotag.workspaces ws where ws.queued > 0) then null
    when p_provider.blocked_until > p_provider.refilled_at then 'retry_after'
    when p_provider.account_error is not null then 'account'
    when p_provider.proven_at is null then 'unproven'
    when not exists (select from autotag.workspaces ws where ws.ready and ws.queued > 0) then 'workspaces'
    when p_provider.tokens_left < p_provider.tokens_per_image then 'provider_tokens'
    when p_provider.requests_left < 1 then 'provider_requests'
    else 'provider_day' end;
end $$;

-- When the next image can be released: the bucket has room for one, a workspace becomes ready, or a delayed task is due.
-- null: only after new images are queued. p_provider: the row after the claim.
create or replace function autotag.next_release(p_provider autotag.provider_limits) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select min(due) from (
    select greatest(p_provider.refilled_at, p_provider.blocked_until, case when p_provider.proven_at is null then p_provider.probe_at end,
      p_provider.refilled_at + interval '1 min' * greatest(
        (1 - p_provider.requests_left) / p_provider.requests_per_minute,
        (1 - p_provider.day_left) / (p_provider.requests_per_day / 1440.0),
        (p_provider.tokens_per_image - p_provider.tokens_left) / p_provider.tokens_per_minute))
    where exists (select from autotag.workspaces ws where ws.ready and ws.queued > 0)
    union all
    select greatest(p_provider.blocked_until, w.ready_at)
    from (select ws.ready_at from autotag.workspaces ws where not ws.ready and ws.queued > 0 order by ws.ready_at limit 1) w
    where w.ready_at < 'infinity'
    union all
    select min(t.retry_at) from autotag.tasks t where t.retry_at < 'infinity'
    union all  -- batches become single calls: reroute_upload() left them, because another transaction held their upload
    select p_provider.refilled_at + autotag.clock_interval(1) where p_provider.has_batches is false
      and exists (select from autotag.batches b where b.state in ('planned', 'preparing', 'uploading') and b.worker_id is null)
    union all  -- the day is used up: waiting calls may become due for a batch
    select p_provider.refilled_at + interval '1 min' where p_provider.day_left < 1 and p_provider.has_batches is distinct from false
      and exists (select from autotag.workspaces ws where ws.queued > 0)
  ) as due_times (due));
end $$;
