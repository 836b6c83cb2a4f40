-- Outcomes that wait for the host's rows, and workers' reports about the provider.

-- The outcome of an image whose row could not be written at once: another transaction holds it, or writing it takes too long.
-- Nothing waits for the host: the outcome is durable here, and a worker tries again with exponential backoff (store_waiting). Its
-- task stays live (retry_at = infinity) and belongs to no worker.
create table autotag.unstored (
  task_id bigint primary key,            -- of autotag.tasks; without a foreign key, as tasks.job_id
  workspace_id autotag.workspace_id not null,
  batch_id uuid,                         -- the batch whose answer it is: batch-complete waits for it
  result jsonb,                          -- either this …
  error_code text,                       -- … or these two
  error text,
  mark uuid,                             -- of the picture that the model saw (describe_assets)
  tries integer not null default 0,      -- attempts to write the row: they set the delay of the next one …
  timeouts integer not null default 0,   -- … and how many of them took too long
  patience_used numeric not null default 0,   -- by errors that may pass; 1 is all of it (keep_error)
  next_at timestamptz not null,
  kept_at timestamptz not null,
  check ((result is null) = (error_code is not null))
);
create index unstored_due_idx on autotag.unstored (next_at);
create index unstored_workspace_idx on autotag.unstored (workspace_id, next_at);
create index unstored_batch_idx on autotag.unstored (batch_id) where batch_id is not null;
alter table autotag.unstored enable row level security;

-- A worker's report about the provider (report_provider).
create type autotag.provider_report as (
  worker_id uuid,
  at timestamptz,
  requests integer,            -- to give back to the bucket
  tokens bigint,
  observed jsonb,              -- limits from response headers (update_provider_limits), and calls sent (record_sent)
  answers autotag.answer[],    -- record_outcomes() …
  asked_at timestamptz,        -- … and when the batch's file was built, if they are of a batch
  form_changed boolean,        -- a parameter was refused, and the model's row has its next form
  inputs integer[],            -- prompt and answer tokens to learn from, where there are no answers
  outputs integer[],
  briefs bigint[],             -- the brief of each of them (autotag.answer)
  windows jsonb                -- corrections for windows whose rows were locked: [{workspace_id, reserved_at, requests, units}]
);

-- Reports that can wait, because they contain no news. The next transaction that locks the provider row applies all of them together
-- (lock_provider), at the cost of one.
create table autotag.provider_reports (
  id bigint generated always as identity primary key,
  worker_id uuid,                        -- null: corrections of windows only
  at timestamptz not null,
  requests integer not null default 0,
  tokens bigint not null default 0,
  sent integer not null default 0,       -- calls sent (record_sent) …
  sent_at timestamptz,                   -- … and when the first of them was
  observed jsonb,                        -- limits from response headers
  inputs integer[] not null default '{}',
  outputs integer[] not null default '{}',
  briefs bigint[] not null default '{}',
  windows jsonb not null default '[]'
);
alter table autotag.provider_reports enable row level security;

-- The outcome of an image, as finish() writes it to the host.
create type autotag.finished as (
  task bigint,
  job_id uuid,
  asset_id autotag.asset_id,
  result jsonb,                -- either this …
  code text,                   -- … or these two: the reason, and a sentence for the user
  message text,
  mark uuid                    -- as in unstored
);

-- Rows of the host that are written in parts, because some of them raise (next_part).
create type autotag.parts as (
  size integer,                -- of the next part
  odd integer,                 -- one of this many next rows raises; 0: unknown
  written integer,             -- 64, plus the rows until now …
  raised integer               -- … and how many of them raised
);

-- Images of a job that have ended, for its counts (count_ended). assets: null: many.
create type autotag.ended as (job_id uuid, completed integer, failed integer, assets autotag.asset_id[]);
