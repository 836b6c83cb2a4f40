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
  reserved_tokens bigint not null default 0,  -- its share of the provider's queued-token limit
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
  looks_in_vain integer not null default 0,   -- … and how many in a row did not find it at OpenAI
  cancel_requested boolean not null default false,
  stuck boolean not null default false,       -- given up: what OpenAI has not done goes as single calls
  stored boolean not null default false,      -- all its rows are stored and batch-complete is sent
  error text,
  created_at timestamptz not null,
  submitted_at timestamptz,
  ended_at timestamptz,
  finished_at timestamptz,
  unique (job_id, ordinal),
  check (express_count < image_count)
) with (fillfactor = 50);
create index batches_turn_idx on autotag.batches (created_at, ordinal)
  where worker_id is null and state in ('planned', 'preparing', 'uploading', 'creating', 'ended', 'harvesting');
create index batches_in_flight_idx on autotag.batches (openai_batch_id) where state = 'submitted';
create index batches_worker_idx on autotag.batches (worker_id) where worker_id is not null;
create index batches_leftover_files_idx on autotag.batches (id) where state in ('done', 'cancelled')
  and (input_file_id is not null or output_file_id is not null or error_file_id is not null);
create index batches_workspace_planned_idx on autotag.batches (workspace_id) where state = 'planned';
alter table autotag.batches enable row level security;

-- How many batches a workspace may still start in the current hour, and images likewise. Reads only.
create function autotag.batches_left(p_workspace_id uuid, out batches integer, out window_images integer)
language sql stable security definer set search_path = ''
as $$
  select (l.max_requests - coalesce(sum(w.requests[i]) filter (where w.admitted_at[i] > autotag.now() - l.length), 0))::integer
           - (select count(*)::integer from autotag.batches b where b.workspace_id = p_workspace_id and b.state = 'planned'),
         l.max_units
  from (select 1) one
  left join public.workspace_rate_limits w on w.workspace_id = p_workspace_id and w.request_type = 'batch'
  cross join lateral autotag.window_limits(
    coalesce(w, row(p_workspace_id, 'batch', null, null, '{}', '{}', '{}')::public.workspace_rate_limits)) l
  left join lateral generate_subscripts(w.admitted_at, 1) i on true
  group by l.max_requests, l.max_units
$$;

-- claim_batches: hands out whole batches, and the poll when it is due.
--   batches: [{batch, attempt, state, image_count, since, cancelled, openai_batch_id, input_file_id,
--     output_file_id, error_file_id}], in the order to work on them: what OpenAI has finished is stored first,
--     then the first batches of uploads, then the others.
--   poll: [{id, since (epoch seconds: it is not older at OpenAI)}] of the batches in flight when they are to be
--     looked at now, else null; cancel: ids of those that are to be cancelled at OpenAI before.
--   files: ids of files that nobody needs any more, to be deleted at OpenAI (files_deleted).
--   wait: seconds until there may be more; null when only a notification can bring some.
-- Locks: provider, windows by workspace, batches by id.
create function autotag.claim_batches(
  p_worker uuid, p_slots integer,
  out batches jsonb, out poll jsonb, out cancel jsonb, out files jsonb, out wait double precision
)
language plpgsql security definer set search_path = ''
as $$
declare
  v_provider autotag.provider_limits := autotag.lock_provider();
  v_now timestamptz := v_provider.refilled_at;
  v_settings autotag.settings;
  v_slots integer := greatest(coalesce(p_slots, 0), 0);
  v_candidates uuid[];
  v_batch autotag.batches;
  v_admitted integer;
  v_admitted_at timestamptz;   -- its place in the workspace's window
  v_retry_at timestamptz;
  v_ahead integer;             -- batches of earlier uploads that count on a place in the window
  v_tokens bigint;
  v_queued bigint;
  v_taken uuid[] := array[]::uuid[];
  v_next timestamptz;
