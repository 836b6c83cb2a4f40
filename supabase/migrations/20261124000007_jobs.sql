-- Uploads and their images; which way an upload goes, and how long that takes.

-- A workspace with work that waits for single calls: its place in the fair order. Its lock covers its queues.
create table autotag.workspaces (
  workspace_id uuid primary key,
  queued integer not null default 0 check (queued >= 0),
  virtual_time double precision not null default 0,
  -- not ready: nothing may be released before ready_at (its window is full, or its chunks are paced)
  ready boolean not null default true,
  ready_at timestamptz not null default '-infinity'
) with (fillfactor = 50);
create index workspaces_turn_idx on autotag.workspaces (virtual_time, workspace_id) where ready and queued > 0;
create index workspaces_wake_idx on autotag.workspaces (ready_at) where not ready and queued > 0;
alter table autotag.workspaces enable row level security;

create table autotag.jobs (
  id uuid primary key default gen_random_uuid(),
  workspace_id uuid not null,
  user_id uuid,                         -- who uploaded; null for the service role
  strategy text not null check (strategy in ('realtime', 'realtime-chunked', 'batch', 'batch-parallel')),
  image_count integer not null check (image_count > 0),
  completed integer not null default 0,
  failed integer not null default 0,
  created_at timestamptz not null,
  cancelled_at timestamptz,
  finished_at timestamptz,
  fallback text,                        -- why images that would have been single calls go by batch
  eta timestamptz,                      -- the median of when it will be done …
  eta_p90 timestamptz,                  -- … and what it will be done by in nine cases of ten
  progress integer not null default 0 check (progress between 0 and 100),
  told_at timestamptz not null default '-infinity',   -- when job-progress was broadcast last
  traceparent text,                     -- of the request that made it (W3C Trace Context), where it had one
  check (completed >= 0 and failed >= 0 and completed + failed <= image_count),
  check ((finished_at is not null) = (completed + failed = image_count))
) with (fillfactor = 50);
create index jobs_workspace_id_idx on autotag.jobs (workspace_id, created_at);
create index jobs_finished_at_idx on autotag.jobs (finished_at);
create index jobs_live_idx on autotag.jobs (workspace_id) where finished_at is null;
create index jobs_live_user_idx on autotag.jobs (user_id) where finished_at is null;
alter table autotag.jobs enable row level security;

-- The single calls of one job that wait to be released, in upload order behind a cursor: what lies at or
-- before it was released already, so that a claim never crawls through dead index entries. A row lives as
-- long as its job.
create table autotag.queues (
  job_id uuid primary key references autotag.jobs on delete cascade,
  workspace_id uuid not null,
  queued integer not null default 0 check (queued >= 0),
  released integer not null default 0,  -- the job that got least goes first: small uploads pass large ones
  cursor bigint not null default 0,
  reached bigint not null default 0,    -- the last task that was ever released: none behind it is held
  output_tokens integer,                -- the least cap that one of them needs, where an answer was cut off
  chunk integer,                        -- at most so many at a time (null: all at once) …
  ready_at timestamptz not null default '-infinity'   -- … and the next not before this moment
) with (fillfactor = 50);
create index queues_turn_idx on autotag.queues (workspace_id, released, job_id) where queued > 0;
alter table autotag.queues enable row level security;

-- One image of one job, for as long as there is something to do about it: with its tags stored it is gone, and the
-- table stays as small as the work in hand, however many images there were. A failed one stays with its job, for
-- retry_tagging(). Its lane and who holds it decide what happens next; its stage is what users see.
--
-- No index knows who holds a task, so that a claim's update stays on its page (HOT) and costs the same however
-- many tasks there are; whose tasks are whose is found by way of the queues (held_tasks).
create table autotag.tasks (
  id bigint generated always as identity primary key,
  job_id uuid not null references autotag.jobs on delete cascade,
  workspace_id uuid not null,
  asset_id uuid not null,
  hidden boolean not null default false,  -- whoever asked for its tags may not see its file
  stage text not null default 'queued' check (stage in
    ('queued', 'preparing', 'submitted', 'processing', 'completing', 'failed')),
  lane text not null check (lane in ('realtime', 'batch')),
  attempt integer not null default 0,   -- grows with every claim; a report with an older one is refused
  failures integer not null default 0,
  worker_id uuid,                       -- who holds it (realtime lane)
  batch_id uuid,                        -- which batch it belongs to (batch lane)
  reserved_at timestamptz,              -- its place in the workspace's window, and what it reserved there
  reserved_tokens integer,
  output_tokens integer,                -- the cap of the answer that was asked for
  min_output_tokens integer,            -- the least cap of the next try: an answer was cut off
  retry_at timestamptz,                 -- parked until then
  error_code text,
  error text,
  finished_at timestamptz,
  check ((finished_at is not null) = (stage = 'failed')),
  check (worker_id is null or lane = 'realtime'),
  check (finished_at is null or worker_id is null)
) with (fillfactor = 45);               -- room for the claim of every task on its page
create unique index tasks_live_asset_idx on autotag.tasks (asset_id) where finished_at is null;
create index tasks_job_id_idx on autotag.tasks (job_id, id);
create index tasks_batch_idx on autotag.tasks (batch_id, id) where batch_id is not null;
create index tasks_parked_idx on autotag.tasks (retry_at) where retry_at is not null;
alter table autotag.tasks enable row level security;

