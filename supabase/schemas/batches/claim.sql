-- Assigns batches to workers, which build or harvest them, within the workspaces' windows and the provider's queue.

-- How many more batches a workspace can start within its window, after its planned ones (so the number may be negative), and the
-- most images that one window admits. Reads only.
create or replace function autotag.batches_left(p_workspace_id autotag.workspace_id, out batches integer, out window_images integer)
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select (l.max_requests - coalesce(sum(wn.requests[i]) filter (where wn.admitted_at[i] > autotag.now() - l.length), 0))::integer
           - (select count(*)::integer from autotag.batches b where b.workspace_id = p_workspace_id and b.state = 'planned'),
         l.max_units
  from autotag.window_limits(p_workspace_id, 'batch') l
  left join autotag.windows wn on wn.workspace_id = p_workspace_id and wn.request_type = 'batch'
  left join lateral generate_subscripts(wn.admitted_at, 1) i on true
  group by l.max_requests, l.max_units
$$;

-- claim_batches: assigns at most p_slots whole batches to a worker, and the poll of the provider if it is due. p_claim: the number
-- of the claim, as in claim(); a second call with the same number returns the same batches. p_question: the version of the question
-- that the worker has; null: none.
--   batches: [{batch, attempt, state, image_count, since, cancelled, openai_batch_id, input_file_id, output_file_id,
--     error_file_id, keep_files, brief}], in the order to work on them: batches that OpenAI has finished, batches in progress (they hold
--     queued tokens), the first batch of each upload, the others. If the provider's queue is too short for all of them, the
--     workspace with the fewest tokens in it goes first. Smaller batches overtake one that does not fit, until it has waited for
--     batch_patience; after that no planned batch starts before it. A workspace leaves one slot of each worker to the others.
--     since: epoch seconds; the batch and its files at OpenAI are not older. keep_files: seconds after which the provider is to
--     delete its files; null: the provider supports no expiry.
--   poll: [{id, since}] of all batches in flight if a poll is due, else null.
--   cancel: ids of those to cancel at OpenAI now (take_cancellations).
--   files: ids of files to delete at OpenAI (reported with files_deleted).
--   unrecorded: [{id, since}] of batches that are over and may have input files at OpenAI whose ids nobody recorded. The worker
--     finds those by the batch's name, deletes them, and reports the batches with files_deleted, too.
--   question: as in claim().
--   look_up: name of the model to check at the provider now (provider_checked), else null.
--   wait: seconds until the next call; null: wait for a notification.
-- While the question is not proven, no batch starts: single calls try it first, if necessary with an image of a planned batch
-- (release_probe). Locks: provider, windows by workspace, batches by id (both skip locked).
create or replace function autotag.claim_batches(
  p_worker uuid, p_slots integer, p_claim integer,
  out batches jsonb, out poll jsonb, out cancel jsonb, out files jsonb, out wait double precision,
  p_question bigint default null, out question jsonb, out look_up text, out unrecorded jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.sync_question(autotag.lock_provider());
  v_now timestamptz := greatest(v_provider.refilled_at, v_provider.question_since);  -- so asked_at shows that it asks this question
  v_settings autotag.settings;
  v_slots integer := least(greatest(coalesce(p_slots, 0), 0), 1000);
  v_queue autotag.batch_queue;
  v_taken record;
  v_polls record;
begin
  select * into v_settings from autotag.settings;
  batches := '[]'; files := '[]';
  if v_provider.question_version is distinct from p_question then
    question := v_provider.question || jsonb_build_object('version', v_provider.question_version);
  end if;
  if p_claim is null or not autotag.lock_worker(p_worker) then
    wait := 1;  -- its next heartbeat returns false, and it registers again
    return;
  end if;
  if (select wk.batch_claim >= p_claim from autotag.workers wk where wk.id = p_worker) then
    batches := autotag.describe_batches(array(
      select b.id from autotag.batches b where b.worker_id = p_worker and b.claim = p_claim order by b.created_at, b.ordinal));
    wait := 0;
    return;
  end if;
  update autotag.workers wk set batch_claim = p_claim where wk.id = p_worker;
  if autotag.asks_another_provider(p_worker, v_provider) then
    wait := autotag.real_seconds(v_settings.account_probe_interval);
    return;
  end if;
  if v_provider.account_error is not null then
    if v_provider.probe_at > v_now then
      wait := autotag.real_seconds(v_provider.probe_at - v_now);
      return;
    end if;
    v_slots := least(v_slots, 1);
  end if;

  v_queue := autotag.measure_batch_queue(v_provider, v_now);
  v_taken := autotag.take_batches(p_worker, autotag.rank_batches(p_worker, v_slots, v_provider, v_queue, v_now), v_provider, v_queue, v_now);
  batches := autotag.describe_batches(v_taken.ids);
  perform pg_notify('autotag', 'realtime') where v_provider.proven_at is null;  -- that lane sends the probe
  v_polls := autotag.assign_poll(p_worker, v_provider, v_settings, v_now);
  poll := v_polls.poll; cancel := v_polls.cancel; files := v_polls.files; unrecorded := v_polls.unrecorded; look_up := v_polls.look_up;
  v_provider.next_poll_at := v_polls.next_poll_at;
  update autotag.provider_limits p
  set next_poll_at = v_provider.next_poll_at,
      probe_at = case when p.account_error is null or v_taken.ids = '{}' then p.probe_at
        else v_now + v_settings.account_probe_interval end,
      -- if this worker does not report, another one checks the model in 10 minutes
      checked_at = case when look_up is null then p.checked_at else v_now - v_settings.model_check_interval + interval '10 min' end where p.id;
  wait := case when v_taken.again then 0
    else autotag.real_seconds(autotag.next_batch_claim(v_provider, files <> '[]', v_now) - v_now) end;
end $$;

-- Assigns the poll of the provider to a worker if it is due (claim_batches: poll, cancel, files, unrecorded, look_up). next_poll_at:
-- the new value in the provider's row. Called by claim_batches(), which holds that row and the worker's.
create or replace function autotag.assign_poll(
  p_worker uuid, p_provider autotag.provider_limits, p_settings autotag.settings, p_now timestamptz,
  out poll jsonb, out cancel jsonb, out files jsonb, out unrecorded jsonb, out look_up text, out next_poll_at timestamptz
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  files := '[]';
  next_poll_at := p_provider.next_poll_at;
  if p_provider.ask_after > p_now then
    return;
  end if;
  cancel := autotag.take_cancellations(next_poll_at <= p_now, p_now);
  if next_poll_at <= p_now then
    select l.poll, l.files, l.unrecorded into poll, files, unrecorded from autotag.list_polls(p_now - p_settings.batch_create_grace) l;
    next_poll_at := case when poll is null and files = '[]' and unrecorded is null then '-infinity' else p_now + p_settings.batch_poll_interval end;
  end if;
  -- Somebody waits for the end of a cancelled batch. (OpenAI takes up to ten minutes.)
  if cancel is not null or exists (
    select from autotag.batches b join autotag.jobs j on j.id = b.job_id
    where b.state = 'submitted' and b.cancel_requested and j.cancelled_at > p_now - interval '10 min') then
    next_poll_at := least(next_poll_at, p_now + interval '5 s');
  end if;
  if p_provider.proven_at is not null and p_provider.checked_at <= p_now - p_settings.model_check_interval then
    look_up := p_provider.question ->> 'model';
  end if;
  if poll is not null or files <> '[]' or unrecorded is not null or look_up is not null or cancel is not null then
    -- Allows the worker's reports about the provider (record_poll, report_poll_failure, provider_checked). A poll that does not find
    -- a batch counts by this time, so a cancellation does not change it.
    update autotag.workers wk
    set poll_assigned_at = case when poll is null and wk.poll_assigned_at is not null then wk.poll_assigned_at else p_now end
    where wk.id = p_worker;
  end if;
end $$;

-- The batches p_ids, in this order, as claim_batches() returns them.
create or replace function autotag.describe_batches(p_ids uuid[]) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_agg(jsonb_build_object(
      'batch', b.id, 'attempt', b.attempt, 'state', b.state, 'image_count', b.image_count,
      'since', autotag.real_epoch(b.created_at), 'cancelled', b.cancel_requested,
      'openai_batch_id', b.openai_batch_id, 'input_file_id', b.input_file_id,
      'output_file_id', b.output_file_id, 'error_file_id', b.error_file_id, 'keep_files', b.keep_files,
      'brief', (select j.brief_id from autotag.jobs j where j.id = b.job_id)) order by t.i), '[]')
    from unnest(p_ids) with ordinality t (id, i) join autotag.batches b on b.id = t.id);
