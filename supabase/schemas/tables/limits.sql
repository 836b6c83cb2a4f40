-- Two kinds of limit, and every call passes both.
--
-- A workspace's limit is an exact sliding window: in no window of that length, wherever it starts, is more
-- admitted than the limit. Each admission is an element of three arrays in the workspace's row, oldest
-- first; admissions of the same moment share one element. It costs one narrow row update per admission,
-- and what leaves the window leaves the row with the next admission.
--
-- The provider's limit is a bucket that refills continuously, because that is how the provider meters.
create table public.workspace_rate_limits (
  workspace_id uuid not null,
  request_type text not null check (request_type in ('realtime', 'batch')),
  -- a workspace's own limits; null means the defaults of autotag.settings
  max_requests integer check (max_requests > 0),
  max_units integer check (max_units > 0),
  -- requests are calls (realtime) or batches (batch); units are tokens (realtime) or images (batch)
  admitted_at timestamptz[] not null default '{}',
  requests integer[] not null default '{}',
  units integer[] not null default '{}',
  primary key (workspace_id, request_type)
) with (fillfactor = 50);
alter table public.workspace_rate_limits enable row level security;

create table autotag.provider_limits (
  id boolean primary key default true check (id),
  -- the organisation's limits; the defaults are OpenAI's tier 1
  requests_per_minute integer not null default 500 check (requests_per_minute > 0),
  tokens_per_minute integer not null default 200000 check (tokens_per_minute > 0),
  queued_batch_tokens bigint not null default 2000000 check (queued_batch_tokens > 0),
  -- null: no cap known (OpenAI's tiers above 1)
  requests_per_day integer default 10000 check (requests_per_day > 0),
  -- what one image reserves: the prompt that 99 of 100 do not exceed, and the cap of the answer, because the provider counts
  -- the cap whatever the answer uses (sync_question and learn keep them; their means say what an image costs)
  tokens_per_image integer not null default 1000 check (tokens_per_image > 0),
  output_tokens integer not null default 400 check (output_tokens > 0),
  prompt_mean integer not null default 700,
  output_mean integer not null default 200,
  -- what is asked at present (describe_question), since when, and when an answer to it was first of use: null means that
  -- nobody knows yet whether it works, and one image after the other tries
  question jsonb not null default '{}',
  question_version bigint not null default 0,
  question_since timestamptz not null default '-infinity',
  proven_at timestamptz default '-infinity',
  -- what this provider can do, as its answers have shown; null: not known yet
  base_url text,
  fingerprint text,                      -- of its address and the key: another one has to prove itself (asks_another_provider, offer_switch) …
  fingerprint_since timestamptz not null default '-infinity',   -- … by answers to calls from then on
  has_batches boolean,
  batches_refused boolean not null default false,   -- an attempt has shown that there are none; else only a look-up has
  has_rate_headers boolean,
  keep_files integer default 604800,     -- seconds after which the provider deletes our files; null: it takes no expiry
  checked_at timestamptz not null default '-infinity',   -- when it was asked about the model (check_provider)
  -- the bucket: what is left, as of `refilled_at`
  requests_left double precision not null default 500,
  tokens_left double precision not null default 200000,
  day_left double precision not null default 10000,
  refilled_at timestamptz not null default '-infinity',
  -- nobody calls before this moment (retry-after)
  blocked_until timestamptz not null default '-infinity',
  -- 429s keep coming since `limited_since`, the last at `limited_at`; a minute without one ends it
  limited_since timestamptz,
  limited_at timestamptz not null default '-infinity',
  -- why nothing can be tagged (bad key, no credit, unknown model): the lanes stand still but for a probe
  account_error text,
  account_error_from text,               -- provider, batch, poll, storage, host or worker: who complained
  account_error_at timestamptz,
  probe_at timestamptz,
  -- one list call covers every batch in flight
  next_poll_at timestamptz not null default '-infinity',
  ask_after timestamptz not null default '-infinity',    -- nor is anything else asked about batches, files and models before (retry-after)
  -- start-time fair queueing: the clock of the workspace served last
  virtual_time double precision not null default 0,
  -- what waits for single calls, counted by claim() at most once a second
  waiting_images bigint not null default 0,
  waiting_workspaces bigint not null default 0,
  waiting_at timestamptz not null default '-infinity'
) with (fillfactor = 50);
alter table autotag.provider_limits enable row level security;