-- How many batches an upload is split into. Splitting never makes an upload slower: while the workspace may
-- start enough batches they hold at most batch_split_images; when fewer are left in its window they get
-- larger instead of more; one is never larger than a file, the provider's queue or the window can take; and no
-- more are made than their size needs.
create function autotag.plan_batches(p_images integer, p_batches_left integer, p_window_images integer)
returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select ceil(p_images / ceil(p_images::numeric / greatest(
    ceil(p_images::numeric / greatest(1, least(
      s.batch_max_requests, p_window_images, p.queued_batch_tokens / p.tokens_per_image))),
    case when p_images <= s.batch_max_images then 1
         else least(ceil(p_images::numeric / s.batch_split_images), greatest(p_batches_left, 1)) end
  )))::integer
  from autotag.settings s, autotag.provider_limits p
$$;

-- The strategy table: what happens with an upload of so many images. A provider without a Batch API gets single calls.
create function autotag.choose_strategy(p_images integer) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select case
    when p_images <= s.realtime_max_images then 'realtime'
    when p_images <= s.chunk_max_images or p.has_batches is false then 'realtime-chunked'
    when p_images <= s.batch_max_images then 'batch'
    else 'batch-parallel' end
  from autotag.settings s, autotag.provider_limits p);
end $$;

-- Seconds that an upload is expected to take when its workspace is otherwise idle.
create function autotag.estimate_seconds(p_images integer, p_batches integer) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
begin
  return (select case
    when p_batches > 0 then
      -- batches beyond the window start an hour later each time it is full
      (autotag.predict_batch(ceil(p_images::numeric / p_batches)::integer, v_now, v_now, null, 0, null)).p50
      + 3600 * greatest((p_batches - 1) / s.batch_batches_per_hour, (p_images - 1) / s.batch_images_per_hour)
    when p_images > s.realtime_max_images then
      s.call_seconds + greatest(
        extract(epoch from s.chunk_delay) * ((p_images - 1) / s.chunk_size),
        60 * ((p_images - 1) / s.realtime_requests_per_minute))
    else s.call_seconds end
  from autotag.settings s);
end $$;

-- What waits for single calls.
create function autotag.count_waiting(out workspaces bigint, out images bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select count(*), coalesce(sum(w.queued), 0) into workspaces, images from autotag.workspaces w where w.queued > 0;
end $$;

-- How long the last of so many more single calls of a workspace would wait: for its own window, and for its
-- fair share of the provider's bucket. p_counted: what waits in other workspaces may be as old as a second (counting
-- it takes the longer, the more of them there are).
create function autotag.predict_wait(p_workspace_id uuid, p_images integer, p_counted boolean default false)
returns interval
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_provider autotag.provider_limits := autotag.refilled_provider(v_now);
  v_settings autotag.settings;
  v_max_requests integer;
  v_max_units integer;
  v_queued bigint := coalesce((select w.queued from autotag.workspaces w where w.workspace_id = p_workspace_id), 0);
  v_own bigint := v_queued + p_images;
  v_everybody bigint;
begin
  select * into v_settings from autotag.settings;
  if not p_counted or v_provider.waiting_at < v_now - interval '2 s' then
    select c.workspaces, c.images into v_provider.waiting_workspaces, v_provider.waiting_images
    from autotag.count_waiting() c;
  end if;
  -- A workspace waits for as many calls of each of the others as it makes itself.
  v_everybody := v_own + least(greatest(v_provider.waiting_images - v_queued, 0),
    v_own * greatest(v_provider.waiting_workspaces - (v_queued > 0)::integer, 0));
  select l.max_requests, l.max_units into v_max_requests, v_max_units
  from public.workspace_rate_limits l where l.workspace_id = p_workspace_id and l.request_type = 'realtime';
  v_max_requests := coalesce(v_max_requests, v_settings.realtime_requests_per_minute);
  v_max_units := coalesce(v_max_units, v_settings.realtime_tokens_per_minute);
  return interval '1 min' * greatest(0,
    (v_own - v_max_requests)::double precision / v_max_requests,
    (v_own * v_provider.tokens_per_image - v_max_units)::double precision / v_max_units,
    (v_everybody - v_provider.requests_left) / v_provider.requests_per_minute,
    (v_everybody * v_provider.tokens_per_image - v_provider.tokens_left) / v_provider.tokens_per_minute);
end $$;