begin
  select * into v_settings from autotag.settings;
  batches := '[]';
  files := '[]';
  if v_provider.account_error is not null then
    if v_provider.probe_at > v_now then
      wait := autotag.real_seconds(v_provider.probe_at - v_now);
      return;
    end if;
    v_slots := least(v_slots, 1);
  end if;

  v_candidates := array(
    select b.id from autotag.batches b
    where b.worker_id is null and b.not_before <= v_now
      and b.state in ('planned', 'preparing', 'uploading', 'creating', 'ended', 'harvesting')
    order by b.state in ('ended', 'harvesting') desc, b.ordinal > 1, b.created_at, b.ordinal
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
      v_tokens := (v_batch.image_count - v_batch.express_count)::bigint * v_provider.tokens_per_image;
      select coalesce(sum(b.reserved_tokens), 0) into v_queued from autotag.batches b
      where b.state in ('preparing', 'uploading', 'creating', 'submitted');
      -- A batch ahead of the provider's queue always goes: alone it must be small enough.
      continue when v_queued > 0 and v_queued + v_tokens > v_provider.queued_batch_tokens;
      v_admitted_at := v_batch.admitted_at;
      if v_admitted_at is null then
        -- The first batch of an upload goes before the others of earlier ones, but not with the place in the window
        -- that these were planned for.
        select count(*) into v_ahead from autotag.batches b
        where b.workspace_id = v_batch.workspace_id and b.state = 'planned' and b.admitted_at is null
          and b.created_at < v_batch.created_at;
        continue when v_ahead > 0 and (select a.admitted = 0 from autotag.admit(
          v_batch.workspace_id, 'batch', v_ahead + 1, 0, false, false) a);
        select a.admitted, a.at, a.retry_at into v_admitted, v_admitted_at, v_retry_at
        from autotag.admit(v_batch.workspace_id, 'batch', 1, v_batch.image_count - v_batch.express_count, false) a;
        if v_admitted = 0 then
          update autotag.batches b set not_before = coalesce(v_retry_at, 'infinity') where b.id = v_batch.id;
          continue;
        end if;
      end if;
      update autotag.batches b
      set admitted_at = v_admitted_at, reserved_tokens = v_tokens
      where b.id = v_batch.id;
    end if;
    update autotag.batches b
    set worker_id = p_worker, attempt = b.attempt + 1,
        state = case
          when b.state = 'planned' and b.input_file_id is null then 'preparing'
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
      'output_file_id', b.output_file_id, 'error_file_id', b.error_file_id) order by t.i), '[]')
  into batches
  from unnest(v_taken) with ordinality t (id, i) join autotag.batches b on b.id = t.id;

  if v_provider.next_poll_at <= v_now then
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
  update autotag.provider_limits p
  set next_poll_at = v_provider.next_poll_at,
      probe_at = case when p.account_error is null then p.probe_at else v_now + v_settings.account_probe_interval end;

  select min(moment) into v_next from (
    select v_provider.next_poll_at
    where files <> '[]' or exists (select from autotag.batches b where b.state = 'submitted')
    union all
    select min(b.not_before) from autotag.batches b
    where b.worker_id is null and b.not_before > v_now and b.not_before < 'infinity'
      and b.state in ('planned', 'preparing', 'uploading', 'creating', 'ended', 'harvesting')
  ) moments (moment);
  wait := case when v_next is not null then autotag.real_seconds(greatest(v_next, v_now) - v_now) end;
end $$;

-- The batch if this worker holds it, locked together with its job; else a refusal that tells the worker to
-- let go of it.
create function autotag.hold_batch(p_worker uuid, p_batch uuid, p_attempt integer) returns autotag.batches
language plpgsql security definer set search_path = ''
as $$
declare
  v_batch autotag.batches;
begin
  perform from autotag.jobs j
  where j.id = (select b.job_id from autotag.batches b where b.id = p_batch) for update;
  select * into v_batch from autotag.batches b
  where b.id = p_batch and b.worker_id = p_worker and b.attempt = p_attempt for update;
  if not found then
    perform autotag.refuse(409, 'batch_not_held', 'This batch is not held by this worker any more.',
      'Let go of it: another worker has it, or it was cancelled.', jsonb_build_object('batch', p_batch));
  end if;
  return v_batch;
