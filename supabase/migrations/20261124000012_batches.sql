-- OpenAI Batches: one row is one batch at OpenAI, whatever dies when.
--
--   planned ─► preparing ─► uploading ─► creating ─► submitted ─► ended ─► harvesting ─► done
--      ▲  (images fetched,   (input file  (about to   (OpenAI has  (OpenAI  (answers are
--      │   file built)        uploaded)    create)     it)          is done) stored)
--      └── OpenAI's queue was full: again later (with the file)       cancelled: before OpenAI had it
--
-- A worker that takes over a row in `creating` looks at OpenAI first and adopts the batch that carries the
-- row's id in its metadata. Whoever holds a row has its `attempt`; a call with an older one is refused.
-- A file's id stays in the row until the file is deleted at OpenAI, so that whoever comes next can do it.

create table autotag.batches (
  id uuid primary key default gen_random_uuid(),
  job_id uuid not null references autotag.jobs on delete cascade,
  workspace_id uuid not null,
  ordinal integer not null,              -- 1 is the priority batch of its job
  image_count integer not null check (image_count > 0),   -- its share of the upload …
  express_count integer not null default 0,               -- … of which so many went as single calls
  state text not null default 'planned' check (state in ('planned', 'preparing', 'uploading', 'creating',
    'submitted', 'ended', 'harvesting', 'done', 'cancelled')),
  worker_id uuid,
  attempt integer not null default 0,
  failures integer not null default 0,
  not_before timestamptz not null default '-infinity',
  admitted_at timestamptz,               -- its place in the workspace's window, taken once
  output_tokens integer,                 -- the cap of its answers, and when it was built with what was asked then
  asked_at timestamptz,
  keep_files integer,                    -- what its files are asked to be kept for (provider_limits.keep_files then)
  extra_tokens bigint not null default 0,     -- what its images need more than others, after answers that were cut off
  reserved_tokens bigint not null default 0,  -- its share of the provider's queued-token limit, until OpenAI is done with it
  openai_batch_id text unique,
  openai_status text,
  input_file_id text,
  output_file_id text,
  error_file_id text,
  request_total integer not null default 0,
  request_done integer not null default 0,    -- answered or failed, as OpenAI counts
  running_at timestamptz,                     -- when OpenAI was first seen to work on it
  predicted_seconds double precision,         -- what it was expected to take when OpenAI got it
  progress_at timestamptz,                    -- when a look at it last saw something new
  looks_in_vain integer not null default 0,   -- … and how many in a row did not find it at OpenAI …
  vain_look_at timestamptz,                   -- … of which this was the last (workers.look_at): each counts once
  cancel_requested boolean not null default false,
  stuck boolean not null default false,       -- given up: what OpenAI has not done goes as single calls
  stored boolean not null default false,      -- all its rows are stored and batch-complete is sent
  error text,
  created_at timestamptz not null,
  submitted_at timestamptz,
  ended_at timestamptz,
  finished_at timestamptz,
  unique (job_id, ordinal),
  check (express_count < image_count),
  check (reserved_tokens = 0 or state in ('preparing', 'uploading', 'creating', 'submitted'))
) with (fillfactor = 50);
create index batches_live_idx on autotag.batches (state, created_at, ordinal) where state not in ('done', 'cancelled');
create index batches_worker_idx on autotag.batches (worker_id) where worker_id is not null;
create index batches_leftover_files_idx on autotag.batches (id) where state in ('done', 'cancelled')
  and (input_file_id is not null or output_file_id is not null or error_file_id is not null);
create index batches_reserved_idx on autotag.batches (workspace_id) include (reserved_tokens) where reserved_tokens > 0;
create index batches_workspace_planned_idx on autotag.batches (workspace_id) where state = 'planned';
alter table autotag.batches enable row level security;

