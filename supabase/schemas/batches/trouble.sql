-- Batches that cannot go on: they are retried, planned again, or replaced by single calls.

-- Records that a worker could not go on with a batch. p_error: {kind, code, message, retry_after, origin, parameter}.
--   account         Both lanes pause.
--   transient       Any worker retries later; in `creating` not before batch_create_grace has passed, because a request that
--                   seemed to fail may still arrive.
--   image           The provider refuses this batch and says why. Its images are sent as single calls, whose errors say more. The
--                   same happens after max_bad_answers times `request_refused`, and after 3 × max_failures failures of any kind
--                   while single calls work.
--   no_batch_api    The routes for files or batches do not exist while single calls work: the provider has no Batch API, and
--                   claim() turns the planned batches into single calls.
--   expires_after   The provider refuses this expiry of files: the next one is tried (7 days, 14 days, none).
-- Locks: job, batch, tasks, provider.
create or replace function autotag.report_batch_failure(p_worker uuid, p_batch uuid, p_attempt integer, p_error jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_batch autotag.batches := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  v_proven boolean := (select p.proven_at is not null from autotag.provider_limits p);
begin
  select * into v_settings from autotag.settings;
  p_error := autotag.judge_batch_error(v_batch, autotag.clean_error(p_error, null), v_proven);
  -- After so many refusals or failures, another try would not succeed either.
  if p_error ->> 'kind' = 'image'
    or p_error ->> 'code' = 'request_refused' and v_batch.failures + 1 >= v_settings.max_bad_answers
    or v_proven and v_batch.failures + 1 >= 3 * v_settings.max_failures and (v_batch.state <> 'harvesting'
      -- the answers are paid for, so workers try to read them for as long as the batch might have taken
      or v_batch.ended_at <= autotag.now() - v_settings.batch_give_up_after) then
    perform autotag.requeue_batch(v_batch, false, 0, p_error ->> 'code', p_error ->> 'message');
    perform autotag.end_batch(v_batch, p_error ->> 'message');
  else
    perform autotag.delay_batch(v_batch, p_error, v_settings);
  end if;
  perform autotag.apply_batch_error(p_worker, v_batch, p_error);
  perform pg_notify('autotag', 'batch');
  perform pg_notify('autotag', 'realtime');
end $$;

-- The error of a batch with the kind that it has in the present situation (report_batch_failure). p_proven: single calls work.
create or replace function autotag.judge_batch_error(p_batch autotag.batches, p_error jsonb, p_proven boolean) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_error ->> 'code' = 'no_batch_api' and p_batch.state not in ('preparing', 'uploading', 'creating') then
    return p_error || '{"kind": "transient", "code": "provider_error"}';  -- only a file is missing
  elsif p_error ->> 'code' = 'no_batch_api' and p_proven or p_error ->> 'parameter' = 'expires_after' and p_batch.keep_files is not null then
    return p_error || '{"kind": "rate_limit"}';
  elsif p_error ->> 'kind' = 'account' and autotag.is_about_request(p_error) and exists (
      select from autotag.jobs j where j.id = p_batch.job_id and j.brief_id is not null) then
    return p_error || '{"kind": "image"}';   -- single calls will show whether the brief is the cause (blame_brief)
  elsif not p_proven and p_error ->> 'kind' = 'transient' and p_error ->> 'origin' = 'provider' then
    return p_error || '{"kind": "account"}';
  end if;
  return p_error;
end $$;

-- Records what the error of a batch says about the provider and the account. p_error: as judge_batch_error() returns it. The caller
-- calls this last. Locks: provider.
create or replace function autotag.apply_batch_error(p_worker uuid, p_batch autotag.batches, p_error jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_error ->> 'code' = 'no_batch_api' and p_error ->> 'kind' = 'rate_limit' then
    update autotag.provider_limits set has_batches = false, batches_refused = true, degraded_at = autotag.now()
      where id;
  elsif p_error ->> 'parameter' = 'expires_after' and p_batch.keep_files is not null then
    -- Azure requires at least 14 days; other providers support no expiry. One step, however many batches report the refusal.
    update autotag.provider_limits p
    set keep_files = case when p_batch.keep_files < 1209600 then 1209600 end, degraded_at = autotag.now()
    where p.keep_files = p_batch.keep_files;
  elsif p_error ->> 'kind' = 'account' then
    perform autotag.pause_tagging(autotag.explain_account(p_error),
      case p_error ->> 'origin' when 'storage' then 'storage' else 'batch' end);
    perform autotag.offer_switch(array[p_worker]);
  end if;
end $$;

-- Releases a batch after an error, for a later try. The caller holds its row.
create or replace function autotag.delay_batch(p_batch autotag.batches, p_error jsonb, p_settings autotag.settings) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- After three failures because OpenAI did not find the input file, the file is lost and is built again.
  update autotag.batches b
  set worker_id = null, error = p_error ->> 'message',
      failures = b.failures + (select k.counts::integer from autotag.error_kinds k where k.kind = p_error ->> 'kind'),
      state = case when v_lost.file or p_error ->> 'code' = 'no_batch_api' then 'planned' else b.state end,
      input_file_id = case when v_lost.file then null else b.input_file_id end,
      reserved_tokens = case when v_lost.file or p_error ->> 'code' = 'no_batch_api' then 0 else b.reserved_tokens end,
      not_before = autotag.now() + greatest(
        case when b.state = 'creating' and p_error ->> 'code' <> all ('{file_not_there_yet,rate_limited}')
          then p_settings.batch_create_grace else interval '0' end,
        case when p_error ->> 'kind' = 'account' or p_error ->> 'code' = 'no_batch_api' or p_error ->> 'parameter' is not null
            then interval '0'
          else make_interval(secs => greatest((p_error ->> 'retry_after')::double precision,
            (0.5 + random() / 2) * least(extract(epoch from p_settings.retry_delay_max),
              extract(epoch from p_settings.retry_delay) * power(2, least(b.failures, 20))))) end)
  from (select p_error ->> 'code' = 'file_not_there_yet' and p_batch.state = 'creating' and p_batch.failures >= 3 as file) v_lost
  where b.id = p_batch.id;
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

-- Whether a single call is queued, requeued or in flight, which can try a question that is not proven. Every claim asks this while the
-- question is not proven. No index has worker_id, so the calls in flight are found through the queues, as leased_tasks() does.
create or replace function autotag.has_single_calls() returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off
  set jit = off
as $$
begin
  return exists (
    select from autotag.workspaces ws where ws.queued > 0 and (ws.ready or ws.ready_at < 'infinity')
    union all select from autotag.tasks t where t.retry_at < 'infinity'
    union all select from autotag.queues q where q.reached > 0 and (
      select t.id from autotag.tasks t where t.job_id = q.job_id and t.id <= q.reached and t.worker_id is not null limit 1) is not null);
end $$;

-- Queues one image of a planned batch as a single call, to try a question that is not proven. False: single calls are queued or
-- in flight that can try it, or no planned batch has a second image. Called by claim(), which holds the provider row.
-- Locks: job, batch, task (all skip locked).
create or replace function autotag.release_probe() returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
  v_task bigint;
begin
  if autotag.has_single_calls() then
    return false;
  end if;
  select b.* into v_batch from autotag.batches b join autotag.jobs j on j.id = b.job_id
  where b.state = 'planned' and b.worker_id is null and b.image_count - b.express_count > 1
  order by b.created_at, b.ordinal limit 1 for no key update skip locked;
  if not found then
    return false;
  end if;
  select t.id into v_task from autotag.tasks t
  where t.batch_id = v_batch.id and t.finished_at is null order by t.id limit 1 for update skip locked;
  if not found then
    return false;
  end if;
  update autotag.batches b set express_count = b.express_count + 1 where b.id = v_batch.id;
  update autotag.tasks t set lane = 'realtime', batch_id = null, retry_at = autotag.now() where t.id = v_task;
  return true;
end $$;

-- Turns the unsubmitted batches of one job into single calls, because the provider has no Batch API. False: there is no such job, or
-- other transactions hold all of them. One job per call. Called by claim(), which holds the provider row.
-- Locks: job, batches, tasks (all skip locked).
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
  order by b.created_at limit 1 for no key update skip locked;
  if not found then
    return false;
  end if;
  v_batches := array(
    select b.id from autotag.batches b
    where b.job_id = v_job.id and b.worker_id is null and b.state in ('planned', 'preparing', 'uploading')
    order by b.id for no key update skip locked);
  update autotag.batches b
  set state = 'cancelled', reserved_tokens = 0, finished_at = p_now,
      error = 'The provider has no Batch API.'
  where b.id = any (v_batches);
  v_tasks := array(
    select t.id from autotag.tasks t where t.batch_id = any (v_batches) and t.finished_at is null
    order by t.id for update skip locked);
  update autotag.queues q set chunk = s.chunk_size from autotag.settings s where q.job_id = v_job.id;
  update autotag.jobs j
  set strategy = 'realtime-chunked', fallback = 'The AI provider has no Batch API, so these images are sent as single calls.'
  where j.id = v_job.id;
  perform autotag.keep(autotag.requeue(jsonb_agg(jsonb_build_object('task', id, 'failures', 0))), false)
  from unnest(v_tasks) id having count(*) > 0;
  perform autotag.refresh_eta(v_job.id);
  return true;
end $$;

-- Plans a batch again and keeps its file. OpenAI refused the batch, because OpenAI's queue of tokens is full; other programs or batches
-- may fill it. A refusal counts if none of our other batches is in the queue, or if the batch is older than batch_patience. After
-- max_bad_answers such refusals the batch is halved, and each half is halved after one more. A batch with at most chunk_max_images images
-- is sent as single calls instead, but only once it is older than batch_patience, because single calls cost twice as much. The caller
-- holds job and batch. Locks: tasks, window (skip locked).
create or replace function autotag.refuse_tokens(
  p_batch autotag.batches, p_error text, p_settings autotag.settings, p_now timestamptz
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_late boolean := p_batch.created_at <= p_now - p_settings.batch_patience;
  v_counts boolean := v_late or not exists (select from autotag.batches b where b.reserved_tokens > 0 and b.id <> p_batch.id);
begin
  update autotag.batches b
  set state = 'planned', openai_batch_id = null, openai_status = null, reserved_tokens = 0, error = p_error,
      not_before = p_now + p_settings.batch_poll_interval, token_refusals = b.token_refusals + v_counts::integer
  where b.id = p_batch.id returning * into p_batch;
  if p_batch.token_refusals < p_settings.max_bad_answers then
    return;
  end if;
  if p_batch.image_count - p_batch.express_count > greatest(p_settings.chunk_max_images, 1) then
    perform autotag.split_batch(p_batch, 2, p_error);
  elsif v_late then
    perform autotag.requeue_batch(p_batch, false, 0, 'batch_refused', p_error);
    perform autotag.end_batch(p_batch, p_error);
    update autotag.jobs j
    set fallback = 'The AI service did not accept a batch of these images, so they are sent as single calls.' where j.id = p_batch.job_id;
  end if;
end $$;

-- Moves the images of a planned batch into p_parts new batches, and cancels the old batch, whose file is deleted at OpenAI. The first new
-- batch takes over the old batch's admission to the workspace's window. The window gets back the images of the other new batches. The
-- caller holds job and batch. Locks: tasks, window (skip locked).
create or replace function autotag.split_batch(p_batch autotag.batches, p_parts integer, p_reason text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tasks bigint[] := autotag.lock_batch_tasks(p_batch.id);
  v_count integer := cardinality(v_tasks);
  v_last integer := (select max(b.ordinal) from autotag.batches b where b.job_id = p_batch.job_id);
begin
  p_parts := least(p_parts, v_count);
  update autotag.batches b
  set state = 'cancelled', worker_id = null, reserved_tokens = 0, finished_at = autotag.now(), error = p_reason where b.id = p_batch.id;
  with made as (
    insert into autotag.batches (job_id, workspace_id, ordinal, image_count, extra_tokens, token_refusals, admitted_at, created_at)
    select p_batch.job_id, p_batch.workspace_id, v_last + n,
      (n::bigint * v_count / p_parts - (n - 1)::bigint * v_count / p_parts)::integer, ceil(p_batch.extra_tokens::numeric / p_parts)::bigint,
      greatest(p_batch.token_refusals - 1, 0), case when n = 1 then p_batch.admitted_at end, p_batch.created_at
    from generate_series(1, p_parts) n
    returning id, ordinal
  )
  update autotag.tasks t set batch_id = m.id
  from unnest(v_tasks) with ordinality u (id, i)
  join made m on m.ordinal = v_last + (u.i * p_parts + v_count - 1) / v_count
  where t.id = u.id;
  perform autotag.give_back_images(p_batch, v_count - v_count / p_parts);
  perform pg_notify('autotag', 'batch');
end $$;

-- Gives images of a batch back to the workspace's window that admitted them, if the window still counts them and no other transaction
-- holds it. Locks: window (skip locked).
create or replace function autotag.give_back_images(p_batch autotag.batches, p_images integer) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_batch.admitted_at is not null and p_images > 0 then
    perform from autotag.windows wn
    where wn.workspace_id = p_batch.workspace_id and wn.request_type = 'batch' for no key update skip locked;
    if found then
      perform autotag.correct_window(p_batch.workspace_id, 'batch', p_batch.admitted_at, 0, -p_images);
    end if;
  end if;
end $$;

-- Splits planned batches that a limit no longer admits because it was lowered since: the images or requests of one batch, the
-- workspace's images in an hour, or the provider's queue (batches of up to a fifth more are tried, because the tokens of an image are
-- an estimate). At most 20 per call. Called by tick(). Locks: job, batch (both skip locked), tasks, window (skip locked).
create or replace function autotag.split_oversized() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_found record;
  v_batch autotag.batches;
begin
  for v_found in
    select b.id, b.job_id, x.images, m.images as max_images
    from autotag.batches b
    cross join lateral (select b.image_count - b.express_count as images) x
    cross join autotag.settings s cross join autotag.provider_limits p
    cross join lateral autotag.window_limits(b.workspace_id, 'batch') l
    cross join lateral (select greatest(1, least(s.batch_max_requests::bigint, l.max_units::bigint,
      case when x.images::bigint * p.tokens_per_image + b.extra_tokens > 1.2 * p.queued_batch_tokens
        then p.queued_batch_tokens * x.images / (x.images::bigint * p.tokens_per_image + b.extra_tokens) end)) as images) m
    where b.state = 'planned' and b.worker_id is null and x.images > 1 and x.images > m.images
    limit 20   -- without an order, because one by id would read every batch that ever existed
  loop
    perform from autotag.jobs j where j.id = v_found.job_id for no key update skip locked;
    continue when not found;
    select * into v_batch from autotag.batches b
    where b.id = v_found.id and b.state = 'planned' and b.worker_id is null for no key update skip locked;
    continue when not found;
    perform autotag.split_batch(v_batch, ceil(v_found.images::numeric / v_found.max_images)::integer,
      'A limit was lowered, so this batch was split.');
  end loop;
end $$;

-- Retries a batch's images without an answer, in the cheapest way allowed: in new batches if p_by_batch and there are more than
-- chunk_max_images, else as single calls. p_failures are added to the images without a recorded error (batch_answers() counted
-- the others). Images that reach max_failures fail with their recorded error, or else with p_code and p_message. The others wait
-- like a single call with as many failures, and at least as long as the errors of the batch's images asked for (leave_to_finish).
-- The caller holds job and batch. Locks: tasks by id, window (skip locked).
create or replace function autotag.requeue_batch(
  p_batch autotag.batches, p_by_batch boolean, p_failures integer, p_code text, p_message text
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_settings autotag.settings;
  v_tasks bigint[] := autotag.lock_batch_tasks(p_batch.id);
  v_job autotag.jobs;
  v_again bigint[] := array[]::bigint[];
  v_failures integer;          -- the largest number of one image
  v_wait double precision := case when p_batch.worker_id is not null and p_batch.not_before > v_now
    then extract(epoch from p_batch.not_before - v_now) else 0 end;
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
      returning t.id, t.failures
    )
    select coalesce(array_agg(a.id order by a.id), '{}'), max(a.failures) into v_again, v_failures from again a;
  end if;
  perform autotag.keep(autotag.requeue(jsonb_agg(jsonb_build_object(
    'task', t.id, 'failures', x.more, 'delay', greatest(v_wait, autotag.growing_delay(t.failures + x.more - 1, v_settings)),
    'code', coalesce(t.error_code, p_code), 'message', coalesce(t.error, p_message)))), false)
  from autotag.tasks t cross join lateral (select case when t.error_code is null then p_failures else 0 end as more) x
  where t.id = any (v_tasks) and t.id not in (select unnest(v_again)) having count(*) > 0;
  perform autotag.place_in_batches(v_job, v_again,
    v_now + make_interval(secs => greatest(v_wait, autotag.growing_delay(greatest(v_failures - 1, 0), v_settings))),
    case when p_batch.openai_batch_id is null then p_batch end);
  perform pg_notify('autotag', 'realtime');
end $$;

-- Puts the waiting single calls of one upload into batches, if the upload is older than realtime_max_wait and batches are expected to
-- finish sooner. p_wait: how long the single calls would wait; null: unknown, and then a batch has to start within realtime_max_wait.
-- p_reason: a sentence for the user. The upload of the workspace with the fewest waiting batches goes first. False: there is no such
-- upload, or other transactions hold all of them. One upload per call. Called by claim(), which holds the provider row. Locks: job, tasks
-- by id (both skip locked).
create or replace function autotag.single_calls_to_batch(p_now timestamptz, p_wait interval, p_reason text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_max_wait interval := (select s.realtime_max_wait from autotag.settings s);
  v_job autotag.jobs;
  v_tasks bigint[];
  v_batch record;
begin
  select j.* into v_job
  from autotag.queues q join autotag.jobs j on j.id = q.job_id
  where q.queued > 0 and j.cancelled_at is null and j.created_at <= p_now - v_max_wait
    -- Images of an upload that was moved to batches before come back one by one. They wait until most are back, because a
    -- workspace may start few batches an hour.
    and (j.fallback is null or q.queued > (
      select count(*) from autotag.tasks t where t.job_id = j.id and t.lane = 'realtime' and t.worker_id is not null))
  order by (select count(*) from autotag.batches b
    where b.workspace_id = j.workspace_id and b.state = 'planned' and b.admitted_at is null), j.created_at
  limit 1 for no key update of j skip locked;
  if not found then
    return false;
  end if;
  v_batch := autotag.predict_new_batch(v_job.workspace_id, (select q.queued from autotag.queues q where q.job_id = v_job.id), p_now);
  if (case when p_wait is null then v_batch.starts_at > p_now + v_max_wait else v_batch.ends_at >= p_now + p_wait end) then
    return false;
  end if;
  v_tasks := array(
    select t.id from autotag.tasks t
    where t.job_id = v_job.id and t.lane = 'realtime' and t.worker_id is null and t.retry_at is null
      and t.finished_at is null order by t.id for update skip locked);
  update autotag.workspaces ws set queued = greatest(0, ws.queued - q.queued)
  from autotag.queues q where q.job_id = v_job.id and q.joined and ws.workspace_id = v_job.workspace_id;
  update autotag.queues q set queued = 0 where q.job_id = v_job.id;
  perform autotag.place_in_batches(v_job, v_tasks);
  update autotag.jobs j set fallback = p_reason where j.id = v_job.id;
  return true;
end $$;