end $$;

-- Ids of batches to cancel at OpenAI, at most 100 at a time, of all workspaces alike. A batch is returned once as soon as its upload
-- is cancelled, and again with each poll (p_due) until OpenAI is cancelling it. The order is random, so that a batch that the provider
-- refuses to cancel does not hold back others for long. Called by claim_batches(), which holds the provider row. Locks: batches by id
-- (skip locked).
create or replace function autotag.take_cancellations(p_due boolean, p_now timestamptz) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids jsonb;
begin
  with chosen as (
    select b.id from autotag.batches b
    where b.state = 'submitted' and b.cancel_requested and b.openai_status is distinct from 'cancelling'
      and (p_due or b.cancel_sent_at is null)
    order by row_number() over (partition by b.workspace_id order by random()) limit 100
  ), locked as (
    select b.id from autotag.batches b where b.id in (select c.id from chosen c) order by b.id for no key update skip locked
  ), asked as (
    update autotag.batches b set cancel_sent_at = p_now from locked l where b.id = l.id returning b.openai_batch_id as id
  )
  select jsonb_agg(a.id order by random()) into v_ids from asked a;
  return v_ids;
end $$;

-- The batches to poll, and the files to delete at OpenAI (claim_batches: poll, files, unrecorded). p_over: a batch that ended before
-- this time has all its unrecorded files at OpenAI by now.
create or replace function autotag.list_polls(p_over timestamptz, out poll jsonb, out files jsonb, out unrecorded jsonb)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select jsonb_agg(jsonb_build_object('id', b.openai_batch_id, 'since', autotag.real_epoch(b.created_at))
           order by b.ordinal, b.created_at)
  into poll
  from autotag.batches b where b.state = 'submitted';
  select coalesce(jsonb_agg(f.id), '[]') into files
  from (
    select unnest(array[b.input_file_id, b.output_file_id, b.error_file_id]) as id
    from autotag.batches b
    where b.state in ('done', 'cancelled')
      and (b.input_file_id is not null or b.output_file_id is not null or b.error_file_id is not null)
    order by b.id limit 300) f
  where f.id is not null;
  select jsonb_agg(jsonb_build_object('id', f.id, 'since', autotag.real_epoch(f.created_at))) into unrecorded
  from (
    select b.id, b.created_at from autotag.batches b
    where b.state in ('done', 'cancelled') and b.unrecorded_files > 0 and b.finished_at <= p_over order by b.id limit 100) f;