end $$;

-- The images of a batch that still need an answer, after a task id: [{task, asset_id, bucket, path, url}].
create function autotag.batch_images(p_batch uuid, p_after bigint, p_limit integer) returns jsonb
language sql stable security definer set search_path = ''
as $$
  with page as (
    select t.id, t.asset_id from autotag.tasks t
    where t.batch_id = p_batch and t.id > p_after and t.finished_at is null
    order by t.id limit p_limit
  )
  select coalesce(jsonb_agg(jsonb_build_object('task', p.id, 'asset_id', p.asset_id,
    'bucket', d.bucket, 'path', d.path, 'url', d.url) order by p.id), '[]')
  from page p
  left join autotag.describe_assets(array(select asset_id from page)) d on d.asset_id = p.asset_id
$$;

-- The input file is full: the images after p_last_task become a batch of their own, which waits
-- its own turn under the limits. Locks: job, batches, tasks.
create function autotag.batch_split(p_worker uuid, p_batch uuid, p_attempt integer, p_last_task bigint) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  v_batch autotag.batches := autotag.hold_batch(p_worker, p_batch, p_attempt);
  v_rest bigint[];
  v_new uuid;
begin
  v_rest := array(select t from unnest(autotag.lock_batch_tasks(p_batch)) t where t > p_last_task);
  if v_rest = '{}' then
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

-- Live tasks of a batch, locked in order.
create function autotag.lock_batch_tasks(p_batch uuid) returns bigint[]
language plpgsql security definer set search_path = ''
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

-- The worker that holds a batch says what it does next: preparing, uploading, creating.
create function autotag.batch_step(
  p_worker uuid, p_batch uuid, p_attempt integer, p_state text, p_input_file_id text default null
) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  v_batch autotag.batches := autotag.hold_batch(p_worker, p_batch, p_attempt);
begin
  update autotag.batches b
  set state = p_state, input_file_id = coalesce(p_input_file_id, b.input_file_id)
  where b.id = p_batch;
  if p_state = 'preparing' then
    perform autotag.advance(autotag.lock_batch_tasks(p_batch), 'preparing');
    perform autotag.tell_progress(v_batch.job_id);
  end if;
end $$;

-- OpenAI has the batch. The worker lets go of it; the next poll looks at it.
create function autotag.batch_submitted(
  p_worker uuid, p_batch uuid, p_attempt integer, p_openai_batch_id text, p_status text, p_input_file_id text
) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  v_now timestamptz;
  v_batch autotag.batches;
begin
  perform autotag.lock_provider();
  v_batch := autotag.hold_batch(p_worker, p_batch, p_attempt);
  v_now := autotag.now();
  update autotag.batches b
  set state = 'submitted', worker_id = null, failures = 0, openai_batch_id = p_openai_batch_id,
      openai_status = p_status, input_file_id = p_input_file_id, submitted_at = v_now, progress_at = v_now,
      looks_in_vain = 0, running_at = null,
      predicted_seconds = (autotag.predict_batch(b.image_count - b.express_count, v_now, v_now, null, 0, b.id)).p50
  where b.id = p_batch;
  perform autotag.advance(autotag.lock_batch_tasks(p_batch), 'submitted',
    (select v_now + make_interval(secs => b.predicted_seconds) from autotag.batches b where b.id = p_batch));
  perform autotag.tell_progress(v_batch.job_id, autotag.refresh_eta(v_batch.job_id));
  perform autotag.resume_account();
  update autotag.provider_limits p
  set next_poll_at = case
    -- its webhook came before its id was known here
    when exists (select from autotag.webhooks w where w.openai_batch_id = p_openai_batch_id) then '-infinity'
    when p.next_poll_at < v_now then v_now + s.batch_poll_interval
    else least(p.next_poll_at, v_now + s.batch_poll_interval) end
  from autotag.settings s;
  perform pg_notify('autotag', 'batch');
end $$;

