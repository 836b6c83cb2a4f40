-- Which batches a worker gets to build, watch or harvest, under the limits of the hour and of the provider's queue.

-- How many batches a workspace may still start in the current hour, and images likewise. Reads only.
create or replace function autotag.batches_left(p_workspace_id uuid, out batches integer, out window_images integer)
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select (l.max_requests - coalesce(sum(w.requests[i]) filter (where w.admitted_at[i] > autotag.now() - l.length), 0))::integer
           - (select count(*)::integer from autotag.batches b where b.workspace_id = p_workspace_id and b.state = 'planned'),
         l.max_units
  from autotag.window_limits(p_workspace_id, 'batch') l
  left join public.workspace_rate_limits w on w.workspace_id = p_workspace_id and w.request_type = 'batch'
  left join lateral generate_subscripts(w.admitted_at, 1) i on true
  group by l.max_requests, l.max_units
$$;

-- claim_batches: hands out whole batches, and the poll when it is due.
--   batches: [{batch, attempt, state, image_count, since, cancelled, openai_batch_id, input_file_id,
--     output_file_id, error_file_id, keep_files}], in the order to work on them: what OpenAI has finished is stored first,
--     then what was begun goes on (it holds queued tokens), then come the first batches of uploads, then the others.
--     Where the provider's queue is too short for all of them, the workspace that has the fewest tokens there is first.
--     What there is no room for is passed by smaller ones until it has waited for batch_patience; from then on nobody
--     begins before it.
--   poll: [{id, since (epoch seconds: it is not older at OpenAI)}] of the batches in flight when they are to be
--     looked at now, else null; cancel: ids of those that are to be cancelled at OpenAI before.
--   files: ids of files that nobody needs any more, to be deleted at OpenAI (files_deleted).
--   question: as in claim(). A batch's keep_files: seconds after which the provider is to delete its files; null: it takes
--   no expiry.
--   look_up: the model, when the provider is to be asked about it now (provider_checked), else null.
--   While nobody knows whether the question works no batch is begun: single calls try it, if need be one of a batch's own
--   images (send_ahead).
--   wait: seconds until there may be more; null when only a notification can bring some.
-- Locks: provider, windows by workspace, batches by id.
create or replace function autotag.claim_batches(
  p_worker uuid, p_slots integer,
  out batches jsonb, out poll jsonb, out cancel jsonb, out files jsonb, out wait double precision,
  p_question bigint default null, out question jsonb, out look_up text
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.sync_question(autotag.lock_provider());
  v_now timestamptz := v_provider.refilled_at;
  v_settings autotag.settings;
  v_slots integer := least(greatest(coalesce(p_slots, 0), 0), 1000);
  v_candidates uuid[];
  v_batch autotag.batches;
  v_images integer;
  v_retry_at timestamptz;      -- when the workspace's window has a place; null: it has
  v_ahead integer;             -- batches of earlier uploads that count on a place in the window
  v_again boolean := false;    -- a candidate could not go: those behind it are for the next call, made at once
  v_tokens bigint;
  v_queued bigint;             -- tokens of what OpenAI has, or is about to
  v_short boolean;             -- not all that waits can be queued there at the same time
  v_patient_since timestamptz;  -- if so, what waits since then is not passed any more …
  v_held boolean := false;     -- … because the room that there is, is held for it
  v_taken uuid[] := array[]::uuid[];
  v_next timestamptz;
  v_unproven boolean;          -- nothing is begun: single calls try the question first
  v_stale boolean;             -- the batch's file asks what was asked before
begin
  select * into v_settings from autotag.settings;
  batches := '[]';
  files := '[]';
  if v_provider.question_version is distinct from p_question then
    question := v_provider.question || jsonb_build_object('version', v_provider.question_version);
  end if;
  if not autotag.hold_lease(p_worker) then
    wait := 1;  -- its next heartbeat registers it again
    return;
  end if;
  if autotag.asks_another_provider(p_worker, v_provider) then
    wait := autotag.real_seconds(v_settings.account_probe_interval);
    return;
  end if;
  v_now := greatest(v_now, v_provider.question_since);  -- what is claimed now is asked this question
  v_unproven := v_provider.proven_at is null and exists (
    select from autotag.workspaces w where w.queued > 0 and (w.ready or w.ready_at < 'infinity')
    union all select from autotag.tasks t where t.retry_at is not null or t.worker_id is not null
    union all select from autotag.batches b where b.state = 'planned' and b.image_count - b.express_count > 1);
  if v_provider.account_error is not null then
    if v_provider.probe_at > v_now then
      wait := autotag.real_seconds(v_provider.probe_at - v_now);
      return;
    end if;
    v_slots := least(v_slots, 1);
  end if;
  if v_provider.proven_at is not null and v_provider.checked_at <= v_now - v_settings.model_check_interval and v_provider.ask_after <= v_now then
    look_up := v_provider.question ->> 'model';
    -- another worker asks in ten minutes, should this one not come to tell
    update autotag.provider_limits p set checked_at = v_now - v_settings.model_check_interval + interval '10 min';
  end if;

  v_queued := (select coalesce(sum(b.reserved_tokens), 0) from autotag.batches b where b.reserved_tokens > 0);
  v_short := v_queued + v_provider.tokens_per_image * (
    select coalesce(sum(b.image_count - b.express_count), 0) from autotag.batches b
    where b.state = 'planned' and b.worker_id is null and b.not_before <= v_now) > v_provider.queued_batch_tokens;
  v_patient_since := case when v_short then v_now - v_settings.batch_patience else '-infinity' end;
  v_candidates := array(
    with ready as (
      select b.id, b.workspace_id, b.state, b.ordinal, b.created_at, t.tokens, t.since,
        b.ordinal > 1 and t.since > v_patient_since as later
      from autotag.batches b
      cross join lateral (
        select (b.image_count - b.express_count)::bigint * v_provider.tokens_per_image + b.extra_tokens as tokens,
               greatest(b.created_at, b.not_before) as since) t
      where b.worker_id is null and b.not_before <= v_now
        and (b.state in ('ended', 'harvesting', 'creating')
          or b.state in ('planned', 'preparing', 'uploading') and not v_unproven and v_provider.has_batches is distinct from false)
        and (b.state <> 'planned' or t.since <= v_patient_since
          or v_queued = 0 or v_queued + t.tokens <= v_provider.queued_batch_tokens)
    )
    select r.id
    from ready r
    left join (
      select b.workspace_id, sum(b.reserved_tokens) as tokens
      from autotag.batches b where b.reserved_tokens > 0 group by b.workspace_id
    ) q on q.workspace_id = r.workspace_id
    order by r.state in ('ended', 'harvesting') desc, r.state = 'planned', r.later,
      -- what its workspace will have queued when its turn comes
      case when v_short and r.state = 'planned' then coalesce(q.tokens, 0) - r.tokens + sum(r.tokens) over (
        partition by r.workspace_id, r.state = 'planned' order by r.later, r.since, r.created_at, r.ordinal) end,
      r.since, r.created_at, r.ordinal
    limit v_slots);
  perform from public.workspace_rate_limits l
  where l.request_type = 'batch' and l.workspace_id in (
    select b.workspace_id from autotag.batches b where b.id = any (v_candidates))
  order by l.workspace_id for update;
  perform from autotag.batches b where b.id = any (v_candidates) order by b.id for update;

  for v_batch in
    select b.* from unnest(v_candidates) with ordinality c (id, i)
    join autotag.batches b on b.id = c.id
    where b.worker_id is null order by c.i
  loop
    if v_batch.state = 'planned' then
      v_images := v_batch.image_count - v_batch.express_count;
      if v_batch.admitted_at is null then
        -- The first batch of an upload goes before the others of earlier ones, but not with the place in the window
        -- that these were planned for.
        select count(*) into v_ahead from autotag.batches b
        where b.workspace_id = v_batch.workspace_id and b.state = 'planned' and b.admitted_at is null
          and b.created_at < v_batch.created_at;
        select max(coalesce(a.retry_at, 'infinity')) into v_retry_at
        from (values (v_ahead + 1, 0), (1, v_images)) w (batches, images)
        cross join lateral autotag.admit(v_batch.workspace_id, 'batch', w.batches, w.images, false, p_take => false) a
        where a.admitted = 0;
        if v_retry_at is not null then  -- it leaves the head of the line: nobody else waits for its workspace's window
          update autotag.batches b set not_before = v_retry_at where b.id = v_batch.id;
          v_again := true;
          continue;
        end if;
      end if;
      v_tokens := v_images::bigint * v_provider.tokens_per_image + v_batch.extra_tokens;
      -- A batch ahead of the provider's queue always goes: alone it must be small enough.
      if v_held or v_queued > 0 and v_queued + v_tokens > v_provider.queued_batch_tokens then
        v_held := v_held or greatest(v_batch.created_at, v_batch.not_before) <= v_patient_since;
        continue;
      end if;
      if v_batch.admitted_at is null then
        select a.at into v_batch.admitted_at
        from autotag.admit(v_batch.workspace_id, 'batch', 1, v_images, false) a where a.admitted > 0;
        if not found then  -- somebody's check_rate_limit was quicker
          v_again := true;
          continue;
        end if;
      end if;
      v_queued := v_queued + v_tokens;
      v_batch.reserved_tokens := v_tokens;
    end if;
    -- a file that asks what was asked before is deleted by its name, and built anew
    v_stale := v_batch.state = 'planned' and coalesce(v_batch.asked_at < v_provider.question_since, false);
    update autotag.batches b
    set worker_id = p_worker, attempt = b.attempt + 1,
        admitted_at = v_batch.admitted_at, reserved_tokens = v_batch.reserved_tokens,
        output_tokens = case when b.input_file_id is null or v_stale then v_provider.output_tokens else b.output_tokens end,
        asked_at = case when b.input_file_id is null or v_stale then v_now else b.asked_at end,
        keep_files = v_provider.keep_files,
        input_file_id = case when v_stale then null else b.input_file_id end,
        state = case
          when b.state = 'planned' and b.input_file_id is null then 'preparing'
          when b.state = 'planned' and v_stale then 'uploading'
          when b.state = 'planned' then 'creating'
          when b.state = 'ended' then 'harvesting'
          else b.state end
    where b.id = v_batch.id;
    v_taken := v_taken || v_batch.id;
  end loop;
  select coalesce(jsonb_agg(jsonb_build_object(
      'batch', b.id, 'attempt', b.attempt, 'state', b.state, 'image_count', b.image_count,
      'since', autotag.real_epoch(b.created_at), 'cancelled', b.cancel_requested,
      'openai_batch_id', b.openai_batch_id, 'input_file_id', b.input_file_id,
      'output_file_id', b.output_file_id, 'error_file_id', b.error_file_id, 'keep_files', b.keep_files) order by t.i), '[]')
  into batches
  from unnest(v_taken) with ordinality t (id, i) join autotag.batches b on b.id = t.id;

  if v_provider.next_poll_at <= v_now and v_provider.ask_after <= v_now then
    select jsonb_agg(jsonb_build_object('id', b.openai_batch_id, 'since', autotag.real_epoch(b.created_at))
             order by b.ordinal, b.created_at),
           jsonb_agg(b.openai_batch_id) filter (where b.cancel_requested)
    into poll, cancel
    from autotag.batches b where b.state = 'submitted';
    select coalesce(jsonb_agg(f.id), '[]') into files
    from (
      select unnest(array[b.input_file_id, b.output_file_id, b.error_file_id]) as id
      from autotag.batches b
      where b.state in ('done', 'cancelled')
        and (b.input_file_id is not null or b.output_file_id is not null or b.error_file_id is not null)
      order by b.id limit 300) f
    where f.id is not null;
    v_provider.next_poll_at := case when poll is null and files = '[]' then '-infinity' else v_now + v_settings.batch_poll_interval end;
  end if;
  if poll is not null or files <> '[]' or look_up is not null then
    -- what it then says of the provider is listened to (batches_seen, poll_trouble, provider_checked)
    update autotag.workers w set look_at = v_now where w.id = p_worker;
  end if;
  update autotag.provider_limits p
  set next_poll_at = v_provider.next_poll_at,
      probe_at = case when p.account_error is null or v_taken = '{}' then p.probe_at
        else v_now + v_settings.account_probe_interval end;

  select min(moment) into v_next from (
    select greatest(v_provider.next_poll_at, v_provider.ask_after)
    where files <> '[]' or v_provider.ask_after > v_now or exists (select from autotag.batches b where b.state = 'submitted')
    union all
    select min(b.not_before) from autotag.batches b
    where b.worker_id is null and b.not_before > v_now and b.not_before < 'infinity'
      and b.state in ('planned', 'preparing', 'uploading', 'creating', 'ended', 'harvesting')
  ) moments (moment);
  wait := case when v_again then 0 when v_next is not null then autotag.real_seconds(greatest(v_next, v_now) - v_now) end;
end $$;

-- The batch if this worker (of the login that calls) holds it, locked together with its job; else a refusal that tells the
-- worker to let go of it.
create or replace function autotag.hold_batch(p_worker uuid, p_batch uuid, p_attempt integer) returns autotag.batches
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
begin
  perform from autotag.jobs j
  where j.id = (select b.job_id from autotag.batches b where b.id = p_batch and b.worker_id = p_worker) for update;
  select * into v_batch from autotag.batches b
  where b.id = p_batch and b.worker_id = p_worker and b.attempt = p_attempt for update;
  if not found or not autotag.is_own_worker(p_worker) then
    perform autotag.refuse(409, 'batch_not_held', 'This batch is not held by this worker any more.',
      'Let go of it: another worker has it, or it was cancelled.', jsonb_build_object('batch', p_batch));
  end if;
  return v_batch;
end $$;
