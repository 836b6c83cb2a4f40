-- Two kinds of limit. Every call has to pass both.
--
-- A workspace's limit is an exact sliding window: no interval of the window's length, wherever it starts, admits more than
-- the limit. Each admission is an element of three arrays in the workspace's row, oldest first; admissions at the same time
-- share one element. An admission costs one update of a narrow row, and removes the elements that have left the window.
--
-- The provider's limit is a bucket that refills continuously, because that is how the provider meters.
create table autotag.windows (
  workspace_id autotag.workspace_id not null,
  request_type text not null check (request_type in ('realtime', 'batch')),
  -- the workspace's own limits; null: the defaults in autotag.settings
  max_requests integer check (max_requests > 0),
  max_units integer check (max_units > 0),
  -- requests are calls (realtime) or batches (batch); units are tokens (realtime) or images (batch)
  admitted_at timestamptz[] not null default '{}',
  requests integer[] not null default '{}',
  units integer[] not null default '{}',
  primary key (workspace_id, request_type)
) with (fillfactor = 50);
-- This column gets the base type instead of the domain, because the view below exposes it: the host inserts into that view, and
-- generated client types do not follow domains.
do $$
begin
  execute (select format('alter table autotag.windows alter column workspace_id type %s', format_type(k.atttypid, null))
    from pg_attribute k where k.attrelid = 'autotag.keys'::regclass and k.attname = 'workspace_id');
end $$;
alter table autotag.windows enable row level security;
-- The host's view of the windows. The host gets no table, because windows are written while the provider row is held: a trigger or a
-- foreign key of the host would run then, and one that raises would stop every tenant.
create view public.workspace_rate_limits with (security_invoker = true) as
  select wn.workspace_id, wn.request_type, wn.max_requests, wn.max_units, wn.admitted_at, wn.requests, wn.units from autotag.windows wn;

create table autotag.provider_limits (
  id boolean primary key default true check (id),
  -- the organization's limits; the defaults are OpenAI's tier 1
  requests_per_minute integer not null default 500 check (requests_per_minute > 0),
  tokens_per_minute integer not null default 200000 check (tokens_per_minute > 0),
  queued_batch_tokens bigint not null default 2000000 check (queued_batch_tokens > 0),
  -- null: no daily limit known (OpenAI's tiers above 1)
  requests_per_day integer default 10000 check (requests_per_day > 0),
  day_seen_at timestamptz not null default '-infinity',   -- when headers last told the daily limit
  -- The tokens that one image reserves: the prompt that 99 of 100 do not exceed, plus the answer's cap, because the provider
  -- meters the cap and not the tokens used. The means give the cost of an image. sync_question() and learn() update all four.
  tokens_per_image integer not null default 1000 check (tokens_per_image > 0),
  output_tokens integer not null default 400 check (output_tokens > 0),
  prompt_mean integer not null default 700,
  output_mean integer not null default 200,
  -- The present question (describe_question), since when it holds, and when an answer first proved it. proven_at null: not
  -- proven yet, so one image at a time tries (the probe).
  question jsonb not null default '{}',
  question_version bigint not null default 0,
  question_since timestamptz not null default '-infinity',
  proven_at timestamptz default '-infinity',
  -- What this provider supports, as its answers have shown; null: not known yet.
  base_url text,
  -- hash of base_url and key; a different one has to be proven (asks_another_provider, offer_switch) …
  fingerprint text,
  fingerprint_since timestamptz not null default '-infinity',   -- … by answers to calls made after this time
  has_batches boolean,
  batches_refused boolean not null default false,   -- has_batches is false because a call failed, not just a check
  has_rate_headers boolean,
  degraded_at timestamptz,   -- when a call last showed that a feature (batches, expiring files) is missing
  keep_files integer default 604800,     -- seconds after which the provider deletes our files; null: it supports no expiry
  checked_at timestamptz not null default '-infinity',   -- last check of model and provider (claim_batches: look_up)
  rerouted boolean not null default false,   -- the last claim changed the way of an upload and released nothing
  -- the bucket: what was left at refilled_at
  requests_left double precision not null default 500,
  tokens_left double precision not null default 200000,
  day_left double precision not null default 10000,
  refilled_at timestamptz not null default '-infinity',
  -- no calls before this time (retry-after)
  blocked_until timestamptz not null default '-infinity',
  -- 429s keep coming since limited_since, the last at limited_at; one minute without a 429 ends the series
  limited_since timestamptz,
  limited_at timestamptz not null default '-infinity',
  -- Why tagging is paused (wrong key, no credit, unknown model). Only the probe runs.
  account_error text,
  account_error_from text,               -- origin of the error: provider, batch, poll, storage, host or worker
  account_error_at timestamptz,
  probe_at timestamptz,
  -- {parameter or code: {workspace, at}}: the first image with a brief that was refused like this since the last success (blame_brief)
  refusals jsonb not null default '{}',
  -- the next poll; one list call covers every batch in flight
  next_poll_at timestamptz not null default '-infinity',
  ask_after timestamptz not null default '-infinity',    -- no call about batches, files or models before (retry-after)
  -- start-time fair queueing: the virtual time of the workspace served last
  virtual_time double precision not null default 0,
  -- single calls that wait to be released; claim() counts them at most once a second
  waiting_images bigint not null default 0,
  waiting_workspaces bigint not null default 0,
  waiting_at timestamptz not null default '-infinity'
) with (fillfactor = 50);
alter table autotag.provider_limits enable row level security;
