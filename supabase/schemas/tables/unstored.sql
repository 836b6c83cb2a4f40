-- Outcomes that wait for the host's rows, and what calls have shown of the provider.

-- The outcome of an image whose row could not be written at once: another transaction holds it, or writing it takes too long.
-- Nothing waits for the host: the outcome is durable here, and a worker tries again with growing delays (store_waiting). Its
-- task stays live (retry_at = infinity) and belongs to no worker.
create table autotag.unstored (
  task_id bigint primary key,            -- of autotag.tasks; without a foreign key, as tasks.job_id
  workspace_id uuid not null,
  batch_id uuid,                         -- the batch whose answer it is: batch-complete waits for it
  result jsonb,                          -- either this …
  error_code text,                       -- … or these two
  error text,
  mark uuid,                             -- of the picture that the model saw (describe_assets)
  tries integer not null default 0,      -- attempts to write the row …
  timeouts integer not null default 0,   -- … and how many of them took too long
  next_at timestamptz not null,
  kept_at timestamptz not null,
  check ((result is null) = (error_code is not null))
);
create index unstored_due_idx on autotag.unstored (next_at);
create index unstored_workspace_idx on autotag.unstored (workspace_id, next_at);
create index unstored_batch_idx on autotag.unstored (batch_id) where batch_id is not null;
alter table autotag.unstored enable row level security;

-- What one report of outcomes says about the provider. The report itself does not wait for the provider row: if another
-- transaction holds it, the next transaction that locks the row applies what is here (lock_provider).
create table autotag.provider_reports (
  id bigint generated always as identity primary key,
  worker_id uuid,
  at timestamptz not null,
  requests integer not null default 0,   -- to give back to the bucket
  tokens bigint not null default 0,
  observed jsonb,                        -- limits from response headers (update_provider_limits), and calls sent (record_sent)
  answers autotag.answer[] not null default '{}',   -- without their results (record_outcomes) …
  asked_at timestamptz,                  -- … and when the batch's file was built, if they are of a batch
  form_changed boolean not null default false,   -- a parameter was refused, and the model's row has its next form
  routine boolean not null default false,   -- no error, while tagging works: such reports are applied together
  windows jsonb not null default '[]'    -- corrections of windows that were held: [{workspace_id, reserved_at, requests, units}]
);
alter table autotag.provider_reports enable row level security;

-- An image that has its outcome: what finish() writes to the host.
create type autotag.finished as (
  task bigint,
  job_id uuid,
  asset_id uuid,
  result jsonb,                -- either this …
  code text,                   -- … or these two: the reason, and a sentence for the user
  message text,
  mark uuid                    -- as in unstored
);