-- How many batches a workspace may still start in the current hour, and images likewise. Reads only.
create function autotag.batches_left(p_workspace_id uuid, out batches integer, out window_images integer)
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
create function autotag.claim_batches(
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
  if autotag.is_outdone(p_worker, v_provider) then
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
create function autotag.hold_batch(p_worker uuid, p_batch uuid, p_attempt integer) returns autotag.batches
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

-- The images of a batch that still need an answer, after a task id, at most 1,000: [{task, asset_id, bucket, path, url,
-- refused, cap}]. None of a batch that the worker does not hold.
create function autotag.batch_images(
  p_worker uuid, p_batch uuid, p_attempt integer, p_after bigint, p_limit integer
) returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  with page as (
    select t.id, t.asset_id, t.hidden, greatest(t.min_output_tokens, b.output_tokens) as cap
    from autotag.tasks t join autotag.batches b on b.id = t.batch_id
    where t.batch_id = p_batch and t.id > p_after and t.finished_at is null
      and b.worker_id = p_worker and b.attempt = p_attempt and autotag.is_own_worker(p_worker)
    order by t.id limit greatest(least(p_limit, 1000), 0)
  )
  select coalesce(jsonb_agg(jsonb_build_object('task', p.id, 'asset_id', p.asset_id,
    'bucket', case when not p.hidden then d.bucket end, 'path', case when not p.hidden then d.path end, 'url', d.url,
    'refused', case when d.foreign_file then 'foreign_file' when p.hidden then 'hidden_file' end,
    'cap', p.cap) order by p.id), '[]')
  from page p
  left join autotag.describe_assets(array(select asset_id from page)) d on d.asset_id = p.asset_id
$$;

-- The input file is full: the images after p_last_task become a batch of their own, which waits its own turn under the
-- limits. Nothing happens when none would be left, or when the file is not being built. Locks: job, batches, tasks.
create function autotag.batch_split(p_worker uuid, p_batch uuid, p_attempt integer, p_last_task bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches := autotag.hold_batch(p_worker, p_batch, p_attempt);
  v_rest bigint[];
  v_new uuid;
begin
  v_rest := array(select t from unnest(autotag.lock_batch_tasks(p_batch)) t where t > p_last_task);
  if v_rest = '{}' or v_batch.state <> 'preparing' or cardinality(v_rest) >= v_batch.image_count - v_batch.express_count then
    return;
  end if;
  insert into autotag.batches (job_id, workspace_id, ordinal, image_count, created_at)
  select v_batch.job_id, v_batch.workspace_id, max(b.ordinal) + 1, cardinality(v_rest), v_batch.created_at
  from autotag.batches b where b.job_id = v_batch.job_id
  returning id into v_new;
  update autotag.batches b set image_count = b.image_count - cardinality(v_rest) where b.id = p_batch;
  update autotag.tasks t set batch_id = v_new where t.id = any (v_rest);
  perform pg_notify('autotag', 'batch');
end $$;

-- A batch's status as the provider says it, made sure of: null for what is none. `gone`: it does not know the batch.
create function autotag.check_status(p_status text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case when p_status in
    ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', 'cancelled', 'gone')
    then p_status end
$$;

-- When a worker (of the login that calls) was handed a look at the provider last; null: never.
create function autotag.was_handed_look(p_worker uuid) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select w.look_at from autotag.workers w where w.id = p_worker and w.login = session_user);
end $$;

-- Live tasks of a batch, locked in order.
create function autotag.lock_batch_tasks(p_batch uuid) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tasks bigint[];
begin
  with live as (
    select t.id from autotag.tasks t where t.batch_id = p_batch and t.finished_at is null order by t.id for update
  )
  select coalesce(array_agg(id), '{}') into v_tasks from live;
  return v_tasks;
end $$;

-- The worker that holds a batch says what it does next: preparing (from the beginning, or again while nothing of it is
-- created), uploading, then creating, with its file.
create function autotag.batch_step(
  p_worker uuid, p_batch uuid, p_attempt integer, p_state text, p_input_file_id text default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches := autotag.hold_batch(p_worker, p_batch, p_attempt);
begin
  p_input_file_id := autotag.check_id(p_input_file_id);
  if not coalesce(case p_state
      when 'preparing' then v_batch.state in ('preparing', 'uploading')
      when 'uploading' then v_batch.state in ('preparing', 'uploading')
      when 'creating' then v_batch.state in ('uploading', 'creating') and p_input_file_id is not null end, false) then
    perform autotag.refuse(400, 'step_out_of_order',
      format('A batch that is %s cannot be %s next.', v_batch.state, coalesce(autotag.printable(p_state, 20), 'nothing')),
      'Prepare, upload, create; creating needs the id of the file.', jsonb_build_object('batch', p_batch));
  end if;
  update autotag.batches b
  set state = p_state, input_file_id = coalesce(p_input_file_id, b.input_file_id)
  where b.id = p_batch;
  if p_state = 'preparing' then
    -- What an earlier worker noted while it built the file holds no more: the image is prepared again.
    update autotag.tasks t set error_code = null, error = null where t.batch_id = p_batch and t.error_code is not null;
    perform autotag.advance(autotag.lock_batch_tasks(p_batch), 'preparing');
    perform autotag.tell_progress(v_batch.job_id);
  end if;
end $$;

-- OpenAI has the batch, which was being created. The worker lets go of it; the next poll looks at it.
create function autotag.batch_submitted(
  p_worker uuid, p_batch uuid, p_attempt integer, p_openai_batch_id text, p_status text, p_input_file_id text
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz;
  v_batch autotag.batches;
begin
  perform autotag.lock_provider();
  v_batch := autotag.hold_batch(p_worker, p_batch, p_attempt);
  v_now := autotag.now();
  p_openai_batch_id := autotag.check_id(p_openai_batch_id);
  if v_batch.state <> 'creating' or p_openai_batch_id is null
    or exists (select from autotag.batches b where b.openai_batch_id = p_openai_batch_id) then
    perform autotag.refuse(400, 'step_out_of_order', 'This is no batch that was being created.',
      'Create it first, and pass the id that the provider gave it.', jsonb_build_object('batch', p_batch));
  end if;
  update autotag.batches b
  set state = 'submitted', worker_id = null, openai_batch_id = p_openai_batch_id,
      openai_status = coalesce(autotag.check_status(p_status), 'validating'),
      input_file_id = coalesce(autotag.check_id(p_input_file_id), b.input_file_id), submitted_at = v_now, progress_at = v_now,
      looks_in_vain = 0, running_at = null,
      predicted_seconds = (autotag.predict_batch(b.image_count - b.express_count, v_now, v_now, null, 0, b.id)).p50
  where b.id = p_batch;
  perform autotag.advance(autotag.lock_batch_tasks(p_batch), 'submitted',
    (select v_now + make_interval(secs => b.predicted_seconds) from autotag.batches b where b.id = p_batch));
  perform autotag.tell_progress(v_batch.job_id, autotag.refresh_eta(v_batch.job_id));
  -- To have a batch proves nothing of the model: only an answer does.
  perform autotag.resume_account('batch');
  update autotag.provider_limits p
  set next_poll_at = case
    -- its webhook came before its id was known here
    when exists (select from autotag.webhooks w where w.openai_batch_id = p_openai_batch_id) then '-infinity'
    when p.next_poll_at < v_now then v_now + s.batch_poll_interval
    else least(p.next_poll_at, v_now + s.batch_poll_interval) end
  from autotag.settings s;
  perform pg_notify('autotag', 'batch');
end $$;

-- The worker could not go on: {kind, code, message, retry_after, origin, parameter}. Of the account: both lanes stop.
-- Transient: another try later, by whoever comes first; in `creating` not before batch_create_grace has passed,
-- because a request that seemed to fail may yet arrive. A batch that the provider refuses as such is split into single calls,
-- whose answers say more: at once where it says why, else after max_bad_answers refusals, or after three times max_failures
-- troubles of any kind while single calls work. If the files or batches routes do not exist while single calls work, the
-- provider has no Batch API, and claim() makes single calls of what was planned. One that refuses an expiry is asked for another.
create function autotag.batch_trouble(p_worker uuid, p_batch uuid, p_attempt integer, p_error jsonb) returns void
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
  p_error := autotag.check_error(p_error, null);
  if p_error ->> 'code' = 'no_batch_api' and v_state not in ('preparing', 'uploading', 'creating') then
    p_error := p_error || '{"kind": "transient", "code": "provider_error"}';  -- a file that is gone is no missing API
  elsif p_error ->> 'code' = 'no_batch_api' and v_provider.proven_at is not null then
    update autotag.provider_limits set has_batches = false, batches_refused = true;
    p_error := p_error || '{"kind": "rate_limit"}';
  elsif p_error ->> 'parameter' = 'expires_after' and v_kept is not null then
    -- Azure keeps files for at least 14 days; others know no expiry at all. One step, however many batches have asked so.
    update autotag.provider_limits p set keep_files = case when v_kept < 1209600 then 1209600 end where p.keep_files = v_kept;
    p_error := p_error || '{"kind": "rate_limit"}';
  elsif p_error ->> 'kind' = 'account'
    or v_provider.proven_at is null and p_error ->> 'kind' = 'transient' and p_error ->> 'origin' = 'provider' then
    p_error := p_error || '{"kind": "account"}';
    perform autotag.stop_account(autotag.explain_account(p_error),
      case p_error ->> 'origin' when 'storage' then 'storage' else 'batch' end);
    perform autotag.pass_turn(array[p_worker]);
  end if;
  perform from autotag.workspaces w where w.workspace_id = v_workspace for update;
  v_batch := autotag.hold_batch(p_worker, p_batch, p_attempt);
  -- A request that is refused again and again, for whatever reason, will not be accepted either.
  if p_error ->> 'kind' = 'image'
    or p_error ->> 'code' = 'request_refused' and v_batch.failures + 1 >= v_settings.max_bad_answers
    or v_state <> 'harvesting' and v_provider.proven_at is not null and v_batch.failures + 1 >= 3 * v_settings.max_failures then
    perform autotag.end_batch(v_batch, p_error ->> 'message');
    perform autotag.requeue_batch(v_batch, false, 0, p_error ->> 'code', p_error ->> 'message');
    return;
  end if;
  -- A file that OpenAI keeps not knowing is gone: it is built again.
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

-- A look at OpenAI failed as a whole. Of the account: both lanes stop, if the worker was handed a look. Else the next look is
-- the next try, not before the provider said, whatever brings looks forward (another batch, a webhook). Locks: provider.
create function autotag.poll_trouble(p_worker uuid, p_error jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  p_error := autotag.check_error(p_error, null);
  if p_error ->> 'kind' = 'account' and autotag.was_handed_look(p_worker) is not null then
    perform autotag.stop_account(autotag.explain_account(p_error), 'poll');
  end if;
  update autotag.provider_limits p
  set ask_after = greatest(p.ask_after, autotag.now() + autotag.clock_interval((p_error ->> 'retry_after')::double precision))
  where p_error ->> 'retry_after' is not null;
end $$;

-- Takes one image out of a planned batch and queues it as a single call, where there is no single call that could try a
-- question that has not proven itself. False when there is one, or no batch that can spare an image. Called by claim(), which
-- holds the provider row. Locks: workspace, job, batch, task.
create function autotag.send_ahead() returns boolean
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

-- A provider without a Batch API: what was planned as batches of one job goes as single calls. False when there is no
-- such job. One at a time, for the same reason as seal_upload(). Called by claim(), which holds the provider row.
-- Locks: workspace, job, batches, tasks by id.
create function autotag.leave_batches(p_now timestamptz) returns boolean
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

-- What the provider says of the model and of itself, asked once a day (claim_batches: look_up) of the worker that was handed
-- the question: {model, shutdown_date, batches}, each optional; `batches`: whether it has a Batch API. Of another model than
-- the one that is asked nothing is kept. Returns a sentence for the log when the model's end is near. Locks: provider.
create function autotag.provider_checked(p_worker uuid, p_facts jsonb) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := (select p.question ->> 'model' from autotag.provider_limits p where p.question ->> 'model' = p_facts ->> 'model');
  m autotag.models := autotag.find_model(v_model);
  v_date date;
begin
  if autotag.was_handed_look(p_worker) is null then
    return null;
  end if;
  if p_facts ->> 'shutdown_date' ~ '^20\d{2}-\d{2}-\d{2}$' then
    begin
      v_date := (p_facts ->> 'shutdown_date')::date;
    exception when datetime_field_overflow then
      v_date := null;
    end;
  end if;
  if v_date is not null and v_model is not null then
    -- First, so that nobody waits for the models' rows with the provider's in hand. A row of its own, like its family's: the
    -- end of one snapshot is not that of the others.
    m.name := v_model;
    m.shutdown_date := v_date;
    m.cap_parameter := coalesce(m.cap_parameter, 'max_completion_tokens');
    m.answer_format := coalesce(m.answer_format, 'json_schema');
    m.sends_effort := coalesce(m.sends_effort, true);
    m.sends_detail := coalesce(m.sends_detail, true);
    m.sends_tier := coalesce(m.sends_tier, true);
    m.batch_discount := coalesce(m.batch_discount, 0.5);
    m.flex_discount := coalesce(m.flex_discount, 0.5);
    m.priority_factor := coalesce(m.priority_factor, 2);
    insert into autotag.models as x values (m.*)
    on conflict (name) do update set shutdown_date = v_date where x.shutdown_date is distinct from v_date;
  end if;
  update autotag.provider_limits p
  set checked_at = autotag.now(),
      -- What an attempt has shown stands: a list of batches may be there without a way to make one.
      has_batches = case when p.batches_refused then false
        when jsonb_typeof(p_facts -> 'batches') = 'boolean' then (p_facts ->> 'batches')::boolean else p.has_batches end;
  perform pg_notify('autotag', 'realtime');
  return (autotag.describe_shutdown()) ->> 'message';
end $$;

-- The end of the model that is asked, once it is 90 days away or nearer: {level, message, days, date, successor}; else
-- null. From 14 days before it is an error: what is not changed by then stops. p_model null: the model of the settings.
create function autotag.describe_shutdown(p_model text default null) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := coalesce(p_model, (select s.model from autotag.settings s));
  m autotag.models := autotag.find_model(v_model);
  v_days integer := m.shutdown_date - (autotag.now() at time zone 'utc')::date;
begin
  if v_days is null or v_days > 90 then
    return null;
  end if;
  return jsonb_build_object(
    'level', case when v_days > 14 then 'warning' else 'error' end, 'days', v_days, 'date', m.shutdown_date,
    'successor', m.successor,
    'message', case
      when v_days > 0 then format('%s shuts down on %s, in %s%s', v_model, m.shutdown_date, case v_days when 1 then '1 day' else v_days || ' days' end,
        coalesce('; its successor is ' || m.successor, '') || '.')
      else format('%s was shut down on %s%s', v_model, m.shutdown_date, coalesce('; its successor is ' || m.successor, '') || '.') end,
    'fix', case when m.successor is not null then format(
        'autotag compare --model %1$s --workspace …   then: update autotag.settings set model = ''%1$s'';', m.successor)
      else 'Choose a model that stays: update autotag.settings set model = ''…'';' end);
end $$;

-- Files that are deleted at OpenAI need no deleting any more. (Of a batch that is over: nothing else comes of a lie than that
-- the provider keeps them until they expire.)
create function autotag.files_deleted(p_worker uuid, p_files text[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_ids(cardinality(p_files));
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  update autotag.batches b
  set input_file_id = case when b.input_file_id = any (p_files) then null else b.input_file_id end,
      output_file_id = case when b.output_file_id = any (p_files) then null else b.output_file_id end,
      error_file_id = case when b.error_file_id = any (p_files) then null else b.error_file_id end
  where b.id in (
    select d.id from autotag.batches d
    where d.state in ('done', 'cancelled')
      and (d.input_file_id = any (p_files) or d.output_file_id = any (p_files) or d.error_file_id = any (p_files))
    order by d.id for update);
end $$;