-- The worker could not go on: {kind, code, message, retry_after}. Of the account: both lanes stop. Of the
-- moment: another try later, by whoever comes first; in `creating` not before batch_create_grace has passed,
-- because a request that seemed to fail may yet arrive. A batch that OpenAI refuses as such falls apart into
-- single calls, whose answers say more.
create function autotag.batch_trouble(p_worker uuid, p_batch uuid, p_attempt integer, p_error jsonb) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  v_settings autotag.settings;
  v_workspace uuid := (select b.workspace_id from autotag.batches b where b.id = p_batch);
  v_batch autotag.batches;
begin
  select * into v_settings from autotag.settings;
  if p_error ->> 'kind' = 'account' then
    perform autotag.stop_account(p_error ->> 'message');
  end if;
  perform from autotag.workspaces w where w.workspace_id = v_workspace for update;
  v_batch := autotag.hold_batch(p_worker, p_batch, p_attempt);
  if p_error ->> 'kind' = 'image' then
    perform autotag.end_batch(v_batch, p_error ->> 'message');
    perform autotag.requeue_batch(v_batch, false, 0, p_error ->> 'code', p_error ->> 'message');
    return;
  end if;
  -- A file that OpenAI keeps not knowing is gone: it is built again.
  update autotag.batches b
  set worker_id = null, failures = b.failures + 1, error = p_error ->> 'message',
      state = case when v_lost.file then 'planned' else b.state end,
      input_file_id = case when v_lost.file then null else b.input_file_id end,
      reserved_tokens = case when v_lost.file then 0 else b.reserved_tokens end,
      not_before = autotag.now() + greatest(
        case when b.state = 'creating' and p_error ->> 'code' <> all ('{file_not_there_yet,rate_limited}')
          then v_settings.batch_create_grace else interval '0' end,
        case when p_error ->> 'kind' = 'account' then interval '0'
          else make_interval(secs => greatest((p_error ->> 'retry_after')::double precision,
            (0.5 + random() / 2) * least(extract(epoch from v_settings.retry_delay_max),
              extract(epoch from v_settings.retry_delay) * power(2, least(b.failures, 20))))) end)
  from (select p_error ->> 'code' = 'file_not_there_yet' and v_batch.state = 'creating' and v_batch.failures >= 3 as file) v_lost
  where b.id = p_batch;
  perform pg_notify('autotag', 'batch');
end $$;

-- A look at OpenAI failed as a whole. Of the account: both lanes stop. Else the next look is the next try.
create function autotag.poll_trouble(p_error jsonb) returns void
language plpgsql security definer set search_path = ''
as $$
begin
  if p_error ->> 'kind' = 'account' then
    perform autotag.stop_account(p_error ->> 'message');
  end if;
end $$;

-- Files that are deleted at OpenAI need no deleting any more.
create function autotag.files_deleted(p_files text[]) returns void
language sql security definer set search_path = ''
as $$
  update autotag.batches b
  set input_file_id = case when b.input_file_id = any (p_files) then null else b.input_file_id end,
      output_file_id = case when b.output_file_id = any (p_files) then null else b.output_file_id end,
      error_file_id = case when b.error_file_id = any (p_files) then null else b.error_file_id end
  where b.id in (
    select d.id from autotag.batches d
    where d.state in ('done', 'cancelled')
      and (d.input_file_id = any (p_files) or d.output_file_id = any (p_files) or d.error_file_id = any (p_files))
    order by d.id for update)
$$;

-- The batch is over, whatever it brought: everybody is told, once, because this is the only place that sends
-- batch-complete. What it leaves without an answer is for requeue_batch(). The caller holds it and its job.
create function autotag.end_batch(p_batch autotag.batches, p_error text) returns void
language plpgsql security definer set search_path = ''
as $$
begin
  update autotag.batches b
  set state = 'done', worker_id = null, stored = true, finished_at = autotag.now(), reserved_tokens = 0,
      error = coalesce(p_error, b.error)
  where b.id = p_batch.id;
  if p_batch.openai_batch_id is not null then
    perform autotag.broadcast('batch-updates', 'batch-complete',
      jsonb_build_object('batch_id', p_batch.openai_batch_id), false);
    perform autotag.broadcast_to_workspace(p_batch.workspace_id, 'batch-complete', jsonb_build_object(
      'batch_id', p_batch.openai_batch_id, 'job_id', p_batch.job_id,
      'image_count', p_batch.image_count, 'status', p_batch.openai_status));
  end if;
