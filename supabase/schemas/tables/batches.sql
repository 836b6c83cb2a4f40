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

-- The provider's queue of batch tokens, and whether there is room in it for all that waits.
create type autotag.batch_queue as (
  tokens bigint,               -- of what the provider has, or is about to have
  short boolean,               -- not all that waits can be queued there at the same time
  patient_since timestamptz    -- if so, what waits since then is not passed any more
);