end $$;

-- When a worker should call claim_batches() again: for the next poll, or when a delayed batch is due; null: only after a
-- notification. p_more_files: there may be more files to delete.
create or replace function autotag.next_batch_claim(p_provider autotag.provider_limits, p_more_files boolean, p_now timestamptz)
returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select min(due) from (
    select greatest(p_now, p_provider.next_poll_at, p_provider.ask_after)
    where p_more_files or p_provider.ask_after > p_now or exists (select from autotag.batches b where b.state = 'submitted')
    union all
    select min(b.not_before) from autotag.batches b
    where b.worker_id is null and b.not_before > p_now and b.not_before < 'infinity'
      and b.state in ('planned', 'preparing', 'uploading', 'creating', 'ended', 'harvesting')
    union all
    select greatest(p_provider.next_poll_at, p_provider.ask_after, min(b.finished_at) + (select s.batch_create_grace from autotag.settings s))
    from autotag.batches b where b.state in ('done', 'cancelled') and b.unrecorded_files > 0 having count(*) > 0
  ) due_times (due));
end $$;

-- Locks a batch and its job, and returns the batch. Refuses a worker that does not hold it (any more) with this attempt, and
-- workers of another login. Refuses as `busy` if another transaction holds one of the rows (for example a tenant's, which called
-- cancel_tagging); the worker calls again later. The caller does not hold the provider row. Locks: job, batch.
create or replace function autotag.lock_held_batch(p_worker uuid, p_batch uuid, p_attempt integer) returns autotag.batches
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  v_batch autotag.batches;
begin
  perform from autotag.jobs j
  where j.id = (select b.job_id from autotag.batches b where b.id = p_batch and b.worker_id = p_worker) for no key update;
  select * into v_batch from autotag.batches b
  where b.id = p_batch and b.worker_id = p_worker and b.attempt = p_attempt for no key update;
  if not found or not autotag.is_own_worker(p_worker) then
    perform autotag.refuse(409, 'batch_not_held', 'This worker does not hold this batch any more.',
      'Stop working on it: another worker has it, or it was cancelled.', jsonb_build_object('batch', p_batch));
  end if;
  return v_batch;
exception when lock_not_available then
  perform autotag.refuse(503, 'busy', 'Another transaction holds this batch.', 'Call again in a moment.',
    jsonb_build_object('batch', p_batch, 'retry_after', 1));
  return null;
end $$;