end $$;

-- Gives what a batch has left without an answer another try, in the cheapest way that is allowed: by batch again
-- (p_by_batch) when there are more than go in chunks, else as single calls. Those that had their share of tries
-- fail, with what stands at the task or with this message. The caller holds workspace, job and batch.
create function autotag.requeue_batch(
  p_batch autotag.batches, p_by_batch boolean, p_failures integer, p_code text, p_message text
) returns void
language plpgsql security definer set search_path = ''
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
     and cardinality(v_tasks) > v_settings.chunk_max_images then
    with again as (
      update autotag.tasks t set failures = t.failures + p_failures
      where t.id = any (v_tasks) and t.failures + p_failures < v_settings.max_failures
      returning t.id
    )
    select coalesce(array_agg(a.id order by a.id), '{}') into v_again from again a;
  end if;
  perform autotag.requeue(jsonb_agg(jsonb_build_object(
    'task', t.id, 'failures', p_failures,
    'code', coalesce(t.error_code, p_code), 'message', coalesce(t.error, p_message))))
  from autotag.tasks t where t.id = any (v_tasks) and t.id <> all (v_again) having count(*) > 0;
  perform autotag.place_in_batches(v_job, v_again);
  perform pg_notify('autotag', 'realtime');
end $$;

-- Puts tasks of a job (in order) into new batches of it, which wait their turn. The caller holds job and tasks.
create function autotag.place_in_batches(p_job autotag.jobs, p_tasks bigint[]) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  v_count integer := cardinality(p_tasks);
  v_left record;
  v_batches integer;
begin
  if v_count = 0 then
    return;
  end if;
  select * into v_left from autotag.batches_left(p_job.workspace_id);
  v_batches := autotag.plan_batches(v_count, v_left.batches, v_left.window_images);
  with made as (
    insert into autotag.batches (job_id, workspace_id, ordinal, image_count, created_at)
    select p_job.id, p_job.workspace_id,
      (select coalesce(max(b.ordinal), 0) from autotag.batches b where b.job_id = p_job.id) + n,
      (n::bigint * v_count / v_batches - (n - 1)::bigint * v_count / v_batches)::integer, autotag.now()
    from generate_series(1, v_batches) n
    returning id, ordinal
  ), numbered as (
    select m.id, row_number() over (order by m.ordinal) as n from made m
  )
  update autotag.tasks t set lane = 'batch', batch_id = b.id
  from unnest(p_tasks) with ordinality u (id, i)
  join numbered b on u.i > (b.n - 1) * v_count / v_batches and u.i <= b.n * v_count / v_batches
  where t.id = u.id;
  perform autotag.refresh_eta(p_job.id);
  perform pg_notify('autotag', 'batch');
end $$;

-- What a poll (or a webhook) has seen: [{id, status, output_file_id, error_file_id, total, done, error_code,
-- error}], with status `gone` for one that OpenAI does not know (any more, or with this key). A batch that ended
-- waits for a worker to harvest it. OpenAI's queue being full is no failure: the batch is planned again. One that
-- stays gone is over. One that is stuck is cancelled, where the limits let its images go as single calls. Batches
-- that are not in flight are ignored, and rows that do not change are not touched. A worker that has seen many tells them a
-- few at a time, because meanwhile nothing else happens to their uploads.
-- Locks: provider (when the account was stopped), workspaces by id, jobs by id, batches by id, tasks by id.
create function autotag.batches_seen(p_seen jsonb) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  v_now timestamptz := autotag.now();
  v_settings autotag.settings;
  v_before autotag.batches;
  v_batch autotag.batches;
  v_seen record;
  v_progress integer;
  v_eta timestamptz;
  v_jobs uuid[] := array[]::uuid[];
  v_job uuid;
