-- Batches that cannot go on: they are retried, planned again, or replaced by single calls.

-- A worker could not go on with a batch. p_error: {kind, code, message, retry_after, origin, parameter}.
--   account         Both lanes pause.
--   transient       Any worker retries later; in `creating` not before batch_create_grace has passed, because a request that
--                   seemed to fail may still arrive.
--   image           The provider refuses this batch and says why: its images go as single calls, whose errors say more. They also
--                   do after max_bad_answers times `request_refused`, and after 3 × max_failures failures of any kind while
--                   single calls work.
--   no_batch_api    The routes for files or batches do not exist while single calls work: the provider has no Batch API, and
--                   claim() turns the planned batches into single calls.
--   expires_after   The provider refuses this expiry of files: the next one is tried (7 days, 14 days, none).
-- Locks: provider, workspace, job, batch, tasks.
create or replace function autotag.report_batch_failure(p_worker uuid, p_batch uuid, p_attempt integer, p_error jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_workspace uuid := (select b.workspace_id from autotag.batches b where b.id = p_batch);
  v_batch autotag.batches;
  v_provider autotag.provider_limits := autotag.lock_provider();
  v_kept integer := (select b.keep_files from autotag.batches b where b.id = p_batch);
  v_state text := (select b.state from autotag.batches b where b.id = p_batch);
begin
  select * into v_settings from autotag.settings;
  p_error := autotag.clean_error(p_error, null);
  if p_error ->> 'code' = 'no_batch_api' and v_state not in ('preparing', 'uploading', 'creating') then
    p_error := p_error || '{"kind": "transient", "code": "provider_error"}';  -- only a file is missing
  elsif p_error ->> 'code' = 'no_batch_api' and v_provider.proven_at is not null then
    update autotag.provider_limits set has_batches = false, batches_refused = true, degraded_at = autotag.now();
    p_error := p_error || '{"kind": "rate_limit"}';
  elsif p_error ->> 'parameter' = 'expires_after' and v_kept is not null then
    -- Azure requires at least 14 days; other providers support no expiry. One step, however many batches report the refusal.
    update autotag.provider_limits p set keep_files = case when v_kept < 1209600 then 1209600 end, degraded_at = autotag.now()
    where p.keep_files = v_kept;
    p_error := p_error || '{"kind": "rate_limit"}';
  elsif p_error ->> 'kind' = 'account'
    or v_provider.proven_at is null and p_error ->> 'kind' = 'transient' and p_error ->> 'origin' = 'provider' then
    p_error := p_error || '{"kind": "account"}';
    perform autotag.pause_tagging(autotag.explain_account(p_error),
      case p_error ->> 'origin' when 'storage' then 'storage' else 'batch' end);
    perform autotag.offer_switch(array[p_worker]);
  end if;
  perform from autotag.workspaces w where w.workspace_id = v_workspace for update;
  v_batch := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  -- After so many refusals or failures, another try would not succeed either.
  if p_error ->> 'kind' = 'image'
    or p_error ->> 'code' = 'request_refused' and v_batch.failures + 1 >= v_settings.max_bad_answers
    or v_state <> 'harvesting' and v_provider.proven_at is not null and v_batch.failures + 1 >= 3 * v_settings.max_failures then
    perform autotag.end_batch(v_batch, p_error ->> 'message');
    perform autotag.requeue_batch(v_batch, false, 0, p_error ->> 'code', p_error ->> 'message');
    return;
  end if;
  -- If OpenAI does not find the input file after three failures, the file is lost and is built again.
  update autotag.batches b
  set worker_id = null, error = p_error ->> 'message',
      failures = b.failures + (select k.counts::integer from autotag.error_kinds k where k.kind = p_error ->> 'kind'),
      state = case when v_lost.file or p_error ->> 'code' = 'no_batch_api' then 'planned' else b.state end,
      input_file_id = case when v_lost.file then null else b.input_file_id end,
      reserved_tokens = case when v_lost.file or p_error ->> 'code' = 'no_batch_api' then 0 else b.reserved_tokens end,
      not_before = autotag.now() + greatest(
        case when b.state = 'creating' and p_error ->> 'code' <> all ('{file_not_there_yet,rate_limited}')
          then v_settings.batch_create_grace else interval '0' end,
        case when p_error ->> 'kind' = 'account' or p_error ->> 'code' = 'no_batch_api' or p_error ->> 'parameter' is not null
            then interval '0'
          else make_interval(secs => greatest((p_error ->> 'retry_after')::double precision,
            (0.5 + random() / 2) * least(extract(epoch from v_settings.retry_delay_max),
              extract(epoch from v_settings.retry_delay) * power(2, least(b.failures, 20))))) end)
  from (select p_error ->> 'code' = 'file_not_there_yet' and v_batch.state = 'creating' and v_batch.failures >= 3 as file) v_lost
  where b.id = p_batch;
  perform pg_notify('autotag', 'batch');
  perform pg_notify('autotag', 'realtime');
end $$;

-- A poll failed as a whole. An account error pauses both lanes if the worker was assigned a poll. The next poll is the retry; it
-- waits for retry_after, even if another batch or a webhook makes it due earlier. Locks: provider.
create or replace function autotag.report_poll_failure(p_worker uuid, p_error jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  p_error := autotag.clean_error(p_error, null);
  if p_error ->> 'kind' = 'account' and autotag.is_poll_assigned(p_worker) is not null then
    perform autotag.pause_tagging(autotag.explain_account(p_error), 'poll');
  end if;
  update autotag.provider_limits p
  set ask_after = greatest(p.ask_after, autotag.now() + autotag.clock_interval((p_error ->> 'retry_after')::double precision))
  where p_error ->> 'retry_after' is not null;
end $$;

-- Queues one image of a planned batch as a single call, to try a question that is not proven. False: single calls are queued or
-- in flight that can try it, or no planned batch has a second image. Called by claim(), which holds the provider row.
-- Locks: workspace, job, batch, task.
create or replace function autotag.release_probe() returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
  v_task bigint;
begin
  if exists (
    select from autotag.workspaces w where w.queued > 0 and (w.ready or w.ready_at < 'infinity')
    union all select from autotag.tasks t where t.retry_at is not null or t.worker_id is not null) then
    return false;
  end if;
  select * into v_batch from autotag.batches b
  where b.state = 'planned' and b.worker_id is null and b.image_count - b.express_count > 1
  order by b.created_at, b.ordinal limit 1;
  if not found then
    return false;
  end if;
  perform autotag.lock_workspace(v_batch.workspace_id);
  perform from autotag.jobs j where j.id = v_batch.job_id for update;
  perform from autotag.batches b where b.id = v_batch.id and b.state = 'planned' and b.worker_id is null for update;
  if not found then
    return false;
  end if;
  select t.id into v_task from autotag.tasks t
  where t.batch_id = v_batch.id and t.finished_at is null order by t.id limit 1 for update;
  if not found then
    return false;
  end if;
  update autotag.batches b set express_count = b.express_count + 1 where b.id = v_batch.id;
  update autotag.tasks t set lane = 'realtime', batch_id = null where t.id = v_task;
  perform autotag.add_queued(v_batch.workspace_id, v_batch.job_id, 1, v_task);
  return true;
end $$;

-- The provider has no Batch API: turns the unsubmitted batches of one job into single calls. False: there is no such job. One
-- job per call, because a job's locks come before the next workspace's in the order of locks. Called by claim(), which holds the provider row.
-- Locks: workspace, job, batches, tasks by id.
create or replace function autotag.batches_to_single_calls(p_now timestamptz) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs;
  v_batches uuid[];
  v_tasks bigint[];
begin
  select j.* into v_job
  from autotag.batches b join autotag.jobs j on j.id = b.job_id
  where b.state in ('planned', 'preparing', 'uploading') and b.worker_id is null
  order by b.created_at limit 1;
  if not found then
    return false;
  end if;
  perform autotag.lock_workspace(v_job.workspace_id);
  perform from autotag.jobs j where j.id = v_job.id for update;
  v_batches := array(
    select b.id from autotag.batches b
    where b.job_id = v_job.id and b.worker_id is null and b.state in ('planned', 'preparing', 'uploading')
    order by b.id for update);
  update autotag.batches b
  set state = 'cancelled', reserved_tokens = 0, finished_at = p_now,
      error = 'The provider has no Batch API.'
  where b.id = any (v_batches);
  v_tasks := array(
    select t.id from autotag.tasks t where t.batch_id = any (v_batches) and t.finished_at is null order by t.id for update);
  update autotag.queues q set chunk = s.chunk_size from autotag.settings s where q.job_id = v_job.id;
  update autotag.jobs j
  set strategy = 'realtime-chunked', fallback = 'The AI provider has no Batch API, so these images go as single calls.'
  where j.id = v_job.id;
  perform autotag.requeue(jsonb_agg(jsonb_build_object('task', t, 'failures', 0))) from unnest(v_tasks) t having count(*) > 0;
  perform autotag.refresh_eta(v_job.id);
  return true;
end $$;

-- Retries a batch's images without an answer, in the cheapest way allowed: in new batches if p_by_batch and there are more than
-- chunk_max_images, else as single calls. p_failures are added to the images without a recorded error (batch_answers() counted
-- the others). Images that reach max_failures fail with their recorded error, or else with p_code and p_message.
-- The caller holds workspace, job and batch. Locks: tasks by id.
create or replace function autotag.requeue_batch(
  p_batch autotag.batches, p_by_batch boolean, p_failures integer, p_code text, p_message text
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_tasks bigint[] := autotag.lock_batch_tasks(p_batch.id);
  v_job autotag.jobs;
  v_again bigint[] := array[]::bigint[];
begin
  select * into v_settings from autotag.settings;
  select * into v_job from autotag.jobs j where j.id = p_batch.job_id;
  if p_by_batch and not p_batch.stuck and v_job.cancelled_at is null
     and (select p.has_batches from autotag.provider_limits p) is distinct from false
     and cardinality(v_tasks) > v_settings.chunk_max_images then
    with again as (
      update autotag.tasks t set failures = t.failures + case when t.error_code is null then p_failures else 0 end
      where t.id = any (v_tasks)
        and t.failures + case when t.error_code is null then p_failures else 0 end < v_settings.max_failures
      returning t.id
    )
    select coalesce(array_agg(a.id order by a.id), '{}') into v_again from again a;
  end if;
  perform autotag.requeue(jsonb_agg(jsonb_build_object(
    'task', t.id, 'failures', case when t.error_code is null then p_failures else 0 end,
    'code', coalesce(t.error_code, p_code), 'message', coalesce(t.error, p_message))))
  from autotag.tasks t where t.id = any (v_tasks) and t.id <> all (v_again) having count(*) > 0;
  perform autotag.place_in_batches(v_job, v_again);
  perform pg_notify('autotag', 'realtime');
end $$;

-- 429s persist: puts the waiting single calls of one upload into batches, if it is older than realtime_max_wait. False: there is
-- no such upload. One upload per call, because a job's locks come before the next workspace's in the order of locks. Called by claim(), which holds the provider row.
-- Locks: workspace, job, tasks by id.
create or replace function autotag.single_calls_to_batch(p_now timestamptz) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs;
  v_tasks bigint[];
begin
  select j.* into v_job
  from autotag.queues q join autotag.jobs j on j.id = q.job_id
  where q.queued > 0 and j.cancelled_at is null
    and j.created_at <= p_now - (select s.realtime_max_wait from autotag.settings s)
  order by j.created_at limit 1;
  if not found then
    return false;
  end if;
  perform autotag.lock_workspace(v_job.workspace_id);
  perform from autotag.jobs j where j.id = v_job.id for update;
  with waiting as (
    select t.id from autotag.tasks t
    where t.job_id = v_job.id and t.lane = 'realtime' and t.worker_id is null and t.retry_at is null
      and t.finished_at is null order by t.id for update
  )
  select coalesce(array_agg(w.id order by w.id), '{}') into v_tasks from waiting w;
  update autotag.workspaces w set queued = w.queued - q.queued
  from autotag.queues q where q.job_id = v_job.id and w.workspace_id = v_job.workspace_id;
  update autotag.queues q set queued = 0 where q.job_id = v_job.id;
  perform autotag.place_in_batches(v_job, v_tasks);
  update autotag.jobs j
  set fallback = 'The AI service kept refusing single calls, so the rest of these images go by batch.'
  where j.id = v_job.id;
  return true;
end $$;
