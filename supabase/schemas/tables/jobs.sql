-- Uploads (jobs), their images (tasks), and the queues of single calls.

-- A workspace with single calls waiting: its place in fair queueing. Only the transaction that holds the provider row writes this
-- table and queues, so that no tenant's transaction can hold one of their rows. (Any transaction may insert a new queue.)
create table autotag.workspaces (
  workspace_id autotag.workspace_id primary key,
  queued integer not null default 0 check (queued >= 0),   -- the sum of its joined queues; repair_queues() checks it
  virtual_time double precision not null default 0,
  -- false: nothing may be released before ready_at (the window is full, or chunk_delay has not passed)
  ready boolean not null default true,
  ready_at timestamptz not null default '-infinity'
) with (fillfactor = 50);
create index workspaces_turn_idx on autotag.workspaces (virtual_time, workspace_id) where ready and queued > 0;
create index workspaces_wake_idx on autotag.workspaces (ready_at) where not ready and queued > 0;
alter table autotag.workspaces enable row level security;

create table autotag.jobs (
  id uuid primary key default gen_random_uuid(),
  workspace_id autotag.workspace_id not null,
  user_id autotag.user_id,                         -- the uploader; null: the service role
  strategy text not null check (strategy in ('realtime', 'realtime-chunked', 'batch', 'batch-parallel')),
  image_count integer not null check (image_count > 0),
  completed integer not null default 0,
  failed integer not null default 0,
  created_at timestamptz not null,
  cancelled_at timestamptz,
  finished_at timestamptz,
  fallback text,                        -- why images are processed in another way than their number implies, as a sentence for users
  eta timestamptz,                      -- median of the predicted end …
  eta_p90 timestamptz,                  -- … and its 90th percentile
  progress integer not null default 0 check (progress between 0 and 100),
  broadcast_at timestamptz not null default '-infinity',   -- when job-progress was last broadcast …
  changed autotag.asset_id[],           -- … and the images whose rows changed since then; null: many (report_job)
  traceparent text,                     -- of the HTTP request that made the job (W3C Trace Context), if it had one
  brief_id bigint,                      -- what its images are asked (autotag.briefs); null: the question alone
  retry_of uuid,                        -- the job whose failed images it retries (retry_tagging)
  check (completed >= 0 and failed >= 0 and completed + failed <= image_count),
  check ((finished_at is not null) = (completed + failed = image_count))
) with (fillfactor = 50);
create index jobs_workspace_id_idx on autotag.jobs (workspace_id, created_at);
create index jobs_finished_at_idx on autotag.jobs (finished_at);
create index jobs_live_idx on autotag.jobs (workspace_id, created_at) where finished_at is null;
create index jobs_retry_idx on autotag.jobs (retry_of, created_at) where retry_of is not null;
create index jobs_live_user_idx on autotag.jobs (user_id) where finished_at is null;
alter table autotag.jobs enable row level security;

-- The single calls of one job that wait to be released, in upload order. Every task up to and including `cursor` has been
-- released, so a claim never scans dead index entries. A row is deleted soon after its job has finished.
create table autotag.queues (
  job_id uuid primary key references autotag.jobs on delete cascade,
  workspace_id autotag.workspace_id not null,
  joined boolean not null default false,   -- counted in its workspace; enqueue_tagging inserts it, and the next claim counts it
  queued integer not null default 0 check (queued >= 0),
  released integer not null default 0,  -- the job with the fewest released goes first: small uploads pass large ones …
  overdue_at timestamptz not null default 'infinity',   -- … until this time; from then on it goes first (patience_ends_at)
  cursor bigint not null default 0,
  reached bigint not null default 0,    -- the last task that was ever released: no later task is held by a worker
  output_tokens integer,                -- largest cap that one of the waiting tasks needs, where an answer was cut off
  chunk integer,                        -- at most this many at a time (null: all at once) …
  ready_at timestamptz not null default '-infinity'   -- … and no more before this time
) with (fillfactor = 50);
create index queues_turn_idx on autotag.queues (workspace_id, released, job_id) where queued > 0;
create index queues_overdue_idx on autotag.queues (workspace_id, overdue_at, job_id) where queued > 0;
create index queues_new_idx on autotag.queues (job_id) where not joined;
alter table autotag.queues enable row level security;

-- One image of one job. The row is deleted when the image's tags are stored, so the table stays as small as the work in
-- progress. A failed task stays as long as its job, for retry_tagging(). Lane and worker decide what happens next; the stage
-- is what users see.
--
-- No index contains worker_id: the update of a claim stays on its page (HOT) and costs the same at any table size.
-- leased_tasks() finds a worker's tasks through the queues instead.
create table autotag.tasks (
  id bigint generated always as identity primary key,
  job_id uuid not null,                 -- of autotag.jobs; without a foreign key, whose checks cost 10 µs an image (delete_tasks)
  workspace_id autotag.workspace_id not null,
  asset_id autotag.asset_id not null,
  visible_mark uuid,                    -- md5 of the file that the caller of enqueue_tagging may see; null: not checked
  stage text not null default 'queued' check (stage in
    ('queued', 'preparing', 'submitted', 'processing', 'completing', 'failed')),
  lane text not null check (lane in ('realtime', 'batch')),
  attempt integer not null default 0,   -- grows with every claim; a report with an older attempt is refused
  failures integer not null default 0,
  crashes integer,                      -- workers that died while they held it (blame_crash); null: none
  worker_id uuid,                       -- the worker that holds it (realtime lane) …
  claim integer,                        -- … and the number of the claim that gave it to the worker
  batch_id uuid,                        -- its batch (batch lane)
  reserved_at timestamptz,              -- when it was admitted to the workspace's window, and the tokens it reserved there
  reserved_tokens integer,
  output_tokens integer,                -- the cap of the answer, as it was requested
  min_output_tokens integer,            -- lowest cap of the next try, after an answer was cut off
  image_notes jsonb,                    -- what was done to the image in its batch's file (clean_image_notes); null: nothing
  retry_at timestamptz,                 -- back in its queue from then on; infinity: its outcome waits for the host (unstored)
  error_code text,
  error text,
  finished_at timestamptz,
  check ((finished_at is not null) = (stage = 'failed')),
  check (worker_id is null or lane = 'realtime'),
  check (finished_at is null or worker_id is null)
) with (fillfactor = 45);  -- room on the page for the update of each task's claim

create unique index tasks_live_asset_idx on autotag.tasks (asset_id) where finished_at is null;
create index tasks_job_id_idx on autotag.tasks (job_id, id);
create index tasks_batch_idx on autotag.tasks (batch_id, id) where batch_id is not null;
create index tasks_cut_off_idx on autotag.tasks (job_id) where min_output_tokens is not null and finished_at is null;
create index tasks_suspects_idx on autotag.tasks (workspace_id, retry_at) where crashes >= 2 and finished_at is null;
create index tasks_retry_at_idx on autotag.tasks (retry_at) where retry_at is not null;
alter table autotag.tasks enable row level security;

-- How an upload is processed (choose_strategy).
create type autotag.upload_plan as (
  strategy text,
  fallback text,               -- why the strategy differs from the one for this number of images
  wait interval,               -- how long single calls are expected to wait for the limits
  batches integer,
  express integer,             -- images that are sent as single calls
  chunk integer                -- of which at most this many at a time; null: all at once
);