begin
  if exists (select from autotag.provider_limits p where p.account_error is not null) then
    perform autotag.resume_account();
    perform pg_notify('autotag', 'realtime');
  end if;
  select * into v_settings from autotag.settings;
  perform from autotag.workspaces w where w.workspace_id in (
    select b.workspace_id from autotag.batches b
    join jsonb_to_recordset(p_seen) s (id text, status text) on s.id = b.openai_batch_id and s.status = 'gone')
  order by w.workspace_id for update;
  perform from autotag.jobs j where j.id in (
    select b.job_id from autotag.batches b
    join jsonb_to_recordset(p_seen) s (id text) on s.id = b.openai_batch_id where b.state = 'submitted')
  order by j.id for update;
  perform from autotag.batches b
  where b.openai_batch_id in (select s.id from jsonb_to_recordset(p_seen) s (id text)) order by b.id for update;

  for v_seen in
    select s.* from jsonb_to_recordset(p_seen) s (id text, status text, output_file_id text, error_file_id text,
      total integer, done integer, error_code text, error text)
    join autotag.batches b on b.openai_batch_id = s.id and b.state = 'submitted'
    order by b.id
  loop
    select * into v_before from autotag.batches b where b.openai_batch_id = v_seen.id and b.state = 'submitted';
    v_batch := v_before;
    if v_seen.status = 'gone' then
      update autotag.batches b set looks_in_vain = b.looks_in_vain + 1 where b.id = v_batch.id;
      if v_batch.looks_in_vain + 1 >= v_settings.batch_looks_in_vain then
        perform autotag.end_batch(v_batch, 'OpenAI does not know this batch any more (or not with this key).');
        perform autotag.requeue_batch(v_batch, true, 1, 'batch_gone', 'OpenAI lost the batch of this image.');
      end if;
    elsif v_seen.status = 'failed' and v_seen.error_code = 'token_limit_exceeded' then
      update autotag.batches b
      set state = 'planned', openai_batch_id = null, openai_status = null, reserved_tokens = 0, error = v_seen.error,
          not_before = v_now + v_settings.batch_poll_interval
      where b.id = v_batch.id;
    elsif v_batch.openai_status is distinct from v_seen.status or v_batch.request_done < v_seen.done then
      update autotag.batches b
      set openai_status = v_seen.status, request_total = greatest(b.request_total, v_seen.total),
          request_done = greatest(b.request_done, v_seen.done), progress_at = v_now, looks_in_vain = 0,
          running_at = coalesce(b.running_at, case when v_seen.status = 'in_progress' then v_now end),
          output_file_id = v_seen.output_file_id, error_file_id = v_seen.error_file_id, error = v_seen.error
      where b.id = v_before.id returning * into v_batch;
      v_progress := autotag.batch_progress(v_batch.request_done, v_batch.request_total);
      v_jobs := array_append(v_jobs, v_batch.job_id);
      if v_seen.status in ('completed', 'failed', 'expired', 'cancelled') then
        update autotag.batches b set state = 'ended', ended_at = v_now, reserved_tokens = 0 where b.id = v_batch.id;
        if v_seen.status = 'completed' then
          perform autotag.note_duration(v_batch, v_now);
        end if;
        perform autotag.advance(autotag.lock_batch_tasks(v_batch.id), 'completing');
        perform pg_notify('autotag', 'batch');
      elsif v_seen.status in ('in_progress', 'finalizing', 'cancelling')
        and (v_before.openai_status is distinct from v_seen.status
          or autotag.batch_progress(v_before.request_done, v_before.request_total) < v_progress) then
        v_eta := (autotag.batch_eta(v_batch, v_now)).p50;
        if v_before.running_at is null then
          perform autotag.advance(autotag.lock_batch_tasks(v_batch.id), 'processing', v_eta);
        end if;
        perform autotag.show_batch_progress(v_batch.id, v_progress, v_eta);
      end if;
    elsif not v_batch.cancel_requested and v_seen.status in ('validating', 'in_progress', 'finalizing')
      and (v_batch.progress_at <= v_now - v_settings.batch_stuck_after
        or v_batch.submitted_at <= v_now - v_settings.batch_give_up_after)
      and autotag.predict_wait(v_batch.workspace_id, v_batch.image_count - v_batch.express_count - v_batch.request_done)
        <= v_settings.realtime_max_wait
    then
      update autotag.batches b set cancel_requested = true, stuck = true where b.id = v_batch.id;
      update autotag.jobs j
      set fallback = 'A batch made no progress, so the rest of its images go as single calls.'
      where j.id = v_batch.job_id;
    end if;
  end loop;
  -- Once an upload, however many of its batches have moved.
  for v_job in select distinct j from unnest(v_jobs) j order by j loop
    perform autotag.tell_progress(v_job, autotag.refresh_eta(v_job));
  end loop;
