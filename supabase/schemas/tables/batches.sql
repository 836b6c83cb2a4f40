-- OpenAI Batches: one row is one batch at OpenAI, even if workers die, at any step.
--
--   planned ─► preparing ─► uploading ─► creating ─► submitted ─► ended ─► harvesting ─► done
--      ▲  (images fetched,   (input file  (about to   (OpenAI has  (OpenAI  (answers are
--      │   file built)        uploaded)    create)     it)          is done) stored)
--      └── OpenAI's queue was full: retried later (with its file)      cancelled: before OpenAI had it, or split into smaller ones
--
-- A worker that takes over a row in `creating` first lists the batches at OpenAI and adopts the one that carries the row's
-- id in its metadata. The worker that holds a row knows its `attempt`; a call with an older attempt is refused.
-- A file's id stays in the row until the file is deleted at OpenAI, so that any worker can delete it.
create table autotag.batches (
  id uuid primary key default gen_random_uuid(),
  job_id uuid not null references autotag.jobs on delete cascade,
  workspace_id autotag.workspace_id not null,
  ordinal integer not null,              -- 1 is the priority batch of its job
  image_count integer not null check (image_count > 0),   -- images of the upload in this batch …
  express_count integer not null default 0,               -- … and how many of them were sent as single calls (express)
  state text not null default 'planned' check (state in ('planned', 'preparing', 'uploading', 'creating',
    'submitted', 'ended', 'harvesting', 'done', 'cancelled')),
  worker_id uuid,                        -- the worker that holds it, and the number of the claim that gave it to the worker
  claim integer not null default 0,
  attempt integer not null default 0,
  failures integer not null default 0,
  crashes integer not null default 0,    -- workers that died while they built its file
  not_before timestamptz not null default '-infinity',
  waits_for_window boolean not null default false,   -- not_before is when the workspace's window will have room (put_off)
  admitted_at timestamptz,               -- when it was admitted to the workspace's window; it is admitted once
  output_tokens integer,                 -- the cap of its answers
  asked_at timestamptz,                  -- when its file was built; shows which question it asks
  keep_files integer,                    -- seconds after which OpenAI deletes its files (provider_limits.keep_files then)
  extra_tokens bigint not null default 0,     -- tokens to reserve beyond the usual: some of its images had answers cut off
  reserved_tokens bigint not null default 0,  -- its part of the provider's queued-token limit, until OpenAI is done with it
  openai_batch_id text unique,
  openai_status text,
  input_file_id text,
  unrecorded_files integer not null default 0,   -- input files whose upload began and whose id was never recorded: found by name
  output_file_id text,
  error_file_id text,
  request_total integer not null default 0,
  request_done integer not null default 0,    -- answered or failed, as OpenAI counts
  running_at timestamptz,                     -- when a poll first saw OpenAI working on it
  predicted_seconds double precision,         -- predicted duration at the time OpenAI got it
  token_refusals integer not null default 0,  -- how often OpenAI refused it because its queue was full (token_limit_exceeded)
  progress_at timestamptz,                    -- when a poll last saw a change
  missing_polls integer not null default 0,   -- polls in a row that did not find it at OpenAI …
  last_missing_poll_at timestamptz,                   -- … and the last of them (workers.poll_assigned_at): each poll counts once
  cancel_requested boolean not null default false,
  cancel_sent_at timestamptz,                 -- when a worker was last asked to cancel it at OpenAI (take_cancellations)
  stuck boolean not null default false,       -- no progress for too long: what OpenAI has not done is sent as single calls
  stored boolean not null default false,      -- all its answers are stored and batch-complete is broadcast
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
  and (input_file_id is not null or output_file_id is not null or error_file_id is not null
    or unrecorded_files > 0);
create index batches_reserved_idx on autotag.batches (workspace_id) include (reserved_tokens) where reserved_tokens > 0;
create index batches_workspace_planned_idx on autotag.batches (workspace_id) where state = 'planned';
create index batches_unannounced_idx on autotag.batches (id) where state = 'done' and not stored;
alter table autotag.batches enable row level security;

-- The provider's queue of batch tokens, and whether all waiting batches fit into it.
create type autotag.batch_queue as (
  tokens bigint,               -- of batches that the provider has, or is about to have
  short boolean,               -- the waiting batches do not all fit into it together
  patient_since timestamptz    -- if so, no other batch passes a batch that has waited since then
);