end $$;

-- Answers of a batch's lines, or images that could not become lines: [{task, result | error, usage}]. A task
-- that is not this batch's any more, or has its answer, is ignored, so that harvesting twice changes nothing. Lines
-- that failed for no fault of their image are left to batch_finish(), which knows how many there are; why is noted.
-- Returns how many were accepted. Locks: provider (of the account's errors), workspace, job, batch, tasks.
create function autotag.batch_answers(p_worker uuid, p_batch uuid, p_attempt integer, p_answers jsonb) returns integer
language plpgsql security definer set search_path = '' set random_page_cost = 1.1
as $$
declare
  v_workspace uuid := (select b.workspace_id from autotag.batches b where b.id = p_batch);
  v_account_error text := (
    select a.error ->> 'message' from jsonb_to_recordset(p_answers) a (error jsonb)
    where a.error ->> 'kind' = 'account' limit 1);
  v_answers autotag.answer[];
begin
  if v_account_error is not null then
    perform autotag.stop_account(v_account_error);
  end if;
  perform from autotag.workspaces w where w.workspace_id = v_workspace for update;
  perform autotag.hold_batch(p_worker, p_batch, p_attempt);
  v_answers := array(
    select distinct on (t.id) row(t.id, t.attempt, t.job_id, t.workspace_id, null, null,
      a.result, a.error, a.usage, true)::autotag.answer
    from rows from (jsonb_to_recordset(p_answers) as (task bigint, result jsonb, error jsonb, usage jsonb))
      with ordinality a (task, result, error, usage, i)
    join autotag.tasks t on t.id = a.task and t.batch_id = p_batch and t.finished_at is null
    order by t.id, a.i);
  update autotag.tasks t set error_code = a.error ->> 'code', error = a.error ->> 'message'
  from unnest(v_answers) a
  where t.id = a.task and a.error ->> 'kind' <> 'image';
  if found then
    v_answers := array(
      select a from unnest(v_answers) a where coalesce(a.error ->> 'kind', 'image') = 'image');
  end if;
  perform autotag.add_usage(v_answers, true);
  perform autotag.apply_answers(v_answers);
  return cardinality(v_answers);
end $$;

-- Every answer of the batch is stored. Images without one get another try (those of a cancelled job end).
-- Locks: workspace, job, batch, tasks.
create function autotag.batch_finish(p_worker uuid, p_batch uuid, p_attempt integer) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  v_workspace uuid := (select b.workspace_id from autotag.batches b where b.id = p_batch);
  v_batch autotag.batches;
begin
  perform from autotag.workspaces w where w.workspace_id = v_workspace for update;
  v_batch := autotag.hold_batch(p_worker, p_batch, p_attempt);
  perform autotag.end_batch(v_batch, null);
  perform autotag.requeue_batch(v_batch, v_batch.openai_status is distinct from 'failed', 1,
    'no_answer', 'OpenAI gave no answer for this image.');
end $$;

-- 429s persist: what is left of one upload's single calls goes by the Batch API, because its images have waited
-- long enough. False when there is none. One at a time, for the same reason as seal_upload(). Called by claim(),
-- which holds the provider row. Locks: workspace, job, tasks by id.
create function autotag.fall_back(p_now timestamptz) returns boolean
language plpgsql security definer set search_path = ''
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
