-- autotag 0.1.0. Made by scripts/release from supabase/schemas; what is released never changes.
set local lock_timeout = '1s';  -- so that no query of yours waits behind it; run the file again then
set local check_function_bodies = off;  -- a function may stand before what it calls
set local client_min_messages = warning;  -- without a notice for each %type
-- autotag: every image of public.assets gets tags.
--
-- One upload is a *job*; each of its images is a *task*. A task is tagged in one of two ways (its *lane*):
--
--   realtime   claim() gives it to a worker within the limits. The worker calls OpenAI once and reports with settle().
--   batch      It belongs to a *batch*, which is one OpenAI Batch. claim_batches() gives the whole batch to a worker, which
--              builds and uploads the input file. When OpenAI has finished, a worker harvests the answers.
--
-- Workers keep no state that would be missed. They ask (claim, claim_batches), do the I/O, and report (report_stages, settle,
-- batch_*). This schema makes every decision. Its files:
--
--   tables/       everything that is stored; settings has every number that can be changed
--   host/         the host's tables for a stand-alone stack, and the adapter: everything that autotag knows of a host's tables
--   basics/       the clock, checks of values from outside, who calls
--   profiles/     what a workspace wants asked about its images, in versions, and what that costs in tokens
--   models/       what a model costs, how it is asked, what its answers were like; another model asked (autotag compare)
--   vocabulary/   the tags that a workspace uses: their names, and what becomes of a model's tags
--   uploads/      the strategy of an upload; enqueue, cancel, retry; quotas; automatic mode; images that exist already
--   scheduling/   exact windows per workspace, the mirror of the provider's bucket, leases, the release of single calls
--   batches/      OpenAI Batches: planned, uploaded, polled, harvested
--   results/      what a worker reports: tags, failures, requeued images; usage; broadcasts
--   views/        stage, progress and ETA; status, metrics, what autotag doctor asks
--   seed          the first rows of every installation
--   api_types, api, cron, version, grants    the public RPCs and their types, tick and housekeeping, the version, all rights
--   changes       steps for existing installations since the last release
--
-- supabase/config.toml has the order in which they run. docs/contributing/change-the-schema.md has the aliases of the tables.
--
-- Locks. A workspace's tables, transactions, triggers and clock belong to its tenant, but every tenant needs the provider row. So:
--   * A transaction that holds the provider row never waits for a lock that a tenant's transaction can hold (skip locked), and never
--     reads or writes the host's tables. claim() and claim_batches() begin with it; the others take it last.
--   * The host's rows are written one workspace at a time (finish, show). Such a transaction holds nothing else that tenants share,
--     and waits at most 50 ms for a lock. An outcome that cannot be written is kept (unstored) and tried again.
--   * Only a transaction that holds the provider row updates queues or workspaces. (enqueue_tagging inserts new queues under an
--     advisory lock.)
--   * A transaction locks in this order: advisory locks, jobs by id, batches by id, tasks by id, assets. Windows and the provider
--     row come last, or before all of these. A worker's row and the clock come after the provider row.

-- Every function sets its search_path to pg_catalog, pg_temp (the adapter's functions have the host's schemas before pg_temp),
-- and every name outside pg_catalog has its schema.
create schema if not exists autotag;

-- A worker's login needs this role and nothing else:
--   create role tagger login in role autotag_worker;   -- then set its password with psql's \password tagger
-- A person who operates autotag without being its owner needs autotag_operator. It sees every workspace's images and usage and
-- may enqueue images, which a worker may not.
do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'autotag_worker') then
    create role autotag_worker nologin;
  end if;
  if not exists (select from pg_catalog.pg_roles where rolname = 'autotag_operator') then
    create role autotag_operator nologin;
  end if;
end $$;

-- The database does not trust a worker. A stolen worker's login can call every function that is granted to it, with any
-- arguments. These limits hold then:
--   * A worker's id belongs to its login (session_user, which poolers keep). No login acts for the workers of another one, even
--     if it learns their ids from status(). Workers of one login count as one.
--   * A worker acts only on what it holds: tasks with their attempt, batches with theirs, and the poll of the provider that
--     claim_batches assigned to it. Only the worker that holds an image learns where it is stored.
--   * Reports are data. Counts, waits and sizes are cut to bounds (clean_number, clean_usage), shapes are validated
--     (clean_result, clean_error), and texts are made printable. check_list refuses a report that is not a list or too long
--     before any work is done. One bad report of many affects its own image only.
-- A stolen login can do these things, and nothing else:
--   * It can claim queued images and report anything about them. When the login is revoked, its images are requeued as its
--     leases run out.
--   * It can pause tagging (an hour at most each time), slow it down and make it dearer. A worker's report about the provider
--     (waits, limits, request form, Batch API) or the account applies to every workspace, because only workers see the provider.
--     Missing features are tried again after model_check_interval, usage is believed up to believable_usage(), and
--     forget_provider() forgets all such reports.
--   * It can read what it claims, and what status(), metrics() and diagnose() return: counts, ids, and one path.

-- The kinds of error and their consequences. Python has the same table (autotag/errors.py); a test compares them.
-- A kind that is not in this table is treated as transient: an unknown error neither fails an image at once nor makes it
-- retry forever.
create table autotag.error_kinds (
  kind text primary key,
  counts boolean not null,               -- counts as a failure of its image, which fails for good after max_failures
  delays boolean not null,               -- the image waits before its next try: longer each time, or as long as the error asks
  pauses boolean not null,               -- tagging pauses until one image (the probe) succeeds
  ends boolean not null,                 -- the image fails, unless the error says that another answer may help
  meaning text not null,
  -- codes whose cause may be this image (for example, it is too large, and a smaller one would be accepted), so they count as its
  -- failures
  suspects text[] not null default '{}'
);
alter table autotag.error_kinds enable row level security;

-- Every number that can be changed, as typed columns of one row:
--   update autotag.settings set chunk_delay = '1 s';
create table autotag.settings (
  id boolean primary key default true check (id),

  -- strategy: how an upload is tagged, by its number of images
  -- up to this many images are sent as single calls, all at once
  realtime_max_images integer not null default 5 check (realtime_max_images >= 0),
  -- up to this many are sent as single calls in chunks
  chunk_max_images integer not null default 50 check (chunk_max_images >= realtime_max_images),
  -- up to this many are sent in one batch, more in several
  batch_max_images integer not null default 200 check (batch_max_images >= chunk_max_images),
  job_max_images integer not null default 50000 check (job_max_images >= batch_max_images),  -- larger uploads are refused
  chunk_size integer not null default 5 check (chunk_size > 0),  -- images per chunk
  chunk_delay interval not null default '2 s' check (chunk_delay >= '0'),  -- time between two chunks
  -- images of a batch upload that are tagged at once as single calls
  express_images integer not null default 5 check (express_images >= 0),
  -- images per batch of a batch-parallel upload, as long as the window admits that many batches
  batch_split_images integer not null default 100 check (batch_split_images > 0),
  -- requests in a batch's file; OpenAI's maximum is 50,000
  batch_max_requests integer not null default 50000 check (batch_max_requests between 1 and 50000),
  -- bytes of a batch's file; OpenAI's maximum is 200 MB
  batch_max_bytes bigint not null default 200000000 check (batch_max_bytes between 1 and 200000000),
  -- unfinished images that a workspace may have; more are refused until some are done
  live_images_max integer not null default 200000 check (live_images_max > 0),

  -- limits
  -- single calls per minute and workspace
  realtime_requests_per_minute integer not null default 30 check (realtime_requests_per_minute > 0),
  -- tokens of single calls per minute and workspace
  realtime_tokens_per_minute integer not null default 100000 check (realtime_tokens_per_minute > 0),
  -- batches that a workspace may start per hour
  batch_batches_per_hour integer not null default 10 check (batch_batches_per_hour > 0),
  -- images in those batches
  batch_images_per_hour integer not null default 5000 check (batch_images_per_hour > 0),
  -- single calls that would wait longer are sent in a batch instead, if that is expected to be done sooner
  realtime_max_wait interval not null default '10 min' check (realtime_max_wait > '0'),
  -- how long newer uploads of the same workspace may pass an upload whose single calls wait; for uploads of more than
  -- chunk_max_images images, longer in proportion
  upload_patience interval not null default '2 min' check (upload_patience >= '0'),
  -- whether automatic mode tags rows that somebody without a user inserts, such as anon; if so, anybody who can insert rows spends
  -- your money
  automatic_for_anyone boolean not null default false,
  -- whether members may call check_rate_limit, which counts against the limit; they may always call peek_rate_limit
  members_may_take boolean not null default false,
  -- Longest expected time from the release of a call to its arrival at the provider. This share of a minute's limit stays
  -- unused, because a full bucket does not refill in that time.
  provider_margin interval not null default '0.25 s' check (provider_margin between '0' and '10 s'),

  -- automatic mode: when the new rows of one uploader become an upload
  upload_quiet interval not null default '2 s' check (upload_quiet > '0'),  -- no new row for this long
  -- or the first row is this old
  upload_longest interval not null default '30 s' check (upload_longest >= upload_quiet),
  -- a second enqueue_tagging of an image skips it while its upload runs and for this long afterwards, unless its picture changed
  -- or it failed
  repeat_window interval not null default '30 s' check (repeat_window >= '0'),

  -- the question to the model (its prices, reasoning effort and form of the request are in autotag.models)
  model text not null default 'gpt-6-luna' check (length(model) between 1 and 100),  -- any model with vision
  -- low: 512 pixels a side; high: 2,048
  image_detail text not null default 'low' check (image_detail in ('low', 'high')),
  -- Max pixels of the longer side of an image that is sent; null: by image_detail. More pixels show more detail and cost more tokens.
  image_side integer check (image_side between 64 and 2500),
  max_tags integer not null default 10 check (max_tags between 1 and 50),  -- tags per image
  tag_language text not null default 'English',  -- the language of tags and caption, in plain words
  -- service tier of single calls; auto: not sent; flex: the batch price, but slower and sometimes refused
  service_tier text not null default 'auto' check (service_tier in ('auto', 'default', 'flex', 'priority')),
  -- Lowest cap of an answer (max_completion_tokens). The cap follows what answers of the model needed so far, between this
  -- and max_output_tokens.
  min_output_tokens integer not null default 100 check (min_output_tokens between 16 and 128000),
  -- highest cap: an answer that was cut off is requested again with four times its cap, up to this
  max_output_tokens integer not null default 16000 check (max_output_tokens between 50 and 128000 and max_output_tokens >= min_output_tokens),
  -- how fast old answers lose weight in what is reserved: an answer this many answers ago weighs about a third of a new one
  learning_memory integer not null default 500 check (learning_memory between 20 and 100000),

  -- leases, retries, polling
  -- a worker without a heartbeat for this long loses what it holds
  lease interval not null default '60 s' check (lease >= '1 s'),
  -- transient failures before an image fails for good: about four minutes with the delays below
  max_failures integer not null default 8 check (max_failures > 0),
  -- unusable answers (each is billed) before an image fails for good
  max_bad_answers integer not null default 3 check (max_bad_answers > 0),
  -- delay after the first failure; it doubles with each …
  retry_delay interval not null default '2 s' check (retry_delay > '0'),
  retry_delay_max interval not null default '60 s' check (retry_delay_max >= retry_delay),  -- … up to this
  -- while tagging is paused (wrong key, no credit, unknown model), one image is tried this often
  account_probe_interval interval not null default '10 s' check (account_probe_interval > '0'),
  -- time between two polls of the batches in flight
  batch_poll_interval interval not null default '60 s' check (batch_poll_interval > '0'),
  -- a create request that seemed to fail may still arrive: no retry before this time
  batch_create_grace interval not null default '10 s' check (batch_create_grace >= '0'),
  -- time between two checks of the model's end of life and of what the provider supports
  model_check_interval interval not null default '1 day' check (model_check_interval > '0'),
  -- how long smaller batches may overtake one that does not fit into OpenAI's queue
  batch_patience interval not null default '30 min' check (batch_patience >= '0'),
  -- polls in a row that do not find a batch at OpenAI before it counts as lost
  batch_max_missing_polls integer not null default 3 check (batch_max_missing_polls > 0),
  -- a batch without progress for this long is cancelled, and its images are sent as single calls if the limits allow
  batch_stuck_after interval not null default '6 h' check (batch_stuck_after > '0'),
  -- a batch this old is cancelled likewise (OpenAI's window is 24 h)
  batch_give_up_after interval not null default '23 h' check (batch_give_up_after > '0'),
  -- shortest time between two job-progress broadcasts of one upload
  broadcast_interval interval not null default '1 s' check (broadcast_interval >= '0'),
  -- whether an upload without batches also ends with a batch-complete (without a batch id) on batch-updates, for clients that listen only
  -- there
  broadcast_single_calls boolean not null default true,

  -- retention
  keep_finished interval not null default '30 days' check (keep_finished > '0'),  -- how long finished uploads are kept
  -- days of usage; a monthly quota needs at least 31
  keep_usage integer not null default 800 check (keep_usage >= 31),

  -- initial estimates, until there is history
  call_seconds double precision not null default 4 check (call_seconds > 0),  -- seconds of one call
  batch_seconds double precision not null default 2700 check (batch_seconds > 0),  -- seconds of one OpenAI Batch
  -- after this many days the duration of a batch weighs half
  eta_half_life_days double precision not null default 1 check (eta_half_life_days > 0),

  -- tests
  -- lets sessions set autotag.now and autotag.speed; while it is off, no session can change the time
  test_clock boolean not null default false
);
alter table autotag.settings enable row level security;

-- When the periodic functions last ran. pg_cron calls them where it is installed; elsewhere a worker's heartbeat does.
create table autotag.clock (
  id boolean primary key default true check (id),
  ticked_at timestamptz not null default '-infinity',
  housekeeping_at timestamptz not null default '-infinity',
  probed_at timestamptz not null default '-infinity'     -- last broadcast of send_test_broadcast()
) with (fillfactor = 50);
alter table autotag.clock enable row level security;

-- Models: prices, form of the request, end of life, and the token use learned from their answers.

-- A row is one model or a family. `gpt-6-luna` also covers its dated snapshots (gpt-6-luna-2026-10-01), and a name that ends
-- with a star (`gemini-2.5-flash*`) covers every name with that prefix. If several rows match, the longest name wins. A model
-- without a row works like any other, but its cost is unknown and shown as unknown.
--   insert into autotag.models (name, input_price, output_price) values ('my-model', 0.10, 0.40);
create table autotag.models (
  name text primary key check (length(name) between 1 and 100),
  -- Dollars per million tokens; null: unknown. Cached tokens and cache writes without a price cost input_price.
  input_price numeric check (input_price >= 0),
  cached_price numeric check (cached_price >= 0),
  cache_write_price numeric check (cache_write_price >= 0),
  output_price numeric check (output_price >= 0),
  batch_discount numeric not null default 0.5 check (batch_discount between 0 and 1),   -- discount in a batch …
  flex_discount numeric not null default 0.5 check (flex_discount between 0 and 1),     -- … and with service_tier flex
  priority_factor numeric not null default 2 check (priority_factor >= 0),              -- of the price, for priority and fast
  reasons boolean,                       -- whether it can reason before it answers; null: unknown
  -- sent with every request; null: not sent, so the model's own default applies
  reasoning_effort text check (reasoning_effort in ('none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max')),
  -- First guess of an image's tokens, until answers show them: per 32-pixel patch, or a base plus tokens per 512-pixel tile.
  patch_tokens numeric check (patch_tokens > 0),
  base_tokens integer check (base_tokens >= 0),
  tile_tokens integer check (tile_tokens >= 0),
  -- The form of the request. When the provider refuses a parameter, downgrade_request_form() moves it to the next form, and
  -- retry_features() moves it back after model_check_interval.
  cap_parameter text not null default 'max_completion_tokens'
    check (cap_parameter in ('max_completion_tokens', 'max_tokens', 'none')),
  answer_format text not null default 'json_schema' check (answer_format in ('json_schema', 'json_object', 'text')),
  sends_effort boolean not null default true,
  sends_detail boolean not null default true,
  sends_tier boolean not null default true,
  degraded jsonb not null default '{}',  -- {column: [its value before, its value since]} of what downgrade_request_form() changed …
  degraded_at timestamptz,               -- … and when it did so last
  -- End of life: as the API reports it once a day, or as known when the row was written.
  shutdown_date date,
  successor text
);
alter table autotag.models enable row level security;

-- Token counts of prompts and answers as weighted histograms: sizes 2 % apart, the newest answers weigh most. One row for
-- each combination of what changes the counts. No history is kept: old weights decay.
create table autotag.learned (
  model text not null,
  image_detail text not null,
  image_side integer not null,           -- 0: by image_detail
  reasoning_effort text not null,        -- '': not sent
  max_tags integer not null,
  tag_language text not null,
  brief_id bigint not null default 0,    -- of autotag.briefs; 0: the question alone
  answers bigint not null default 0,
  prompt jsonb not null default '{}',    -- {size: weight}
  output jsonb not null default '{}',
  learned_at timestamptz not null default '-infinity',
  primary key (model, image_detail, image_side, reasoning_effort, max_tags, tag_language, brief_id)
) with (fillfactor = 50);
alter table autotag.learned enable row level security;

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

-- Workers and their leases. One heartbeat extends the lease on everything that the worker holds; when the lease ends, all
-- of it is released.
create table autotag.workers (
  id uuid primary key,
  host text not null,
  version text not null,
  listening boolean not null default true,   -- false: polls, because it is behind a transaction pooler
  started_at timestamptz not null,
  last_heartbeat_at timestamptz not null,
  lease_until timestamptz not null,
  resumed_at timestamptz not null default '-infinity',   -- when it sent the first heartbeat after a time without any (can_expire)
  unsent integer not null default 0,         -- calls released to it that it has not sent yet …
  unsent_extra bigint not null default 0,    -- … and the tokens that they reserve beyond the usual
  claim integer not null default 0,          -- number of its last claim, and of its last claim of batches; the worker counts them
  batch_claim integer not null default 0,
  base_url text,                             -- the provider's address that it calls …
  fingerprint text,                          -- … and the hash of that address and its key
  poll_assigned_at timestamptz,              -- when it was last assigned a poll of the provider (claim_batches)
  login name not null default session_user   -- the login that registered it: no other login may act for it
) with (fillfactor = 50);
create index workers_lease_until_idx on autotag.workers (lease_until);
create index workers_login_idx on autotag.workers (login);
alter table autotag.workers enable row level security;

-- Usage, quotas, and the durations of batches.

-- Usage: one row per workspace, user, day (UTC), model and service tier, from the figures that the provider returns.
create table autotag.usage (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id not null,
  user_id autotag.user_id,
  day date not null,
  model text not null,                   -- the model that answered, as the provider names it
  service_tier text not null,            -- the tier it was billed at: default, flex, priority …, or batch
  images integer not null default 0,     -- images tagged
  requests integer not null default 0,   -- answers the provider billed
  input_tokens bigint not null default 0,         -- prompts, including cached tokens
  cached_tokens bigint not null default 0,
  cache_write_tokens bigint not null default 0,
  output_tokens bigint not null default 0,        -- answers, including reasoning
  reasoning_tokens bigint not null default 0,
  cost numeric                           -- dollars, by the prices in autotag.models at that time; null: no price known
) with (fillfactor = 50);
create unique index usage_key on autotag.usage (workspace_id, day, user_id, model, service_tier) nulls not distinct;
create index usage_day_idx on autotag.usage (day);
create index usage_user_idx on autotag.usage (user_id, day);
create index usage_unpriced_idx on autotag.usage (model) where cost is null;
alter table autotag.usage enable row level security;

-- Quotas: images and dollars per day or month (UTC), for a workspace as a whole or for each of its users.
--   insert into autotag.quotas (scope, period, max_images) values ('user', 'day', 500);          -- every user
--   insert into autotag.quotas (workspace_id, scope, period, max_cost) values ('…', 'workspace', 'month', 20);
-- For each scope and period one quota applies: the one that names the user, else the one that names the workspace, else the
-- general one. A null maximum is no limit, so a specific quota can also lift a general one.
create table autotag.quotas (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id,                     -- null: every workspace
  user_id autotag.user_id,                          -- null: every user (scope user)
  scope text not null check (scope in ('workspace', 'user')),
  period text not null check (period in ('day', 'month')),
  max_images integer check (max_images >= 0),
  max_cost numeric check (max_cost >= 0),
  check (scope = 'user' or user_id is null)
);
create unique index quotas_key on autotag.quotas (scope, period, workspace_id, user_id) nulls not distinct;
alter table autotag.quotas enable row level security;

-- The dollars that images reserve in quotas while they are being tagged.
create type autotag.reservation_prices as (
  single numeric,              -- an image that goes as a single call …
  batch numeric,               -- … or in a batch
  token numeric,               -- each token of a cap above the usual one
  free boolean,                -- the prices are known, and all are zero
  usual_cap integer            -- tokens
);

-- How long OpenAI took for each batch that it completed.
create table autotag.durations (
  id bigint generated always as identity primary key,
  images integer not null check (images > 0),
  started_at timestamptz not null,       -- when OpenAI got the batch
  seconds double precision not null check (seconds > 0)
);
create index durations_started_at_idx on autotag.durations (started_at);
alter table autotag.durations enable row level security;

-- Automatic mode: no call of enqueue_tagging is needed. New rows of the host's images are collected per workspace and
-- uploader, and become one job when no row has come for a while: a client that inserts 300 rows one by one still gets one
-- `batch-parallel` upload.
--
--   insert ─► autotag_collect (adapter) ─► collect(): arrivals ─► seal_uploads(): a job, or a postponed upload
--
-- The host's transaction only adds rows to arrivals. It shares no row and no key with another transaction, so no insert waits for
-- another one. The arrivals of an upload show when it is complete (list_uploads).

-- A new image that has no job yet. Rows are not unique: an image that comes twice is tagged once (start_upload).
create table autotag.arrivals (
  id bigint generated always as identity primary key,
  asset_id autotag.asset_id not null,
  workspace_id autotag.workspace_id not null,
  -- the signed-in user; nobody(): the service role, or a token that names nobody. Not null, so that indexes compare it.
  uploader autotag.user_id not null,
  arrived_at timestamptz not null,       -- when the row was inserted; it may be old when its transaction commits
  upload_id bigint                       -- the postponed upload that it waits in; null: its upload may still grow
) with (fillfactor = 90);
-- There is no foreign key, because its trigger would slow down each insert of the host. housekeeping() repairs rows whose upload is gone.
create index arrivals_new_idx on autotag.arrivals (workspace_id, uploader, arrived_at) where upload_id is null;
create index arrivals_upload_idx on autotag.arrivals (upload_id, id) where upload_id is not null;
alter table autotag.arrivals enable row level security;

-- A complete upload that cannot become a job yet. Several may belong to one workspace and uploader; they are sealed together.
create table autotag.uploads (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id not null,
  uploader autotag.user_id not null,
  seal_at timestamptz not null,                          -- when to try again
  failures integer not null default 0 check (failures >= 0)   -- attempts that raised; 0: it waits for room
);
create index uploads_key_idx on autotag.uploads (workspace_id, uploader);
create index uploads_seal_at_idx on autotag.uploads (seal_at);
alter table autotag.uploads enable row level security;

-- The pictures of an upload: a hash of id and location of each image. enqueue_tagging compares them, so that an image whose tags were
-- stored a moment ago is not tagged again (repeat_window). That takes 8 bytes per image, and no write when the image is tagged.
create table autotag.pictures (
  job_id uuid primary key references autotag.jobs on delete cascade,
  workspace_id autotag.workspace_id not null,
  marks bigint[] not null
);
alter table autotag.pictures alter column marks set storage external;   -- hashes do not shrink
alter table autotag.pictures enable row level security;

-- Outgoing messages (outbox) and webhook deliveries from OpenAI (webhooks).

-- Messages wait here where realtime.send() does not exist (older self-hosted stacks). A worker delivers them through
-- Realtime's HTTP broadcast endpoint.
create table autotag.outbox (
  id bigint generated always as identity primary key,
  topic text not null,
  event text not null,
  payload jsonb not null,
  private boolean not null,
  created_at timestamptz not null
);
alter table autotag.outbox enable row level security;

-- OpenAI's webhooks report that a batch has ended. A delivery is only a hint: the workers poll OpenAI now instead of within
-- a minute, and act on what the poll returns. Deliveries are kept by id, so that a repeated one does nothing (OpenAI retries
-- for up to 72 hours).
create table autotag.webhooks (
  id text primary key check (length(id) between 1 and 200),
  openai_batch_id text not null check (length(openai_batch_id) between 1 and 200),
  received_at timestamptz not null
);
create index webhooks_batch_idx on autotag.webhooks (openai_batch_id);
create index webhooks_received_at_idx on autotag.webhooks (received_at);
alter table autotag.webhooks enable row level security;

-- The types that carry results and errors between functions.

-- The answer about one image, or the error instead of one, with what the other functions need of its task.
create type autotag.answer as (
  task bigint,
  attempt integer,
  job_id uuid,
  workspace_id autotag.workspace_id,
  reserved_at timestamptz,     -- single calls: settle() needs these two to correct the reservation
  reserved_tokens integer,
  output_tokens integer,       -- the cap of the answer, as it was requested
  result jsonb,                -- {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model}, and image: clean_image_notes()
  error jsonb,                 -- {kind, code, message, retry, retry_after, origin, parameter}
  usage jsonb,                 -- as clean_usage() returns it; null: the provider gave no figures
  called boolean,              -- whether the call was sent
  mark uuid,                   -- of the picture that the model saw (describe_assets); null: not known
  asset_id autotag.asset_id,
  brief_id bigint              -- what its job is asked (autotag.briefs); null: the question alone
);

-- The state of one batch, as a poll of OpenAI showed it.
create type autotag.batch_poll as (
  id text,                     -- OpenAI's
  status text,
  output_file_id text,
  error_file_id text,
  total integer,               -- lines of the batch
  done integer,                -- lines that are answered or have failed
  error_code text,
  error text,
  error_kind text
);

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

-- What a workspace wants asked about its images.

-- A version of a profile. A change inserts a new version (save_profile), so a row that was read never has to be read again.
-- check_profile() refuses versions that no request could ask, also in your own inserts. All workspaces share one sequence of versions.
-- So list_assets() can tell by the version in tagging_result whether an image was tagged with its workspace's present profile, even if
-- the image has moved from another workspace.
create sequence autotag.profile_versions as integer;
create table autotag.profiles (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id,     -- null: all workspaces that have none of their own
  version integer not null default nextval('autotag.profile_versions') check (version > 0),
  instructions text not null default '' check (length(instructions) <= 2000),   -- in the owner's words
  -- the language of tags and caption, in plain words; null: tags as settings.tag_language says, and the caption as the model likes
  language text check (length(language) between 1 and 100),
  tag_count integer check (tag_count between 1 and 50),   -- null: settings.max_tags
  min_confidence real not null default 0 check (min_confidence between 0 and 1),   -- less sure tags are not stored
  vocabulary_mode text not null default 'open' check (vocabulary_mode in ('open', 'prefer', 'only')),
  add_parents boolean not null default false,   -- stores the vocabulary's parents of a tag, too
  -- what else the model says about each image: [{name, kind, values (of an enum), description}]
  fields jsonb not null default '[]',
  created_at timestamptz not null
);
create unique index profiles_key on autotag.profiles (workspace_id, version) nulls not distinct;
alter table autotag.profiles enable row level security;

-- What the images of an upload are asked beside the question: a version of a profile, and the vocabulary of that moment. A job has one
-- brief, so all its images are asked the same, and the answers of a batch are read by what was asked. A job without a brief is asked
-- the question alone. Workers read a brief once.
create table autotag.briefs (
  id bigint generated always as identity primary key,
  profile_id bigint not null,
  vocabulary jsonb not null,             -- tags for the prompt; [] where the mode is open
  tag_count integer,                     -- of its profile
  extra_prompt integer not null,         -- first guess of the tokens that it adds to a prompt …
  extra_output integer not null,         -- … and to an answer, beside its number of tags
  -- What one image reserves and uses on average (as in provider_limits), and the version of the question for which this was estimated.
  -- Only the transaction that holds the provider row updates a brief.
  question_version bigint not null default -1,
  tokens_per_image integer not null,
  output_tokens integer not null,
  prompt_mean integer not null,
  output_mean integer not null,
  created_at timestamptz not null
) with (fillfactor = 50);
-- This index is not unique: two first uploads may each insert a brief, so that neither waits for the other's transaction.
create index briefs_profile_idx on autotag.briefs (profile_id, md5(vocabulary::text));
alter table autotag.briefs enable row level security;

-- The tags that a workspace uses, in its own words. A model's tags are matched with the vocabulary when they are stored (match_tags).

--   insert into autotag.vocabulary (tag, aliases, parent) values ('cat', '{kitty, pussycat}', 'animal');
-- Two triggers clean what comes in and refuse what would be ambiguous (vocabulary/words.sql).
create table autotag.vocabulary (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id,     -- null: all workspaces; a workspace's own entry replaces the general one with its name
  tag text not null check (length(tag) between 1 and 50),      -- as images get it
  key text collate "C" not null,         -- tag_key(tag): what is compared
  aliases text[] not null default '{}',  -- other names of it
  description text check (length(description) between 1 and 500),   -- for the model, where the tag says too little
  parent text check (length(parent) between 1 and 50),   -- the tag above it …
  parent_key text collate "C",           -- … and its key
  uses bigint not null default 0 check (uses >= 0)   -- images that have it, when they were last counted (count_uses)
);
create unique index vocabulary_key on autotag.vocabulary (workspace_id, key) nulls not distinct;
create index vocabulary_uses_idx on autotag.vocabulary (workspace_id, uses desc, key);
alter table autotag.vocabulary enable row level security;

-- Every name of every entry: its tag and its aliases. Because of the unique index, a name has one tag.
create table autotag.vocabulary_names (
  id bigint generated always as identity primary key,
  vocabulary_id bigint not null references autotag.vocabulary on delete cascade,
  workspace_id autotag.workspace_id,     -- of the entry
  key text collate "C" not null
);
create unique index vocabulary_names_key on autotag.vocabulary_names (workspace_id, key) nulls not distinct;
create index vocabulary_names_entry_idx on autotag.vocabulary_names (vocabulary_id);
alter table autotag.vocabulary_names enable row level security;

-- A tag of a model that the vocabulary knows.
create type autotag.known_tag as (
  given text,                  -- as the model gave it
  id bigint                    -- of the entry
);

-- An entry, and one above it. depth: 1 is the parent.
create type autotag.ancestor as (id bigint, above bigint, depth integer);

-- An entry as it will be stored (read_entries).
create type autotag.vocabulary_entry as (key text, tag text, aliases text[], description text, parent text, uses bigint);

-- autotag's clock. Tests can change it; all other code reads the time here.

-- How much faster autotag's clock runs than real time: 1, except in tests and benchmarks that compress time
-- (`alter database … set autotag.speed = 10`). Functions that are called often are in plpgsql, because it keeps their plans.
-- An SQL function that cannot be inlined is planned again in every call.
create or replace function autotag.speed() returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- Usually nothing is set. Then it does not read settings, and takes 2 µs instead of 10.
  if coalesce(current_setting('autotag.speed', true), '') = '' or not (select s.test_clock from autotag.settings s) then
    return 1;
  end if;
  return current_setting('autotag.speed')::double precision;
end $$;

-- The current time, for all of autotag. It advances within a transaction, so that time spent waiting for a lock counts.
create or replace function autotag.now() returns timestamptz
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if coalesce(current_setting('autotag.now', true), '') = '' and coalesce(current_setting('autotag.speed', true), '') = ''
    or not (select s.test_clock from autotag.settings s) then
    return clock_timestamp();
  end if;
  return coalesce(nullif(current_setting('autotag.now', true), '')::timestamptz,
    timestamptz '2026-01-01' + (clock_timestamp() - timestamptz '2026-01-01') * autotag.speed());
end $$;

-- Real seconds in an interval of autotag's clock. clock_interval() is the inverse.
create or replace function autotag.real_seconds(p_interval interval) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return extract(epoch from p_interval) / autotag.speed();
end $$;

-- A time of autotag's clock as real epoch seconds.
create or replace function autotag.real_epoch(p_time timestamptz) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return extract(epoch from clock_timestamp()) - autotag.real_seconds(autotag.now() - p_time);
end $$;

create or replace function autotag.clock_interval(p_real_seconds double precision) returns interval
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return make_interval(secs => p_real_seconds * autotag.speed());
end $$;

-- Refusals, and checks of values from outside. `check_…` refuses an invalid value, `clean_…` returns a valid one.

-- Refuses a call; every refusal goes through here. PostgREST turns the sqlstate PTnnn into HTTP status nnn and passes
-- message, detail and hint on. The detail is JSON: a stable `code` and the data that a program needs to react.
create or replace function autotag.refuse(
  p_status integer, p_code text, p_message text, p_hint text, p_detail jsonb default '{}'
) returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using
    errcode = 'PT' || p_status, message = p_message, hint = p_hint,
    detail = (jsonb_build_object('code', p_code) || p_detail)::text;
end $$;

-- Matches characters that a printable text does not have: control, bidirectional and invisible ones, and white space except U+0020.
-- U+200C and U+200D (joiners) count as letters. Planning replaces the call by its value.
create or replace function autotag.unprintable() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select E'[\\u0001-\\u001f\\u007f-\\u00a0\\u00ad\\u0600-\\u0605\\u061c\\u06dd\\u070f\\u0890\\u0891\\u08e2\\u1680\\u180e\\u2000-\\u200b\\u200e\\u200f\\u2028-\\u202f\\u205f-\\u206f\\u3000\\ue000-\\uf8ff\\ufdd0-\\ufdef\\ufeff\\ufff0-\\ufffb\\ufffe\\uffff\\U000110bd\\U000110cd\\U00013430-\\U0001343f\\U0001bca0-\\U0001bca3\\U0001d173-\\U0001d17a\\U00040000-\\U000e00ff\\U000e01f0-\\U000e0fff\\U000f0000-\\U0010ffff]'
$$;

-- Names for a sentence: at most five, and how many more there are.
create or replace function autotag.name_some(p_names text[]) returns text
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return array_to_string(p_names[:5], ', ')
    || case when cardinality(p_names) > 5 then format(' and %s more', cardinality(p_names) - 5) else '' end;
end $$;

-- Whether a text is printable.
create or replace function autotag.is_plain(p_text text) returns boolean
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return p_text !~ autotag.unprintable();
end $$;

-- A text from outside in the form in which it is stored and shown: one line of at most p_length characters that cannot move
-- the cursor, hide text or imitate output. Any white space, including line ends, becomes one space. Control, bidirectional
-- and invisible characters are escaped (\x1b, \u202e), so that a reader sees them. A text that was cut ends in “…”. The
-- worker does the same (autotag/texts.py); a test compares the two.
create or replace function autotag.printable(p_text text, p_length integer) returns text
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_text text := left(p_text, 4 * p_length);   -- what is cut off is not scanned
begin
  if not autotag.is_plain(v_text) then
    v_text := regexp_replace(v_text,
      E'[\\u0009-\\u000d\\u001c-\\u0020\\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+', ' ', 'g');
    select string_agg(case
        when autotag.is_plain(c) then c
        when ascii(c) < 256 then E'\\x' || lpad(to_hex(ascii(c)), 2, '0')
        when ascii(c) < 65536 then E'\\u' || lpad(to_hex(ascii(c)), 4, '0')
        else E'\\U' || lpad(to_hex(ascii(c)), 8, '0') end, '' order by i)
    into v_text from unnest(string_to_array(btrim(v_text), null)) with ordinality u (c, i);
  elsif v_text like '%  %' then
    v_text := regexp_replace(v_text, ' +', ' ', 'g');
  end if;
  v_text := coalesce(btrim(v_text), '');
  if length(v_text) > p_length or length(p_text) > 4 * p_length then
    return left(v_text, p_length - 1) || '…';
  end if;
  return v_text;
end $$;

-- Matches characters that are removed from words: unprintable ones, and fillers and others that nobody sees. Planning replaces the
-- call by its value, here and in the next two functions.
create or replace function autotag.invisible() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select autotag.unprintable() || E'|[\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u3164\\uffa0]' $$;

create or replace function autotag.blanks() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select E'[\\u0009-\\u000d\\u001c-\\u0020\\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+' $$;

-- Scripts in which a joiner between two letters changes what a reader sees, and emojis (JOINED in autotag/texts.py).
create or replace function autotag.joined() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select E'[\\u0600-\\u0dff\\u0f00-\\u10ff\\u1200-\\u1cff\\u2190-\\u2bff\\ua800-\\ua95f\\ua980-\\uabff\\ufb50-\\ufdff\\ufe0f\\ufe70-\\ufefc\\U00010800-\\U0001ffff]' $$;

-- A text from outside as people write it: composed, one space for any white space, without characters that nobody sees. Joiners stay
-- where they change something. The worker and its commands do the same (visible_text in autotag/texts.py).
create or replace function autotag.visible_text(p_text text) returns text
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_text text := p_text;
begin
  if v_text ~ '[^ -~]' then
    v_text := regexp_replace(v_text, autotag.blanks(), ' ', 'g');
    v_text := regexp_replace(v_text, '(?<!' || autotag.joined() || E')[\\u200c\\u200d]|[\\u200c\\u200d](?!' || autotag.joined() || ')|'
      || autotag.invisible(), '', 'g');
    v_text := normalize(v_text, NFC);
  end if;
  return btrim(regexp_replace(v_text, ' +', ' ', 'g'));
end $$;

-- Validates an id of an object at the provider (batch_…, file-…). Null: invalid.
create or replace function autotag.clean_id(p_id text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select case when p_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:/=-]{0,199}$' then p_id end $$;

-- Validates a number in a worker's report and clamps it to [p_min, p_max]. Null: not a number.
create or replace function autotag.clean_number(p_report jsonb, p_name text, p_min double precision, p_max double precision)
returns double precision
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return case when jsonb_typeof(p_report -> p_name) = 'number'
    then least(greatest((p_report -> p_name)::numeric, p_min::numeric), p_max::numeric)::double precision end;
end $$;

-- Refuses a report that is not a list, or that is larger than a worker ever needs: 10,000 items or 50 MB.
create or replace function autotag.check_list(p_list jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
  if p_list is null or jsonb_typeof(p_list) <> 'array' then
    perform autotag.refuse(400, 'bad_report', 'A report has to be a list.', 'Pass a JSON array of objects.');
  elsif jsonb_array_length(p_list) > 10000 or pg_column_size(p_list) > 50000000 then
    perform autotag.refuse(413, 'report_too_large', 'This report is too large.',
      'Send at most 10,000 items and 50 MB in one report.');
  end if;
end $$;

-- The same for a list of ids.
create or replace function autotag.check_ids(p_count integer) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
  if p_count > 10000 then
    perform autotag.refuse(413, 'report_too_large', 'This report is too large.',
      'Pass at most 10,000 ids at a time.');
  end if;
end $$;

-- Validates a batch's status as the provider returns it. Null: invalid. `gone`: the provider does not know the batch. `unread`: the
-- worker cannot read it.
create or replace function autotag.clean_status(p_status text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case when p_status in
    ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', 'cancelled', 'gone', 'unread')
    then p_status end
$$;

-- Refuses a worker whose major and minor version differ from the schema's.
create or replace function autotag.check_version(p_version text) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_worker integer[] := (regexp_match(p_version, E'^(\\d{1,6})\\.(\\d{1,6})(?!\\d)'))::integer[];
  v_schema integer[] := (regexp_match(autotag.schema_version(), E'^(\\d+)\\.(\\d+)'))::integer[];
begin
  if v_worker is distinct from v_schema then
    perform autotag.refuse(426, 'versions_differ',
      format('This worker is autotag %s, but the database has the schema of autotag %s.',
        coalesce(autotag.printable(p_version, 50), '(no version)'), autotag.schema_version()),
      case when v_worker > v_schema then 'Apply the new migrations: autotag migrate, or supabase db push.'
        else format('Install the matching worker: pip install ''supabase-autotag==%s.%s.*''.',
          v_schema[1], v_schema[2]) end);
  end if;
end $$;

-- Refuses a number of images that no upload can have: none, or more than settings.job_max_images.
create or replace function autotag.check_image_count(p_images integer) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_max_allowed integer := (select s.job_max_images from autotag.settings s);
begin
  if p_images is null or p_images < 1 then
    perform autotag.refuse(400, 'no_images', 'There is no image to tag.', 'Pass at least one image.');
  elsif p_images > v_max_allowed then
    perform autotag.refuse(413, 'too_many_images',
      format('%s images are too many for one upload.', p_images),
      format('Split it into uploads of at most %s images.', v_max_allowed),
      jsonb_build_object('max_images', v_max_allowed));
  end if;
end $$;

-- Identity of the caller: a service, a member of a workspace, or a worker's login.

-- Whether the caller may act for every workspace: the service role over HTTP, or a direct connection without a user (no JWT
-- claims, and neither the API's login role nor a role that it switches to).
create or replace function autotag.is_service() returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_claims text := nullif(current_setting('request.jwt.claims', true), '');
begin
  if v_claims is not null then
    return coalesce(v_claims::jsonb ->> 'role' = 'service_role', false);
  end if;
  return session_user <> 'authenticator' and current_setting('role') not in ('anon', 'authenticated');
end $$;

-- Refuses a token that names no user: its claim does not have the type of the users' ids. That happens where another service signs
-- people in.
create or replace function autotag.check_caller() returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if not autotag.is_service() and autotag.caller() is null then
    perform autotag.refuse(403, 'unknown_caller', 'Your token does not say who you are in a way that this project knows.',
      'Sign in as a user of this project. Where Clerk, Auth0 or another service signs people in: autotag init --caller-claim sub.');
  end if;
end $$;

create or replace function autotag.check_member(p_workspace_id autotag.workspace_id) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_workspace_id is null then
    perform autotag.refuse(400, 'no_workspace', 'No workspace was given.', 'Pass the id of a workspace.');
  elsif octet_length(p_workspace_id::text) > 1024 then   -- an index takes no key over 2.7 kB
    perform autotag.refuse(400, 'workspace_too_long', 'The id of the workspace has more than 1,024 bytes.',
      'Give the workspace a shorter id.');
  elsif not autotag.is_service() and not autotag.is_member(p_workspace_id) then
    perform autotag.refuse(403, 'not_a_member', 'You are not a member of this workspace.',
      'Sign in as one of its members.', jsonb_build_object('workspace_id', p_workspace_id));
  end if;
end $$;

-- The same for a change of a workspace's profile or vocabulary.
create or replace function autotag.check_editor(p_workspace_id autotag.workspace_id) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_member(p_workspace_id);
  if not autotag.is_service() and autotag.is_editor(p_workspace_id) is not true then
    perform autotag.refuse(403, 'not_an_editor', 'You may not change what this workspace''s images are asked.',
      'Ask the people who run this project: autotag.is_editor() decides it.', jsonb_build_object('workspace_id', p_workspace_id));
  end if;
end $$;

-- Returns the job. Refuses a job that does not exist or belongs to another workspace.
create or replace function autotag.visible_job(p_job_id uuid) returns autotag.jobs
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs;
begin
  select * into v_job from autotag.jobs j where j.id = p_job_id;
  -- Both cases get the same refusal, so that a caller cannot find out which ids exist.
  if not found or not (autotag.is_service() or autotag.is_member(v_job.workspace_id)) then
    perform autotag.refuse(404, 'unknown_job', 'There is no such upload.', 'Pass the job_id that enqueue_tagging returned.');
  end if;
  return v_job;
end $$;

-- The traceparent header of the HTTP request behind this call; null: it has none, or none that is well-formed.
create or replace function autotag.request_traceparent() returns text
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_headers text := nullif(current_setting('request.headers', true), '');
begin
  if v_headers is null then
    return null;
  end if;
  return substring(v_headers::jsonb ->> 'traceparent' from '^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$');
exception when invalid_text_representation then
  return null;
end $$;

-- Whether the calling login has registered this worker. False once the worker's row is deleted (expire_worker, release_worker).
create or replace function autotag.is_own_worker(p_worker uuid) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.workers wk where wk.id = p_worker and wk.login = session_user);
end $$;

-- Models as rows of autotag.models: finding the row of a name, prices, the question, end of life.

-- Whether the row p_row covers the model p_model.
create or replace function autotag.names_model(p_row text, p_model text) returns boolean
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return p_model = p_row
    or right(p_row, 1) = '*' and starts_with(p_model, left(p_row, -1))
    -- a request for mistral-small-latest is answered by mistral-small-2506
    or right(p_row, 7) = '-latest' and starts_with(p_model, left(p_row, -6))
    or starts_with(p_model, p_row) and substr(p_model, length(p_row) + 1) ~ E'^[-@](latest|\\d{4}-?\\d{2}-?\\d{2}|\\d{4})$';
end $$;

-- The row of a model; all columns are null when there is none.
create or replace function autotag.find_model(p_model text) returns autotag.models
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_row autotag.models;
begin
  select * into v_row from autotag.models mo where mo.name = p_model;
  if not found then
    -- The first condition is in every form of names_model(), and costs a fraction of the call.
    select * into v_row from autotag.models mo
    where starts_with(p_model, case when right(mo.name, 1) = '*' then left(mo.name, -1)
        when right(mo.name, 7) = '-latest' then left(mo.name, -6) else mo.name end)
      and autotag.names_model(mo.name, p_model)
    order by length(mo.name) desc limit 1;
  end if;
  return v_row;
end $$;

-- Price of a model's tokens in a service tier (`batch` for a batch), in dollars. Null: unknown, because the model has no price
-- or the tier is unknown. A model whose prices are all zero (on one's own server) costs zero in any tier, and even without figures.
-- p_input includes cached and cache-written tokens, as in OpenAI's figures.
create or replace function autotag.price_tokens(
  p_model text, p_tier text, p_input numeric, p_cached numeric, p_cache_write numeric, p_output numeric
) returns numeric
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_model);
begin
  if 0 = all (array[m.input_price, m.output_price, coalesce(m.cached_price, 0), coalesce(m.cache_write_price, 0)]) then
    return 0;
  end if;
  return (
    greatest(p_input - p_cached - p_cache_write, 0) * m.input_price
    + p_cached * coalesce(m.cached_price, m.input_price)
    + p_cache_write * coalesce(m.cache_write_price, m.input_price)
    + p_output * m.output_price
  ) / 1000000 * case
    when p_tier in ('default', 'auto', 'standard', 'on_demand') then 1
    when p_tier = 'batch' then 1 - m.batch_discount
    when p_tier = 'flex' then 1 - m.flex_discount
    when p_tier in ('priority', 'fast') then m.priority_factor end;
end $$;

-- The question as workers get it: everything in the request but the image. p_effort null: the one in the model's row.
create or replace function autotag.question_for(p_model text, p_effort text default null) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  m autotag.models := autotag.find_model(p_model);
begin
  select * into v_settings from autotag.settings;
  return jsonb_build_object(
    'model', p_model, 'image_detail', v_settings.image_detail, 'image_side', v_settings.image_side,
    'max_tags', v_settings.max_tags, 'tag_language', v_settings.tag_language,
    'reasoning_effort', case when coalesce(m.sends_effort, true) then coalesce(p_effort, m.reasoning_effort) end,
    'service_tier', case when v_settings.service_tier <> 'auto' and coalesce(m.sends_tier, true) then v_settings.service_tier end,
    'cap_parameter', coalesce(m.cap_parameter, 'max_completion_tokens'),
    'answer_format', coalesce(m.answer_format, 'json_schema'),
    'sends_detail', coalesce(m.sends_detail, true));
end $$;

-- The question to the model in use. It is derived at every use (sync_question), so one UPDATE of settings or models changes it.
create or replace function autotag.describe_question() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.question_for((select s.model from autotag.settings s));
end $$;

-- Wakes the workers: their next claim picks up the change.
create or replace function autotag.notify_workers() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_notify('autotag', 'realtime');
  perform pg_notify('autotag', 'batch');
  return null;
end $$;

create or replace trigger autotag_announce after update on autotag.settings
  for each statement execute function autotag.notify_workers();

create or replace trigger autotag_announce after insert or update or delete on autotag.models
  for each statement execute function autotag.notify_workers();

-- Moves the model's row to the next form, because the provider refused a parameter. False: there is none, or another transaction holds
-- the row. A model without a row gets one (without prices). Locks: the model's row (skip locked).
create or replace function autotag.downgrade_request_form(p_model text, p_parameter text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_model);
  v_column text := case p_parameter when 'token_cap' then 'cap_parameter' when 'response_format' then 'answer_format'
    when 'reasoning_effort' then 'sends_effort' when 'detail' then 'sends_detail' when 'service_tier' then 'sends_tier' end;
  v_before jsonb;
  v_next jsonb;
begin
  if v_column is null then
    return false;
  end if;
  if m.name is null then
    insert into autotag.models (name) values (p_model) on conflict do nothing;
    m.name := p_model;
  end if;
  select * into m from autotag.models mo where mo.name = m.name for update skip locked;
  if not found then
    return false;
  end if;
  v_before := to_jsonb(m) -> v_column;
  v_next := (case
    when v_before = '"max_completion_tokens"' then '"max_tokens"' when v_before = '"max_tokens"' then '"none"'
    when v_before = '"json_schema"' then '"json_object"' when v_before = '"json_object"' then '"text"'
    when v_before = 'true' and (v_column <> 'sends_effort' or m.reasoning_effort is not null) then 'false' end)::jsonb;
  if v_next is null then
    return false;
  end if;
  m := jsonb_populate_record(m, jsonb_build_object(v_column, v_next));
  m.degraded := m.degraded || jsonb_build_object(v_column, jsonb_build_array(
    case when m.degraded -> v_column -> 1 = v_before then m.degraded -> v_column -> 0 else v_before end, v_next));
  update autotag.models mo
  set cap_parameter = m.cap_parameter, answer_format = m.answer_format, sends_effort = m.sends_effort,
      sends_detail = m.sends_detail, sends_tier = m.sends_tier, degraded = m.degraded, degraded_at = autotag.now()
  where mo.name = m.name;
  return true;
end $$;

-- Makes calls try again what refusals before p_before showed to be missing: parameters of the request, the Batch API, expiring files.
-- The provider may support it by now, or a worker may have lied. A call that is refused again is not billed.
-- Values that the owner changed meanwhile stay. Called by tick(). Locks: provider, models (skip locked).
create or replace function autotag.retry_features(p_before timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.provider_limits p
  set has_batches = case when not p.batches_refused then p.has_batches end, batches_refused = false, keep_files = 604800,
      degraded_at = null
  where p.degraded_at <= p_before;
  if exists (select from autotag.models mo where mo.degraded_at <= p_before) then
    update autotag.models mo
    set cap_parameter = case when mo.degraded #>> '{cap_parameter,1}' = mo.cap_parameter
          then mo.degraded #>> '{cap_parameter,0}' else mo.cap_parameter end,
        answer_format = case when mo.degraded #>> '{answer_format,1}' = mo.answer_format
          then mo.degraded #>> '{answer_format,0}' else mo.answer_format end,
        sends_effort = mo.sends_effort or mo.degraded ? 'sends_effort',
        sends_detail = mo.sends_detail or mo.degraded ? 'sends_detail',
        sends_tier = mo.sends_tier or mo.degraded ? 'sends_tier', degraded = '{}', degraded_at = null
    where mo.name in (select due.name from autotag.models due where due.degraded_at <= p_before order by due.name for update skip locked);
  end if;
end $$;

-- Forgets everything that workers have reported of the provider and of the token use of its answers, for example after a worker's
-- login was stolen. The next call has to prove that tagging works. Limits stay: headers correct them, or the owner sets them.
-- For the owner. Locks: provider, models.
create or replace function autotag.forget_provider() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.lock_provider();
  update autotag.provider_limits p
  set has_batches = null, batches_refused = false, keep_files = 604800, has_rate_headers = null, degraded_at = null,
      proven_at = null, probe_at = null, account_error = null, account_error_from = null, account_error_at = null,
      blocked_until = '-infinity', limited_since = null, ask_after = '-infinity', next_poll_at = '-infinity', checked_at = '-infinity',
      question = '{}', refusals = '{}'
  where p.id;
  perform autotag.retry_features('infinity');
  delete from autotag.learned l where l.learned_at > '-infinity';
  perform pg_notify('autotag', 'realtime');
  perform pg_notify('autotag', 'batch');
end $$;

-- End of life of a model (p_model null: the one in use), from 90 days before: {level, message, fix, days, date, successor};
-- else null. level: warning, and error from 14 days before, because tagging is paused from that date on.
create or replace function autotag.describe_shutdown(p_model text default null) returns jsonb
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
      else 'Choose another model: update autotag.settings set model = ''…'';' end);
end $$;

-- Token use of a model's answers: histograms of prompt and answer tokens that decay, and the reservations derived from them.

-- A histogram after new counts: {size: weight}. Each new count multiplies the old weights by 1 - 1 / p_memory (in answers). A bin is
-- named by its upper end, and bins are 2 % apart.
create or replace function autotag.decayed_histogram(p_old jsonb, p_counts integer[], p_memory integer) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_object_agg(b.size, b.weight), '{}')
    from (
      select x.size, round(sum(x.weight)::numeric, 3) as weight
      from (
        select o.key as size, o.value::double precision * power(1 - 1.0 / p_memory, cardinality(p_counts)) as weight
        from jsonb_each_text(p_old) o
        union all
        select (case when c.tokens <= 50 then greatest(c.tokens, 1)
          else ceil(power(1.02, ceil(ln(c.tokens) / ln(1.02) - 0.000001)))::integer end)::text, c.answers
        from (select u.tokens, count(*) as answers from unnest(p_counts) u (tokens) group by u.tokens) c) x
      group by x.size having sum(x.weight) > 0.01) b);
end $$;

-- The quantile p_share (0 to 1) of a histogram; null for an empty one.
create or replace function autotag.quantile(p_weights jsonb, p_share double precision) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select min(x.size) from (
      select w.key::integer as size, sum(w.value::double precision) over (order by w.key::integer) as upto,
        sum(w.value::double precision) over () as total
      from jsonb_each_text(p_weights) w) x
    where x.upto >= p_share * x.total - 0.000001);
end $$;

create or replace function autotag.mean_size(p_weights jsonb) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select round(sum(w.key::integer * w.value::double precision) / sum(w.value::double precision))::integer
    from jsonb_each_text(p_weights) w);
end $$;

-- First guess of a prompt's tokens: 300 for instructions and schema (measured with o200k and rounded up), plus a square image,
-- the most expensive shape. The worker sends image_side pixels a side, or 512 for detail low and 2,048 for high. A model without a row
-- counts as the most expensive one (gpt-4o-mini).
create or replace function autotag.guess_prompt(p_question jsonb) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_question ->> 'model');
  v_low boolean := p_question ->> 'image_detail' = 'low';
  v_side integer := coalesce((p_question ->> 'image_side')::integer, case when v_low then 512 else 2048 end);
begin
  return 300 + case
    when m.patch_tokens is not null then ceil(least(ceil(v_side / 32.0) ^ 2, 1536) * m.patch_tokens)
    -- the provider scales a square to at most 768 pixels a side: up to four tiles of 512
    else coalesce(m.base_tokens, 2833)
      + case when v_low then 0 else ceil(least(v_side, 768) / 512.0) ^ 2 * coalesce(m.tile_tokens, 5667) end end;
end $$;

-- First guess of the tokens that an answer may need: 100, 30 per tag, and the reasoning. OpenAI publishes no figures for
-- reasoning efforts; these are generous, because an answer that is cut off is billed and unusable.
create or replace function autotag.guess_output(p_question jsonb) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_question ->> 'model');
  v_effort text := p_question ->> 'reasoning_effort';
begin
  return 100 + 30 * (p_question ->> 'max_tags')::integer + case
    when v_effort = 'none' or m.reasons = false then 0
    when v_effort is null and m.reasons is null then 1000
    when v_effort = 'minimal' then 500
    when v_effort = 'low' then 1500
    when v_effort = 'high' then 10000
    when v_effort in ('xhigh', 'max') then 25000
    else 4000 end;  -- medium, and a model's own default
end $$;

-- Sets what one image reserves and what it uses on average, from what was learned about the present question, or from the
-- first guess below 10 answers. Few answers get a margin of 2 / answers, because ten may not have included the largest.
-- p_brief: what is asked beside the question; the row that is returned then says what such an image needs. The caller holds the provider
-- row.
create or replace function autotag.estimate_tokens(p_provider autotag.provider_limits, p_brief autotag.briefs default null)
returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_learned autotag.learned;
  v_question jsonb := p_provider.question;
  v_prompt_guess integer := autotag.guess_prompt(v_question) + coalesce(p_brief.extra_prompt, 0);
  v_output_guess integer := coalesce(p_brief.extra_output, 0)
    + autotag.guess_output(v_question || jsonb_build_object('max_tags', coalesce(p_brief.tag_count, (v_question -> 'max_tags')::integer)));
  v_prompt integer := v_prompt_guess;
  v_output integer := v_output_guess;
  v_margin double precision;
begin
  select * into v_settings from autotag.settings;
  select * into v_learned from autotag.learned l
  where l.model = v_question ->> 'model' and l.image_detail = v_question ->> 'image_detail'
    and l.image_side = coalesce((v_question ->> 'image_side')::integer, 0)
    and l.reasoning_effort = coalesce(v_question ->> 'reasoning_effort', '')
    and l.max_tags = (v_question ->> 'max_tags')::integer and l.tag_language = v_question ->> 'tag_language'
    and l.brief_id = coalesce(p_brief.id, 0);
  p_provider.prompt_mean := v_prompt;
  p_provider.output_mean := v_output / 3;
  if v_learned.answers >= 10 then
    v_margin := 1 + 2.0 / v_learned.answers;
    v_prompt := ceil(autotag.quantile(v_learned.prompt, 0.99) * v_margin);
    p_provider.prompt_mean := autotag.mean_size(v_learned.prompt);
    p_provider.output_mean := autotag.mean_size(v_learned.output);
    -- Cut off 0.5 % of answers: each costs another call, but a higher cap would cost every call its share of the limit.
    v_output := ceil(autotag.quantile(v_learned.output, 0.995) * 1.05 * v_margin) + 8;
    if v_learned.answers < 30 then
      v_output := greatest(v_output, v_output_guess);
    end if;
  end if;
  -- A cap above the limit per minute would never be admitted.
  v_output := least(greatest(v_output, v_settings.min_output_tokens), v_settings.max_output_tokens,
    greatest((0.9 * p_provider.tokens_per_minute)::integer - v_prompt, v_settings.min_output_tokens));
  -- Limit a learned prompt so that the workspace's minute always holds two images, or as many as with the first guess: too
  -- high a value slows tagging down but never stops it. settle() corrects the windows by the real use.
  v_prompt := least(v_prompt, greatest(v_settings.realtime_tokens_per_minute / 2 - v_output, v_prompt_guess));
  p_provider.output_tokens := v_output;
  p_provider.tokens_per_image := v_prompt + v_output;
  return p_provider;
end $$;

-- Updates the provider's row when the question has changed (settings or models were updated). A new question has to be proven, unless
-- only max_tags, tag_language or image_side changed. Its tokens are estimated again in any case. Every claim calls this. The caller holds
-- the provider row.
create or replace function autotag.sync_question(p_provider autotag.provider_limits) returns autotag.provider_limits
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_question jsonb := autotag.describe_question();
  v_prompt_only text[] := array['max_tags', 'tag_language', 'image_side'];  -- they change no parameter, so no provider refuses them
begin
  if v_question = p_provider.question then
    return p_provider;
  end if;
  if v_question - v_prompt_only <> p_provider.question - v_prompt_only then
    p_provider.proven_at := null;
    p_provider.probe_at := null;
    p_provider.checked_at := '-infinity';
  end if;
  p_provider.question := v_question;
  p_provider.question_version := p_provider.question_version + 1;
  p_provider.question_since := autotag.now();
  p_provider := autotag.estimate_tokens(p_provider);
  update autotag.provider_limits p
  set question = p_provider.question, question_version = p_provider.question_version,
      question_since = p_provider.question_since, proven_at = p_provider.proven_at, probe_at = p_provider.probe_at,
      checked_at = p_provider.checked_at, tokens_per_image = p_provider.tokens_per_image,
      output_tokens = p_provider.output_tokens, prompt_mean = p_provider.prompt_mean, output_mean = p_provider.output_mean
  where p.id;
  return p_provider;
end $$;

-- Learns from the prompt and answer tokens (parallel arrays) of answers to a question (null: the present one). p_briefs: what each was
-- asked beside the question; null: nothing. The caller holds the provider row.
create or replace function autotag.learn(p_inputs integer[], p_outputs integer[], p_question jsonb default null, p_briefs bigint[] default null)
returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_group record;
begin
  if array_remove(p_briefs, null) = '{}' is not false then
    perform autotag.learn_brief(null, p_inputs, p_outputs, p_question);
    return;
  end if;
  for v_group in
    select u.brief, array_agg(u.input) as inputs, array_agg(u.output) as outputs
    from unnest(p_inputs, p_outputs, p_briefs) u (input, output, brief) group by u.brief order by u.brief
  loop
    perform autotag.learn_brief(v_group.brief, v_group.inputs, v_group.outputs, p_question);
  end loop;
end $$;

-- Learns from answers that were all asked the same. A prompt counts as at most 20 times the first guess.
create or replace function autotag.learn_brief(p_brief bigint, p_inputs integer[], p_outputs integer[], p_question jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_brief autotag.briefs;
  v_question jsonb;
  v_memory integer := (select s.learning_memory from autotag.settings s);
  v_max_allowed integer;
begin
  if p_inputs is null or cardinality(p_inputs) = 0 then
    return;
  end if;
  select * into v_provider from autotag.provider_limits;
  v_question := coalesce(p_question, v_provider.question);
  if p_brief is not null then
    select * into v_brief from autotag.briefs br where br.id = p_brief;
    if not found then
      return;
    end if;
  end if;
  v_max_allowed := 20 * (autotag.guess_prompt(v_question) + coalesce(v_brief.extra_prompt, 0));
  p_inputs := array(select least(i, v_max_allowed) from unnest(p_inputs) i);
  update autotag.learned l
  set answers = l.answers + cardinality(p_inputs), learned_at = autotag.now(),
      prompt = autotag.decayed_histogram(l.prompt, p_inputs, v_memory), output = autotag.decayed_histogram(l.output, p_outputs, v_memory)
  where l.model = v_question ->> 'model' and l.image_detail = v_question ->> 'image_detail'
    and l.image_side = coalesce((v_question ->> 'image_side')::integer, 0)
    and l.reasoning_effort = coalesce(v_question ->> 'reasoning_effort', '')
    and l.max_tags = (v_question ->> 'max_tags')::integer and l.tag_language = v_question ->> 'tag_language' and l.brief_id = coalesce(p_brief, 0);
  if not found then
    insert into autotag.learned (model, image_detail, image_side, reasoning_effort, max_tags, tag_language, brief_id, answers, prompt, output, learned_at)
    values (v_question ->> 'model', v_question ->> 'image_detail', coalesce((v_question ->> 'image_side')::integer, 0),
      coalesce(v_question ->> 'reasoning_effort', ''), (v_question ->> 'max_tags')::integer,
      v_question ->> 'tag_language', coalesce(p_brief, 0), cardinality(p_inputs),
      autotag.decayed_histogram('{}', p_inputs, v_memory), autotag.decayed_histogram('{}', p_outputs, v_memory), autotag.now());
  end if;
  if p_brief is not null then
    perform autotag.refresh_brief(v_brief, v_provider);
    return;
  end if;
  v_provider := autotag.estimate_tokens(v_provider);
  update autotag.provider_limits p
  set tokens_per_image = v_provider.tokens_per_image, output_tokens = v_provider.output_tokens,
      prompt_mean = v_provider.prompt_mean, output_mean = v_provider.output_mean
  where (p.tokens_per_image, p.output_tokens, p.prompt_mean, p.output_mean) is distinct from
    (v_provider.tokens_per_image, v_provider.output_tokens, v_provider.prompt_mean, v_provider.output_mean);
end $$;

-- Asks another model about images that already have tags (`autotag compare`). Its calls respect all limits and quotas and give
-- way to live uploads, and their usage is recorded. It creates no jobs or tasks and writes nothing to the host's tables.
--
--   preview_comparison   the cost, and whether the quotas allow it
--   comparison_sample    the images, with their stored tags
--   admit_comparison     admits one call, or returns when to ask again
--   settle_comparison    settles one call, and returns what to do next about its image

-- The provider's row with its token estimates (reserved and mean) replaced by those of another question, with what a workspace's images
-- are asked beside it.
create or replace function autotag.estimate_question(p_provider autotag.provider_limits, p_question jsonb, p_workspace_id autotag.workspace_id)
returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  p_provider.question := p_question;
  return autotag.estimate_tokens(p_provider, autotag.compose_brief(p_workspace_id));
end $$;

-- Previews asking p_model about p_sample tagged images of a workspace: {images (at most p_sample), cost (dollars; null:
-- unknown), reserved (tokens of one image), question, brief (what the workspace's profile asks beside it; null: nothing),
-- shutdown_date, current_model, current_effort, current_cost_per_1000 (dollars, as single calls of the model in use; null: unknown),
-- current_answers (number of answers behind that figure)}.
-- p_effort null: the one in the model's row. Refuses an invalid model or effort, a workspace without tagged images, and more
-- than a quota allows.
create or replace function autotag.preview_comparison(p_workspace_id autotag.workspace_id, p_model text, p_effort text, p_sample integer)
returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.refilled_provider(autotag.now());
  v_current autotag.provider_limits := autotag.estimate_question(v_provider, autotag.describe_question(), p_workspace_id);
  v_question jsonb := autotag.question_for(p_model, p_effort);
  v_brief autotag.briefs := autotag.compose_brief(p_workspace_id);
  v_images integer;
begin
  if coalesce(length(p_model), 0) not between 1 and 100 then
    perform autotag.refuse(400, 'unknown_model', 'This is not a model name.', 'Pass the name that the provider uses for the model.');
  elsif p_effort not in ('none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max') then
    perform autotag.refuse(400, 'unknown_effort', format('%L is not a reasoning effort.', p_effort),
      'Pass none, minimal, low, medium, high, xhigh or max.');
  elsif p_effort is not null and v_question ->> 'reasoning_effort' is null then
    perform autotag.refuse(400, 'unknown_effort', format('%s does not accept a reasoning effort.', p_model),
      'Leave it out (autotag.models.sends_effort is false for this model).');
  end if;
  v_images := (select count(*) from autotag.tagged_assets(p_workspace_id, least(greatest(p_sample, 0), 1000)));
  if v_images = 0 then
    perform autotag.refuse(404, 'no_tagged_images', 'This workspace has no tagged images.',
      'Tag some images first: autotag enqueue.');
  end if;
  v_provider := autotag.estimate_question(v_provider, v_question, p_workspace_id);
  -- Without a price next to nothing is reserved, as for uploads; a price of zero is a price.
  perform autotag.check_quotas(p_workspace_id, null, v_images, coalesce(autotag.question_cost(v_provider, true), 0.0000001));
  return jsonb_build_object(
    'images', v_images, 'cost', v_images * autotag.question_cost(v_provider, false),
    'reserved', v_provider.tokens_per_image, 'question', v_question, 'brief', autotag.spell_brief(v_brief),
    'shutdown_date', (autotag.find_model(p_model)).shutdown_date,
    'current_model', v_current.question -> 'model', 'current_effort', v_current.question -> 'reasoning_effort',
    'current_cost_per_1000', round(1000 * autotag.question_cost(v_current, false), 4),
    'current_answers', coalesce((
      select l.answers from autotag.learned l
      where l.brief_id = coalesce(v_brief.id, 0) and l.model = v_current.question ->> 'model' and l.image_detail = v_current.question ->> 'image_detail'
        and l.image_side = coalesce((v_current.question ->> 'image_side')::integer, 0)
        and l.reasoning_effort = coalesce(v_current.question ->> 'reasoning_effort', '')
        and l.max_tags = (v_current.question ->> 'max_tags')::integer
        and l.tag_language = v_current.question ->> 'tag_language'), 0));
end $$;

-- The images to compare: [{asset_id, bucket, path, url, tags: [tag, …], caption, confidence: {tag: 0 to 1}, model}].
create or replace function autotag.comparison_sample(p_workspace_id autotag.workspace_id, p_sample integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_assets autotag.asset_id[];
  v_sample jsonb;
begin
  select array_agg(t.asset_id),
    jsonb_object_agg(t.asset_id, jsonb_build_object(
      'tags', jsonb_path_query_array(t.tags, 'strict $[*] ? (@.type() == "string")'),
      'caption', t.result ->> 'caption', 'confidence', t.result -> 'confidence', 'model', t.result ->> 'model'))
  into v_assets, v_sample
  from autotag.tagged_assets(p_workspace_id, least(greatest(p_sample, 0), 1000)) t;
  return (
    select coalesce(jsonb_agg(jsonb_build_object('asset_id', d.asset_id::text, 'bucket', d.bucket, 'path', d.path, 'url', d.url)
      || (v_sample -> d.asset_id::text) order by d.asset_id), '[]')
    from autotag.describe_assets(coalesce(v_assets, '{}')) d where d.refused is null);
end $$;

-- Admits one call with this question: {admitted, reserved (tokens), reserved_at, cap (of the answer, in tokens)}, or
-- {admitted: false, wait (seconds), reason}. The call takes from the provider's bucket and from the workspace's window like
-- any single call, but only while no live image waits for one. p_cap: lowest cap, after an answer was cut off.
-- reason: `account` (with the error as `message`), `retry_after`, `live`, `provider` or `window`.
-- Refuses more than a quota allows, and an image that reserves more than the window's limit.
-- Locks: provider, window (skip locked).
create or replace function autotag.admit_comparison(p_workspace_id autotag.workspace_id, p_question jsonb, p_cap integer default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.estimate_question(autotag.refilled_provider(autotag.now()), p_question, p_workspace_id);
  v_now timestamptz;
  v_cap integer;
  v_reserved integer;
  v_next timestamptz;
  v_window record;
begin
  perform autotag.check_quotas(p_workspace_id, null, 1, coalesce(autotag.question_cost(v_provider, true), 0.0000001));
  v_provider := autotag.estimate_question(autotag.lock_provider(), p_question, p_workspace_id);
  v_now := v_provider.refilled_at;
  -- Limit the cap to what one minute's token limit can hold; a larger one would never be admitted.
  v_cap := greatest(v_provider.output_tokens, least(coalesce(p_cap, 0),
    (0.9 * v_provider.tokens_per_minute)::integer - (v_provider.tokens_per_image - v_provider.output_tokens)));
  v_reserved := v_provider.tokens_per_image - v_provider.output_tokens + v_cap;
  -- An error of the model in use (it may have shut down) is a reason to compare, so it does not hold back other models. If
  -- the error affects those too, their own calls show it.
  if v_provider.account_error is not null
    and (v_provider.account_error_from = 'storage' or p_question ->> 'model' = (select s.model from autotag.settings s)) then
    return autotag.retry_later('account', v_now, v_now + (select s.account_probe_interval from autotag.settings s))
      || jsonb_build_object('message', v_provider.account_error);
  elsif v_provider.blocked_until > v_now then
    return autotag.retry_later('retry_after', v_now, v_provider.blocked_until);
  -- A workspace whose next image never fits its window (ready_at is infinite) does not hold others back. Queues that no claim has
  -- counted yet (not joined) wait, too.
  elsif v_provider.account_error is null
    and (exists (select from autotag.workspaces ws where ws.queued > 0 and (ws.ready or ws.ready_at < 'infinity'))
      or exists (select from autotag.queues q where not q.joined and q.queued > 0)) then
    return autotag.retry_later('live', v_now, v_now + autotag.clock_interval(1));
  end if;
  v_next := v_now + interval '1 min' * greatest(0,
    (1 - v_provider.requests_left) / v_provider.requests_per_minute,
    (1 - v_provider.day_left) / (v_provider.requests_per_day / 1440.0),
    (v_reserved - v_provider.tokens_left) / v_provider.tokens_per_minute);
  if v_next > v_now then
    return autotag.retry_later('provider', v_now, v_next);
  end if;
  if not autotag.try_window(p_workspace_id, 'realtime') then
    return autotag.retry_later('window', v_now, v_now + autotag.clock_interval(1));
  end if;
  v_window := autotag.admit(p_workspace_id, 'realtime', 1, v_reserved, false);
  if v_window.admitted = 0 and v_window.retry_at is null then
    perform autotag.refuse(429, 'exceeds_limit',
      format('One image with %s reserves %s tokens, more than this workspace may use in a minute.',
        p_question ->> 'model', v_reserved),
      'Raise its limit (max_units in public.workspace_rate_limits), or choose a lower effort.');
  elsif v_window.admitted = 0 then
    return autotag.retry_later('window', v_window.at, v_window.retry_at);
  end if;
  update autotag.provider_limits
  set requests_left = v_provider.requests_left - 1, tokens_left = v_provider.tokens_left - v_reserved,
      day_left = v_provider.day_left - 1, refilled_at = v_now
  where id;
  return jsonb_build_object('admitted', true, 'reserved', v_reserved, 'reserved_at', v_window.at, 'cap', v_cap);
end $$;

-- admit_comparison()'s reply when the call has to wait until p_until.
create or replace function autotag.retry_later(p_reason text, p_now timestamptz, p_until timestamptz) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_build_object('admitted', false, 'reason', p_reason, 'wait', autotag.real_seconds(p_until - p_now));
end $$;

-- The question to ask after the provider refused a parameter of p_question: the model's row moves to its next form, unless
-- another call has done that already. Null: there is no other form. Locks: the model's row (skip locked).
create or replace function autotag.next_request_form(p_question jsonb, p_parameter text) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := p_question ->> 'model';
  v_effort text := p_question ->> 'reasoning_effort';
  v_question jsonb := autotag.question_for(v_model, v_effort);
begin
  if v_question <> p_question then
    return v_question;
  end if;
  -- Here the effort may be one that the comparison tries out; the refusal says nothing about the one in the model's row.
  if p_parameter = 'reasoning_effort' and v_effort is distinct from (autotag.find_model(v_model)).reasoning_effort then
    return null;
  end if;
  if autotag.downgrade_request_form(v_model, p_parameter) then
    v_question := autotag.question_for(v_model, v_effort);
  end if;
  return case when v_question <> p_question then v_question end;
end $$;

-- What to do next about an image: {next: done | again | failed | stop}. again: with `question` and `cap` where given, after
-- `wait` seconds; stop: no call can succeed, `message` says why. p_report as in settle_comparison().
create or replace function autotag.next_action(p_question jsonb, p_report jsonb, p_answer autotag.answer) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_error jsonb := p_answer.error;
  v_failures integer := coalesce((p_report ->> 'failures')::integer, 0) + 1;
  v_proven boolean := coalesce((p_report ->> 'proven')::boolean, false);
  v_question jsonb;
begin
  if v_error is null then
    return jsonb_build_object('next', 'done');
  end if;
  select * into v_settings from autotag.settings;
  -- A reply that is not JSON counts as the provider's lack of a format only until one answer of this comparison was usable.
  if v_error ->> 'parameter' is not null and (v_error ->> 'kind' <> 'image' or not v_proven) then
    v_question := autotag.next_request_form(p_question, v_error ->> 'parameter');
    if v_question is not null then
      return jsonb_build_object('next', 'again', 'question', v_question);
    end if;
  end if;
  if v_error ->> 'code' = 'answer_too_long' and p_answer.output_tokens < v_settings.max_output_tokens
     and not coalesce((p_report ->> 'cut_off')::boolean, false) then
    return jsonb_build_object('next', 'again', 'cap', autotag.next_cap(p_answer));
  end if;
  case v_error ->> 'kind'
    when 'rate_limit' then
      -- admit_comparison() returns the time, except for a host of images
      return jsonb_build_object('next', 'again',
        'wait', case when v_error ->> 'origin' = 'host' then (v_error ->> 'retry_after')::double precision end);
    when 'account' then
      return jsonb_build_object('next', 'stop', 'message', autotag.explain_account(v_error, p_question ->> 'model'));
    when 'transient' then
      if v_failures < v_settings.max_bad_answers then
        return jsonb_build_object('next', 'again', 'wait', greatest((v_error ->> 'retry_after')::double precision,
          autotag.real_seconds(v_settings.retry_delay * power(2, v_failures - 1))));
      elsif not v_proven then
        return jsonb_build_object('next', 'stop', 'message', v_error ->> 'message');
      end if;
    else
      null;
  end case;
  return jsonb_build_object('next', 'failed');
end $$;

-- Settles one call: next_action()'s reply, and `cost` (dollars; null: unknown, or the provider billed nothing). p_report:
-- {reserved, reserved_at, cap (from admit_comparison; absent: nothing was admitted), called, usage, error (as in settle()),
-- failures (transient failures of this image so far), cut_off (an answer about it was cut off before), proven (this
-- comparison has had a usable answer)}. p_observed: limits from the reply's headers (update_provider_limits). Corrects bucket and
-- window as settle() does, records the usage, and learns the token use of this question. An error of kind account stops
-- only this comparison: live calls meet it themselves.
-- Locks: window, usage, provider.
create or replace function autotag.settle_comparison(
  p_workspace_id autotag.workspace_id, p_question jsonb, p_report jsonb, p_observed jsonb default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer autotag.answer;
  v_used integer;              -- tokens of the prompt; null: the provider gave no figures
  v_free boolean;              -- the call took nothing from the provider's bucket
  v_brief autotag.briefs := autotag.compose_brief(p_workspace_id);
begin
  v_answer.workspace_id := p_workspace_id;
  v_answer.reserved_at := (p_report ->> 'reserved_at')::timestamptz;
  v_answer.reserved_tokens := (p_report ->> 'reserved')::integer;
  v_answer.output_tokens := (p_report ->> 'cap')::integer;
  v_answer.error := autotag.clean_error(p_report -> 'error');
  v_answer.usage := autotag.clean_usage(p_report -> 'usage');
  v_answer.called := p_report -> 'called' is distinct from 'false';
  v_used := (v_answer.usage -> 'input')::integer;
  v_free := not v_answer.called or coalesce(v_answer.error ->> 'code' = 'rate_limited', false);

  if v_answer.reserved_at is not null then
    perform autotag.correct_window(p_workspace_id, 'realtime', v_answer.reserved_at,
      case when v_answer.called then 0 else -1 end,
      case when v_used is not null then v_used + (v_answer.usage -> 'output')::integer - v_answer.reserved_tokens
        when v_answer.error ->> 'code' = 'provider_unreachable' then 0
        else -v_answer.reserved_tokens end);
  end if;
  if v_answer.called then
    perform autotag.add_usage(array[v_answer], false, p_question);
  end if;
  perform from autotag.provider_limits for update;
  if v_answer.reserved_tokens is not null then
    perform autotag.refund_provider(v_free::integer, case when v_free then v_answer.reserved_tokens
      else coalesce(v_answer.reserved_tokens - v_used - v_answer.output_tokens, 0) end);
  end if;
  if p_observed is not null then
    perform autotag.update_provider_limits(p_observed);
  end if;
  if v_used > 0 and (v_brief.id is null) = (v_brief.profile_id is null) then   -- nothing is learned for a brief that no upload has used
    -- A cut-off answer needs an unknown number of tokens: at least the cap of the next try.
    perform autotag.learn(array[v_used], array[case when v_answer.error ->> 'code' = 'answer_too_long'
      then coalesce(autotag.next_cap(v_answer), 1) else greatest((v_answer.usage -> 'output')::integer, 1) end],
      p_question, array[v_brief.id]);
  end if;
  return autotag.next_action(p_question, p_report, v_answer) || jsonb_build_object('cost', autotag.price_tokens(
    coalesce(v_answer.usage ->> 'model', p_question ->> 'model'), coalesce(v_answer.usage ->> 'tier', 'default'), v_used,
    least((v_answer.usage -> 'cached')::integer, v_used), (v_answer.usage -> 'cache_write')::integer,
    (v_answer.usage -> 'output')::integer));
end $$;

-- Profiles: what a workspace wants asked about its images, in versions.

-- The profile of a workspace: the newest version of its own profile, else of the one for all workspaces, else the default with version 0.
create or replace function autotag.profile_of(p_workspace_id autotag.workspace_id) returns autotag.profiles
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles;
begin
  select * into v_profile from autotag.profiles pr
  where pr.workspace_id = p_workspace_id order by pr.version desc limit 1;
  if not found then
    select * into v_profile from autotag.profiles pr where pr.workspace_id is null order by pr.version desc limit 1;
  end if;
  if not found then
    v_profile.version := 0;
    v_profile.instructions := '';
    v_profile.min_confidence := 0;
    v_profile.vocabulary_mode := 'open';
    v_profile.add_parents := false;
    v_profile.fields := '[]';
  end if;
  return v_profile;
end $$;

-- Refuses a version that no request could ask. Also refuses every change of an existing version, because the answers of a batch arrive
-- hours later and are read by the version that their images were asked.
create or replace function autotag.check_profile() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if tg_op = 'UPDATE' then
    perform autotag.refuse(400, 'profile_is_fixed', 'A version of a profile does not change.', 'Insert a new version (autotag profile set).');
  end if;
  if length(new.instructions) > 2000 then
    perform autotag.refuse_profile(format('The instructions have %s characters; at most 2,000 are possible.', length(new.instructions)));
  elsif new.instructions ~ E'[\\u0001-\\u0008\\u000b\\u000c\\u000e-\\u001f\\u007f]' then
    perform autotag.refuse_profile('The instructions contain a control character.');
  elsif autotag.tag_key(new.language) = '' or length(new.language) > 100 or not autotag.is_plain(new.language) then
    perform autotag.refuse_profile('The language has to be one line of at most 100 characters, for example German.');
  elsif new.tag_count not between 1 and 50 then
    perform autotag.refuse_profile(format('The number of tags has to be from 1 to 50, not %s.', new.tag_count));
  elsif new.min_confidence not between 0 and 1 then
    perform autotag.refuse_profile(format('The minimum confidence has to be from 0 to 1, not %s.', new.min_confidence));
  elsif new.vocabulary_mode not in ('open', 'prefer', 'only') then
    perform autotag.refuse_profile('The vocabulary mode has to be open, prefer or only.');
  end if;
  perform autotag.check_fields(new.fields);
  return new;
end $$;

create or replace trigger autotag_check before insert or update on autotag.profiles
  for each row execute function autotag.check_profile();

create or replace function autotag.refuse_profile(p_message text) returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.refuse(400, 'bad_profile', p_message, 'Change it and save the profile again; nothing was saved.');
end $$;

-- Refuses fields that are not [{name, kind, values, description}] or exceed what OpenAI allows in a strict schema.
create or replace function autotag.check_fields(p_fields jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_field jsonb;
  v_names text[] := array[]::text[];
  v_values integer := 0;       -- of all enums
  v_length bigint := 0;        -- characters of all names and values
  v_one record;
begin
  if p_fields is null or jsonb_typeof(p_fields) <> 'array' then
    perform autotag.refuse_profile('The fields have to be a list.');
  elsif jsonb_array_length(p_fields) > 20 then
    perform autotag.refuse_profile(format('%s fields are too many; at most 20 are possible.', jsonb_array_length(p_fields)));
  end if;
  for v_field in select f from jsonb_array_elements(p_fields) f loop
    v_one := autotag.check_field(v_field);
    if v_field ->> 'name' = any (v_names) then
      perform autotag.refuse_profile(format('Two fields have the name %s.', v_field ->> 'name'));
    end if;
    v_names := v_names || (v_field ->> 'name');
    v_values := v_values + v_one.value_count;
    v_length := v_length + length(v_field ->> 'name') + v_one.characters;
  end loop;
  if v_values > 1000 then
    perform autotag.refuse_profile(format('The fields have %s values together; OpenAI allows at most 1,000.', v_values));
  elsif v_length > 120000 then
    perform autotag.refuse_profile(format(
      'The names and values of the fields have %s characters together; OpenAI allows at most 120,000.', v_length));
  end if;
end $$;

-- Refuses one field that no schema could contain. Returns the number of its values, and of their characters.
create or replace function autotag.check_field(p_field jsonb, out value_count integer, out characters bigint)
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text := autotag.printable(case when jsonb_typeof(p_field) = 'object' then p_field ->> 'name' end, 70);
  v_kind text := p_field ->> 'kind';
  v_values jsonb := coalesce(nullif(p_field -> 'values', 'null'), '[]');
begin
  if jsonb_typeof(p_field -> 'name') is distinct from 'string' or p_field ->> 'name' !~ '^[a-zA-Z0-9_-]{1,64}$' then
    perform autotag.refuse_profile(format(
      'The name of a field has to be 1 to 64 of the characters a-z, A-Z, 0-9, _ and -, not %s.', coalesce(quote_literal(v_name), 'missing')));
  elsif p_field - '{name,kind,values,description}'::text[] <> '{}' then
    perform autotag.refuse_profile(format('The field %s has more than name, kind, values and description.', v_name));
  elsif coalesce(v_kind not in ('enum', 'boolean', 'integer', 'text'), true) then
    perform autotag.refuse_profile(format('The kind of the field %s has to be enum, boolean, integer or text.', v_name));
  elsif jsonb_typeof(coalesce(nullif(p_field -> 'description', 'null'), '""')) <> 'string' or length(p_field ->> 'description') > 500
      or not autotag.is_plain(p_field ->> 'description') then
    perform autotag.refuse_profile(format('The description of the field %s has to be one line of at most 500 characters.', v_name));
  elsif jsonb_typeof(v_values) <> 'array' or (v_kind = 'enum') = (v_values = '[]') then
    perform autotag.refuse_profile(format('The field %s has to have a list of values if it is an enum, and none otherwise.', v_name));
  elsif exists (select from jsonb_array_elements(v_values) e where jsonb_typeof(e) <> 'string' or (e #>> '{}') <> btrim(e #>> '{}')
      or length(e #>> '{}') not between 1 and 200 or not autotag.is_plain(e #>> '{}')) then
    perform autotag.refuse_profile(format('Each value of the field %s has to be one line of 1 to 200 characters.', v_name));
  elsif (select count(distinct lower(normalize(e, NFKC))) < count(*) from jsonb_array_elements_text(v_values) e) then
    perform autotag.refuse_profile(format('The field %s has a value twice.', v_name));
  end if;
  select count(*), coalesce(sum(length(e)), 0) into value_count, characters from jsonb_array_elements_text(v_values) e;
  if value_count > 250 and characters > 15000 then
    perform autotag.refuse_profile(format(
      'The values of the field %s have %s characters; OpenAI allows at most 15,000 for more than 250 values.', v_name, characters));
  end if;
end $$;

-- The words of a vocabulary: the form in which they are compared, and which words are refused.

-- Matches punctuation that separates words: Unicode's, ASCII's except # % . @ and the apostrophe, and the minus sign. Planning replaces
-- the call by its value.
create or replace function autotag.punctuation() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select E'[]!"&()*,/:;?[\\\\_{}`~\\u00a1\\u00a7\\u00ab\\u00b6-\\u00b7\\u00bb\\u00bf\\u055a-\\u055f\\u0589-\\u058a\\u05be\\u05c0\\u05c3\\u05c6\\u05f3-\\u05f4\\u0609-\\u060a\\u060c-\\u060d\\u061b\\u061d-\\u061f\\u066a-\\u066d\\u06d4\\u0700-\\u070d\\u07f7-\\u07f9\\u0830-\\u083e\\u085e\\u0964-\\u0965\\u0970\\u09fd\\u0a76\\u0af0\\u0c77\\u0c84\\u0df4\\u0e4f\\u0e5a-\\u0e5b\\u0f04-\\u0f0b\\u0f0d-\\u0f12\\u0f14\\u0f3a-\\u0f3d\\u0f85\\u0fd0-\\u0fd4\\u0fd9-\\u0fda\\u104a-\\u104f\\u10fb\\u1360-\\u1368\\u1400\\u166e\\u169b-\\u169c\\u16eb-\\u16ed\\u1735-\\u1736\\u17d4-\\u17d6\\u17d8-\\u17da\\u1800-\\u180a\\u1944-\\u1945\\u1a1e-\\u1a1f\\u1aa0-\\u1aa6\\u1aa8-\\u1aad\\u1b5a-\\u1b60\\u1b7d-\\u1b7e\\u1bfc-\\u1bff\\u1c3b-\\u1c3f\\u1c7e-\\u1c7f\\u1cc0-\\u1cc7\\u1cd3\\u2010\\u2012-\\u2016\\u2018-\\u2023\\u2027\\u2030-\\u2032\\u2035\\u2038-\\u203b\\u203d\\u203f-\\u2043\\u2045-\\u2046\\u204a-\\u2051\\u2053-\\u2056\\u2058-\\u205e\\u2308-\\u230b\\u2768-\\u2775\\u27c5-\\u27c6\\u27e6-\\u27ef\\u2983-\\u2998\\u29d8-\\u29db\\u29fc-\\u29fd\\u2cf9-\\u2cfc\\u2cfe-\\u2cff\\u2d70\\u2e00-\\u2e2e\\u2e30-\\u2e4f\\u2e52-\\u2e5d\\u3001-\\u3003\\u3008-\\u3011\\u3014-\\u301f\\u3030\\u303d\\u30a0\\u30fb\\ua4fe-\\ua4ff\\ua60d-\\ua60f\\ua673\\ua67e\\ua6f2-\\ua6f7\\ua874-\\ua877\\ua8ce-\\ua8cf\\ua8f8-\\ua8fa\\ua8fc\\ua92e-\\ua92f\\ua95f\\ua9c1-\\ua9cd\\ua9de-\\ua9df\\uaa5c-\\uaa5f\\uaade-\\uaadf\\uaaf0-\\uaaf1\\uabeb\\ufd3e-\\ufd3f\\ufe45-\\ufe46\\u2212-]'
$$;

-- The form in which tags are compared: "T-Shirts!" and "t shirts" are one tag, but "c#", ".net" and "100%" keep their signs. "": there is
-- nothing to compare. Characters that nobody sees do not count, and neither does the style of an emoji. The worker changes the form of
-- a tag (autotag/tags.py), but never its key.
create or replace function autotag.tag_key(p_tag text) returns text
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_key text := p_tag;
begin
  if v_key ~ '^[a-z0-9]+( [a-z0-9]+)*$' then   -- nearly every tag of a model is in this form already
    return v_key;
  end if;
  v_key := lower(v_key);
  if v_key !~ E'^[a-z0-9\\u00df-\\u00f6\\u00f8-\\u00ff]+( [a-z0-9\\u00df-\\u00f6\\u00f8-\\u00ff]+)*$' then   -- nearly every tag of a person, except for capitals
    v_key := regexp_replace(p_tag, autotag.blanks(), ' ', 'g');
    v_key := regexp_replace(v_key, autotag.invisible() || E'|[\\u180b-\\u180d\\u180f\\u200c\\u200d\\ufe00-\\ufe0f\\U000e0100-\\U000e01ef]', '', 'g');
    -- the lower case of İ has a second dot, and a final sigma is a sigma
    v_key := normalize(replace(lower(replace(normalize(v_key, NFKC), 'İ', 'i')), 'ς', 'σ'), NFKC);
    -- # and % belong to the word before them, a full stop and @ to the word after them
    v_key := regexp_replace(v_key, E'(?<![[:alnum:]])[#%]|[.@](?![[:alnum:]])|(?<=\\.)\\.', ' ', 'g');
    v_key := regexp_replace(v_key, '[''’‘ʼ]', '', 'g');
    v_key := regexp_replace(v_key, autotag.punctuation(), ' ', 'g');
    v_key := btrim(regexp_replace(v_key, ' +', ' ', 'g'));
  end if;
  return v_key;
end $$;

-- The trigrams of a key, word by word as in pg_trgm.
create or replace function autotag.key_grams(p_key text) returns text[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select distinct substr('  ' || w || ' ', i, 3)
    from unnest(string_to_array(p_key, ' ')) w cross join lateral generate_series(1, length(w) + 1) i);
end $$;

create or replace function autotag.refuse_vocabulary(
  p_message text, p_code text default 'bad_vocabulary', p_detail jsonb default '{}'
) returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.refuse(400, p_code, p_message, 'Correct it and try again; nothing was saved.', p_detail);
end $$;

-- Returns a tag, alias or parent in the form that is stored, or refuses it. p_what: `tag`, `alias` or `parent`. p_entry: the place of
-- its entry in a list.
create or replace function autotag.clean_word(p_word text, p_what text, p_entry bigint default null) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_word text := case when length(p_word) <= 1000 then autotag.visible_text(p_word) else p_word end;
  v_detail jsonb := case when p_entry is null then '{}' else jsonb_build_object('entry', p_entry) end;
begin
  if length(v_word) > 50 then
    perform autotag.refuse_vocabulary(format('The %s “%s” has more than 50 characters.', p_what, autotag.printable(v_word, 51)), 'bad_vocabulary', v_detail);
  elsif autotag.tag_key(v_word) = '' then
    perform autotag.refuse_vocabulary(format('The %s “%s” has no letter and no digit.', p_what, v_word), 'bad_vocabulary', v_detail);
  end if;
  return v_word;
end $$;

-- Cleans an entry, or refuses it.
create or replace function autotag.clean_vocabulary() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if new.tag is null then
    perform autotag.refuse_vocabulary('An entry has no tag.');
  elsif cardinality(new.aliases) > 100 then
    perform autotag.refuse_vocabulary(format('The tag “%s” has %s aliases; at most 100 are possible.', new.tag, cardinality(new.aliases)));
  end if;
  new.tag := autotag.clean_word(new.tag, 'tag');
  new.key := autotag.tag_key(new.tag);
  new.aliases := array(
    select (array_agg(a.word order by a.i))[1] from (
      select autotag.clean_word(u.word, 'alias') as word, u.i from unnest(new.aliases) with ordinality u (word, i)
      where autotag.visible_text(u.word) <> '') a
    where autotag.tag_key(a.word) <> new.key group by autotag.tag_key(a.word) order by min(a.i));
  new.description := nullif(autotag.visible_text(left(new.description, 5000)), '');
  if length(new.description) > 500 then
    perform autotag.refuse_vocabulary(format('The description of “%s” has more than 500 characters.', new.tag));
  end if;
  new.parent := case when autotag.visible_text(new.parent) <> '' then autotag.clean_word(new.parent, 'parent') end;
  new.parent_key := autotag.tag_key(new.parent);
  return new;
end $$;

create or replace trigger autotag_clean before insert or update of tag, key, aliases, description, parent, parent_key on autotag.vocabulary
  for each row execute function autotag.clean_vocabulary();

-- Records the names of new entries. Refuses a name that another tag has already, and an invalid chain of parents (check_parents).
create or replace function autotag.keep_names() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.add_names(array(select n.id from new_rows n));
  return null;
end $$;

-- The same for entries that have changed.
create or replace function autotag.keep_changed_names() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_changed bigint[] := array(
    select n.id from new_rows n left join old_rows o on o.id = n.id
    where (n.workspace_id, n.tag, n.aliases, n.parent_key) is distinct from (o.workspace_id, o.tag, o.aliases, o.parent_key));
begin
  delete from autotag.vocabulary_names vn where vn.vocabulary_id = any (v_changed);
  perform autotag.add_names(v_changed);
  return null;
end $$;

create or replace trigger autotag_names after insert on autotag.vocabulary
  referencing new table as new_rows for each statement execute function autotag.keep_names();
create or replace trigger autotag_names_changed after update on autotag.vocabulary
  referencing old table as old_rows new table as new_rows for each statement execute function autotag.keep_changed_names();

-- Adds the names of these entries, and checks their chains of parents. Refuses what keep_names() refuses.
create or replace function autotag.add_names(p_entries bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_clash record;
begin
  if p_entries = '{}' then
    return;
  end if;
  with named as materialized (
    select v.id, v.workspace_id, autotag.tag_key(u.name) as key
    from autotag.vocabulary v cross join lateral unnest(v.tag || v.aliases) u (name) where v.id = any (p_entries)
  ), added as (
    insert into autotag.vocabulary_names (vocabulary_id, workspace_id, key)
    select n.id, n.workspace_id, n.key from named n order by n.id, n.key
    on conflict (workspace_id, key) do nothing returning vocabulary_id, key
  )
  select n.id, n.workspace_id, n.key into v_clash
  from named n left join added a on a.vocabulary_id = n.id and a.key = n.key where a.key is null order by n.id limit 1;
  if found then
    perform autotag.refuse_vocabulary(format('“%s” is a name of two tags: %s.', v_clash.key, (
      select autotag.name_some(array_agg(format('“%s”', v.tag) order by v.key)) from autotag.vocabulary v
      where v.id = v_clash.id or v.id = (
        select vn.vocabulary_id from autotag.vocabulary_names vn
        where vn.workspace_id is not distinct from v_clash.workspace_id and vn.key = v_clash.key))), 'two_tags',
      jsonb_build_object('name', v_clash.key));
  end if;
  perform autotag.check_parents(p_entries);
end $$;

-- Refuses an entry whose chain of parents contains the entry itself or more than ten entries. (A chain of general entries and entries of
-- a workspace can still be a circle, so matching follows at most ten parents.)
create or replace function autotag.check_parents(p_entries bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_workspace autotag.workspace_id;
  v_ids bigint[];
  v_deep bigint;
begin
  for v_workspace, v_ids in
    select v.workspace_id, array_agg(v.id) from autotag.vocabulary v
    where v.id = any (p_entries) and v.parent_key is not null group by v.workspace_id
  loop
    select a.id into v_deep from unnest(autotag.find_ancestors(v_workspace, v_ids, 11)) a
    where a.above = a.id or a.depth = 11 order by a.id limit 1;
    if found then
      perform autotag.refuse_vocabulary(format(
        'The tag “%s” is above itself, or more than ten tags are above it.', (select v.tag from autotag.vocabulary v where v.id = v_deep)), 'parent_cycle',
        jsonb_build_object('name', (select v.key from autotag.vocabulary v where v.id = v_deep)));
    end if;
  end loop;
end $$;

-- Matches a model's tags with the vocabulary when they are stored. The vocabulary of that moment decides, whatever the model answered
-- and however long ago. So with the mode `only`, no other tag reaches a row of the host.

-- The results of images of one workspace as they are stored. write_outcomes(), the only caller of store_tags(), calls it.
create or replace function autotag.match_results(p_workspace_id autotag.workspace_id, p_results jsonb[]) returns jsonb[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles := autotag.profile_of(p_workspace_id);
begin
  if v_profile.vocabulary_mode = 'open' then
    return case when autotag.has_vocabulary(p_workspace_id) then autotag.name_tags(p_workspace_id, p_results) else p_results end;
  end if;
  return autotag.match_tags(p_workspace_id, p_results, v_profile.vocabulary_mode, v_profile.add_parents);
end $$;

-- Replaces the tags of each result by the vocabulary's tags. p_mode: `prefer` keeps tags that are not in the vocabulary; every other mode
-- drops them. p_parents: adds the parents of each tag, with the tag's confidence. If several tags become the same tag, it keeps the
-- highest confidence. A result has at most 50 tags: the most confident first, and tags of equal confidence in the model's order. Two keys
-- are added to each result:
--   names   {tag: [key, …]}: the keys under which a person may know a tag of the vocabulary: its own, those of its aliases, and that of
--           the model's word. merge_tags() compares them with the tags of a row.
--   above   {tag: [tag, …]}: for a tag that was added as a parent, the tags below it. A parent that the model gave itself has no entry
--           (answered_tags).
create or replace function autotag.match_tags(
  p_workspace_id autotag.workspace_id, p_results jsonb[], p_mode text, p_parents boolean
) returns jsonb[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set jit = off
as $$
declare
  v_known autotag.known_tag[] := autotag.know_tags(p_workspace_id, array(
    select distinct t.tag from unnest(p_results) r cross join lateral jsonb_array_elements_text(r -> 'tags') t (tag)));
  v_above autotag.ancestor[] := array[]::autotag.ancestor[];
begin
  if p_parents then
    v_above := autotag.find_ancestors(p_workspace_id, array(select distinct k.id from unnest(v_known) k), 10);
  end if;
  return array(
    with given as materialized (
      select r.i, t.tag, k.id, (r.result -> 'confidence' -> t.tag)::numeric as sure, t.place
      from unnest(p_results) with ordinality r (result, i)
      cross join lateral jsonb_array_elements_text(r.result -> 'tags') with ordinality t (tag, place)
      left join unnest(v_known) k on k.given = t.tag
    ), words as materialized (
      select v.id, v.tag from autotag.vocabulary v
      where v.id = any (array(select k.id from unnest(v_known) k union select a.above from unnest(v_above) a))
    ), names as materialized (
      select w.tag, jsonb_agg(n.key) as keys from words w join (
        select f.id, f.key from autotag.names_of(p_workspace_id, array(select x.id from words x)) f
        union
        select k.id, k.key from unnest(v_known, autotag.tag_keys(array(select x.given from unnest(v_known) x))) k (given, id, key)) n on n.id = w.id
      group by w.tag
    ), chosen as (
      select g.i, coalesce(w.tag, g.tag) as tag, g.sure, g.place, null as below from given g left join words w on w.id = g.id
      where w.id is not null or p_mode = 'prefer'
      union all
      select g.i, w.tag, g.sure, 1000 * a.depth + g.place, b.tag
      from given g join unnest(v_above) a on a.id = g.id join words w on w.id = a.above join words b on b.id = g.id
    ), merged as (
      select c.i, c.tag, max(c.sure) as sure, case when bool_and(c.below is not null) then jsonb_agg(c.below) end as below,
        row_number() over (partition by c.i order by max(c.sure) desc nulls last, min(c.place)) as place
      from chosen c group by c.i, c.tag
    ), matched as (
      select m.i, jsonb_agg(m.tag order by m.place) as tags, jsonb_object_agg(m.tag, m.sure) filter (where m.sure is not null) as sure,
        jsonb_object_agg(m.tag, n.keys) filter (where n.keys is not null) as names,
        jsonb_object_agg(m.tag, m.below) filter (where m.below is not null) as above
      from merged m left join names n on n.tag = m.tag where m.place <= 50 group by m.i
    )
    select r.result || jsonb_build_object('tags', coalesce(m.tags, '[]'), 'confidence', coalesce(m.sure, '{}'),
      'names', coalesce(m.names, '{}')) || case when m.above is null then '{}' else jsonb_build_object('above', m.above) end
    from unnest(p_results) with ordinality r (result, i) left join matched m on m.i = r.i order by r.i);
end $$;

-- Adds `names` to results, as match_tags() does, for the mode `open`: their tags stay as they are.
create or replace function autotag.name_tags(p_workspace_id autotag.workspace_id, p_results jsonb[]) returns jsonb[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set jit = off
as $$
declare
  v_known autotag.known_tag[] := autotag.know_tags(p_workspace_id, array(
    select distinct t.tag from unnest(p_results) r cross join lateral jsonb_array_elements_text(r -> 'tags') t (tag)));
begin
  if v_known = '{}' then
    return p_results;
  end if;
  return array(
    with names as materialized (
      select k.given, jsonb_agg(n.key) as keys
      from unnest(v_known, autotag.tag_keys(array(select x.given from unnest(v_known) x))) k (given, id, key) cross join lateral (
        select f.key from autotag.names_of(p_workspace_id, array[k.id]) f union select k.key) n
      group by k.given
    )
    select r.result || jsonb_build_object('names', coalesce((
      select jsonb_object_agg(n.given, n.keys) from names n where r.result -> 'tags' ? n.given), '{}'))
    from unnest(p_results) with ordinality r (result, i) order by r.i);
end $$;

-- The keys of all names that these entries have for a workspace. A name of a general entry does not count if an entry of the workspace
-- has it.
create or replace function autotag.names_of(p_workspace_id autotag.workspace_id, p_entries bigint[]) returns table (id bigint, key text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
  return query
    select n.vocabulary_id, n.key from unnest(p_entries) e cross join lateral (
      select vn.vocabulary_id, vn.key, vn.workspace_id from autotag.vocabulary_names vn where vn.vocabulary_id = e) n
    where n.workspace_id is not null or not exists (
      select from autotag.vocabulary_names own where own.workspace_id = p_workspace_id and own.key = n.key);
end $$;

-- The tags among these that the vocabulary knows: by their key, else because they are a tag with its description, else because exactly
-- one name is nearly the same.
create or replace function autotag.know_tags(p_workspace_id autotag.workspace_id, p_tags text[]) returns autotag.known_tag[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_keys text[] := array(select autotag.tag_key(t) from unnest(p_tags) with ordinality u (t, i) order by i);
  v_names text[];              -- keys that are found …
  v_ids bigint[];              -- … and their entries
begin
  select coalesce(array_agg(f.key), '{}'), coalesce(array_agg(f.id), '{}') into v_names, v_ids
  from autotag.find_names(p_workspace_id, array(select distinct k from unnest(v_keys) k where k <> '')) f;
  select v_names || coalesce(array_agg(d.key), '{}'), v_ids || coalesce(array_agg(d.id), '{}') into v_names, v_ids
  from autotag.find_described(p_workspace_id, array(
    select t.tag from unnest(p_tags, v_keys) t (tag, key) where t.tag ~ '[:(]' and t.key not in (select unnest(v_names)))) d;
  select v_names || coalesce(array_agg(s.key), '{}'), v_ids || coalesce(array_agg(s.id), '{}') into v_names, v_ids
  from autotag.find_similar(p_workspace_id, array(
    select distinct k from unnest(v_keys) k where k <> '' and k not in (select unnest(v_names)))) s;
  return array(
    select row(t.tag, n.id)::autotag.known_tag
    from unnest(p_tags, v_keys) t (tag, key) join unnest(v_names, v_ids) n (key, id) on n.key = t.key);
end $$;

-- The entries that have these names for a workspace: its own, else general ones, unless one of its own has the general entry's tag. (The
-- plan is kept, as in read_reports(), because planning would take longer than the search. The join is lateral, because the planner does
-- not know the number of keys.)
create or replace function autotag.find_names(p_workspace_id autotag.workspace_id, p_keys text[]) returns table (key text, id bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
  return query
    select k.key, f.id from unnest(p_keys) k (key)
    cross join lateral (
      select x.id from (
        select vn.vocabulary_id as id, 1 as rank from autotag.vocabulary_names vn where vn.workspace_id = p_workspace_id and vn.key = k.key
        union all
        select vn.vocabulary_id, 2 from autotag.vocabulary_names vn join autotag.vocabulary v on v.id = vn.vocabulary_id
        where vn.workspace_id is null and vn.key = k.key and not exists (
          select from autotag.vocabulary_names own where own.workspace_id = p_workspace_id and own.key = v.key)) x
      order by x.rank limit 1) f;
end $$;

-- The tags among these that are a name of an entry followed by (the beginning of) its description. The prompt has descriptions, and a
-- model may copy them: "barn: a building for hay", "barn (a building for hay)". Other words after a name can mean something else:
-- "jaguar (car)".
create or replace function autotag.find_described(p_workspace_id autotag.workspace_id, p_tags text[]) returns table (key text, id bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    with copied as materialized (
      select distinct autotag.tag_key(t) as key, autotag.tag_key(m[1]) as name, autotag.tag_key(m[2]) as said
      from unnest(p_tags) t cross join lateral regexp_match(t, '^([^:(]+)[:(](.+)$') m where m is not null
    )
    select distinct on (c.key) c.key, v.id
    from copied c
    join autotag.find_names(p_workspace_id, array(select distinct x.name from copied x)) f on f.key = c.name
    join autotag.vocabulary v on v.id = f.id
    where c.said <> '' and starts_with(autotag.tag_key(v.description), c.said) order by c.key;
end $$;

-- For each of these keys, which no entry has, the entry with a name that is nearly the same. So it finds plurals and misspellings of
-- longer words. Two keys are nearly the same if they share 70 % of their trigrams, counted as pg_trgm does (which need not be
-- installed); if no other entry is within 10 % of that; and if their first three letters, their numbers and their words of less than
-- four letters are equal (is_spelling).
-- A key is compared only with the 20 names before and after it in the alphabet. So it takes the same time in a vocabulary of any size,
-- even if all names begin alike.
create or replace function autotag.find_similar(p_workspace_id autotag.workspace_id, p_keys text[]) returns table (key text, id bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  c_like constant numeric := 0.7;
  c_apart constant numeric := 0.1;
begin
  return query
    with asked as materialized (
      select k.key collate "C" as key, left(k.key, 3) collate "C" as first, (left(k.key, 3) || E'\U0010FFFF') collate "C" as last,
        autotag.key_grams(k.key) as grams
      from unnest(p_keys) k (key) where length(k.key) >= 5
    ), near as materialized (
      select a.key, a.grams, n.vocabulary_id as id, n.key as name, n.general, autotag.key_grams(n.key) as others
      from asked a cross join lateral (
        (select vn.vocabulary_id, vn.key, false as general from autotag.vocabulary_names vn
         where vn.workspace_id = p_workspace_id and vn.key > a.key and vn.key < a.last order by vn.key limit 20)
        union all
        (select vn.vocabulary_id, vn.key, false from autotag.vocabulary_names vn
         where vn.workspace_id = p_workspace_id and vn.key < a.key and vn.key >= a.first order by vn.key desc limit 20)
        union all
        (select vn.vocabulary_id, vn.key, true from autotag.vocabulary_names vn
         where vn.workspace_id is null and vn.key > a.key and vn.key < a.last order by vn.key limit 20)
        union all
        (select vn.vocabulary_id, vn.key, true from autotag.vocabulary_names vn
         where vn.workspace_id is null and vn.key < a.key and vn.key >= a.first order by vn.key desc limit 20)) n
      where length(n.key) between c_like * length(a.key) - 1 and length(a.key) / c_like + 2
        and length(n.key) - length(replace(n.key, ' ', '')) = length(a.key) - length(replace(a.key, ' ', ''))
    ), compared as (
      select n.*, (select count(*) from unnest(n.grams) g where g = any (n.others))::numeric as shared from near n
    ), best as (
      select c.key, c.id, max(c.shared / (cardinality(c.grams) + cardinality(c.others) - c.shared)) as likeness from compared c
      where c.shared >= c_like * (cardinality(c.grams) + cardinality(c.others) - c.shared) and autotag.is_spelling(c.key, c.name)
        and not (c.general and exists (
          select from autotag.vocabulary v join autotag.vocabulary_names own on own.workspace_id = p_workspace_id and own.key in (v.key, c.name)
          where v.id = c.id))
      group by c.key, c.id
    ), ranked as (
      select b.key, b.id, b.likeness, lead(b.likeness) over w as next, row_number() over w as rank
      from best b window w as (partition by b.key order by b.likeness desc, b.id)
    )
    select r.key, r.id from ranked r where r.rank = 1 and coalesce(r.likeness - r.next >= c_apart, true);
end $$;

-- Whether two keys that look alike can be spellings of one tag: equal numbers, equal short words, and as many words.
create or replace function autotag.is_spelling(p_one text, p_other text) returns boolean
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return regexp_replace(p_one, E'\\D', '', 'g') = regexp_replace(p_other, E'\\D', '', 'g') and not exists (
    select from unnest(string_to_array(p_one, ' '), string_to_array(p_other, ' ')) w (one, other)
    where w.one is null or w.other is null or w.one <> w.other and least(length(w.one), length(w.other)) < 4);
end $$;

-- All entries above these in a workspace's vocabulary, up to p_depth. It ends at a parent that is not the name of an entry.
create or replace function autotag.find_ancestors(p_workspace_id autotag.workspace_id, p_entries bigint[], p_depth integer) returns autotag.ancestor[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_above autotag.ancestor[] := array[]::autotag.ancestor[];
  v_level autotag.ancestor[] := array(select row(e, e, 0)::autotag.ancestor from unnest(p_entries) e);
begin
  for v_depth in 1 .. p_depth loop
    v_level := array(
      with tops as materialized (
        select v.id, v.parent_key from autotag.vocabulary v
        where v.id = any (array(select distinct l.above from unnest(v_level) l)) and v.parent_key is not null
      ), parents as materialized (
        select f.key, f.id from autotag.find_names(p_workspace_id, array(select distinct t.parent_key from tops t)) f
      )
      select row(l.id, p.id, v_depth)::autotag.ancestor
      from unnest(v_level) l join tops t on t.id = l.above join parents p on p.key = t.parent_key);
    exit when v_level = '{}';
    v_above := v_above || v_level;
  end loop;
  return v_above;
end $$;

-- Reading and changing vocabularies: the prompt's list, the commands `autotag vocabulary`, and the calls for a page.

-- The vocabulary of a workspace for the prompt: at most 500 tags, as a JSON array of "tag" or ["tag", "description"], by key. A workspace's
-- own come before general ones, then those that most images have. It only changes with the vocabulary, because the provider's prompt
-- cache needs the same beginning in every call.
create or replace function autotag.vocabulary_for_prompt(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  return (
    select coalesce(jsonb_agg(case when p.description is null then to_jsonb(p.tag) else jsonb_build_array(p.tag, p.description) end order by p.key), '[]')
    from (
      select x.key, x.tag, case when length(x.description) > 80 then left(x.description, 79) || '…' else x.description end as description
      from (
        (select v.*, 1 as rank from autotag.vocabulary v where v.workspace_id = p_workspace_id order by v.uses desc, v.key limit 500)
        union all
        (select v.*, 2 from autotag.vocabulary v
         where v.workspace_id is null and not exists (
           select from autotag.vocabulary_names vn where vn.workspace_id = p_workspace_id and vn.key = v.key)
         order by v.uses desc, v.key limit 500)) x
      order by x.rank, x.uses desc, x.key limit 500) p);
end $$;

-- The entries of a workspace (null: the general ones), by key: [{tag, aliases, description, parent, uses}]. For `autotag vocabulary
-- export`.
create or replace function autotag.list_vocabulary(p_workspace_id autotag.workspace_id) returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select coalesce(jsonb_agg(jsonb_build_object('tag', v.tag, 'aliases', v.aliases, 'description', v.description, 'parent', v.parent,
    'uses', v.uses) order by v.key), '[]')
  from autotag.vocabulary v where v.workspace_id is not distinct from p_workspace_id
$$;

-- tagging_vocabulary: the vocabulary in force for a workspace, for its members: {mode, add_parents, may_edit, tags: [{tag, aliases,
-- description, parent, general}]}. general: an entry for all workspaces, which members cannot change.
create or replace function autotag.describe_vocabulary(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles;
begin
  perform autotag.check_member(p_workspace_id);
  v_profile := autotag.profile_of(p_workspace_id);
  return jsonb_build_object(
    'mode', v_profile.vocabulary_mode, 'add_parents', v_profile.add_parents,
    'may_edit', autotag.is_service() or autotag.is_editor(p_workspace_id),
    'tags', (
      select coalesce(jsonb_agg(jsonb_build_object('tag', v.tag, 'aliases', v.aliases, 'description', v.description,
        'parent', v.parent, 'general', v.workspace_id is null) order by v.key), '[]')
      from autotag.vocabulary v
      where v.workspace_id = p_workspace_id or v.workspace_id is null and not exists (
        select from autotag.vocabulary_names vn where vn.workspace_id = p_workspace_id and vn.key = v.key)));
end $$;

-- Changes the vocabulary of a workspace (null: the general one). Adds or changes p_entries ([{tag, aliases, description, parent, uses}];
-- absent keys stay as they are), and deletes the tags p_removed. p_replace: deletes all other entries, too. A parent that is not a name
-- of an entry becomes an entry. Entries with the same tag become one, unless they contradict each other. Returns {tags (in all), added,
-- changed, removed}. Locks: the workspace's vocabulary (advisory).
create or replace function autotag.edit_vocabulary(
  p_workspace_id autotag.workspace_id, p_entries jsonb, p_removed text[] default '{}', p_replace boolean default false
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_entries autotag.vocabulary_entry[];
  v_stays text[];              -- keys of entries that do not change …
  v_gone text[];               -- … and of those that are deleted or written anew
  v_tags integer;
  v_changed integer;
  v_written integer;
begin
  if p_workspace_id is not null or not autotag.is_service() then
    perform autotag.check_editor(p_workspace_id);   -- the general one is the service's
  end if;
  perform autotag.check_entries(p_entries);
  perform pg_advisory_xact_lock(hashtextextended('autotag.vocabulary ' || coalesce(p_workspace_id::text, ''), 0));
  v_entries := autotag.read_entries(p_workspace_id, p_entries, p_replace);
  v_stays := array(
    select v.key from unnest(v_entries) e join autotag.vocabulary v on v.workspace_id is not distinct from p_workspace_id and v.key = e.key
    where (v.tag, v.aliases, v.description, v.parent, v.uses) is not distinct from (e.tag, e.aliases, e.description, e.parent, e.uses));
  with gone as (
    delete from autotag.vocabulary v
    where v.workspace_id is not distinct from p_workspace_id and v.key <> all (v_stays)
      and (p_replace or v.key in (select e.key from unnest(v_entries) e union all select autotag.tag_key(r) from unnest(p_removed) r))
    returning v.key
  )
  select coalesce(array_agg(g.key), '{}') into v_gone from gone g;
  insert into autotag.vocabulary (workspace_id, tag, aliases, description, parent, uses)
  select p_workspace_id, e.tag, e.aliases, e.description, e.parent, e.uses from unnest(v_entries) e where e.key <> all (v_stays);
  get diagnostics v_written = row_count;
  select count(*) into v_tags from autotag.vocabulary v where v.workspace_id is not distinct from p_workspace_id;
  if v_tags > 50000 then
    perform autotag.refuse(413, 'vocabulary_too_large', format('%s tags are too many for one vocabulary.', v_tags),
      'A vocabulary has at most 50,000 tags; nothing was saved.', '{"max_tags": 50000}');
  end if;
  select count(*) into v_changed from unnest(v_entries) e where e.key = any (v_gone);
  return jsonb_build_object('tags', v_tags, 'added', v_written - v_changed, 'changed', v_changed, 'removed', cardinality(v_gone) - v_changed);
end $$;

-- Refuses anything but a list of entries. `entry` in the detail is the place of the wrong one.
create or replace function autotag.check_entries(p_entries jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_wrong record;
begin
  if p_entries is null or jsonb_typeof(p_entries) <> 'array' then
    perform autotag.refuse_vocabulary('The entries have to be a list.');
  elsif jsonb_array_length(p_entries) > 50000 or pg_column_size(p_entries) > 50000000 then
    perform autotag.refuse(413, 'vocabulary_too_large', 'This list is too long.', 'A vocabulary has at most 50,000 tags; nothing was saved.',
      '{"max_tags": 50000}');
  end if;
  select w.i, w.fault into v_wrong from (
    select u.i, case
      when jsonb_typeof(u.e) <> 'object' then 'is not an object'
      when jsonb_typeof(u.e -> 'tag') is distinct from 'string' then 'has no tag'
      when jsonb_typeof(u.e -> 'aliases') not in ('array', 'null') or jsonb_path_exists(u.e, 'strict $.aliases[*] ? (@.type() != "string")', '{}', true)
        then 'has aliases that are no list of texts'
      when jsonb_typeof(u.e -> 'description') not in ('string', 'null') then 'has a description that is no text'
      when jsonb_typeof(u.e -> 'parent') not in ('string', 'null') then 'has a parent that is no text'
      when u.e ? 'uses' and not coalesce(u.e ->> 'uses' ~ '^[0-9]{1,15}$', false) then 'has uses that are no number' end as fault
    from jsonb_array_elements(p_entries) with ordinality u (e, i)) w
  where w.fault is not null order by w.i limit 1;
  if found then
    perform autotag.refuse_vocabulary(format('Entry %s %s.', v_wrong.i, v_wrong.fault), 'bad_vocabulary',
      jsonb_build_object('entry', v_wrong.i));
  end if;
end $$;

-- The entries as they will be stored: cleaned, one for each tag, completed from the stored ones, and with new entries for parents.
create or replace function autotag.read_entries(p_workspace_id autotag.workspace_id, p_entries jsonb, p_replace boolean)
returns autotag.vocabulary_entry[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_entries autotag.vocabulary_entry[];
begin
  v_entries := array(
    with read as materialized (
      select u.i, u.e, c.tag, autotag.tag_key(c.tag) as key,
        case when autotag.visible_text(u.e ->> 'parent') <> '' then autotag.clean_word(u.e ->> 'parent', 'parent', u.i) end as parent
      from jsonb_array_elements(p_entries) with ordinality u (e, i)
      cross join lateral (select autotag.clean_word(u.e ->> 'tag', 'tag', u.i) as tag offset 0) c
    ), aliases as materialized (
      select a.key, array_agg(a.word order by a.place) as words from (
        select r.key, (array_agg(c.word order by r.i, x.place))[1] as word, min(r.i * 1000 + x.place) as place
        from read r
        cross join lateral jsonb_array_elements_text(coalesce(nullif(r.e -> 'aliases', 'null'), '[]')) with ordinality x (alias, place)
        cross join lateral (select autotag.clean_word(x.alias, 'alias', r.i) as word offset 0) c
        where autotag.visible_text(x.alias) <> '' and autotag.tag_key(c.word) <> r.key group by r.key, autotag.tag_key(c.word)) a
      group by a.key
    ), merged as materialized (
      select r.key, (array_agg(r.tag order by r.i))[1] as tag, max(r.i) as i, bool_or(r.e ? 'aliases') as has_aliases,
        bool_or(r.e ? 'description') as has_description, bool_or(r.e ? 'parent') as has_parent,
        array_agg(distinct d.text) filter (where d.text <> '') as descriptions,
        array_agg(distinct autotag.tag_key(r.parent)) filter (where r.parent is not null) as parents,
        min(r.parent) as parent, sum((r.e ->> 'uses')::bigint) as uses
      from read r cross join lateral (select autotag.visible_text(left(r.e ->> 'description', 5000)) as text offset 0) d
      group by r.key
    )
    select autotag.check_merged(row(m.key, m.tag,
        case when m.has_aliases or v.id is null or p_replace then coalesce(a.words, '{}') else v.aliases end,
        case when m.has_description or p_replace then m.descriptions[1] else v.description end,
        case when m.has_parent or p_replace then m.parent else v.parent end,
        coalesce(m.uses, v.uses, 0))::autotag.vocabulary_entry, m.descriptions, m.parents, m.i)
    from merged m left join aliases a on a.key = m.key
    left join autotag.vocabulary v on v.workspace_id is not distinct from p_workspace_id and v.key = m.key
    order by m.i);
  return v_entries || autotag.missing_parents(p_workspace_id, v_entries, p_replace);
end $$;

-- Returns an entry. Refuses one that was given several times with different descriptions or parents.
create or replace function autotag.check_merged(p_entry autotag.vocabulary_entry, p_descriptions text[], p_parents text[], p_place bigint)
returns autotag.vocabulary_entry
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
  if cardinality(p_descriptions) > 1 or cardinality(p_parents) > 1 then
    perform autotag.refuse_vocabulary(format('The tag “%s” is there twice, with different %s.', p_entry.tag,
      case when cardinality(p_parents) > 1 then 'parents' else 'descriptions' end), 'bad_vocabulary', jsonb_build_object('entry', p_place));
  end if;
  return p_entry;
end $$;

-- New entries for the parents that are not a name of any entry, neither of p_entries nor of those that stay.
create or replace function autotag.missing_parents(p_workspace_id autotag.workspace_id, p_entries autotag.vocabulary_entry[], p_replace boolean)
returns autotag.vocabulary_entry[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_parents text[];
  v_keys text[];
begin
  select array_agg(p.parent), array_agg(p.key) into v_parents, v_keys
  from (
    select autotag.tag_key(e.parent) as key, min(e.parent) as parent from unnest(p_entries) e where e.parent is not null group by 1) p
  where p.key not in (
    select e.key from unnest(p_entries) e
    union all
    select autotag.tag_key(a) from unnest(p_entries) e cross join lateral unnest(e.aliases) a);
  return array(
    select row(p.key, p.parent, '{}'::text[], null, null, coalesce(v.uses, 0))::autotag.vocabulary_entry
    from unnest(v_parents, v_keys) p (parent, key)
    left join autotag.vocabulary v on v.workspace_id is not distinct from p_workspace_id and v.key = p.key
    where not exists (
      -- when everything is replaced, only general entries stay
      select from autotag.find_names(case when not p_replace then p_workspace_id end, array[p.key])
      where not (p_replace and p_workspace_id is null))
    order by p.key);
end $$;

-- Records how many images have each tag ({tag: images}) at the entries of a workspace (null: the general ones), and adds the tags that
-- are no name yet and that at least p_min images have. Returns {tags (in all), added, counted, new: [{tag, uses}]}. Locks: as edit_vocabulary().
create or replace function autotag.count_uses(p_workspace_id autotag.workspace_id, p_counts jsonb, p_min bigint) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_counted integer;
  v_tags text[];
  v_uses bigint[];
  v_ids bigint[];              -- of the entry that has this name; null: none
  v_new jsonb;
  v_done jsonb;
begin
  select coalesce(array_agg(c.tag), '{}'), coalesce(array_agg(c.uses), '{}'), coalesce(array_agg(f.id), '{}') into v_tags, v_uses, v_ids
  from (
    -- the spelling that most images have
    select autotag.tag_key(c.tag) as key, (array_agg(c.tag order by c.uses desc, c.tag))[1] as tag, sum(c.uses)::bigint as uses
    from (select autotag.visible_text(t.key) as tag, t.value::bigint as uses from jsonb_each_text(p_counts) t where length(t.key) <= 50 offset 0) c
    where length(c.tag) between 1 and 50 group by 1) c
  left join lateral autotag.find_names(p_workspace_id, array[c.key]) f on true
  where c.key <> '';
  select coalesce(jsonb_agg(jsonb_build_object('tag', t.tag, 'uses', t.uses) order by t.uses desc, t.tag), '[]') into v_new
  from unnest(v_tags, v_uses, v_ids) t (tag, uses, id) where t.id is null and t.uses >= p_min;
  v_done := autotag.edit_vocabulary(p_workspace_id, v_new);
  update autotag.vocabulary v set uses = t.uses
  from (select x.id, sum(x.uses)::bigint as uses from unnest(v_uses, v_ids) x (uses, id) where x.id is not null group by x.id) t
  where v.id = t.id and v.workspace_id is not distinct from p_workspace_id and v.uses <> t.uses;
  get diagnostics v_counted = row_count;
  return v_done - '{changed,removed}'::text[] || jsonb_build_object('counted', v_counted, 'new', v_new);
end $$;

-- Saving a profile: `autotag profile set`, and set_tagging_profile for a person's page.

-- Saves a new version of a workspace's profile (null: of the one for all), and returns it. p_changes: what changes, by the names of the
-- columns (instructions, language, tag_count, min_confidence, vocabulary_mode, add_parents, fields); null: the default. The rest stays
-- as it is in profile_of(), so a workspace's first own version starts from the profile for all. Without a change there is no new version.
-- Locks: the workspace's profile (advisory).
create or replace function autotag.save_profile(p_workspace_id autotag.workspace_id, p_changes jsonb) returns autotag.profiles
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_old autotag.profiles;
  v_new autotag.profiles;
begin
  perform autotag.check_changes(p_changes);
  perform pg_advisory_xact_lock(hashtextextended('autotag.profile ' || coalesce(p_workspace_id::text, ''), 0));
  v_old := autotag.profile_of(p_workspace_id);
  v_new := jsonb_populate_record(v_old, jsonb_strip_nulls(p_changes));
  -- Nulls are removed from fields, too: a field without values or description is the same as one where they are null.
  v_new.fields := coalesce(jsonb_strip_nulls(p_changes -> 'fields'), v_old.fields);
  v_new.instructions := btrim(replace(v_new.instructions, E'\r\n', E'\n'), E' \n\t');
  if p_changes ? 'instructions' and v_new.instructions = '' or p_changes -> 'instructions' = 'null' then v_new.instructions := ''; end if;
  v_new.language := btrim(v_new.language);
  if p_changes -> 'language' = 'null' then v_new.language := null; end if;
  if p_changes -> 'tag_count' = 'null' then v_new.tag_count := null; end if;
  if p_changes -> 'min_confidence' = 'null' then v_new.min_confidence := 0; end if;
  if p_changes -> 'vocabulary_mode' = 'null' then v_new.vocabulary_mode := 'open'; end if;
  if p_changes -> 'add_parents' = 'null' then v_new.add_parents := false; end if;
  if p_changes -> 'fields' = 'null' then v_new.fields := '[]'; end if;
  if v_new = v_old then
    return v_old;
  end if;
  insert into autotag.profiles (workspace_id, instructions, language, tag_count, min_confidence, vocabulary_mode, add_parents,
    fields, created_at)
  values (p_workspace_id, v_new.instructions, v_new.language, v_new.tag_count, v_new.min_confidence,
    v_new.vocabulary_mode, v_new.add_parents, v_new.fields, autotag.now())
  returning * into v_new;
  return v_new;
end $$;

-- Refuses changes of a profile that are not an object of the right names and types. check_profile() checks the values.
create or replace function autotag.check_changes(p_changes jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_types jsonb := '{"instructions": "string", "language": "string", "tag_count": "number", "min_confidence": "number",
    "vocabulary_mode": "string", "add_parents": "boolean", "fields": "array"}'::jsonb;
  v_odd text;
begin
  if p_changes is null or jsonb_typeof(p_changes) <> 'object' then
    perform autotag.refuse_profile('A profile has to be an object.');
  elsif octet_length(p_changes::text) > 1000000 then
    perform autotag.refuse_profile('A profile may have at most 1,000,000 bytes.');
  end if;
  select autotag.printable(c.key, 50) into v_odd from jsonb_object_keys(p_changes) c (key) where not v_types ? c.key limit 1;
  if v_odd is not null then
    perform autotag.refuse_profile(format('A profile has no %s; it has %s.', v_odd, (
      select string_agg(t.key, ', ' order by t.key) from jsonb_object_keys(v_types) t (key))));
  end if;
  select format('%s has to be of the type %s', c.key, v_types ->> c.key) into v_odd
  from jsonb_each(p_changes) c where jsonb_typeof(c.value) not in (v_types ->> c.key, 'null') limit 1;
  if v_odd is not null then
    perform autotag.refuse_profile(v_odd || '.');
  elsif jsonb_typeof(p_changes -> 'tag_count') = 'number' and not coalesce(p_changes ->> 'tag_count' ~ E'^\\d{1,4}$', false) then
    perform autotag.refuse_profile('The number of tags has to be a whole number from 1 to 50.');
  elsif jsonb_typeof(p_changes -> 'min_confidence') = 'number' and not coalesce(p_changes -> 'min_confidence' between '0' and '1', false) then
    perform autotag.refuse_profile('The minimum confidence has to be from 0 to 1.');
  end if;
end $$;

-- A profile for programs. own: whether it is the workspace's own, and not the one for all.
create or replace function autotag.describe_profile(p_profile autotag.profiles) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return to_jsonb(p_profile) - '{id,workspace_id}'::text[] || jsonb_build_object('own', p_profile.workspace_id is not null);
end $$;

-- All versions that a workspace's images may have been tagged with, the newest first, at most 100; null: those of the profile for all.
create or replace function autotag.profile_history(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_agg(autotag.describe_profile(p) order by p.version desc), '[]')
    from (
      select pr.* from autotag.profiles pr
      where pr.workspace_id is null and p_workspace_id is null or pr.workspace_id = p_workspace_id
      order by pr.version desc limit 100) p);
end $$;

-- tagging_profile: the profile in force for a workspace, for its members.
create or replace function autotag.read_profile(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_member(p_workspace_id);
  return autotag.describe_profile(autotag.profile_of(p_workspace_id));
end $$;

-- set_tagging_profile: saves changes of a workspace's profile (save_profile) for its editors, and returns the profile that is in force
-- from now on. Images that were tagged before stay as they are, until `autotag enqueue --outdated`.
create or replace function autotag.edit_profile(p_workspace_id autotag.workspace_id, p_changes jsonb) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_editor(p_workspace_id);
  return autotag.describe_profile(autotag.save_profile(p_workspace_id, p_changes));
end $$;

-- Whether a workspace (null: one without a vocabulary of its own) has tags to use: its own, or general ones.
create or replace function autotag.has_vocabulary(p_workspace_id autotag.workspace_id) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.vocabulary v where v.workspace_id is null)
    or exists (select from autotag.vocabulary v where v.workspace_id = p_workspace_id);
end $$;

-- For operators: the profile and has_vocabulary, without a check of the caller. Null: the profile for all workspaces.
create or replace function autotag.show_profile(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.describe_profile(autotag.profile_of(p_workspace_id))
    || jsonb_build_object('has_vocabulary', autotag.has_vocabulary(p_workspace_id));
end $$;

create or replace function autotag.set_profile(p_workspace_id autotag.workspace_id, p_changes jsonb) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.describe_profile(autotag.save_profile(p_workspace_id, p_changes))
    || jsonb_build_object('has_vocabulary', autotag.has_vocabulary(p_workspace_id));
end $$;

-- Whether a workspace is known here: it has an image, an upload, usage, or a setting of its own. autotag knows no table of
-- workspaces, so a mistyped id would look like an empty workspace.
create or replace function autotag.knows_workspace(p_workspace_id autotag.workspace_id) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.list_assets(p_workspace_id, false, null, 1) <> '{}'
    or exists (select from autotag.workspaces ws where ws.workspace_id = p_workspace_id)
    or exists (select from autotag.jobs j where j.workspace_id = p_workspace_id)
    or exists (select from autotag.profiles pr where pr.workspace_id = p_workspace_id)
    or exists (select from autotag.vocabulary v where v.workspace_id = p_workspace_id)
    or exists (select from autotag.usage us where us.workspace_id = p_workspace_id)
    or exists (select from autotag.quotas qu where qu.workspace_id = p_workspace_id)
    or exists (select from autotag.windows wn where wn.workspace_id = p_workspace_id);
end $$;

-- Briefs: what the images of an upload are asked beside the question, what that costs in tokens, and which part of the answers is kept.

-- The brief of a workspace at this moment. profile_id is null: the workspace has no profile, so its images are asked the question
-- alone. id is null: no upload has been asked this yet. Reads only.
--
-- The first guess of its tokens counts three bytes per token. English has more than four, but lists of words and other scripts have
-- fewer. After ten answers the measured use replaces the guess (learn). A field takes twenty tokens in the schema and ten in the answer,
-- beside its texts; a short text takes 60.
create or replace function autotag.compose_brief(p_workspace_id autotag.workspace_id) returns autotag.briefs
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles := autotag.profile_of(p_workspace_id);
  v_brief autotag.briefs;
  v_vocabulary jsonb;
  v_provider autotag.provider_limits;
begin
  if v_profile.id is null then
    return v_brief;
  end if;
  select * into v_provider from autotag.provider_limits;
  if v_provider.question <> autotag.describe_question() then   -- the next claim makes it the present one
    v_provider.question := autotag.describe_question();
    v_provider.question_version := -1;
  end if;
  v_vocabulary := case when v_profile.vocabulary_mode = 'open' then '[]' else coalesce(autotag.vocabulary_for_prompt(p_workspace_id), '[]') end;
  select * into v_brief from autotag.briefs br
  where br.profile_id = v_profile.id and md5(br.vocabulary::text) = md5(v_vocabulary::text) order by br.id limit 1;
  if found then
    return case when v_brief.question_version = v_provider.question_version then v_brief
      else autotag.estimate_brief(v_brief, v_provider) end;
  end if;
  v_brief.profile_id := v_profile.id;
  v_brief.vocabulary := v_vocabulary;
  v_brief.tag_count := v_profile.tag_count;
  v_brief.extra_prompt := 120 + 20 * jsonb_array_length(v_profile.fields)
    + ceil(octet_length(concat(v_profile.instructions, v_profile.language, nullif(v_vocabulary, '[]'), nullif(v_profile.fields, '[]'))) / 3.0)::integer;
  v_brief.extra_output := coalesce((
    select sum(10 + ceil(octet_length(f ->> 'name') / 3.0) + case f ->> 'kind' when 'text' then 60 when 'enum' then (
      select ceil(max(octet_length(e)) / 3.0) from jsonb_array_elements_text(f -> 'values') e) else 0 end)
    from jsonb_array_elements(v_profile.fields) f), 0);
  return autotag.estimate_brief(v_brief, v_provider);
end $$;

-- Returns the brief with new estimates for the question in p_provider: the tokens that one image reserves, and those that it uses on
-- average.
create or replace function autotag.estimate_brief(p_brief autotag.briefs, p_provider autotag.provider_limits) returns autotag.briefs
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_estimate autotag.provider_limits := autotag.estimate_tokens(p_provider, p_brief);
begin
  p_brief.question_version := p_provider.question_version;
  p_brief.tokens_per_image := v_estimate.tokens_per_image;
  p_brief.output_tokens := v_estimate.output_tokens;
  p_brief.prompt_mean := v_estimate.prompt_mean;
  p_brief.output_mean := v_estimate.output_mean;
  return p_brief;
end $$;

-- The same, and stores it. The caller holds the provider row.
create or replace function autotag.refresh_brief(p_brief autotag.briefs, p_provider autotag.provider_limits) returns autotag.briefs
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  p_brief := autotag.estimate_brief(p_brief, p_provider);
  update autotag.briefs br
  set question_version = p_brief.question_version, tokens_per_image = p_brief.tokens_per_image, output_tokens = p_brief.output_tokens,
      prompt_mean = p_brief.prompt_mean, output_mean = p_brief.output_mean
  where br.id = p_brief.id and (br.question_version, br.tokens_per_image, br.output_tokens, br.prompt_mean, br.output_mean)
    is distinct from (p_brief.question_version, p_brief.tokens_per_image, p_brief.output_tokens, p_brief.prompt_mean, p_brief.output_mean);
  return p_brief;
end $$;

-- The id of a new upload's brief; null: the question alone. Inserts the brief if it is new. It updates nothing, because it may run in
-- a tenant's long transaction.
create or replace function autotag.make_brief(p_workspace_id autotag.workspace_id) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_brief autotag.briefs := autotag.compose_brief(p_workspace_id);
begin
  if v_brief.id is null and v_brief.profile_id is not null then
    insert into autotag.briefs (profile_id, vocabulary, tag_count, extra_prompt, extra_output, question_version, tokens_per_image,
      output_tokens, prompt_mean, output_mean, created_at)
    values (v_brief.profile_id, v_brief.vocabulary, v_brief.tag_count, v_brief.extra_prompt, v_brief.extra_output, v_brief.question_version,
      v_brief.tokens_per_image, v_brief.output_tokens, v_brief.prompt_mean, v_brief.output_mean, autotag.now())
    returning id into v_brief.id;
  end if;
  return v_brief.id;
end $$;

-- The brief of a job, estimated for the present question; no row: it has none. The caller holds the provider row.
create or replace function autotag.job_brief(p_job_id uuid, p_provider autotag.provider_limits) returns autotag.briefs
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_brief autotag.briefs;
begin
  select br.* into v_brief from autotag.jobs j join autotag.briefs br on br.id = j.brief_id where j.id = p_job_id;
  if v_brief.question_version <> p_provider.question_version then
    v_brief := autotag.refresh_brief(v_brief, p_provider);
  end if;
  return v_brief;
end $$;

-- The tokens that one image of a brief reserves, at most what the window of its workspace holds. Otherwise an image with a long
-- vocabulary would wait for ever. settle() corrects the window by the real use.
create or replace function autotag.fit_window(p_tokens integer, p_workspace_id autotag.workspace_id) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select least(p_tokens, l.max_units) from autotag.window_limits(p_workspace_id, 'realtime') l);
end $$;

-- How many tokens more than usual each image of a batch reserves in the provider's queue because of this brief (null: none).
create or replace function autotag.extra_tokens(p_brief bigint) returns bigint
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_brief is null then
    return 0;
  end if;
  return coalesce((select greatest(br.tokens_per_image - p.tokens_per_image, 0) from autotag.briefs br, autotag.provider_limits p where br.id = p_brief), 0);
end $$;

-- The provider's row with the tokens that one image of a workspace reserves and uses now; null: a workspace without a profile.
create or replace function autotag.provider_for(p_workspace_id autotag.workspace_id) returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_brief autotag.briefs;
begin
  select * into v_provider from autotag.provider_limits;
  if p_workspace_id is not null then
    v_brief := autotag.compose_brief(p_workspace_id);
  end if;
  if v_brief.profile_id is not null then
    v_provider.tokens_per_image := v_brief.tokens_per_image;
    v_provider.output_tokens := v_brief.output_tokens;
    v_provider.prompt_mean := v_brief.prompt_mean;
    v_provider.output_mean := v_brief.output_mean;
  end if;
  return v_provider;
end $$;

-- A brief as a worker needs it for prompt and answer: {id, version (of the profile), instructions, language, tag_count, vocabulary_mode,
-- vocabulary, fields}. Null: the worker holds no image that is asked this.
create or replace function autotag.describe_brief(p_worker uuid, p_brief bigint) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
begin
  if not autotag.is_own_worker(p_worker) or not exists (
      select from autotag.tasks t join autotag.jobs j on j.id = t.job_id
      where t.id = any (autotag.leased_tasks(p_worker)) and j.brief_id = p_brief
      union all
      select from autotag.batches b join autotag.jobs j on j.id = b.job_id where b.worker_id = p_worker and j.brief_id = p_brief) then
    return null;
  end if;
  return (select autotag.spell_brief(br) from autotag.briefs br where br.id = p_brief);
end $$;

-- A brief with the words of its profile (describe_brief); id is 0 where no upload has been asked this. Null: there is none.
create or replace function autotag.spell_brief(p_brief autotag.briefs) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select jsonb_build_object('id', coalesce(p_brief.id, 0), 'version', pr.version, 'instructions', pr.instructions, 'language', pr.language,
      'tag_count', pr.tag_count, 'vocabulary_mode', pr.vocabulary_mode, 'vocabulary', p_brief.vocabulary, 'fields', pr.fields)
    from autotag.profiles pr where pr.id = p_brief.profile_id);
end $$;

-- The part of a result (clean_result) with this brief that is stored: the tags that are sure enough, and no more than the profile asks
-- for; of the fields that the worker reports, those of the profile; and the profile's version.
create or replace function autotag.fit_result(p_result jsonb, p_fields jsonb, p_brief bigint) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles;
  v_tags text[];
begin
  select pr.* into v_profile from autotag.briefs br join autotag.profiles pr on pr.id = br.profile_id where br.id = p_brief;
  if not found or p_result is null then
    return p_result;
  end if;
  v_tags := array(
    select given.tag from jsonb_array_elements_text(p_result -> 'tags') with ordinality given (tag, i)
    -- a tag whose confidence the model did not give is kept
    where coalesce((p_result -> 'confidence' ->> given.tag)::real >= v_profile.min_confidence, true) order by given.i limit v_profile.tag_count);
  return p_result || jsonb_build_object('tags', to_jsonb(v_tags), 'profile', v_profile.version,
    'confidence', coalesce((
      select jsonb_object_agg(c.key, c.value) from jsonb_each(p_result -> 'confidence') c where c.key = any (v_tags)), '{}'))
    || case when v_profile.fields = '[]' then '{}' else jsonb_build_object('fields', autotag.clean_fields(p_fields, v_profile.fields)) end;
end $$;

-- The values of these fields ([{name, kind, values}]) in a worker's report; null where the report has no value of the right type. An
-- enum has only its own values, an integer at most 53 bits (JavaScript's), and a text at most 200 characters.
create or replace function autotag.clean_fields(p_report jsonb, p_fields jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_object_agg(f ->> 'name', case f ->> 'kind'
      when 'boolean' then case when jsonb_typeof(v) = 'boolean' then v end
      -- in jsonb's sort order only numbers lie between two numbers
      when 'integer' then case when v between '-9007199254740991' and '9007199254740991'
        then case when v::numeric = trunc(v::numeric) then to_jsonb(trunc(v::numeric)) end end
      when 'enum' then case when jsonb_typeof(v) = 'string' then (
        select to_jsonb(e) from jsonb_array_elements_text(f -> 'values') e where normalize(e, NFKC) = normalize(v #>> '{}', NFKC) limit 1) end
      when 'text' then case when jsonb_typeof(v) = 'string' then to_jsonb(nullif(autotag.printable(v #>> '{}', 200), '')) end end), '{}')
    from jsonb_array_elements(p_fields) f
    cross join lateral (select case when jsonb_typeof(p_report) = 'object' then p_report -> (f ->> 'name') end as v) x);
end $$;

-- The strategy of an upload, the number of its batches, and its expected duration.

-- Number of batches for an upload. Splitting never makes it slower: as long as the window admits enough batches, each has at
-- most batch_split_images; if the window admits fewer, batches get larger. A batch is never larger than a file, the provider's
-- queue or the window's images allow, and there are no more batches than that size needs.
create or replace function autotag.plan_batches(p_images integer, p_batches_left integer, p_window_images integer)
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

-- The strategy for an upload of p_images images. Without a Batch API at the provider, all are sent as single calls.
create or replace function autotag.choose_strategy(p_images integer) returns text
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

-- Expected duration of an upload in seconds, if its workspace has no other work. Single calls may have to wait for the next day.
create or replace function autotag.estimate_seconds(p_images integer, p_batches integer) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
begin
  return (select case
    when p_batches > 0 then
      -- each full window delays the batches beyond it by one hour
      (autotag.predict_batch(ceil(p_images::numeric / p_batches)::integer, v_now, v_now, null, 0, null)).p50
      + 3600 * greatest((p_batches - 1) / s.batch_batches_per_hour, (p_images - 1) / s.batch_images_per_hour)
    else
      s.call_seconds + greatest(
        case when p_images > s.realtime_max_images then extract(epoch from s.chunk_delay) * ((p_images - 1) / s.chunk_size) end,
        case when p_images > s.realtime_max_images then 60 * ((p_images - 1) / s.realtime_requests_per_minute) end,
        extract(epoch from autotag.wait_for_day(autotag.refilled_provider(v_now), p_images)), 0) end
  from autotag.settings s);
exception when others then
  raise warning 'autotag could not estimate a duration: %', sqlerrm;
  return null;
end $$;

-- The single calls that wait to be released, in all workspaces.
create or replace function autotag.count_waiting(out workspaces bigint, out images bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select count(distinct q.workspace_id), coalesce(sum(q.queued), 0) into workspaces, images
  from autotag.queues q
  -- This is a look-up per queue. A join may read all uploads that ever finished.
  where q.queued > 0 and (select j.cancelled_at from autotag.jobs j where j.id = q.job_id) is null;
end $$;

-- How long the last of p_images more single calls of a workspace would wait for its window, for its fair share of the provider's
-- bucket and of the rest of the day's limit, and for the end of a block (retry-after). p_counted: use claim()'s count of calls that wait
-- in other workspaces if it is at most 2 s old, because counting takes longer with more workspaces.
create or replace function autotag.predict_wait(p_workspace_id autotag.workspace_id, p_images integer, p_counted boolean default false)
returns interval
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_provider autotag.provider_limits;
  v_settings autotag.settings;
  v_max_requests integer;
  v_max_units integer;
  v_queued bigint;
  v_own bigint;
  v_everybody bigint;
  v_each integer;              -- tokens that an image of this workspace reserves
begin
  v_provider := autotag.refilled_provider(v_now);
  v_each := coalesce((
    select br.tokens_per_image from autotag.jobs j join autotag.briefs br on br.id = j.brief_id
    where j.workspace_id = p_workspace_id and j.finished_at is null order by j.created_at desc limit 1), v_provider.tokens_per_image);
  v_queued := coalesce((select sum(q.queued) from autotag.queues q where q.workspace_id = p_workspace_id and q.queued > 0
      and (select j.cancelled_at from autotag.jobs j where j.id = q.job_id) is null), 0);
  v_own := v_queued + p_images;
  select * into v_settings from autotag.settings;
  if not p_counted or v_provider.waiting_at < v_now - interval '2 s' then
    select c.workspaces, c.images into v_provider.waiting_workspaces, v_provider.waiting_images
    from autotag.count_waiting() c;
  end if;
  -- Fair share: for each of its own calls, the workspace waits for one call of every other workspace that still has some.
  v_everybody := v_own + least(greatest(v_provider.waiting_images - v_queued, 0),
    v_own * greatest(v_provider.waiting_workspaces - (v_queued > 0)::integer, 0));
  select wn.max_requests, wn.max_units into v_max_requests, v_max_units
  from autotag.windows wn where wn.workspace_id = p_workspace_id and wn.request_type = 'realtime';
  v_max_requests := coalesce(v_max_requests, v_settings.realtime_requests_per_minute);
  v_max_units := coalesce(v_max_units, v_settings.realtime_tokens_per_minute);
  return greatest(autotag.wait_for_day(v_provider, v_everybody),
    case when v_provider.blocked_until > v_now then v_provider.blocked_until - v_now end, interval '1 min' * greatest(0,
    (v_own - v_max_requests)::double precision / v_max_requests,
    (v_own * v_each - v_max_units)::double precision / v_max_units,
    (v_everybody - v_provider.requests_left) / v_provider.requests_per_minute,
    (v_own * v_each + (v_everybody - v_own) * v_provider.tokens_per_image - v_provider.tokens_left) / v_provider.tokens_per_minute));
exception when others then
  raise warning 'autotag could not predict a wait: %', sqlerrm;
  return null;
end $$;

-- enqueue_tagging: checks an upload and makes it a job.

-- How many more unfinished images a workspace may have (live_images_max).
create or replace function autotag.live_capacity(p_workspace_id autotag.workspace_id) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select s.live_images_max from autotag.settings s) - coalesce((
    select sum(j.image_count - j.completed - j.failed)::integer
    from autotag.jobs j where j.workspace_id = p_workspace_id and j.finished_at is null), 0);
end $$;

-- Refuses an upload with which the workspace would have more than live_images_max unfinished images. retry_after: seconds until
-- enough of them are expected to be done; null: this upload alone is too large.
create or replace function autotag.check_live_capacity(p_workspace_id autotag.workspace_id, p_images integer) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_room integer := autotag.live_capacity(p_workspace_id);
  v_max_allowed integer := (select s.live_images_max from autotag.settings s);
  v_free_at timestamptz;
begin
  if p_images <= v_room then
    return;
  end if;
  select min(d.eta) into v_free_at from (
    select j.eta, sum(j.image_count - j.completed - j.failed) over (order by j.eta, j.id) as freed
    from autotag.jobs j where j.workspace_id = p_workspace_id and j.finished_at is null) d
  where v_room + d.freed >= p_images;
  perform autotag.refuse(429, 'too_many_live_images',
    format('Only %s more images of this workspace can be tagged at the moment.', greatest(v_room, 0)),
    'Wait until earlier uploads are done, or make the upload smaller.',
    jsonb_build_object('max_images', v_max_allowed, 'images_left', greatest(v_room, 0), 'retry_after',
      case when p_images <= v_max_allowed then greatest(extract(epoch from v_free_at - autotag.now()), 1) end));
end $$;

-- The images of a workspace that are being tagged. (An image that has moved here since is not among them.)
create or replace function autotag.live_in_workspace(p_workspace_id autotag.workspace_id) returns table (asset_id autotag.asset_id)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  return query
    select t.asset_id from autotag.jobs j join autotag.tasks t on t.job_id = j.id
    where j.workspace_id = p_workspace_id and j.finished_at is null and t.finished_at is null;
end $$;

-- The images among these that are being tagged, and where. (The plan is kept, and must use the index. A plan from when nothing was being
-- tagged would compare each image with each task: 14 s for 50,000 of them.)
create or replace function autotag.live_tasks(p_asset_ids autotag.asset_id[])
returns table (asset_id autotag.asset_id, workspace_id autotag.workspace_id, job_id uuid)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  return query
    select t.asset_id, t.workspace_id, t.job_id from autotag.tasks t where t.asset_id = any (p_asset_ids) and t.finished_at is null;
end $$;

-- The images among these that are being tagged for a workspace of the caller.
create or replace function autotag.own_live_assets(p_asset_ids autotag.asset_id[]) returns autotag.asset_id[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    with live as materialized (select x.asset_id, x.workspace_id from autotag.live_tasks(p_asset_ids) x)
    select l.asset_id from live l where l.workspace_id in (
      -- offset 0: call is_member once per workspace, not once per image
      select w.id from (select distinct l.workspace_id as id from live l offset 0) w where autotag.is_member(w.id)));
end $$;

-- Refuses an upload if not all of its images exist for the caller. p_visible: the images of p_asset_ids whose rows the caller can read.
-- p_found: how many of these are in the caller's workspaces p_workspaces; null: none.
create or replace function autotag.check_known(
  p_asset_ids autotag.asset_id[], p_visible autotag.asset_id[], p_workspaces autotag.workspace_id[], p_found integer
) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_asked integer := (select count(distinct id) from unnest(p_asset_ids) id);
begin
  if p_found >= v_asked then
    return;   -- none is missing: p_asset_ids names some images twice
  end if;
  perform autotag.check_caller() where p_workspaces is null;
  perform autotag.refuse(404, 'unknown_asset',
    format('%s of the %s images do not exist.', v_asked - p_found, v_asked),
    'Insert the assets before you enqueue them.', jsonb_build_object('asset_ids', array(
      select unnest(p_asset_ids) except
      select d.asset_id from autotag.describe_assets(p_visible, false) d where d.workspace_id = any (p_workspaces)
      order by 1 limit 5)));
end $$;

-- enqueue_tagging: makes one upload one job. Idempotent: it skips images that are being tagged, images that have just been tagged
-- (find_repeats), and images that the row filter leaves out. It may run in a tenant's long transaction, so it locks no row that a worker
-- needs: it takes advisory locks (lock_quotas) and inserts new rows.
--
-- p_visible_marks[i]: the mark of the file of p_asset_ids[i] that the caller may see (`visible_file_marks`), which matches no file if the
-- caller may not see it; null: not checked. If the image's file has another mark when a worker claims it, the image fails as if
-- the file did not exist.
-- p_visible: the images whose rows the caller can read (`visible_assets`); null: not checked. The others do not exist for the caller.
create or replace function autotag.enqueue(
  p_asset_ids autotag.asset_id[], p_visible_marks uuid[] default null, p_visible autotag.asset_id[] default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_found integer;
  v_foreign autotag.asset_id[];            -- images that name a file of another workspace, at most 5
  v_long autotag.asset_id[];               -- images whose URL, path or bucket name is too long, at most 5
  v_workspaces autotag.workspace_id[];         -- workspaces of the images that the caller may act for
  v_images autotag.asset_id[];             -- the images, each once,
  v_marks bigint[];            -- the marks of their pictures,
  v_suspects autotag.asset_id[];           -- and those that may have been enqueued before
begin
  if array_ndims(p_asset_ids) > 1 or array_position(p_asset_ids, null) is not null then
    perform autotag.refuse(400, 'bad_asset_ids', 'asset_ids must be a plain list of ids.', 'Pass an array of ids without nulls.');
  end if;
  perform autotag.check_image_count(cardinality(p_asset_ids));

  if p_visible <> p_asset_ids then
    p_visible := array(select unnest(p_visible) intersect select unnest(p_asset_ids));
  end if;
  -- An image of another workspace, or with a hidden row, is reported like one that does not exist: nobody can find out which ids exist.
  -- All images of a workspace make one row: is_member() is called once for it, and each image is looked at once.
  with there as materialized (
    select d.workspace_id, count(*) as images,
      array_agg(d.asset_id) filter (where d.refused = 'foreign_file') as foreign_ids,
      array_agg(d.asset_id) filter (where d.refused = 'location_too_long') as long_ids,
      array_agg(d.asset_id) filter (where d.refused is null) as ids,
      array_agg(hash_record_extended(row(d.asset_id, d.place), 0)) filter (where d.refused is null) as marks,
      array_agg(d.asset_id) filter (where d.stage <> 'failed' and d.refused is null) as suspects
    from autotag.describe_assets(coalesce(p_visible, p_asset_ids), false) d where d.workspace_id is not null group by d.workspace_id
  ), theirs as materialized (
    select x.* from there x where autotag.is_service() or autotag.is_member(x.workspace_id)
  )
  select (select array_agg(w.workspace_id order by w.workspace_id) from theirs w), (select sum(w.images) from theirs w),
    array(select unnest(x.foreign_ids) order by 1 limit 5), array(select unnest(x.long_ids) order by 1 limit 5),
    coalesce(x.ids, '{}'), coalesce(x.marks, '{}'), coalesce(x.suspects, '{}')
  into v_workspaces, v_found, v_foreign, v_long, v_images, v_marks, v_suspects
  from theirs x limit 1;   -- several workspaces are refused below
  if coalesce(v_found, 0) < cardinality(p_asset_ids) then
    perform autotag.check_known(p_asset_ids, coalesce(p_visible, p_asset_ids), v_workspaces, coalesce(v_found, 0));
  end if;
  if cardinality(v_workspaces) > 1 then
    perform autotag.refuse(400, 'several_workspaces',
      format('The images belong to %s workspaces: %s.', cardinality(v_workspaces), autotag.name_some(v_workspaces::text[])),
      'Make one upload for each workspace.', jsonb_build_object('workspace_ids', v_workspaces[:5]));
  end if;
  if v_foreign <> '{}' then
    perform autotag.refuse(403, 'foreign_file', 'An image names a file that does not belong to its workspace.',
      format('Name a file of its own workspace (rule %s).', autotag.file_rule()), jsonb_build_object('asset_ids', v_foreign));
  end if;
  if v_long <> '{}' then
    perform autotag.refuse(400, 'location_too_long', 'The URL, path or bucket name of an image, or the id of its workspace, is too long.',
      'A URL may have 8,192 bytes, a path or an id 1,024 and a bucket name 100.', jsonb_build_object('asset_ids', v_long));
  end if;
  return autotag.start_once(v_workspaces[1], p_asset_ids, p_visible_marks, v_images, v_marks, v_suspects);
end $$;

-- Starts the job of an upload: its strategy, batches and tasks.

-- Makes a job of the images among these that are not being tagged already. All belong to p_workspace_id.
-- p_visible_marks: as in enqueue(). Returns {job_id, strategy, image_count, skipped, batches, eta}.
-- Locks: workspace, user (lock_quotas), assets (show); all rows of autotag are new.
create or replace function autotag.start_job(
  p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_asset_ids autotag.asset_id[], p_visible_marks uuid[] default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set random_page_cost = 1.1
as $$
declare
  v_now timestamptz := autotag.now();
  v_asked integer := (select count(distinct id) from unnest(p_asset_ids) id);
  v_live autotag.asset_id[];               -- those of p_asset_ids that are being tagged already
  v_new autotag.asset_id[];
  v_new_marks uuid[];           -- p_visible_marks of each of them
  v_count integer;
  v_plan autotag.upload_plan;
  v_job autotag.jobs;
  v_first_task bigint;
begin
  perform autotag.lock_quotas(p_workspace_id, p_user_id);
  -- The new images, each once, in the order of the upload.
  v_live := array(select x.asset_id from autotag.live_tasks(p_asset_ids) x);
  if v_live = '{}' and v_asked = cardinality(p_asset_ids) and array_lower(p_asset_ids, 1) = 1 then   -- nothing to leave out
    v_new := p_asset_ids;
    v_new_marks := p_visible_marks;
  else
    select coalesce(array_agg(a.id order by a.i), '{}'), array_agg(a.visible_mark order by a.i) into v_new, v_new_marks
    from (select distinct on (u.id) u.* from unnest(p_asset_ids, p_visible_marks) with ordinality u (id, visible_mark, i) order by u.id, u.i) a
    where a.id not in (select unnest(v_live));   -- hashed, where `<> all` compares each with each in a generic plan
  end if;
  v_count := cardinality(v_new);
  if v_count = 0 then
    return autotag.describe_live(p_workspace_id, v_live, v_asked);
  end if;
  perform autotag.check_live_capacity(p_workspace_id, v_count);
  perform autotag.check_quotas(p_workspace_id, p_user_id, v_count);

  v_plan := autotag.plan_upload(p_workspace_id, v_count);
  insert into autotag.jobs (workspace_id, user_id, strategy, fallback, image_count, created_at, traceparent, brief_id, changed)
  values (p_workspace_id, p_user_id, v_plan.strategy, v_plan.fallback, v_count, v_now, autotag.request_traceparent(),
    autotag.make_brief(p_workspace_id), autotag.add_changed('{}', v_new))
  returning * into v_job;
  v_first_task := autotag.add_tasks(v_job, v_plan, v_new, v_new_marks);
  insert into autotag.queues (job_id, workspace_id, queued, overdue_at, cursor, chunk)
  values (v_job.id, p_workspace_id, v_plan.express, autotag.patience_ends_at(v_plan.express, v_now), v_first_task - 1, v_plan.chunk);
  v_job.eta := autotag.refresh_eta(v_job.id, v_plan.wait);
  if v_plan.express > 0 and v_plan.batches > 0 then   -- express images do not wait for the batch
    perform autotag.show(p_workspace_id, v_new[:v_plan.express], 'queued', 0, autotag.predict_single_calls(v_job.id, null));
    v_new := v_new[v_plan.express + 1:];
  end if;
  perform autotag.show(p_workspace_id, v_new, 'queued', 0, v_job.eta);

  if v_plan.express > 0 then
    perform pg_notify('autotag', 'realtime');
  end if;
  if v_plan.batches > 0 then
    perform pg_notify('autotag', 'batch');
  end if;
  return jsonb_build_object('job_id', v_job.id, 'strategy', v_job.strategy, 'image_count', v_count,
    'skipped', v_asked - v_count, 'batches', v_plan.batches, 'eta', v_job.eta);
end $$;

-- The reply to an upload whose images are all being tagged already: their job, or null if they belong to several. It names only jobs of
-- this workspace. (If an image moves to this workspace while it is being tagged, its job belongs to the former workspace.)
create or replace function autotag.describe_live(p_workspace_id autotag.workspace_id, p_live autotag.asset_id[], p_asked integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_live_jobs uuid[];
  v_job autotag.jobs;
begin
  -- The call is probably a retry after its first reply was lost, so name the job.
  select array_agg(distinct x.job_id) into v_live_jobs from autotag.live_tasks(p_live) x where x.workspace_id = p_workspace_id;
  select * into v_job from autotag.jobs j
  where cardinality(v_live_jobs) = 1 and j.id = v_live_jobs[1];
  return jsonb_build_object('job_id', v_job.id, 'strategy', v_job.strategy, 'image_count', 0,
    'skipped', p_asked, 'batches', 0, 'eta', (autotag.current_eta(v_job)).p50);
end $$;

-- Plans an upload of p_images images. Reads only.
create or replace function autotag.plan_upload(p_workspace_id autotag.workspace_id, p_images integer) returns autotag.upload_plan
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_settings autotag.settings;
  v_plan autotag.upload_plan;
  v_left record;
begin
  select * into v_settings from autotag.settings;
  v_plan.strategy := autotag.choose_strategy(p_images);
  if v_plan.strategy in ('realtime', 'realtime-chunked') then
    v_plan.wait := autotag.predict_wait(p_workspace_id, p_images);
    if (select p.has_batches from autotag.provider_limits p) = false then
      v_plan.fallback := case when p_images > v_settings.chunk_max_images
        then 'The AI provider has no Batch API, so these images are sent as single calls.' end;
    -- A batch is no use if it has to wait for its workspace's window, or if it takes longer than the single calls would wait.
    elsif v_plan.wait > v_settings.realtime_max_wait
      and v_now + v_plan.wait > (autotag.predict_new_batch(p_workspace_id, p_images, v_now)).ends_at then
      v_plan.strategy := 'batch';
      v_plan.fallback := format('Single calls would have waited about %s min for the limits, so these images are sent in a batch.',
        ceil(extract(epoch from v_plan.wait) / 60));
    end if;
  end if;
  v_plan.batches := 0;
  if v_plan.strategy in ('batch', 'batch-parallel') then
    select * into v_left from autotag.batches_left(p_workspace_id);
    v_plan.batches := autotag.plan_batches(p_images, v_left.batches, v_left.window_images);
  end if;
  -- The express images are taken from the first batch, which keeps at least one image.
  v_plan.express := case when v_plan.batches = 0 then p_images
    when v_plan.fallback is not null then 0  -- the fallback avoids single calls
    when autotag.predict_wait(p_workspace_id, v_settings.express_images) > v_settings.realtime_max_wait then 0
    else least(v_settings.express_images, p_images / v_plan.batches - 1) end;
  v_plan.chunk := case when v_plan.strategy = 'realtime-chunked' then v_settings.chunk_size end;
  return v_plan;
end $$;

-- Inserts a job's batches and tasks, in upload order, and returns the id of the first task.
create or replace function autotag.add_tasks(p_job autotag.jobs, p_plan autotag.upload_plan, p_asset_ids autotag.asset_id[], p_visible_marks uuid[])
returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batches uuid[];       -- by their ordinal
  v_first_task bigint;
  v_extra bigint := autotag.extra_tokens(p_job.brief_id);
begin
  -- Ordinal 1 is the priority batch, which has the express images.
  if p_plan.batches > 0 then
    with planned as (
      insert into autotag.batches (job_id, workspace_id, ordinal, image_count, express_count, extra_tokens, created_at)
      select p_job.id, p_job.workspace_id, b, n.images, n.express, (n.images - n.express) * v_extra, p_job.created_at
      from generate_series(1, p_plan.batches) b
      cross join lateral (
        select (b::bigint * p_job.image_count / p_plan.batches - (b - 1)::bigint * p_job.image_count / p_plan.batches)::integer as images,
          case when b = 1 then p_plan.express else 0 end as express) n
      returning id, ordinal
    )
    select array_agg(x.id order by x.ordinal) into v_batches from planned x;
  end if;

  with placed as (
    insert into autotag.tasks (job_id, workspace_id, asset_id, visible_mark, lane, batch_id)
    select p_job.id, p_job.workspace_id, a.id, a.visible_mark,
      case when a.i <= p_plan.express then 'realtime' else 'batch' end,
      case when a.i > p_plan.express then v_batches[((a.i * p_plan.batches + p_job.image_count - 1) / p_job.image_count)::integer] end
    from unnest(p_asset_ids, p_visible_marks) with ordinality a (id, visible_mark, i)
    order by a.i
    returning id
  )
  select min(x.id) into v_first_task from placed x;
  return v_first_task;
end $$;

-- Nothing twice: a call that is repeated, because its reply was lost, does not pay for its images again.

-- The images among these that are being tagged, or were tagged a moment ago: a job of the workspace that still runs, or finished within
-- repeat_window, has them with their present location and brief, and they did not fail there. It reads only tables of autotag, in one
-- snapshot. So it finds every image that was tagged until now, whatever the image's row showed earlier.
-- p_suspects: the images; p_images, p_marks: these and maybe others, each once, and the marks of their pictures. jobs[i]: the job of assets[i].
create or replace function autotag.find_repeats(
  p_workspace_id autotag.workspace_id, p_suspects autotag.asset_id[], p_images autotag.asset_id[], p_marks bigint[],
  out assets autotag.asset_id[], out jobs uuid[]
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
  set enable_nestloop = off
as $$
declare
  v_brief autotag.briefs;
  v_recent record;
begin
  assets := '{}';
  jobs := '{}';
  if p_suspects = '{}' then
    return;   -- almost always: nothing is read for new images
  end if;
  -- An image that moved here while it is being tagged belongs to a job of another workspace.
  select coalesce(array_agg(x.asset_id), '{}'), coalesce(array_agg(case when x.workspace_id = p_workspace_id then x.job_id end), '{}')
  into assets, jobs
  from autotag.live_tasks(p_suspects) x;
  if cardinality(assets) = cardinality(p_suspects) then
    return;
  end if;
  -- Tags of another brief are not what this call asks for. (0: no job has been asked this yet.)
  v_brief := autotag.compose_brief(p_workspace_id);
  with recent as materialized (
    select pi.job_id, unnest(pi.marks) as mark from autotag.pictures pi
    where pi.job_id = any (array(
      select j.id from autotag.jobs j
      where j.workspace_id = p_workspace_id and j.finished_at is null and j.brief_id is not distinct from coalesce(v_brief.id, v_brief.profile_id * 0)
      union all
      select j.id from autotag.jobs j
      where j.finished_at > autotag.now() - (select s.repeat_window from autotag.settings s) and j.workspace_id = p_workspace_id
        and j.brief_id is not distinct from coalesce(v_brief.id, v_brief.profile_id * 0)))
  ), met as materialized (
    select i.id as asset_id, r.job_id from unnest(p_images, p_marks) i (id, mark) join recent r on r.mark = i.mark
    where i.id in (select unnest(p_suspects)) and i.id not in (select unnest(assets))
  ), failed as materialized (
    select t.job_id, t.asset_id from autotag.tasks t
    where t.job_id = any (array(select distinct m.job_id from met m)) and t.finished_at is not null
  ), repeated as (
    select m.asset_id, (array_agg(m.job_id))[1] as job_id from met m
    where (m.job_id, m.asset_id) not in (select f.job_id, f.asset_id from failed f)
    group by m.asset_id
  )
  select array_agg(r.asset_id) as assets, array_agg(r.job_id) as jobs into v_recent from repeated r;
  assets := assets || v_recent.assets;
  jobs := jobs || v_recent.jobs;
end $$;

-- Makes a job of an upload without the repeated images (find_repeats) and without those that the row filter leaves out. Returns what
-- start_job() does; the images left out are skipped, too. If nothing is left, the reply names the job of the repeated images, or null
-- if they belong to several, or to none.
-- p_images, p_marks: all images that the row filter does not leave out, each once, and the marks of their pictures. p_suspects: those
-- that may have been enqueued before. Locks: as in start_job().
create or replace function autotag.start_once(
  p_workspace_id autotag.workspace_id, p_asset_ids autotag.asset_id[], p_visible_marks uuid[], p_images autotag.asset_id[], p_marks bigint[],
  p_suspects autotag.asset_id[]
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id := autotag.caller();
  v_repeated record;
  v_skipped integer;
  v_jobs uuid[];
  v_job autotag.jobs;
  v_reply jsonb;
begin
  if not autotag.lock_quotas(p_workspace_id, v_user, false) then
    perform autotag.lock_quotas(p_workspace_id, v_user);
    -- Meanwhile others may have enqueued any of these images, and some may have got their tags.
    p_suspects := p_images;
  end if;
  v_repeated := autotag.find_repeats(p_workspace_id, p_suspects, p_images, p_marks);
  v_skipped := cardinality(v_repeated.assets);
  if cardinality(p_images) < cardinality(p_asset_ids) then   -- filtered, or named twice
    v_skipped := v_skipped + (select count(distinct id)::integer from unnest(p_asset_ids) id) - cardinality(p_images);
  end if;
  if cardinality(v_repeated.assets) = cardinality(p_images) then
    p_asset_ids := null;
  elsif v_skipped > 0 then
    select array_agg(a.id order by a.i), array_agg(a.visible_mark order by a.i) into p_asset_ids, p_visible_marks
    from unnest(p_asset_ids, p_visible_marks) with ordinality a (id, visible_mark, i)
    where a.id in (select unnest(p_images)) and a.id not in (select unnest(v_repeated.assets));
  end if;
  if p_asset_ids is null then
    v_jobs := array(select distinct id from unnest(v_repeated.jobs) id where id is not null);
    select * into v_job from autotag.jobs j where cardinality(v_jobs) = 1 and j.id = v_jobs[1];
    return autotag.describe_repeat(v_job, v_skipped);
  end if;
  v_reply := autotag.start_job(p_workspace_id, v_user, p_asset_ids, p_visible_marks);
  v_reply := v_reply || jsonb_build_object('skipped', (v_reply ->> 'skipped')::integer + v_skipped);
  perform autotag.record_pictures(p_workspace_id, v_reply, p_images, p_marks);
  return v_reply;
end $$;

-- Records the pictures of a new job. p_reply: the reply of start_job(); p_images, p_marks: the images of the call, and the marks of
-- their pictures.
create or replace function autotag.record_pictures(p_workspace_id autotag.workspace_id, p_reply jsonb, p_images autotag.asset_id[], p_marks bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_job_id uuid := (p_reply ->> 'job_id')::uuid;
begin
  if (p_reply ->> 'image_count')::integer = 0 then
    return;
  end if;
  if (p_reply ->> 'skipped')::integer > 0 then   -- those belong to other jobs
    p_marks := array(
      select i.mark from unnest(p_images, p_marks) i (id, mark)
      where i.id in (select t.asset_id from autotag.tasks t where t.job_id = v_job_id));
  end if;
  insert into autotag.pictures (job_id, workspace_id, marks) values (v_job_id, p_workspace_id, p_marks);
end $$;

-- The reply to a call that was made before: its job, with all images skipped.
create or replace function autotag.describe_repeat(p_job autotag.jobs, p_skipped integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_build_object('job_id', p_job.id, 'strategy', p_job.strategy, 'image_count', 0, 'skipped', p_skipped,
    'batches', 0, 'eta', (autotag.current_eta(p_job)).p50);
end $$;

-- Cancelling an upload.

-- cancel_tagging: {job_id, cancelled (images)}. Images that have not been sent to OpenAI fail with the code `cancelled`. Images that
-- have been sent are billed, so their answers are stored. The notification wakes a worker, which cancels the batch at OpenAI at once
-- (take_cancellations).
-- It may run in a tenant's long transaction. Until that ends, claims skip the upload, because they do not get the job's advisory lock.
-- Nothing else waits for it. Locks: the job (advisory), job, batches, tasks, assets (finish).
create or replace function autotag.cancel(p_job_id uuid) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs := autotag.visible_job(p_job_id);
  v_now timestamptz;
  v_items autotag.finished[] := array[]::autotag.finished[];
begin
  perform pg_advisory_xact_lock(autotag.job_key(p_job_id));
  select * into v_job from autotag.jobs j where j.id = p_job_id for no key update;
  v_now := autotag.now();
  if v_job.finished_at is null and v_job.cancelled_at is null then
    update autotag.jobs set cancelled_at = v_now where id = p_job_id;
    perform from autotag.batches b
    where b.job_id = p_job_id and b.state in ('planned', 'preparing', 'uploading', 'creating', 'submitted') order by b.id for no key update;
    with waiting as (
      select t.id, t.asset_id
      from autotag.tasks t
      left join autotag.batches b on b.id = t.batch_id
      where t.job_id = p_job_id and t.finished_at is null and t.worker_id is null
        and t.retry_at is distinct from 'infinity'   -- its answer is there
        and (b.id is null or b.state in ('planned', 'preparing', 'uploading'))
      order by t.id for update of t
    )
    select coalesce(array_agg(row(w.id, p_job_id, w.asset_id, null, 'cancelled', 'Tagging was cancelled.', null)::autotag.finished), '{}')
    into v_items from waiting w;
    update autotag.batches b set state = 'cancelled', worker_id = null, reserved_tokens = 0, finished_at = v_now
    where b.job_id = p_job_id and b.state in ('planned', 'preparing', 'uploading');
    update autotag.batches b set cancel_requested = true
    where b.job_id = p_job_id and b.state in ('creating', 'submitted');
    perform autotag.finish(v_job.workspace_id, v_items, false);
    perform autotag.broadcast_progress(p_job_id);   -- that it is being cancelled
    perform pg_notify('autotag', 'batch');
  end if;
  return jsonb_build_object('job_id', p_job_id, 'cancelled', cardinality(v_items));
end $$;

-- Retrying the failed images of an upload.

-- The failed images of a job, in order.
create or replace function autotag.failed_assets(p_job_id uuid) returns autotag.asset_id[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs := autotag.visible_job(p_job_id);
begin
  return array(select t.asset_id from autotag.tasks t where t.job_id = v_job.id and t.stage = 'failed' order by t.id);
end $$;

-- retry_tagging: enqueues the failed images of a job as a new job, except those that no longer exist, moved to another workspace
-- (which the caller may not know of), whose location is refused (describe_assets), or that a later job has tagged.
-- A call that is repeated while that job runs, or within repeat_window of its end, returns that job again. After the job was cancelled, a
-- call makes another one.
-- p_asset_ids: the failed_assets() whose files the caller's rights were checked for; p_visible_marks: as in enqueue, for these images.
-- Locks: the job (advisory: calls for one job run one after the other), then as in enqueue().
create or replace function autotag.retry(p_job_id uuid, p_asset_ids autotag.asset_id[], p_visible_marks uuid[] default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs := autotag.visible_job(p_job_id);
  v_retry autotag.jobs;
  v_images autotag.asset_id[];    -- those that can be tagged now,
  v_marks bigint[];               -- the marks of their pictures,
  v_suspects autotag.asset_id[];  -- and those that may have been enqueued again
  v_failed autotag.asset_id[];
  v_assets autotag.asset_id[];
  v_visible_marks uuid[];
  v_reply jsonb;
begin
  perform pg_advisory_xact_lock(hashtextextended('autotag.retry ' || v_job.id, 0));
  select * into v_retry from autotag.jobs j where j.retry_of = v_job.id order by j.created_at desc limit 1;
  if v_retry.cancelled_at is null
    and (v_retry.finished_at is null or v_retry.finished_at > autotag.now() - (select s.repeat_window from autotag.settings s))
    and v_retry.id is not null then
    return autotag.describe_repeat(v_retry, v_retry.image_count);
  end if;
  v_failed := autotag.failed_assets(v_job.id);
  if p_asset_ids is distinct from v_failed then
    v_failed := array(select unnest(p_asset_ids) intersect select unnest(v_failed));
  end if;
  select coalesce(array_agg(d.asset_id), '{}'), array_agg(hash_record_extended(row(d.asset_id, d.place), 0)),
    coalesce(array_agg(d.asset_id) filter (where d.stage <> 'failed'), '{}')
  into v_images, v_marks, v_suspects
  from autotag.describe_assets(v_failed, false) d
  where d.workspace_id = v_job.workspace_id and d.refused is null and d.stage is distinct from 'completed';
  if cardinality(v_images) = cardinality(p_asset_ids) then
    v_assets := p_asset_ids;
    v_visible_marks := p_visible_marks;
  else
    select array_agg(a.id order by a.i), array_agg(a.visible_mark order by a.i) into v_assets, v_visible_marks
    from unnest(p_asset_ids, p_visible_marks) with ordinality a (id, visible_mark, i)
    where a.id in (select unnest(v_images));
  end if;
  if v_assets is null or v_images = '{}' then
    perform autotag.refuse(409, 'nothing_to_retry', 'This upload has no failed image that can be tagged now.',
      'Check tagging_job() before you retry.');
  end if;
  v_reply := autotag.start_once(v_job.workspace_id, v_assets, v_visible_marks, v_images, v_marks, v_suspects);
  update autotag.jobs j set retry_of = v_job.id
  where j.id = (v_reply ->> 'job_id')::uuid and (v_reply ->> 'image_count')::integer > 0;
  return v_reply;
end $$;

-- Automatic mode: new rows become uploads without a call (tables/uploads.sql has a diagram).
--
-- Nothing here notifies a worker from the host's transaction. A NOTIFY would make its commit wait for other commits (one global
-- lock), forbid PREPARE TRANSACTION, and fail it while the queue of notifications is full. It is not needed either: an upload is not
-- sealed before upload_quiet has passed, and a worker that looks that often sees each upload in time (seal_uploads: wait).

-- The uploader in the host's transaction: the signed-in user (caller), or nobody() for the project's own server, which has no user. Null:
-- a token that names no user, such as that of anon. Rows of such a caller are not collected, because they may not tag images, unless the
-- owner allows it (automatic_for_anyone). The claims of a direct connection can contain anything: that is the server, not an error.
create or replace function autotag.find_uploader() returns autotag.user_id
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id;
begin
  begin
    v_user := autotag.caller();
  exception when others or assert_failure then
    null;
  end;
  if v_user is null and (autotag.is_service() or (select s.automatic_for_anyone from autotag.settings s)) then
    return autotag.nobody();
  end if;
  return v_user;
exception when invalid_text_representation then   -- the claims are not JSON
  return autotag.nobody();
end $$;

-- Collects the images that one statement inserted: their ids and workspaces. Images without a workspace, and those of a token that names
-- no user (find_uploader), are left out. seal_uploads() looks later whether an image has a file or URL. Called by the host's
-- transaction, so it only inserts. It locks no row, and waits only for a lock of the whole table (an upgrade of autotag), for 50 ms at
-- most. The trigger catches errors.
create or replace function autotag.collect(p_asset_ids autotag.asset_id[], p_workspace_ids autotag.workspace_id[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_uploader autotag.user_id := autotag.find_uploader();
  v_now timestamptz := autotag.now();
begin
  insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at)
  select n.asset_id, n.workspace_id, v_uploader, v_now
  from unnest(p_asset_ids, p_workspace_ids) n (asset_id, workspace_id)
  where n.asset_id is not null and n.workspace_id is not null and v_uploader is not null;
end $$;

-- At most p_limit uploads that may still grow, by workspace and uploader, with their first and last arrival. Only workspaces from
-- p_from (null: the first) to before p_before (null: all). It jumps from one upload to the next in the index, so its cost does not depend
-- on their numbers of images: 10 µs for each upload.
create or replace function autotag.list_arriving(p_from autotag.workspace_id, p_before autotag.workspace_id, p_limit integer)
returns table (workspace_id autotag.workspace_id, uploader autotag.user_id, first_at timestamptz, last_at timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
begin
  p_from := coalesce(p_from, (
    select ar.workspace_id from autotag.arrivals ar where ar.upload_id is null order by ar.workspace_id, ar.uploader, ar.arrived_at limit 1));
  return query
    with recursive found as (
      (select ar.workspace_id, ar.uploader, ar.arrived_at from autotag.arrivals ar
       where ar.upload_id is null and ar.workspace_id >= p_from
       order by ar.workspace_id, ar.uploader, ar.arrived_at limit 1)
      union all
      select n.* from found f
      cross join lateral (
        select ar.workspace_id, ar.uploader, ar.arrived_at from autotag.arrivals ar
        where ar.upload_id is null and (ar.workspace_id, ar.uploader) > (f.workspace_id, f.uploader)
        order by ar.workspace_id, ar.uploader, ar.arrived_at limit 1) n
      where p_before is null or f.workspace_id < p_before
    )
    select f.workspace_id, f.uploader, f.arrived_at, (
      select max(ar.arrived_at) from autotag.arrivals ar
      where ar.upload_id is null and ar.workspace_id = f.workspace_id and ar.uploader = f.uploader)
    from found f where p_before is null or f.workspace_id < p_before limit p_limit;
end $$;

-- Uploads, and when each is due. An upload that may still grow is complete when no image has come for upload_quiet, or when its first
-- image is upload_longest old. A postponed upload has a time. An image that becomes visible late, because its transaction was long, is as
-- old as its row. An image from the future was inserted before the clock was set back, and is complete at once.
-- At most 2,000 growing uploads, beginning with the workspace of a random arrival, and 1,000 postponed ones. If there are more, each has
-- a chance in every call.
create or replace function autotag.list_uploads(p_now timestamptz)
returns table (workspace_id autotag.workspace_id, uploader autotag.user_id, due_at timestamptz, arriving boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_quiet interval;
  v_longest interval;
  v_from autotag.workspace_id := (
    select ar.workspace_id from autotag.arrivals ar
    where exists (select from autotag.arrivals growing where growing.upload_id is null)   -- otherwise nothing is read
      and ar.id >= (select f.id + floor(random() * (l.id - f.id + 1))::bigint
      from (select edge.id from autotag.arrivals edge order by edge.id limit 1) f,
        (select edge.id from autotag.arrivals edge order by edge.id desc limit 1) l)
    order by ar.id limit 1);
begin
  select s.upload_quiet, s.upload_longest into v_quiet, v_longest from autotag.settings s;
  return query
    select l.workspace_id, l.uploader,
      case when l.last_at > p_now + v_quiet then p_now else least(l.last_at + v_quiet, l.first_at + v_longest) end, true
    from (
      select * from autotag.list_arriving(v_from, null, 1000)
      union all
      select * from autotag.list_arriving(null, v_from, 1000)) l;
  return query
    select up.workspace_id, up.uploader, up.seal_at, false from autotag.uploads up where up.seal_at <= p_now order by up.seal_at limit 1000;
  return query
    select up.workspace_id, up.uploader, up.seal_at, false from autotag.uploads up where up.seal_at > p_now order by up.seal_at limit 1;
end $$;

-- Makes a job of one upload that is due, in a transaction of its own: it writes the host's rows, so it holds nothing that other
-- tenants need. It waits for nobody, and skips an upload whose quotas are locked. The oldest upload of each user and of each workspace is
-- eligible, and users with fewer uploads are more probable. So many uploads of one user, or many users of one workspace, do not keep
-- others waiting, and do not wait for ever either. A workspace in which an upload has failed (its triggers may be slow) comes after all
-- others. A worker calls it again at once while `more` is true.
--   sealed: how many jobs were made.   more: another upload is due.
--   wait: seconds until the next call; null: automatic mode is off, and nothing waits.
--   notices: [{event, notice}] for the log.
-- p_quiet: earlier calls ended their session, probably because writing some row ends it. So `queued` is not written to the rows (show).
-- Locks: quotas (without waiting), one user's uploads and arrivals (skip locked), then as in start_job().
create or replace function autotag.seal_uploads(
  p_worker uuid, p_quiet boolean default false, out sealed integer, out more boolean, out wait double precision, out notices jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_nobody autotag.user_id := autotag.nobody();
  v_next timestamptz;
  v_upload record;
  v_result record;
  v_done boolean := false;
begin
  perform set_config('request.jwt.claims', '', true),   -- triggers on the host's tables trust these claims
    set_config('autotag.quiet', p_quiet::text, true);
  sealed := 0;
  more := false;
  notices := '[]';
  wait := 1;
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  for v_upload in
    select x.workspace_id, x.uploader, x.due_at
    from (
      select l.workspace_id, l.uploader, l.due_at, l.due_at > v_now as later, row_number() over (users order by l.due_at) as of_user,
        count(*) over users as uploads
      from autotag.list_uploads(v_now) l
      window users as (partition by l.uploader, case when l.uploader = v_nobody then l.workspace_id end, l.due_at > v_now)) x
    left join (select distinct up.workspace_id from autotag.uploads up where up.failures > 0) failed on failed.workspace_id = x.workspace_id
    order by x.later, failed.workspace_id is not null,
      greatest(x.of_user, row_number() over (partition by x.workspace_id, x.later order by x.of_user, x.due_at)) > 1, random() * x.uploads
  loop
    if v_upload.due_at > v_now then
      v_next := least(v_next, v_upload.due_at);
    elsif v_done then
      more := true;
      exit;
    elsif autotag.try_lock_quotas(v_upload.workspace_id, nullif(v_upload.uploader, v_nobody)) then
      v_result := autotag.seal_upload(v_upload.workspace_id, v_upload.uploader, v_now);
      sealed := v_result.sealed;
      notices := v_result.notices;
      more := v_result.rest;
      v_done := true;
    else
      v_next := least(v_next, v_now + autotag.clock_interval(0.25));   -- until its quotas are free
    end if;
  end loop;
  if v_next is not null or v_done or autotag.is_automatic() then
    v_next := least(v_next, v_now + (select least(greatest(s.upload_quiet, '0.2 s'), '10 s') from autotag.settings s));
  end if;
  wait := case when v_next is not null then greatest(autotag.real_seconds(v_next - v_now), 0) end;
end $$;

-- Whether automatic mode is on.
create or replace function autotag.is_automatic() returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from pg_trigger t where t.tgname = 'autotag_collect' and not t.tgisinternal and t.tgenabled <> 'D');
end $$;

-- Makes a job of the arrivals of one workspace and uploader, and of their postponed uploads that are due. Takes at most as many images as
-- one job, the limit of live images and the quotas allow; if that is none, the upload is postponed. rest: more of its images are due.
-- If an earlier attempt raised or took too long, a quarter of its images is tried. The caller holds the quotas.
create or replace function autotag.seal_upload(
  p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_now timestamptz, out sealed integer, out rest boolean, out notices jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id := nullif(p_uploader, autotag.nobody());
  v_room integer;
  v_waiting bigint;            -- the postponed upload of this uploader that still waits for room
  v_due bigint[];              -- those that are due
  v_failures integer;
  v_arrivals bigint[];
  v_assets autotag.asset_id[];
  v_try record;
begin
  sealed := 0;
  rest := false;
  notices := '[]';
  select min(u.id) filter (where u.seal_at > p_now and u.failures = 0), coalesce(array_agg(u.id) filter (where u.seal_at <= p_now), '{}'),
    coalesce(max(u.failures) filter (where u.seal_at <= p_now), 0)
  into v_waiting, v_due, v_failures
  from (
    select * from autotag.uploads up where up.workspace_id = p_workspace_id and up.uploader = p_uploader for update skip locked) u;
  if v_waiting is not null then
    perform autotag.join_upload(v_waiting, p_workspace_id, p_uploader);
    update autotag.arrivals ar set upload_id = v_waiting where ar.upload_id = any (v_due);
    delete from autotag.uploads up where up.id = any (v_due);
    return;
  end if;
  v_room := autotag.room_for_upload(p_workspace_id, v_user);
  if v_room < 1 then
    perform autotag.postpone_upload(p_workspace_id, p_uploader, v_due, p_now);
    return;
  end if;
  v_room := least(v_room, greatest(50000 >> least(2 * v_failures, 30), 1));
  select array_agg(t.id), array_agg(t.asset_id) into v_arrivals, v_assets
  from autotag.take_arrivals(p_workspace_id, p_uploader, v_due, v_room) t;
  if v_arrivals is not null then
    v_try := autotag.try_upload(p_workspace_id, v_user, v_assets, true);
    if v_try.state = 'PT429' then   -- the quotas changed meanwhile
      perform autotag.postpone_upload(p_workspace_id, p_uploader, v_due, p_now);
      return;
    elsif v_try.state is not null then
      v_try := autotag.seal_apart(p_workspace_id, p_uploader, v_arrivals, v_assets, v_failures, v_try.state, v_try.error);
      notices := v_try.notices;
      v_arrivals := v_try.ended;
    end if;
    sealed := v_try.jobs;
    delete from autotag.arrivals ar where ar.id = any (v_arrivals);
  end if;
  delete from autotag.uploads up where up.id = any (v_due) and not exists (select from autotag.arrivals ar where ar.upload_id = up.id);
  rest := exists (select from autotag.take_arrivals(p_workspace_id, p_uploader, v_due, 1));
end $$;

-- The first p_limit images of one workspace and uploader that may still grow or belong to these postponed uploads.
create or replace function autotag.take_arrivals(p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_uploads bigint[], p_limit integer)
returns table (id bigint, asset_id autotag.asset_id)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  return query
    select x.id, x.asset_id from (
      select ar.id, ar.asset_id from autotag.arrivals ar
      where ar.upload_id is null and ar.workspace_id = p_workspace_id and ar.uploader = p_uploader
      union all
      select ar.id, ar.asset_id from autotag.arrivals ar where ar.upload_id = any (p_uploads)) x
    order by x.id limit p_limit;
end $$;

-- Tries to make a job of these images. Errors are returned, not raised: state is the SQLSTATE; null: no error. p_keep false: the try is
-- undone in any case. It waits 50 ms at most for each row of the host that another transaction holds. Constraints that the host has
-- deferred are checked here, because an error at the commit would undo everything. jobs: how many were made, 0 or 1.
-- The host may raise autotag's SQLSTATEs, too. So PT429 is returned only if there is not enough room; otherwise it becomes P0001.
create or replace function autotag.try_upload(
  p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_asset_ids autotag.asset_id[], p_keep boolean, out jobs integer, out state text, out error text
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_started boolean := false;
  v_undone boolean := false;
begin
  jobs := autotag.start_upload(p_workspace_id, p_user_id, p_asset_ids);
  v_started := true;
  set constraints all immediate;
  if not p_keep then
    v_undone := true;
    raise exception 'undone';
  end if;
exception when others or assert_failure or query_canceled then
  jobs := 0;
  if v_undone then
    return;
  end if;
  get stacked diagnostics state = returned_sqlstate, error = message_text;
  if left(state, 2) in ('AT', 'PT') and (state <> 'PT429' or v_started
    or autotag.room_for_upload(p_workspace_id, p_user_id) >= cardinality(p_asset_ids)) then
    state := 'P0001';
  end if;
end $$;

-- How many images of automatic mode one more job of a workspace and uploader may have.
create or replace function autotag.room_for_upload(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return least(autotag.live_capacity(p_workspace_id), (select s.job_max_images from autotag.settings s),
    (select min(q.images_left) from autotag.quotas_left(p_workspace_id, p_user_id) q));
end $$;

-- Makes a job of these images of an upload, and returns how many jobs were made: 0 or 1. It leaves out images that are gone, that the row
-- filter leaves out, that have no file or URL, and that are being tagged (start_job). It also leaves out images whose rows are
-- `completed` or `failed` already: enqueue_tagging was called for them, or the row was copied with its tags. If an image has moved to
-- another workspace, it becomes an arrival of that workspace.
create or replace function autotag.start_upload(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_asset_ids autotag.asset_id[]) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_assets autotag.asset_id[];
  v_marks bigint[];            -- of their pictures
  v_moved autotag.asset_id[];
  v_job jsonb;
begin
  select array_agg(d.asset_id order by p.i) filter (where d.workspace_id = p_workspace_id),
    array_agg(hash_record_extended(row(d.asset_id, d.place), 0) order by p.i) filter (where d.workspace_id = p_workspace_id),
    array_agg(d.asset_id) filter (where d.workspace_id <> p_workspace_id)
  into v_assets, v_marks, v_moved
  from unnest(p_asset_ids) with ordinality p (id, i)
  join autotag.describe_assets(p_asset_ids, false) d on d.asset_id = p.id
  -- a row whose location is refused becomes a task, which fails with the reason
  where (d.path is not null or d.url is not null or d.refused is not null)
    and d.refused is distinct from 'filtered' and (d.stage is null or d.stage not in ('completed', 'failed'));
  if v_moved is not null then
    insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at)
    select d.asset_id, d.workspace_id, coalesce(p_user_id, autotag.nobody()), autotag.now()
    from autotag.describe_assets(v_moved, false) d where d.workspace_id is not null;
  end if;
  if v_assets is null then
    return 0;
  end if;
  v_job := autotag.start_job(p_workspace_id, p_user_id, v_assets);
  perform autotag.record_pictures(p_workspace_id, v_job, v_assets, v_marks);
  return least((v_job ->> 'image_count')::integer, 1);
end $$;

-- Automatic mode: uploads that cannot become a job yet, and images that prevent it.

-- Adds the new arrivals of one workspace and uploader to a postponed upload. Locks: arrivals (skip locked).
create or replace function autotag.join_upload(p_upload_id bigint, p_workspace_id autotag.workspace_id, p_uploader autotag.user_id) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  update autotag.arrivals ar set upload_id = p_upload_id
  where ar.id in (
    select arrived.id from autotag.arrivals arrived
    where arrived.upload_id is null and arrived.workspace_id = p_workspace_id and arrived.uploader = p_uploader for update skip locked);
end $$;

-- Postpones an upload for which a quota has no room. If the quota is used up by billed images, the upload waits until the quota renews.
-- Otherwise images that are being tagged have reserved the rest, and it waits until some of them are expected to be done (1 min to 1 h).
-- If the quota counts the user's images in all workspaces, the user's other uploads that are due wait as long, so that one call
-- postpones all of them. p_due: the ids of postponed uploads of this workspace and uploader that are due.
-- Locks: uploads and arrivals (skip locked).
create or replace function autotag.postpone_upload(p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_due bigint[], p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id := nullif(p_uploader, autotag.nobody());
  v_prices autotag.reservation_prices := autotag.price_reservations(p_workspace_id);
  v_until timestamptz;
  v_scope text;
  v_other record;
begin
  select u.renews_at, u.scope into v_until, v_scope
  from autotag.quota_use(p_workspace_id, v_user, v_prices) u
  where u.maximum - u.billed < case u.kind when 'images' then 1 else greatest(v_prices.single, 0.0000001) end
    and not (u.kind = 'cost' and v_prices.free)
  order by u.renews_at desc, u.scope limit 1;
  v_until := coalesce(v_until, least(greatest(p_now + interval '1 min', (
    select min(j.eta) from autotag.jobs j
    where j.finished_at is null and (j.workspace_id = p_workspace_id or j.user_id = v_user))), p_now + interval '1 h'));
  if v_scope = 'user' and not exists (select from autotag.quotas qu where qu.scope = 'user' and qu.workspace_id is not null) then
    for v_other in
      select l.workspace_id from autotag.list_uploads(p_now) l
      where l.uploader = p_uploader and l.arriving and l.due_at <= p_now and l.workspace_id <> p_workspace_id
    loop
      perform autotag.put_aside(v_other.workspace_id, p_uploader, '{}', v_until);
    end loop;
    update autotag.uploads up set seal_at = v_until, failures = 0
    where up.id in (
      select due.id from autotag.uploads due where due.uploader = p_uploader and due.seal_at <= p_now
      order by due.seal_at limit 1000 for update skip locked);
  end if;
  perform autotag.put_aside(p_workspace_id, p_uploader, p_due, v_until);
end $$;

-- Makes one postponed upload of the new arrivals of a workspace and uploader and of the postponed uploads p_due, which the caller has
-- locked.
create or replace function autotag.put_aside(p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_due bigint[], p_until timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_upload_id bigint := p_due[1];
begin
  if v_upload_id is null then
    insert into autotag.uploads (workspace_id, uploader, seal_at) values (p_workspace_id, p_uploader, p_until)
    returning id into v_upload_id;
  else
    update autotag.uploads up set seal_at = p_until, failures = 0 where up.id = v_upload_id;
    update autotag.arrivals ar set upload_id = v_upload_id where ar.upload_id = any (p_due[2:]);
    delete from autotag.uploads up where up.id = any (p_due[2:]);
  end if;
  perform autotag.join_upload(v_upload_id, p_workspace_id, p_uploader);
end $$;

-- After an upload has raised an error: finds the images that cause it, and makes a job of the others. An image that the database refuses
-- (a trigger or constraint of the host, an expression in the adapter) fails; its row shows the failure if the row can be written. If the
-- cause is not an image (a locked row, a full disk), the images are postponed with exponential backoff (1 s to 10 min).
-- p_arrivals[i] belongs to p_assets[i]; p_failures: attempts so far. ended: the arrivals that are done.
create or replace function autotag.seal_apart(
  p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_arrivals bigint[], p_assets autotag.asset_id[], p_failures integer, p_state text, p_error text,
  out jobs integer, out ended bigint[], out notices jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id := nullif(p_uploader, autotag.nobody());
  v_odd jsonb := (autotag.find_odd(p_workspace_id, v_user, p_assets, p_state, p_error, 64)).odd;
  v_good autotag.asset_id[] := array(select a from unnest(p_assets) a except select (o ->> 'asset')::autotag.asset_id from jsonb_array_elements(v_odd) o);
  v_refused autotag.asset_id[];
  v_upload_id bigint;
  v_try record;
begin
  jobs := 0;
  notices := '[]';
  if v_good <> '{}' then
    v_try := autotag.try_upload(p_workspace_id, v_user, array(select a from unnest(p_assets) a where a = any (v_good)), true);
    jobs := v_try.jobs;
    if v_try.state is not null then
      v_good := '{}';
    end if;
  end if;
  select coalesce(array_agg((o ->> 'asset')::autotag.asset_id), '{}'), coalesce(jsonb_agg(jsonb_build_object('event', 'image_not_enqueued', 'notice',
    format('The database refused to enqueue image %s: %s', o ->> 'asset', autotag.printable(o ->> 'error', 500)))), '[]')
  into v_refused, notices
  from jsonb_array_elements(v_odd) o where autotag.is_refusal(o ->> 'state');
  if v_refused <> '{}' then
    perform autotag.show_refused(p_workspace_id, v_refused);
  end if;
  ended := array(select p.id from unnest(p_arrivals, p_assets) p (id, asset) where p.asset = any (v_good || v_refused));
  if cardinality(ended) < cardinality(p_arrivals) then
    insert into autotag.uploads (workspace_id, uploader, seal_at, failures)
    values (p_workspace_id, p_uploader, autotag.now() + least(interval '1 s' * power(2, least(p_failures, 20)), '10 min'), p_failures + 1)
    returning id into v_upload_id;
    update autotag.arrivals ar set upload_id = v_upload_id where ar.id = any (p_arrivals) and ar.id <> all (ended);
    notices := notices || jsonb_build_array(jsonb_build_object('event', 'upload_postponed', 'notice', format(
      '%s images of workspace %s cannot be enqueued yet: %s', cardinality(p_arrivals) - cardinality(ended), p_workspace_id,
      autotag.printable(p_error, 500))));
  end if;
end $$;

-- Finds which of these images raise, after all of them together raised p_state and p_error: [{asset, state, error}]. It makes at most
-- p_budget tries. A try that waited for a lock counts 20, and a try that was cancelled because this call took too long is the last one.
-- Images that were not tried alone get the state 55000 and the error of their group.
create or replace function autotag.find_odd(
  p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_assets autotag.asset_id[], p_state text, p_error text, p_budget integer, out odd jsonb, out budget integer
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_half integer := cardinality(p_assets) / 2;
  v_part autotag.asset_id[];
  v_try record;
begin
  budget := p_budget - case p_state when '55P03' then 20 when '57014' then p_budget else 0 end;
  if v_half = 0 or budget < 1 then
    odd := (select jsonb_agg(jsonb_build_object('asset', a, 'error', p_error,
      -- several that were not tried apart: it is unknown which of them is the cause
      'state', case when v_half = 0 then p_state else '55000' end)) from unnest(p_assets) a);
    return;
  end if;
  odd := '[]';
  for i in 1 .. 2 loop
    v_part := case i when 1 then p_assets[:v_half] else p_assets[v_half + 1:] end;
    if budget < 1 then
      odd := odd || (autotag.find_odd(p_workspace_id, p_user_id, v_part, '55000', p_error, 0)).odd;
      continue;
    end if;
    budget := budget - 1;
    v_try := autotag.try_upload(p_workspace_id, p_user_id, v_part, false);
    if v_try.state is not null then
      v_try := autotag.find_odd(p_workspace_id, p_user_id, v_part, v_try.state, v_try.error, budget);
      odd := odd || v_try.odd;
      budget := v_try.budget;
    end if;
  end loop;
end $$;

-- Whether an error is about the data of a row. Other errors may pass: transactions, locks, limits, resources, configuration, and errors
-- of Postgres itself.
create or replace function autotag.is_refusal(p_state text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return left(p_state, 2) <> all ('{08,25,40,42,53,54,55,57,58,72,F0,HV,PT,XX}');
end $$;

-- Shows on the host's rows that these images failed. A row that raises is left out.
create or replace function autotag.show_refused(p_workspace_id autotag.workspace_id, p_assets autotag.asset_id[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_asset autotag.asset_id;
begin
  foreach v_asset in array p_assets loop
    begin
      perform autotag.show_stage(array[v_asset], p_workspace_id, 'failed', 0, null,
        array['The database refused to enqueue this image.']);
      set constraints all immediate;
    exception when others or assert_failure then
      null;   -- the notice says why
    end;
  end loop;
end $$;

-- Makes uploads due that wait for room, because quotas have changed.
create or replace function autotag.resume_uploads() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.uploads up set seal_at = autotag.now()
  where up.id in (
    select waiting.id from autotag.uploads waiting
    where waiting.failures = 0 and waiting.seal_at > autotag.now() for update skip locked);
  perform pg_notify('autotag', 'uploads');
  return null;
end $$;

create or replace trigger autotag_resume_uploads after insert or update or delete on autotag.quotas
  for each statement execute function autotag.resume_uploads();

-- Tags images that existed before autotag (`autotag enqueue`).

-- Previews tagging existing images: {images, seconds, cost (dollars; null: unknown), model}. p_untagged: only those without
-- tags; p_outdated: only those that were tagged with another version of the profile than the present one; p_after, p_limit: as in
-- backfill().
create or replace function autotag.preview_backfill(
  p_workspace_id autotag.workspace_id, p_untagged boolean, p_after autotag.asset_id, p_limit integer, p_outdated boolean default false
) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_images integer := cardinality(autotag.list_assets(p_workspace_id, p_untagged, p_after, p_limit,
    case when p_outdated then (autotag.profile_of(p_workspace_id)).version end));
  v_settings autotag.settings;
  v_batches integer := 0;
begin
  select * into v_settings from autotag.settings;
  if v_images = 0 then
    return jsonb_build_object('images', 0, 'seconds', 0, 'cost', 0, 'model', v_settings.model);
  end if;
  if autotag.choose_strategy(v_images) like 'batch%' then
    v_batches := autotag.plan_batches(v_images, v_settings.batch_batches_per_hour, v_settings.batch_images_per_hour);
  end if;
  return jsonb_build_object('images', v_images, 'seconds', autotag.estimate_seconds(v_images, v_batches),
    'cost', v_images * autotag.expected_cost(case when v_batches > 0 then 'batch' end, p_workspace_id => p_workspace_id),
    'model', v_settings.model);
end $$;

-- Makes one upload of the next p_limit existing images of a workspace (by id, after p_after): {job_id, images, last}. `last`
-- is p_after for the next call; null: no more images. Refuses what enqueue_tagging refuses. Locks: the workspace (advisory).
create or replace function autotag.backfill(
  p_workspace_id autotag.workspace_id, p_untagged boolean, p_after autotag.asset_id, p_limit integer, p_outdated boolean default false
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_assets autotag.asset_id[];
  v_job jsonb;
begin
  perform autotag.check_image_count(p_limit);
  perform autotag.lock_quotas(p_workspace_id, null);
  v_assets := autotag.list_assets(p_workspace_id, p_untagged, p_after, p_limit,
    case when p_outdated then (autotag.profile_of(p_workspace_id)).version end);
  if v_assets = '{}' then
    return jsonb_build_object('job_id', null, 'images', 0, 'last', null);
  end if;
  v_job := autotag.start_job(p_workspace_id, null, v_assets);
  return jsonb_build_object('job_id', v_job -> 'job_id', 'images', v_job -> 'image_count',
    'last', v_assets[cardinality(v_assets)]::text);
end $$;

-- Quotas: how much a workspace or a user may use per day or month.

-- Cost of one answer to the question in p_provider, in dollars: its mean, or with p_max what it reserves (an upper bound).
-- Null: the model has no price in autotag.models. p_tier: a service tier, or batch; null: the tier in the question.
create or replace function autotag.question_cost(p_provider autotag.provider_limits, p_max boolean, p_tier text default null)
returns numeric
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.price_tokens(
    p_provider.question ->> 'model', coalesce(p_tier, p_provider.question ->> 'service_tier', 'default'),
    case when p_max then p_provider.tokens_per_image - p_provider.output_tokens else p_provider.prompt_mean end, 0, 0,
    case when p_max then p_provider.output_tokens else p_provider.output_mean end);
end $$;

-- The same for the present question, and for what a workspace asks beside it (p_workspace_id null: nothing).
create or replace function autotag.expected_cost(
  p_tier text default null, p_max boolean default false, p_workspace_id autotag.workspace_id default null
) returns numeric
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.provider_for(p_workspace_id);
begin
  v_provider.question := autotag.describe_question();
  return autotag.question_cost(v_provider, p_max, p_tier);
end $$;

-- What images reserve in quotas, in dollars: an image as a single call, an image in a batch, and each token by which a cap exceeds the
-- usual cap. Without a price these are zero: no dollars can be reserved then, and autotag doctor reports it. A price of zero (a model on
-- one's own server) is a known price: such images fit into every quota of dollars.
create or replace function autotag.price_reservations(p_workspace_id autotag.workspace_id default null) returns autotag.reservation_prices
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_prices autotag.reservation_prices;
  v_question jsonb := autotag.describe_question();
begin
  v_prices.single := autotag.expected_cost(null, true, p_workspace_id);
  v_prices.batch := autotag.expected_cost('batch', true, p_workspace_id);
  v_prices.token := autotag.price_tokens(
    v_question ->> 'model', coalesce(v_question ->> 'service_tier', 'default'), 0, 0, 0, 1);
  v_prices.free := coalesce(0 = all (array[v_prices.single, v_prices.batch, v_prices.token]), false);
  v_prices.single := coalesce(v_prices.single, 0);
  v_prices.batch := coalesce(v_prices.batch, 0);
  v_prices.token := coalesce(v_prices.token, 0);
  v_prices.usual_cap := (autotag.provider_for(p_workspace_id)).output_tokens;
  return v_prices;
end $$;

-- The quotas that apply to a workspace and a user, and how much of each is used. billed: includes unusable answers. reserved: for images
-- that are being tagged, so that concurrent uploads cannot exceed the quota. An image whose answer was cut off reserves its larger
-- cap. A user quota without a workspace counts the user's images in all workspaces.
create or replace function autotag.quota_use(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_prices autotag.reservation_prices)
returns table (scope text, period text, kind text, maximum numeric, billed numeric, reserved numeric, renews_at timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_today date := (autotag.now() at time zone 'utc')::date;
begin
  return query
    with chosen as (
      select distinct on (qu.scope, qu.period) qu.*,
        date_trunc(qu.period, v_today::timestamp)::date as first_day,
        (date_trunc(qu.period, v_today::timestamp) + ('1 ' || qu.period)::interval) at time zone 'utc' as next_period
      from autotag.quotas qu
      where (qu.workspace_id is null or qu.workspace_id = p_workspace_id)
        and (qu.scope = 'workspace' or (p_user_id is not null and (qu.user_id is null or qu.user_id = p_user_id)))
      order by qu.scope, qu.period, qu.user_id is null, qu.workspace_id is null
    )
    select c.scope, c.period, k.kind, k.maximum, k.billed, k.reserved, c.next_period
    from chosen c
    cross join lateral (
      select coalesce(sum(greatest(us.requests, us.images)), 0)::numeric as answers, coalesce(sum(us.cost), 0) as cost
      from autotag.usage us
      where us.day >= c.first_day and case when c.scope = 'workspace' then us.workspace_id = p_workspace_id
        else us.user_id = p_user_id and (c.workspace_id is null or us.workspace_id = c.workspace_id) end) u
    cross join lateral (
      select coalesce(sum(n.images), 0)::numeric as images,
        coalesce(sum(n.images * n.price + n.more_tokens * p_prices.token), 0) as cost
      from (
        select j.image_count - j.completed - j.failed as images,
          case when j.strategy like 'batch%' then p_prices.batch else p_prices.single end as price,
          case when c.max_cost is null then 0 else (
            select coalesce(sum(greatest(t.min_output_tokens - p_prices.usual_cap, 0)), 0) from autotag.tasks t
            where t.job_id = j.id and t.min_output_tokens is not null and t.finished_at is null) end as more_tokens
        from autotag.jobs j
        where j.finished_at is null and case when c.scope = 'workspace' then j.workspace_id = p_workspace_id
          else j.user_id = p_user_id and (c.workspace_id is null or j.workspace_id = c.workspace_id) end) n) l
    cross join lateral (values ('images', c.max_images::numeric, u.answers, l.images), ('cost', c.max_cost, u.cost, l.cost))
      k (kind, maximum, billed, reserved)
    where k.maximum is not null;
end $$;

-- The rest of each quota: the maximum minus what is billed and reserved. images_left: how many more images that allows, at p_each
-- dollars per image (null: what the model in use reserves). Images without a cost always fit, even if the quota is used up.
create or replace function autotag.quotas_left(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_each numeric default null)
returns table (scope text, period text, kind text, maximum numeric, available numeric, images_left integer, renews_at timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_prices autotag.reservation_prices;
begin
  if not exists (select from autotag.quotas) then
    return;
  end if;
  v_prices := autotag.price_reservations(p_workspace_id);
  return query
    select u.scope, u.period, u.kind, u.maximum, greatest(u.maximum - u.billed - u.reserved, 0),
      case when u.kind = 'cost' and coalesce(p_each = 0, v_prices.free) then 2147483647
        else least(greatest(floor((u.maximum - u.billed - u.reserved) / case u.kind when 'images' then 1
          else greatest(coalesce(p_each, v_prices.single), 0.0000001) end), 0), 2147483647)::integer end, u.renews_at
    from autotag.quota_use(p_workspace_id, p_user_id, v_prices) u;
end $$;

-- Locks (advisory, until the transaction ends) the workspace of an upload, and its user where a quota counts what a user does in all
-- workspaces. So uploads at the same time, also into several workspaces, and retries of billed answers see each other's images: no
-- quota is exceeded, and no image is tagged twice.
-- p_wait false: for transactions that must not wait for a tenant's; returns false if another transaction holds a lock.
-- Called at the start of start_job(), before it reads what is left, and where images are tried again.
create or replace function autotag.lock_quotas(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_wait boolean default true) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_lock record;
begin
  for v_lock in
    select hashtextextended(x.name, 0) as key from (
      select 1 as turn, 'autotag.quotas workspace ' || p_workspace_id as name
      union all
      select 2, 'autotag.quotas user ' || p_user_id
      where p_user_id is not null and exists (select from autotag.quotas qu
        where qu.scope = 'user' and qu.workspace_id is null and coalesce(qu.user_id = p_user_id, true))) x
    order by x.turn
  loop
    if p_wait then
      perform pg_advisory_xact_lock(v_lock.key);
    elsif not pg_try_advisory_xact_lock(v_lock.key) then
      return false;
    end if;
  end loop;
  return true;
end $$;

-- Takes all locks of lock_quotas() without waiting. If one of them is not free, takes none, because a lock that it kept would delay other
-- uploads.
create or replace function autotag.try_lock_quotas(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if not autotag.lock_quotas(p_workspace_id, p_user_id, false) then
    raise lock_not_available;
  end if;
  return true;
exception when lock_not_available then
  return false;   -- the subtransaction has released what it took
end $$;

-- Refuses p_images images if a quota does not allow them: those of an upload (the caller has called lock_quotas(), so that
-- no other upload reserves the same), or those of a comparison at p_each dollars.
create or replace function autotag.check_quotas(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_images integer, p_each numeric default null)
returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_quota record;
begin
  select * into v_quota from autotag.quotas_left(p_workspace_id, p_user_id, p_each) q
  where q.images_left < p_images order by q.renews_at desc, q.images_left limit 1;
  if not found then
    return;
  end if;
  perform autotag.refuse(429, 'quota_exceeded',
    format('The %s quota of this %s allows %s more images%s.',
      case v_quota.period when 'day' then 'daily' else 'monthly' end, v_quota.scope, v_quota.images_left,
      case v_quota.period when 'day' then ' today' else ' this month' end),
    format('%s fewer images, or wait until %s UTC.', case when p_each is null then 'Upload' else 'Compare' end,
      to_char(v_quota.renews_at at time zone 'utc', 'YYYY-MM-DD HH24:MI')),
    jsonb_build_object('quota', v_quota.kind, 'scope', v_quota.scope, 'period', v_quota.period,
      'maximum', v_quota.maximum, 'left', v_quota.available, 'images_left', v_quota.images_left,
      'renews_at', v_quota.renews_at, 'retry_after', extract(epoch from v_quota.renews_at - autotag.now())));
end $$;

-- Refuses retries for which a quota has no room. An answer with usage was billed, and another try will be billed again. A retry is
-- allowed if every quota of its workspace and user has room for the price of a single call with the new cap, beside everything billed and
-- reserved. Returns the answers. Errors of refused retries become `quota_exceeded`, which ends their images. So the billed amount exceeds
-- a quota by at most one answer for each image that is being tagged.
-- The usage of p_answers counts as billed, although the caller adds it later (add_usage; p_batch and p_asked_at: as there). Uploads of
-- the same user or into the same workspace wait until this transaction has committed (lock_quotas). If one of them is running already,
-- this function does not wait for it, and decides without the lock.
create or replace function autotag.judge_retries(p_answers autotag.answer[], p_batch boolean, p_asked_at timestamptz default null)
returns autotag.answer[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_prices autotag.reservation_prices;
  v_refused jsonb;             -- {task: sentence}
begin
  if not exists (select from autotag.quotas) then
    return p_answers;
  end if;
  perform autotag.lock_quotas(o.workspace_id, o.user_id, false)
  from (select distinct a.workspace_id, j.user_id from unnest(p_answers) a join autotag.jobs j on j.id = a.job_id
    where a.error is not null and a.usage is not null) o;
  v_prices := autotag.price_reservations(p_answers[1].workspace_id);
  with tries as materialized (
    select a.task, a.workspace_id, j.user_id,
      greatest(coalesce(autotag.next_cap(a), t.min_output_tokens) - v_prices.usual_cap, 0) * v_prices.token + v_prices.single as price,
      greatest(t.min_output_tokens - v_prices.usual_cap, 0) * v_prices.token
        + case when j.strategy like 'batch%' then v_prices.batch else v_prices.single end as reserved
    from unnest(p_answers) a
    join autotag.tasks t on t.id = a.task and t.finished_at is null
    join autotag.jobs j on j.id = a.job_id and j.cancelled_at is null
    where a.usage is not null and a.error is not null and not autotag.is_final(a, t.failures)
  ), billed as materialized (
    select * from autotag.count_usage(p_answers, p_batch, null, p_asked_at)
  ), limits as materialized (
    select o.workspace_id, o.user_id, q.*, (
      select coalesce(sum(case q.kind when 'images' then greatest(b.requests, b.images) else b.cost end), 0)
      from billed b where q.scope = 'workspace' or b.user_id = o.user_id) as more_billed
    from (select distinct y.workspace_id, y.user_id from tries y) o
    cross join lateral autotag.quota_use(o.workspace_id, o.user_id, v_prices) q
  ), placed as (
    -- Instead of what the images reserve now, each in turn takes what its next answer may cost.
    select y.task, l.*, case l.kind when 'images' then row_number() over sharing - count(*) over shared
      else sum(y.price) over sharing - sum(y.reserved) over shared end as change
    from tries y join limits l on l.workspace_id = y.workspace_id and l.user_id is not distinct from y.user_id
    window shared as (partition by l.scope, l.period, l.kind, case l.scope when 'workspace' then l.workspace_id::text else l.user_id::text end),
      sharing as (shared order by y.task)
  )
  select jsonb_object_agg(f.task, format('The %s quota of this %s has no room for another try.',
    case f.period when 'day' then 'daily' else 'monthly' end, f.scope))
  into v_refused
  from (
    select distinct on (p.task) p.task, p.scope, p.period from placed p
    where p.billed + p.more_billed + p.reserved + p.change > p.maximum and not (p.kind = 'cost' and v_prices.free)
    order by p.task, p.renews_at desc) f;
  return array(
    select case when v_refused ? a.task::text then row(a.task, a.attempt, a.job_id, a.workspace_id, a.reserved_at, a.reserved_tokens,
        a.output_tokens, a.result, a.error || jsonb_build_object('kind', 'image', 'code', 'quota_exceeded', 'retry', false,
          'message', v_refused -> a.task::text), a.usage, a.called, a.mark, a.asset_id, a.brief_id)::autotag.answer else a end
    from unnest(p_answers) a);
end $$;

-- Exact sliding windows of workspaces.

-- Length of a window, and a workspace's limits in it.
create or replace function autotag.window_limits(p_workspace_id autotag.workspace_id, p_request_type text)
returns table (length interval, max_requests integer, max_units integer) rows 1
language sql stable set search_path = pg_catalog, pg_temp
as $$
  select case p_request_type when 'realtime' then interval '1 min' else interval '1 h' end,
         coalesce(wn.max_requests, case p_request_type
           when 'realtime' then s.realtime_requests_per_minute else s.batch_batches_per_hour end),
         coalesce(wn.max_units, case p_request_type
           when 'realtime' then s.realtime_tokens_per_minute else s.batch_images_per_hour end)
  from autotag.settings s
  left join autotag.windows wn on wn.workspace_id = p_workspace_id and wn.request_type = p_request_type
$$;

-- Keys of advisory locks: window_key() for the insert of a window; job_key() for an upload that is being cancelled (exclusive) or served
-- (shared).
create or replace function autotag.window_key(p_workspace_id autotag.workspace_id, p_request_type text) returns bigint
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return hashtextextended('autotag.window ' || p_request_type || p_workspace_id, 0);
end $$;

create or replace function autotag.job_key(p_job_id uuid) returns bigint
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return hashtextextended('autotag.job ' || p_job_id, 0);
end $$;

-- Takes the advisory lock for each insert of a window. claim() tries to take it first, and skips the workspace if it is not free, because
-- its own insert would wait for the other transaction.
create or replace function autotag.lock_new_window() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_advisory_xact_lock(autotag.window_key(new.workspace_id, new.request_type));
  return new;
end $$;

create or replace trigger autotag_lock_new_window before insert on autotag.windows
  for each row execute function autotag.lock_new_window();

-- Locks one window, or the right to insert it. False: another transaction holds it.
create or replace function autotag.try_window(p_workspace_id autotag.workspace_id, p_request_type text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform from autotag.windows wn
  where wn.workspace_id = p_workspace_id and wn.request_type = p_request_type for no key update skip locked;
  return found or not exists (
      select from autotag.windows wn where wn.workspace_id = p_workspace_id and wn.request_type = p_request_type)
    and pg_try_advisory_xact_lock(autotag.window_key(p_workspace_id, p_request_type));
end $$;

-- Admits up to p_wanted requests of p_units_each units each (null: what one image reserves): all or nothing, or with p_partial
-- as many as fit. If not all were admitted, retry_at is the exact time when the next fit (1 µs earlier they are refused); null:
-- they never fit. Without p_take nothing is counted.
--
-- It decides by an unlocked read and writes only if that row version is still current (ctid and xmin together identify it);
-- otherwise it reads again. So a refusal writes and locks nothing. Locks the window's row when it admits.
-- Long: check_rate_limit calls this before every API call. It takes 22 µs, and each function with a search_path of its own would
-- add 2.5 µs.
create or replace function autotag.admit(
  p_workspace_id autotag.workspace_id, p_request_type text, p_wanted integer, p_units_each integer, p_partial boolean,
  out admitted integer, out retry_at timestamptz, out at timestamptz, p_take boolean default true
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_ctid tid;                  -- the version of the window's row that was read; null: it has none yet
  v_xmin xid;
  v_test_clock boolean;
  v_length interval := case p_request_type when 'realtime' then interval '1 min' else interval '1 h' end;
  v_each integer;
  v_max_requests integer;
  v_max_units integer;
  v_at timestamptz[];          -- the window as it was read …
  v_requests integer[];
  v_units integer[];
  v_count integer;
  v_old integer;               -- … elements of it that have left it
  v_used_requests bigint;
  v_used_units bigint;
  v_need_requests bigint;      -- requests that must leave the window before the next ones fit
  v_need_units bigint;
  v_min_wanted integer;             -- the smallest number that is worth waiting for
begin
  loop
    select wn.ctid, wn.xmin, s.test_clock,
      coalesce(wn.max_requests, case p_request_type
        when 'realtime' then s.realtime_requests_per_minute else s.batch_batches_per_hour end),
      coalesce(wn.max_units, case p_request_type
        when 'realtime' then s.realtime_tokens_per_minute else s.batch_images_per_hour end),
      coalesce(p_units_each, p.tokens_per_image),
      coalesce(wn.admitted_at, '{}'), coalesce(wn.requests, '{}'), coalesce(wn.units, '{}')
    into v_ctid, v_xmin, v_test_clock, v_max_requests, v_max_units, v_each, v_at, v_requests, v_units
    from autotag.settings s
    cross join autotag.provider_limits p
    left join autotag.windows wn on wn.workspace_id = p_workspace_id and wn.request_type = p_request_type;

    -- Time never runs backwards within a row.
    v_count := cardinality(v_at);
    at := greatest(case when v_test_clock then autotag.now() else clock_timestamp() end, v_at[v_count]);
    v_old := 0;
    while v_old < v_count and v_at[v_old + 1] <= at - v_length loop
      v_old := v_old + 1;
    end loop;
    v_used_requests := 0;
    v_used_units := 0;
    for i in v_old + 1 .. v_count loop
      v_used_requests := v_used_requests + v_requests[i];
      v_used_units := v_used_units + v_units[i];
    end loop;

    admitted := least(
      p_wanted,
      greatest(v_max_requests - v_used_requests, 0),
      case when v_used_units > v_max_units then 0  -- real use was more than the estimate
        when v_each > 0 then (v_max_units - v_used_units) / v_each
        else p_wanted end);
    if not p_partial and admitted < p_wanted then
      admitted := 0;
    end if;
    exit when admitted = 0 or not p_take;

    if v_ctid is null then
      insert into autotag.windows (workspace_id, request_type) values (p_workspace_id, p_request_type)
      on conflict do nothing;
      continue;
    end if;
    if v_count > 0 and v_at[v_count] = at then
      update autotag.windows wn
      set requests = v_requests[v_old + 1 : v_count - 1] || (v_requests[v_count] + admitted),
          units = v_units[v_old + 1 : v_count - 1] || (v_units[v_count] + admitted * v_each),
          admitted_at = v_at[v_old + 1 :]
      where wn.ctid = v_ctid and wn.xmin = v_xmin;
    else
      update autotag.windows wn
      set requests = v_requests[v_old + 1 :] || admitted,
          units = v_units[v_old + 1 :] || (admitted * v_each),
          admitted_at = v_at[v_old + 1 :] || at
      where wn.ctid = v_ctid and wn.xmin = v_xmin;
    end if;
    exit when found;
  end loop;

  if admitted < p_wanted then
    v_min_wanted := case when p_partial then 1 else p_wanted end;
    if v_min_wanted <= v_max_requests and v_min_wanted::bigint * v_each <= v_max_units then
      v_need_requests := v_used_requests + admitted + v_min_wanted - v_max_requests;
      v_need_units := v_used_units + (admitted + v_min_wanted)::bigint * v_each - v_max_units;
      for i in v_old + 1 .. v_count loop
        exit when v_need_requests <= 0 and v_need_units <= 0;
        v_need_requests := v_need_requests - v_requests[i];
        v_need_units := v_need_units - v_units[i];
        retry_at := v_at[i] + v_length;
      end loop;
      -- Only requests that are admitted now are in the way. They leave after one whole window.
      if v_need_requests > 0 or v_need_units > 0 then
        retry_at := at + v_length;
      end if;
    end if;
  end if;
end $$;

-- Corrects a reservation by the real use. p_at: the time that admit() returned; a reservation that has left its window needs
-- no correction. If the use exceeds the limit, the window admits nothing until enough has left it.
create or replace function autotag.correct_window(
  p_workspace_id autotag.workspace_id, p_request_type text, p_at timestamptz, p_requests_delta integer, p_units_delta integer
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.windows wn
  set requests[array_position(wn.admitted_at, p_at)] =
        greatest(0, wn.requests[array_position(wn.admitted_at, p_at)] + p_requests_delta),
      units[array_position(wn.admitted_at, p_at)] =
        least(greatest(0, wn.units[array_position(wn.admitted_at, p_at)]::bigint + p_units_delta), 1000000000)
  where wn.workspace_id = p_workspace_id and wn.request_type = p_request_type
    and array_position(wn.admitted_at, p_at) is not null;
end $$;

-- Whether p_images fit the workspace's window, all or nothing; p_take: count them if so. retry_after: exact seconds; 0: allowed;
-- null: more than the limit, they never fit. reason: null, `window_full` (wait) or `exceeds_limit` (never).
create or replace function autotag.take_allowance(
  p_workspace_id autotag.workspace_id, p_request_type text, p_images integer, p_take boolean,
  out allowed boolean, out retry_after double precision, out reason text
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_service boolean := autotag.is_service();
  v_admission record;
begin
  -- Callers ask before each of their calls, so is_service() runs once, and check_member() only where it may refuse.
  if not v_service or p_workspace_id is null then
    perform autotag.check_member(p_workspace_id);
  end if;
  if p_request_type is null or p_request_type not in ('realtime', 'batch') then
    perform autotag.refuse(400, 'unknown_request_type', format('%L is not a request type.', left(p_request_type, 50)),
      'Pass realtime or batch.');
  end if;
  if p_images is distinct from 1 then   -- one image never exceeds a limit of images
    perform autotag.check_image_count(p_images);
  end if;
  -- A member could use up the workspace's ten batches per hour in ten calls. (A separate `if`: a subquery in the condition
  -- above would cost a service 5 µs, too.)
  if p_take and not v_service then
    if not (select s.members_may_take from autotag.settings s) then
      perform autotag.refuse(403, 'service_only', 'Only your server may call check_rate_limit.',
        'Call peek_rate_limit, or check_rate_limit with the secret key.');
    end if;
  end if;
  if p_request_type = 'realtime' then
    v_admission := autotag.admit(p_workspace_id, 'realtime', p_images, null, false, p_take);
  else
    v_admission := autotag.admit(p_workspace_id, 'batch', 1, p_images, false, p_take);
  end if;
  allowed := v_admission.admitted > 0;
  retry_after := case when allowed then 0 else extract(epoch from v_admission.retry_at - v_admission.at) end;
  reason := case when not allowed then case when retry_after is null then 'exceeds_limit' else 'window_full' end end;
end $$;

-- The mirror of the provider's bucket: requests and tokens per minute, requests per day, corrected by response headers.

-- Refills the mirror up to p_now. provider_margin's share of a minute stays unused. Calls that were released but not sent
-- (their image is still being fetched) still occupy the provider's bucket, so the mirror is capped at capacity minus unsent.
create or replace function autotag.refill(p_provider autotag.provider_limits, p_now timestamptz) returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  -- a bucket that was not used for a day, or never, is full
  v_minutes double precision := case when p_provider.refilled_at > p_now - interval '1 day'
    then greatest(0, extract(epoch from p_now - p_provider.refilled_at) / 60) else 1440 end;
  v_share double precision;    -- share of a minute's limit that may be used at once
  v_unsent integer;
  v_extra bigint;              -- tokens that the unsent calls reserve beyond the usual
begin
  select 1 - extract(epoch from s.provider_margin) / 60, u.calls, u.extra into v_share, v_unsent, v_extra
  from autotag.settings s
  cross join (select coalesce(sum(wk.unsent), 0) as calls, coalesce(sum(wk.unsent_extra), 0) as extra from autotag.workers wk) u;
  -- Limit the estimate to what one minute can hold; a first guess above a small limit would never be admitted.
  p_provider.tokens_per_image := least(p_provider.tokens_per_image, greatest((0.9 * p_provider.tokens_per_minute)::integer, 1));
  p_provider.requests_left := least(p_provider.requests_per_minute * v_share - v_unsent,
    p_provider.requests_left + v_minutes * p_provider.requests_per_minute);
  p_provider.tokens_left := least(p_provider.tokens_per_minute * v_share - v_unsent::bigint * p_provider.tokens_per_image - v_extra,
    p_provider.tokens_left + v_minutes * p_provider.tokens_per_minute);
  p_provider.day_left := case when p_provider.requests_per_day is null then 'infinity'
    else least(p_provider.requests_per_day,
      p_provider.day_left + v_minutes * p_provider.requests_per_day / 1440) end;
  p_provider.refilled_at := greatest(p_now, p_provider.refilled_at);
  return p_provider;
end $$;

-- The provider's row with a refilled bucket, without a lock: only to read.
create or replace function autotag.refilled_provider(p_now timestamptz) returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
begin
  select * into v_provider from autotag.provider_limits;
  return autotag.refill(v_provider, p_now);
end $$;

-- The same with the row locked. Every function that takes from the bucket begins here, which serializes admission. Waiting reports are
-- applied first.
create or replace function autotag.lock_provider() returns autotag.provider_limits
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
begin
  select * into v_provider from autotag.provider_limits for update;
  if exists (select from autotag.provider_reports) then
    perform autotag.apply_reports();
    select * into v_provider from autotag.provider_limits;
  end if;
  return autotag.refill(v_provider, autotag.now());
end $$;

-- Applies a report of calls about the provider. A report without news waits for the next lock_provider() if the provider row is not free,
-- and always while images are queued: the next claim comes soon, and applies all such reports at the cost of one.
-- It comes last in its transaction, which may hold locks of a tenant. A report with news may wait for the provider row, because a
-- transaction that holds it waits for no tenant's lock. Returns sentences for the operator's log: [{event, notice}]. Locks: provider.
create or replace function autotag.report_provider(p_report autotag.provider_report) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_steady boolean;            -- tagging works, and the report shows nothing new of what the provider supports and allows
  v_queued boolean;
  v_learnt record;
begin
  select p.proven_at is not null and p.account_error is null and p.has_rate_headers is not null and not exists (
      select from jsonb_each(autotag.place_unclear(p_report.observed, p)) o
      where o.value <> case o.key when 'requests_limit' then to_jsonb(p.requests_per_minute)
        when 'tokens_limit' then to_jsonb(p.tokens_per_minute)
        when 'day_limit' then coalesce(to_jsonb(p.requests_per_day), 'null') end),
    p.waiting_images > 0 and p.waiting_at > autotag.now() - interval '2 s'
  into v_steady, v_queued from autotag.provider_limits p;
  if exists (select from unnest(p_report.answers) a where a.error is not null) or not v_steady or p_report.form_changed or p_report.asked_at is not null
    or coalesce(p_report.observed ? 'retry_after', false) then
    perform autotag.lock_provider();
    return autotag.apply_report(p_report);
  end if;
  if not v_queued then
    perform from autotag.provider_limits for update skip locked;
    if found then
      perform autotag.lock_provider();
      return autotag.apply_report(p_report);
    end if;
  end if;
  v_learnt := autotag.tokens_to_learn(p_report.answers);
  insert into autotag.provider_reports (worker_id, at, requests, tokens, sent, sent_at, observed, inputs, outputs, briefs, windows)
  values (p_report.worker_id, p_report.at, p_report.requests, p_report.tokens,
    coalesce(autotag.clean_number(p_report.observed, 'sent', 0, 100000), 0),
    p_report.at - autotag.clock_interval(coalesce(autotag.clean_number(p_report.observed, 'sent_age', 0, 3600), 0)),
    nullif(p_report.observed - '{sent,sent_age}'::text[], '{}'), v_learnt.inputs, v_learnt.outputs, v_learnt.briefs, p_report.windows);
  return '[]'::jsonb;
end $$;

-- Applies all reports that wait, together. If that raises, they are dropped, because every claim comes here. The caller holds the
-- provider row.
create or replace function autotag.apply_reports() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_reports autotag.provider_reports[];
  v_sent record;
  v_sum autotag.provider_report;
begin
  with taken as (delete from autotag.provider_reports re where re.id > 0 returning re as report)
  select array_agg(t.report) into v_reports from taken t;
  -- This has a block of its own. An error of the whole function would undo the deletion, and every claim would meet it again.
  begin
    for v_sent in
      select r.worker_id as worker, sum(r.sent)::integer as calls, min(r.sent_at) as since
      from unnest(v_reports) r where r.sent > 0 group by r.worker_id
    loop
      perform autotag.record_sent(v_sent.worker, v_sent.calls, autotag.real_seconds(autotag.now() - v_sent.since));
    end loop;
    select o.observed, o.at into v_sum.observed, v_sum.at   -- the newest headers count
    from unnest(v_reports) o where o.observed is not null order by o.at desc limit 1;
    v_sum.at := coalesce(v_sum.at, autotag.now());
    select sum(r.requests), sum(r.tokens) into v_sum.requests, v_sum.tokens from unnest(v_reports) r;
    -- answers from before the question changed teach nothing
    v_sum.inputs := array(
      select unnest(r.inputs) from unnest(v_reports) r join autotag.provider_limits p on r.at >= p.question_since);
    v_sum.outputs := array(
      select unnest(r.outputs) from unnest(v_reports) r join autotag.provider_limits p on r.at >= p.question_since);
    v_sum.briefs := array(
      select unnest(r.briefs) from unnest(v_reports) r join autotag.provider_limits p on r.at >= p.question_since);
    select coalesce(jsonb_agg(w), '[]') into v_sum.windows from unnest(v_reports) r cross join lateral jsonb_array_elements(r.windows) w;
    perform autotag.apply_report(v_sum);
  exception when others or assert_failure then
    raise warning 'autotag could not apply the reports of workers: %', sqlerrm;
  end;
end $$;

-- Counts the calls that a report says were sent. The caller holds the provider row.
create or replace function autotag.apply_sent(p_report autotag.provider_report) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_report.observed ? 'sent' then
    perform autotag.record_sent(p_report.worker_id, autotag.clean_number(p_report.observed, 'sent', 0, 100000)::integer,
      coalesce(autotag.clean_number(p_report.observed, 'sent_age', 0, 3600), 0) + autotag.real_seconds(autotag.now() - p_report.at));
  end if;
end $$;

-- Applies one report: refunds, response headers, the account, and what was learned. The caller holds the provider row. Returns
-- sentences for the operator's log: [{event, notice}]. Locks: windows by workspace (skip locked).
create or replace function autotag.apply_report(p_report autotag.provider_report) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_late double precision := autotag.real_seconds(autotag.now() - p_report.at);   -- since the report was made
  v_held jsonb;
  v_changed text;
begin
  perform autotag.apply_sent(p_report);
  -- The refund comes first: after it, the headers may still lower the mirror.
  if p_report.requests <> 0 or p_report.tokens <> 0 then
    perform autotag.refund_provider(p_report.requests, p_report.tokens);
  end if;
  if p_report.observed - '{sent,sent_age}'::text[] <> '{}' then
    v_changed := autotag.update_provider_limits(p_report.observed || jsonb_build_object('age',
      coalesce(autotag.clean_number(p_report.observed, 'age', 0, 3600), 0) + v_late));
  end if;
  perform autotag.learn(p_report.inputs, p_report.outputs, null, p_report.briefs);
  if p_report.answers <> '{}' then
    perform autotag.record_outcomes(p_report.worker_id, p_report.answers, p_report.asked_at);
  end if;
  if p_report.form_changed then
    -- The new form is a new question, so answers to the old form prove nothing about it. It is tried at once.
    perform autotag.sync_question(p) from autotag.provider_limits p;
    -- A probe that was released after the report asks in the new form already.
    update autotag.provider_limits p set probe_at = null
    where p.proven_at is null and p.probe_at <= p_report.at + (select s.account_probe_interval from autotag.settings s);
  end if;
  if p_report.windows <> '[]' and p_report.at > autotag.now() - interval '1 min' then
    v_held := autotag.correct_windows(p_report.windows);
    if v_held <> '[]' then
      insert into autotag.provider_reports (at, windows) values (p_report.at, v_held);
    end if;
  end if;
  return case when v_changed is null then '[]'::jsonb
    else jsonb_build_array(jsonb_build_object('event', 'provider_limits_changed', 'notice', v_changed)) end;
end $$;

-- Records that a worker has sent p_calls of the calls released to it (or will never send them), the first one p_age real seconds ago. If
-- the mirror was full until then, it has refilled since. The caller holds the provider row.
create or replace function autotag.record_sent(p_worker uuid, p_calls integer, p_age double precision) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.refilled_provider(autotag.now());
  v_share double precision;
  v_unsent integer;
  v_extra bigint;
  v_minutes double precision := extract(epoch from autotag.clock_interval(least(greatest(p_age, 0), 3600))) / 60;
begin
  select 1 - extract(epoch from s.provider_margin) / 60, u.calls, u.extra into v_share, v_unsent, v_extra
  from autotag.settings s
  cross join (select coalesce(sum(wk.unsent), 0) as calls, coalesce(sum(wk.unsent_extra), 0) as extra from autotag.workers wk) u;
  -- a worker cannot have sent more calls than were released to it
  update autotag.workers wk
  set unsent = greatest(0, wk.unsent - greatest(p_calls, 0)),
      unsent_extra = wk.unsent_extra * greatest(0, wk.unsent - greatest(p_calls, 0)) / greatest(wk.unsent, 1)
  where wk.id = p_worker;   -- the caller has checked that the worker belongs to the login
  update autotag.provider_limits p
  set requests_left = v_provider.requests_left + case
        when v_provider.requests_left >= v_provider.requests_per_minute * v_share - v_unsent
        then v_minutes * v_provider.requests_per_minute else 0 end,
      tokens_left = v_provider.tokens_left + case
        when v_provider.tokens_left >= v_provider.tokens_per_minute * v_share
          - v_unsent::bigint * v_provider.tokens_per_image - v_extra
        then v_minutes * v_provider.tokens_per_minute else 0 end,
      day_left = v_provider.day_left, refilled_at = v_provider.refilled_at
  where p.id;
end $$;

-- Updates the mirror from response headers: {requests_limit, requests_left, tokens_limit, tokens_left (per minute), day_limit,
-- day_left (requests per day), unclear_limit, unclear_left (place_unclear), age, retry_after (at most 3600)}, each optional.
-- `age`: seconds since the call was sent; the remaining values held then, and the bucket has refilled since. A lower remaining
-- value than the mirror's is adopted (another program may use the same key), so is a changed limit, and retry_after applies to all
-- workers. Returns a sentence for the log if the limits changed, else null. The caller holds the provider row.
create or replace function autotag.update_provider_limits(p_observed jsonb) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.refilled_provider(autotag.now());
  v_seen jsonb := autotag.place_unclear(p_observed, v_provider);
  -- OpenAI's highest tier has 30,000 requests and 180 million tokens a minute (guide "Rate limits"). The lower bounds (2, 100, and
  -- one request an hour) leave room for one call. With less, no call would go out, and no header could correct the limit.
  v_requests integer := coalesce(autotag.clean_number(v_seen, 'requests_limit', 2, 1000000), v_provider.requests_per_minute);
  v_tokens integer := coalesce(autotag.clean_number(v_seen, 'tokens_limit', 100, 2000000000), v_provider.tokens_per_minute);
  -- At OpenAI only tier 1 has a daily limit; a higher limit per minute means a higher tier. Some gateways tell both in turn.
  v_day integer := coalesce(autotag.clean_number(v_seen, 'day_limit', 24, 2000000000), case
    when v_requests <= v_provider.requests_per_minute or v_provider.day_seen_at > v_provider.refilled_at - interval '10 min'
    then v_provider.requests_per_day end);
  v_minutes double precision := extract(epoch from
    autotag.clock_interval(coalesce(autotag.clean_number(v_seen, 'age', 0, 3600), 0))) / 60;
  v_retry_after double precision := autotag.clean_number(v_seen, 'retry_after', 0, 3600);
begin
  update autotag.provider_limits p
  set requests_per_minute = v_requests,
      tokens_per_minute = v_tokens,
      requests_per_day = v_day,
      day_seen_at = case when v_seen ? 'day_limit' then v_provider.refilled_at else p.day_seen_at end,
      requests_left = least(v_provider.requests_left + greatest(v_requests - p.requests_per_minute, 0),
        autotag.clean_number(v_seen, 'requests_left', 0, v_requests) + v_minutes * v_requests),
      tokens_left = least(v_provider.tokens_left + greatest(v_tokens - p.tokens_per_minute, 0),
        autotag.clean_number(v_seen, 'tokens_left', 0, v_tokens) + v_minutes * v_tokens),
      day_left = autotag.day_left_now(v_provider, v_day, autotag.clean_number(v_seen, 'day_left', 0, v_day), v_minutes),
      refilled_at = v_provider.refilled_at,
      blocked_until = greatest(p.blocked_until, v_provider.refilled_at + autotag.clock_interval(v_retry_after)),
      limited_since = case
        when v_retry_after is null then p.limited_since
        when p.limited_since is not null and p.limited_at > v_provider.refilled_at - interval '1 min' then p.limited_since
        else v_provider.refilled_at end,
      limited_at = case when v_retry_after is null then p.limited_at else v_provider.refilled_at end,
      has_rate_headers = case when v_seen ?| '{tokens_limit,requests_limit,day_limit}' then true else p.has_rate_headers end
  where p.id;
  return case when (v_requests, v_tokens, v_day) is distinct from
      (v_provider.requests_per_minute, v_provider.tokens_per_minute, v_provider.requests_per_day)
    then format('The provider''s limits are now %s (before: %s).', autotag.name_limits(v_requests, v_tokens, v_day),
      autotag.name_limits(v_provider.requests_per_minute, v_provider.tokens_per_minute, v_provider.requests_per_day)) end;
end $$;

-- Decides whether requests of an unclear period (unclear_limit, unclear_left) are per minute or per day, and returns the limits with
-- them. Most providers count minutes. A value that equals the known limit of the day, and not that of the minute, is per day, because a
-- daily limit must not overwrite a minute's limit. Clear headers take precedence.
create or replace function autotag.place_unclear(p_observed jsonb, p_provider autotag.provider_limits) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_limit double precision := autotag.clean_number(p_observed, 'unclear_limit', 0, 2000000000);
  v_kind text := case when v_limit = p_provider.requests_per_day and v_limit <> p_provider.requests_per_minute
    then 'day' else 'requests' end;
begin
  if v_limit is null or p_observed ? (v_kind || '_limit') then
    return p_observed;
  end if;
  return p_observed || jsonb_build_object(v_kind || '_limit', v_limit, v_kind || '_left', p_observed -> 'unclear_left');
end $$;

-- Requests left of the day, after headers: p_day is the limit, p_seen the number that was left p_minutes ago (null: not given).
-- A lower value than the mirror's is adopted. A higher one is adopted, too, because some providers renew the whole day at midnight, minus
-- the calls that may have been released since: those that the minute's bucket lacks or has refilled, and those not sent yet.
create or replace function autotag.day_left_now(
  p_provider autotag.provider_limits, p_day integer, p_seen double precision, p_minutes double precision
) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  -- a higher limit leaves that much more; so does the first known limit
  v_left double precision := least(p_day, p_provider.day_left + greatest(p_day - p_provider.requests_per_day, 0));
  v_since double precision := greatest(p_provider.requests_per_minute - p_provider.requests_left, 0)
    + p_minutes * p_provider.requests_per_minute + (select coalesce(sum(wk.unsent), 0) from autotag.workers wk);
begin
  return case when p_day is null then 'infinity'
    when p_seen is null then v_left
    else least(greatest(v_left, p_seen - v_since), p_seen + p_minutes * p_day / 1440) end;
end $$;

-- The provider's limits in words. p_day null: no daily limit.
create or replace function autotag.name_limits(p_requests integer, p_tokens integer, p_day integer) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return format('%s requests and %s tokens a minute%s', p_requests, p_tokens, coalesce(format(', %s requests a day', p_day), ''));
end $$;

-- How long it takes until the day's limit allows p_calls more single calls; null: at once, or there is no such limit.
create or replace function autotag.wait_for_day(p_provider autotag.provider_limits, p_calls double precision) returns interval
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_calls > p_provider.day_left
    then interval '1 day' * ((p_calls - p_provider.day_left) / p_provider.requests_per_day) end;
end $$;

-- How long waiting single calls have to wait because the day's requests are used up; null: they are not used up.
create or replace function autotag.wait_when_day_is_used_up(p_provider autotag.provider_limits) returns interval
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_provider.requests_per_day is null or p_provider.day_left >= 1 then
    return null;
  end if;
  return autotag.wait_for_day(p_provider, (select c.images from autotag.count_waiting() c));
end $$;

-- Returns reservations that calls did not use to the bucket. If calls used more than they reserved (p_tokens < 0), the bucket
-- goes no lower than minus one minute's limit, so that no report can stop tagging. Locks the provider row.
create or replace function autotag.refund_provider(p_requests integer, p_tokens bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.provider_limits
  set requests_left = requests_left + p_requests, day_left = day_left + p_requests,
      tokens_left = greatest(tokens_left + p_tokens, least(tokens_left, -tokens_per_minute))
  where id;
end $$;

-- Pauses both lanes until the probe succeeds; all tasks stay queued. p_from: the error's origin. Locks the provider row.
create or replace function autotag.pause_tagging(p_error text, p_from text default 'provider') returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  update autotag.provider_limits
  set account_error = left(p_error, 1000), account_error_from = p_from,
      account_error_at = coalesce(account_error_at, autotag.now()), proven_at = null,
      probe_at = autotag.now() + (select s.account_probe_interval from autotag.settings s)
  where id
$$;

-- Ends the pause: for any reason (p_from null: a call has succeeded), or only if its error came from p_from. Locks the provider
-- row.
create or replace function autotag.resume_tagging(p_from text default null) returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  update autotag.provider_limits
  set account_error = null, account_error_from = null, account_error_at = null, probe_at = null,
      proven_at = case when p_from is null then coalesce(proven_at, autotag.now()) else proven_at end
  where (account_error is not null or p_from is null and proven_at is null)
    and (p_from is null or account_error_from = p_from)
$$;

-- Workers: registration, heartbeats and leases.

-- Registers a worker and returns worker_settings(). p_base_url: the provider's address; p_fingerprint: hash of address and key.
-- A fingerprint other than the present one has to be proven; another address may be a provider with other features. Refuses
-- an id of another login, and more than 1,000 workers of one login. Locks: provider.
create or replace function autotag.register_worker(
  p_worker uuid, p_host text, p_version text, p_listening boolean, p_base_url text default null, p_fingerprint text default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_login name;
begin
  perform autotag.check_version(p_version);
  if p_worker is null then
    perform autotag.refuse(400, 'no_worker', 'A worker needs an id.', 'Pass a new uuid.');
  end if;
  v_login := (select wk.login from autotag.workers wk where wk.id = p_worker);
  if v_login <> session_user then
    perform autotag.refuse(403, 'not_your_worker', 'This worker belongs to another login.', 'Register with a new id.');
  elsif v_login is null and (select count(*) from autotag.workers wk where wk.login = session_user) >= 1000 then
    perform autotag.refuse(429, 'too_many_workers', 'This login already has 1,000 workers.',
      'Wait until the leases of stopped workers end.', jsonb_build_object('retry_after', 60));
  end if;
  p_base_url := autotag.printable(p_base_url, 300);
  p_fingerprint := autotag.printable(p_fingerprint, 100);
  if autotag.switch_provider(p_base_url, p_fingerprint) then
    update autotag.provider_limits
    set proven_at = null, probe_at = null, account_error = null, account_error_from = null, account_error_at = null
    where id;
  end if;
  insert into autotag.workers (id, host, version, listening, started_at, last_heartbeat_at, lease_until, resumed_at, base_url, fingerprint)
  select p_worker, coalesce(autotag.printable(p_host, 100), ''), autotag.printable(p_version, 50), coalesce(p_listening, false),
    v_now, v_now, v_now + s.lease, case when autotag.is_silent(v_now) then v_now else '-infinity' end, p_base_url, p_fingerprint
  from autotag.settings s
  on conflict (id) do update set version = excluded.version, listening = excluded.listening, last_heartbeat_at = excluded.last_heartbeat_at,
    lease_until = excluded.lease_until, resumed_at = greatest(autotag.workers.resumed_at, excluded.resumed_at), unsent = 0, unsent_extra = 0, base_url = excluded.base_url,
    fingerprint = excluded.fingerprint
  where autotag.workers.login = session_user;
  return autotag.worker_settings();
end $$;

-- The settings that a worker needs, as JSON.
create or replace function autotag.worker_settings() returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object(
    'batch_max_bytes', s.batch_max_bytes, 'lease_seconds', autotag.real_seconds(s.lease))
  from autotag.settings s
$$;

-- Whether a worker never received the reply of this claim: its list lacks the claim. A claim with a higher number than the last one in
-- the list does not count, because the worker made the list before it. An empty list lacks every claim.
create or replace function autotag.is_lost(p_claim integer, p_claims integer[]) returns boolean
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select p_claim <> all (p_claims) and p_claim <= coalesce((select max(c) from unnest(p_claims) c), p_claim)
$$;

-- Extends the worker's lease. alive: false if the lease had ended and what the worker held has been released, so it has to
-- register again. lost: the worker holds images of a claim that it does not list in p_claims, or batches of one that it does not list
-- in p_batch_claims, because the reply was lost; it calls release_lost() next. tick_due: the worker calls tick_if_due() next, in a
-- transaction of its own, because a tick takes many locks. settings: the present worker_settings(). The worker follows them, so each
-- heartbeat sets a lease_until that matches the lease that the worker knows.
create or replace function autotag.heartbeat(
  p_worker uuid, p_claims integer[], p_batch_claims integer[], out alive boolean, out lost boolean, out tick_due boolean,
  out settings jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_version text;
begin
  update autotag.workers wk
  set last_heartbeat_at = v_now, lease_until = v_now + (select s.lease from autotag.settings s),
      resumed_at = case when autotag.is_silent(v_now) then v_now else wk.resumed_at end
  where wk.id = p_worker and wk.login = session_user returning wk.version into v_version;
  alive := found;
  if alive then
    perform autotag.check_version(v_version);
  end if;
  lost := exists (select from autotag.tasks t where t.id = any (autotag.leased_tasks(p_worker)) and autotag.is_lost(t.claim, p_claims))
    or exists (select from autotag.batches b where b.worker_id = p_worker and autotag.is_lost(b.claim, p_batch_claims));
  tick_due := autotag.is_tick_due(v_now);
  settings := autotag.worker_settings();
end $$;

-- Whether there are workers and none has sent a heartbeat for half a lease. Workers send three heartbeats in a lease, so the database was
-- unreachable.
create or replace function autotag.is_silent(p_now timestamptz) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select max(wk.last_heartbeat_at) < p_now - (select s.lease from autotag.settings s) / 2 from autotag.workers wk);
end $$;

-- Whether the lease of a worker has ended and expire_worker() may release its work. Workers that could not reach the database may still
-- hold answers that were paid for. So no worker expires while none sends heartbeats, nor for one lease after the first heartbeat that
-- follows. (While none sends heartbeats, no other worker could take the work.) After a day the work is released in any case.
create or replace function autotag.can_expire(p_now timestamptz) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select min(wk.lease_until) < p_now and (min(wk.lease_until) < p_now - interval '1 day'
      or max(wk.last_heartbeat_at) >= p_now - s.lease and max(wk.resumed_at) <= p_now - s.lease)
    from autotag.settings s, autotag.workers wk group by s.lease);
end $$;

-- Whether a worker has a row and belongs to the caller. A worker without a row must get no work, because nothing would release it again.
-- Locks the row, so that expire_worker() cannot delete it before the transaction ends. (lease_until may have passed: can_expire()
-- decides.) It waits for the worker's own heartbeat, but not for expire_worker(), which takes long if a worker held much.
create or replace function autotag.lock_worker(p_worker uuid) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform from autotag.workers wk where wk.id = p_worker and wk.login = session_user for no key update skip locked;
  if not found and exists (select from autotag.workers wk where wk.id = p_worker and wk.lease_until > autotag.now()) then
    perform from autotag.workers wk where wk.id = p_worker and wk.login = session_user for no key update;
  end if;
  return found;
end $$;

-- Whether the worker must get no work, because its address or key is not the one in use, and a live worker has the one in use. Only one
-- fingerprint is in use at a time: that of the worker that registered last, until it fails and a worker with another one is alive.
-- Otherwise a worker with a wrong address, which fails fast, would get most images, and each of them would have a failure.
create or replace function autotag.asks_another_provider(p_worker uuid, p_provider autotag.provider_limits) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.workers wk where wk.id = p_worker and wk.fingerprint <> p_provider.fingerprint)
    and exists (select from autotag.workers wk where wk.fingerprint = p_provider.fingerprint and wk.lease_until > autotag.now());
end $$;

-- Handles an account error of these workers. If one of them uses the fingerprint in use, and a live worker has another one, that other
-- fingerprint comes into use, so the next probe goes to its workers. The caller holds the provider row.
create or replace function autotag.offer_switch(p_workers uuid[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_fingerprint text := (select p.fingerprint from autotag.provider_limits p);
  v_next autotag.workers;
begin
  if not exists (select from autotag.workers wk where wk.id = any (p_workers) and wk.fingerprint = v_fingerprint) then
    return;
  end if;
  select * into v_next from autotag.workers wk
  where wk.fingerprint <> v_fingerprint and wk.lease_until > autotag.now()
  order by wk.fingerprint > v_fingerprint desc, wk.fingerprint limit 1;
  if found then
    perform autotag.switch_provider(v_next.base_url, v_next.fingerprint);
  end if;
end $$;

-- Makes this address and key the present ones. What was learned about another address is reset. False: they were already, or
-- there is no fingerprint. Locks the provider row.
create or replace function autotag.switch_provider(p_base_url text, p_fingerprint text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.provider_limits p
  set fingerprint = p_fingerprint, base_url = p_base_url, fingerprint_since = autotag.now(), checked_at = '-infinity',
      has_batches = case when p.base_url = p_base_url then p.has_batches end,
      batches_refused = coalesce(p.base_url = p_base_url, false) and p.batches_refused,
      has_rate_headers = case when p.base_url = p_base_url then p.has_rate_headers end,
      keep_files = case when p.base_url = p_base_url then p.keep_files else 604800 end
  where p_fingerprint is not null and p.fingerprint is distinct from p_fingerprint;
  return found;
end $$;

-- The single calls that a worker holds: released, unfinished tasks of unfinished jobs.
create or replace function autotag.leased_tasks(p_worker uuid) returns bigint[]
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select coalesce(array_agg(t.id), '{}')
  from autotag.queues q
  join autotag.tasks t on t.job_id = q.job_id and t.id <= q.reached and t.lane = 'realtime'
    and t.retry_at is null and t.finished_at is null
  where q.reached > 0 and t.worker_id = p_worker
$$;

-- Releases the work of a worker, except that of the claims p_claims and p_batch_claims. p_cause: `stopped`; `lost` (the worker never
-- received it: a failure of each image is counted); or `crashed` (the lease has ended: see blame_crash()). Returns how many tasks and
-- batches it released, and whether there are more: it skips rows that another transaction holds (the worker's last report, a
-- cancellation).
-- Locks: batches, tasks (both skip locked); job (skip locked), its batch's tasks; the worker.
create or replace function autotag.release_held(
  p_worker uuid, p_claims integer[], p_batch_claims integer[], p_cause text, out released integer, out more boolean
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tasks bigint[] := array(
    select t.id from autotag.tasks t where t.id = any (autotag.leased_tasks(p_worker)) and autotag.is_lost(t.claim, p_claims)
    order by t.id for update skip locked);
  v_batches uuid[] := array(
    select b.id from autotag.batches b where b.worker_id = p_worker and autotag.is_lost(b.claim, p_batch_claims)
    order by b.id for update skip locked);
begin
  -- Wait until OpenAI shows what the worker's last request may have created, before another worker looks for it.
  update autotag.batches b
  set worker_id = null, crashes = b.crashes + (p_cause = 'crashed' and b.state in ('preparing', 'uploading'))::integer,
      not_before = case when b.state <> 'creating' then b.not_before
        else autotag.now() + (select s.batch_create_grace from autotag.settings s) end
  where b.id = any (v_batches);
  if p_cause = 'crashed' then
    perform autotag.take_apart(v_batches);
  end if;
  perform autotag.keep(autotag.requeue(case when p_cause = 'crashed' then autotag.blame_crash(v_tasks)
    else (select jsonb_agg(jsonb_build_object('task', id, 'failures', (p_cause = 'lost')::integer,
      'code', 'worker_lost', 'message', 'Tagging this image was interrupted too often.')) from unnest(v_tasks) id) end), false)
  where v_tasks <> '{}';
  perform pg_notify('autotag', 'realtime') where v_tasks <> '{}';
  perform pg_notify('autotag', 'batch') where v_batches <> '{}';
  -- A lost call was never sent, so it no longer counts as unsent. (The row of a worker that ends is deleted.)
  update autotag.workers wk
  set unsent = greatest(0, wk.unsent - cardinality(v_tasks)),
      unsent_extra = wk.unsent_extra * greatest(0, wk.unsent - cardinality(v_tasks)) / greatest(wk.unsent, 1)
  where wk.id = p_worker and v_tasks <> '{}';
  released := cardinality(v_tasks) + cardinality(v_batches);
  more := exists (select from autotag.batches b where b.worker_id = p_worker and autotag.is_lost(b.claim, p_batch_claims))
    or exists (select from autotag.tasks t where t.id = any (autotag.leased_tasks(p_worker)) and autotag.is_lost(t.claim, p_claims));
end $$;

-- Counts a crash for each of the images that a dead worker held, because any of them may be the cause. Returns their tries for
-- requeue(). A failure is counted only for the image with the most crashes, and only if no other image has as many. (An image that kills
-- its worker is in every crash; other images are in a crash only by chance.) To tell them apart, images with two crashes are released one
-- at a time (hold_suspects), and images with more crashes later than others. After 3 * max_failures crashes an image fails in any case.
-- The caller holds the tasks.
create or replace function autotag.blame_crash(p_tasks bigint[]) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_settings autotag.settings;
  v_tries jsonb;
begin
  select * into v_settings from autotag.settings;
  update autotag.tasks t set crashes = coalesce(t.crashes, 0) + 1 where t.id = any (p_tasks);
  with held as (
    select t.id, t.crashes, rank() over (order by t.crashes desc) as place, count(*) over (partition by t.crashes) as equals
    from autotag.tasks t where t.id = any (p_tasks)
  )
  select jsonb_agg(jsonb_build_object(
    'task', h.id, 'code', 'worker_lost', 'message', 'Tagging this image was interrupted too often.',
    'failures', case when h.crashes >= 3 * v_settings.max_failures then v_settings.max_failures
      else (h.place = 1 and h.equals = 1)::integer end,
    'delay', coalesce(autotag.growing_delay(h.crashes - 2, v_settings), 0)))
  into v_tries from held h;
  return v_tries;
end $$;

-- Sends the images of a batch as single calls if three workers died while they built its file: failures of single calls show which
-- image is the cause. A batch whose upload another transaction holds is built once more. The caller holds the batches and the provider row.
-- Locks: job (skip locked), tasks.
create or replace function autotag.take_apart(p_batches uuid[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
  v_reason constant text := 'Workers stopped while they prepared a batch of these images, so they are sent as single calls.';
begin
  for v_batch in
    select b.* from autotag.batches b where b.id = any (p_batches) and b.state in ('preparing', 'uploading') and b.crashes >= 3 order by b.id
  loop
    perform from autotag.jobs j where j.id = v_batch.job_id for no key update skip locked;
    continue when not found;
    perform autotag.requeue_batch(v_batch, false, 0, 'worker_lost', 'Tagging this image was interrupted too often.');
    perform autotag.end_batch(v_batch, v_reason);
    update autotag.jobs j set fallback = v_reason where j.id = v_batch.job_id;
  end loop;
end $$;

-- Releases everything that a worker holds, and deletes the worker, because it stops. Returns how many tasks and batches it released. If
-- another transaction holds some of them, the worker's lease ends now instead, and tick() releases the rest.
create or replace function autotag.release_worker(p_worker uuid) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_release record;
begin
  if not autotag.is_own_worker(p_worker) then
    return 0;
  end if;
  perform from autotag.workers wk where wk.id = p_worker for update;
  v_release := autotag.release_held(p_worker, '{}', '{}', 'stopped');
  if v_release.more then
    update autotag.workers wk set lease_until = autotag.now() where wk.id = p_worker;
  else
    delete from autotag.workers wk where wk.id = p_worker;
  end if;
  return v_release.released;
end $$;

-- Releases the work of a worker except that of these claims. A worker calls it after heartbeat() said that replies of claims were lost.
-- A failure of each image is counted, so that an image whose report the worker cannot deliver is not requested for ever.
create or replace function autotag.release_lost(p_worker uuid, p_claims integer[], p_batch_claims integer[]) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_ids(greatest(cardinality(p_claims), cardinality(p_batch_claims)));
  if not autotag.is_own_worker(p_worker) then
    return 0;
  end if;
  return (autotag.release_held(p_worker, coalesce(p_claims, '{}'), coalesce(p_batch_claims, '{}'), 'lost')).released;
end $$;

-- Releases the work of one worker whose lease has ended, if can_expire() allows it, and deletes the worker. If another transaction holds
-- some of the work, the next tick goes on. One worker per transaction. Returns whether work was released. Called by tick().
-- Locks: provider (first, because a transaction that holds it may wait for a worker's row, as record_sent() does); the worker's row,
-- for which the worker itself does not wait (lock_worker); release_held.
create or replace function autotag.expire_worker() returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_worker uuid;
begin
  if not coalesce(autotag.can_expire(autotag.now()), false) then
    return false;
  end if;
  perform from autotag.provider_limits for update;
  select wk.id into v_worker from autotag.workers wk
  where wk.lease_until < autotag.now() order by wk.lease_until, wk.id limit 1 for update skip locked;
  if not found then
    return false;
  end if;
  if (autotag.release_held(v_worker, '{}', '{}', 'crashed')).more then
    update autotag.workers wk set lease_until = autotag.now() where wk.id = v_worker;   -- so others with ended leases come first
    return false;
  end if;
  delete from autotag.workers wk where wk.id = v_worker;
  return true;
end $$;

-- Where a worker finds the images it is about to read.

-- Whether a signed-in user may see a file of Storage, by the policies on storage.objects. The role authenticated owns it, so row level
-- security applies as it does to the user. The user's token is not available here: a policy sees only its `sub` and `role`, and a policy
-- that needs more refuses.
create or replace function autotag.may_see_file(p_user_id autotag.user_id, p_bucket text, p_path text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_visible boolean := false;
begin
  if current_user <> 'authenticated' or p_user_id is null or p_path is null then
    return false;
  end if;
  perform set_config('request.jwt.claims', jsonb_build_object('sub', p_user_id::text, 'role', 'authenticated')::text, true);
  v_visible := exists (select from storage.objects o where o.bucket_id = p_bucket and o.name = p_path);
  perform set_config('request.jwt.claims', '', true);
  return v_visible;
exception when others then
  perform set_config('request.jwt.claims', '', true);
  return false;
end $$;

do $$
begin
  grant create on schema autotag to authenticated;   -- needed to own a function, for this moment
  alter function autotag.may_see_file owner to authenticated;
  revoke create on schema autotag from authenticated;
exception when insufficient_privilege then
  raise warning 'This login cannot give a function to the role authenticated, so a file that replaces another while it is tagged counts as hidden.';
end $$;

-- The location of each image, as describe_assets() returns it. An image has a location only if its uploader was allowed to see this file
-- at enqueue, or is allowed to see it now. p_users[i]: the uploader; null: the service role.
-- refused: as in describe_assets(), or `hidden_file` (the uploader may not see it). A row that no longer exists or has
-- moved to another workspace is missing from the result. If the host's rows cannot be read together, each is read by itself, and
-- one that raises is refused: as `unreadable_row`, or as `unreadable_now` where the error may pass (the adapter is being changed, a
-- page of the table cannot be read). Then the worker reports a transient error, so its slot is free, and the image is tried again.
-- p_workspace_ids[i], p_visible_marks[i]: tasks.workspace_id and tasks.visible_mark of p_asset_ids[i].
create or replace function autotag.locate(
  p_asset_ids autotag.asset_id[], p_workspace_ids autotag.workspace_id[], p_visible_marks uuid[], p_users autotag.user_id[], p_limited boolean default false
)
returns table (asset_id autotag.asset_id, bucket text, path text, url text, refused text, mark uuid)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- locate_together() reads all rows before it returns the first, because an error would not take back what return query has returned.
  return query select l.* from autotag.locate_together(p_asset_ids, p_workspace_ids, p_visible_marks, p_users, p_limited) l;
exception when others or assert_failure then
  if cardinality(p_asset_ids) = 1 then
    raise warning 'autotag could not read the row of image %: %', p_asset_ids[1], sqlerrm;
    -- the first are errors that the data of a row can cause
    return query select p_asset_ids[1], null::text, null::text, null::text,
      case when left(sqlstate, 2) in ('22', '23', 'P0', '09') then 'unreadable_row' else 'unreadable_now' end, null::uuid;
    return;
  elsif autotag.is_lock_error(sqlstate) then
    raise;   -- probably another transaction holds the whole table, and each row would wait again
  end if;
  return query
    select l.* from generate_subscripts(p_asset_ids, 1) i
    cross join lateral autotag.locate(p_asset_ids[i : i], p_workspace_ids[i : i], p_visible_marks[i : i], p_users[i : i]) l;
end $$;

-- The same; raises if one row does. p_limited: a policy of the host may be slow, and images of other workspaces are in the same claim. So
-- files that replaced others are looked at for one second, at least one of them; the others are `unchecked`, and the worker asks again.
create or replace function autotag.locate_together(
  p_asset_ids autotag.asset_id[], p_workspace_ids autotag.workspace_id[], p_visible_marks uuid[], p_users autotag.user_id[], p_limited boolean
)
returns table (asset_id autotag.asset_id, bucket text, path text, url text, refused text, mark uuid)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    with described as materialized (
      select * from autotag.describe_assets(p_asset_ids)
    ), budget as materialized (   -- begins when all rows are read
      select case when p_limited then clock_timestamp() + interval '1 s' else 'infinity' end as ends_at from (select count(*) from described) counted
    )
    select d.asset_id, case when r.refused is null then d.bucket end, case when r.refused is null then d.path end,
      case when r.refused is null then d.url end, r.refused, d.mark
    from unnest(p_asset_ids, p_workspace_ids, p_visible_marks, p_users) t (asset_id, workspace_id, visible_mark, user_id)
    join described d on d.asset_id = t.asset_id and d.workspace_id = t.workspace_id
    cross join budget bu
    cross join lateral (select case
      when d.refused is not null then d.refused
      when (t.visible_mark = d.file_mark) is not false then null   -- the same file, or none that has to be visible
      when clock_timestamp() > bu.ends_at then 'unchecked'
      when not autotag.may_see_file(t.user_id, d.bucket, d.path) then 'hidden_file' end as refused
      offset 0  -- evaluate the case once per image, not once per use
    ) r;
end $$;

-- The order of single calls: fair among workspaces, and within each of them.

-- Counts new queues in their workspaces. A workspace with nothing queued starts at the virtual time of the one served last, so its
-- idle time gives it no credit and no penalty. The caller holds the provider row.
create or replace function autotag.join_queues(p_virtual_time double precision) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  with new as (
    update autotag.queues q set joined = true where not q.joined returning q.workspace_id, q.queued
  )
  insert into autotag.workspaces as ws (workspace_id, queued, virtual_time)
  -- A queue can be empty (a batch without express images). Its workspace gets a row, too, because requeue_due() adds to it.
  select n.workspace_id, sum(n.queued), p_virtual_time from new n group by n.workspace_id
  on conflict (workspace_id) do update
  set queued = ws.queued + excluded.queued, ready = true,
      virtual_time = case when ws.queued > 0 then ws.virtual_time else greatest(ws.virtual_time, p_virtual_time) end;
end $$;

-- Makes sure that images that were in two crashes of workers (blame_crash) are released one at a time in each workspace, so that the next
-- crash shows which of them is the cause. While one is queued or in flight, the others wait for another second. Called by requeue_due().
-- Locks: tasks (skip locked).
create or replace function autotag.hold_suspects(p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
begin
  with suspects as (
    select t.id, t.retry_at, row_number() over (partition by t.workspace_id order by t.retry_at nulls first, t.id) as turn
    from autotag.tasks t where t.crashes >= 2 and t.finished_at is null and t.retry_at is distinct from 'infinity'
  ), early as (
    select t.id from autotag.tasks t
    where t.id = any (array(select x.id from suspects x where x.turn > 1 and x.retry_at <= p_now)) order by t.id for update skip locked
  )
  update autotag.tasks t set retry_at = p_now + interval '1 s' from early e where t.id = e.id;
end $$;

-- Puts requeued tasks that are due into their queues. Tasks whose upload was cancelled meanwhile end instead. The caller holds the
-- provider row. Locks: tasks (skip locked: those of an upload that is being cancelled).
create or replace function autotag.requeue_due(p_now timestamptz, p_virtual_time double precision) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_queue record;
begin
  if not exists (select from autotag.tasks t where t.retry_at <= p_now) then
    return;
  end if;
  perform autotag.keep(array(
    select row(t.id, t.job_id, t.asset_id, null, 'cancelled', 'Tagging was cancelled.', null)::autotag.finished
    from autotag.tasks t join autotag.jobs j on j.id = t.job_id where t.retry_at <= p_now and j.cancelled_at is not null
    order by t.id for update of t skip locked), false);   -- keep() would wait
  perform autotag.hold_suspects(p_now);
  for v_queue in
    with due as (
      select t.id from autotag.tasks t where t.retry_at <= p_now order by t.id limit 10000 for update skip locked
    ), freed as (
      update autotag.tasks t set retry_at = null from due where t.id = due.id
      returning t.workspace_id, t.job_id, t.id, t.min_output_tokens
    )
    select f.workspace_id, f.job_id, count(*)::integer as tasks, min(f.id) as first_task, max(f.min_output_tokens) as output_tokens
    from freed f group by f.workspace_id, f.job_id
  loop
    insert into autotag.queues as q (job_id, workspace_id, joined, queued, overdue_at, cursor, output_tokens)
    values (v_queue.job_id, v_queue.workspace_id, false, v_queue.tasks, autotag.patience_ends_at(v_queue.tasks, p_now),
      v_queue.first_task - 1, v_queue.output_tokens)
    on conflict (job_id) do update
    set queued = q.queued + v_queue.tasks,
        overdue_at = case when q.queued = 0 then excluded.overdue_at else q.overdue_at end, cursor = least(q.cursor, v_queue.first_task - 1),
        output_tokens = greatest(q.output_tokens, v_queue.output_tokens);
    -- the workspace has no row yet if all its images were in batches
    insert into autotag.workspaces as ws (workspace_id, queued, virtual_time)
    select q.workspace_id, v_queue.tasks, p_virtual_time from autotag.queues q where q.job_id = v_queue.job_id and q.joined
    on conflict (workspace_id) do update
    set queued = ws.queued + excluded.queued, ready = true,
        virtual_time = case when ws.queued > 0 then ws.virtual_time else greatest(ws.virtual_time, p_virtual_time) end;
  end loop;
  perform autotag.join_queues(p_virtual_time);
end $$;

-- Checks the counts of queues and workspaces, and corrects those that are wrong; deletes the queues of finished uploads. Retries
-- workspaces whose next image exceeds the window's limit: the limit may have been raised. Called by tick(). Locks: provider.
create or replace function autotag.repair_queues() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
begin
  perform autotag.lock_provider();
  -- This is one look-up per queue. A join may read all jobs that ever finished.
  delete from autotag.queues q where (select j.finished_at from autotag.jobs j where j.id = q.job_id) is not null;
  -- A queue that is empty by its count, although tasks wait in it.
  update autotag.queues q set queued = c.waiting, cursor = c.first_task - 1
  from (
    select empty.job_id, n.* from autotag.queues empty
    cross join lateral (
      select count(*)::integer as waiting, min(t.id) as first_task from autotag.tasks t
      where t.job_id = empty.job_id and t.lane = 'realtime' and t.worker_id is null and t.retry_at is null and t.finished_at is null) n
    where empty.queued = 0) c
  where q.job_id = c.job_id and c.waiting > 0;
  insert into autotag.workspaces (workspace_id, virtual_time)
  select q.workspace_id, p.virtual_time from autotag.queues q, autotag.provider_limits p where q.joined and q.queued > 0
  on conflict do nothing;
  update autotag.workspaces ws set queued = c.queued
  from (
    select counted.workspace_id, coalesce(sum(q.queued) filter (where q.joined), 0)::integer as queued
    from autotag.workspaces counted left join autotag.queues q on q.workspace_id = counted.workspace_id and q.queued > 0
    group by counted.workspace_id) c
  where ws.workspace_id = c.workspace_id and ws.queued <> c.queued;
  if found then
    perform pg_notify('autotag', 'realtime');
  end if;
  update autotag.workspaces ws set ready = true where not ws.ready and ws.queued > 0 and ws.ready_at = 'infinity';
end $$;

-- Releases up to p_slots images while the provider's bucket has room. The workspace with the lowest virtual time is served first,
-- one turn at a time. tokens: the sum of what the images reserve; virtual_time: that of the workspace served last.
-- Called by claim(), which holds the provider row. Locks: windows by workspace (skip locked), queued tasks.
create or replace function autotag.release_in_turn(
  p_worker uuid, p_slots integer, p_provider autotag.provider_limits,
  out ids bigint[], out tokens bigint, out virtual_time double precision
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := p_provider.refilled_at;
  v_room integer := autotag.room_left(p_provider, p_slots);   -- images that may still be released
  v_turn integer;              -- images of one workspace before the next one is served
  v_workspaces autotag.workspace_id[];
  v_workspace autotag.workspaces;
  v_released record;
begin
  ids := array[]::bigint[];
  tokens := 0;
  virtual_time := p_provider.virtual_time;
  if v_room < 1 then
    return;
  end if;
  -- A turn is chunk_size images or 50 ms (a minute / 1200) of the provider's throughput, at most 1,000, whichever is larger.
  -- Within 50 ms, users do not notice the order.
  v_turn := (select s.chunk_size from autotag.settings s);
  v_turn := greatest(v_turn, least(1000, p_provider.requests_per_minute / 1200,
    p_provider.tokens_per_minute / p_provider.tokens_per_image / 1200));
  -- The first workspaces that fill the room together.
  v_workspaces := array(
    select x.workspace_id from (
      select w.workspace_id, sum(least(w.queued, v_turn)) over turns - least(w.queued, v_turn) as before
      from (
        select ws.workspace_id, ws.queued, ws.virtual_time from autotag.workspaces ws where ws.ready and ws.queued > 0
        order by ws.virtual_time, ws.workspace_id limit v_room) w
      window turns as (order by w.virtual_time, w.workspace_id)) x
    where x.before < v_room);
  v_workspaces := autotag.lock_windows(v_workspaces, v_now);

  while v_room > 0 loop
    select * into v_workspace from autotag.workspaces ws
    where ws.ready and ws.queued > 0 and ws.workspace_id = any (v_workspaces)
    order by ws.virtual_time, ws.workspace_id limit 1;
    exit when not found;
    v_released := autotag.release_tasks(v_workspace, p_worker, v_room, v_turn, p_provider, p_provider.tokens_left - tokens, v_now);
    ids := ids || v_released.ids;
    tokens := tokens + v_released.tokens;
    virtual_time := greatest(virtual_time, v_workspace.virtual_time);
    v_room := least(v_room - cardinality(v_released.ids), floor((p_provider.tokens_left - tokens) / p_provider.tokens_per_image));
  end loop;
end $$;

-- Locks the windows of these workspaces, and returns the workspaces that can be served now. If another transaction holds a window (a
-- tenant's, which called check_rate_limit), its workspace is not ready for a second. The caller holds the provider row.
-- Locks: windows by workspace (skip locked); for a workspace without one, the right to insert it (advisory).
create or replace function autotag.lock_windows(p_workspaces autotag.workspace_id[], p_now timestamptz) returns autotag.workspace_id[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_free autotag.workspace_id[] := array(
    select wn.workspace_id from autotag.windows wn
    where wn.workspace_id = any (p_workspaces) and wn.request_type = 'realtime' order by wn.workspace_id for no key update skip locked);
begin
  if cardinality(v_free) < cardinality(p_workspaces) then
    v_free := v_free || array(
      select w from unnest(p_workspaces) w
      where w <> all (v_free)
        and not exists (select from autotag.windows wn where wn.workspace_id = w and wn.request_type = 'realtime')
        and pg_try_advisory_xact_lock(autotag.window_key(w, 'realtime')));
    update autotag.workspaces ws set ready = false, ready_at = p_now + interval '1 s'
    where ws.workspace_id = any (p_workspaces) and ws.workspace_id <> all (v_free);
  end if;
  return v_free;
end $$;

-- How many images the provider's bucket has room for, at most p_slots. While the question is not proven: one (the probe),
-- and none before probe_at.
create or replace function autotag.room_left(p_provider autotag.provider_limits, p_slots integer) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when p_provider.blocked_until > p_provider.refilled_at then 0
    when p_provider.proven_at is null and p_provider.probe_at > p_provider.refilled_at then 0
    else least(p_slots, case when p_provider.proven_at is null then 1 end, floor(p_provider.requests_left),
      floor(p_provider.day_left), floor(p_provider.tokens_left / p_provider.tokens_per_image)) end;
end $$;

-- The tokens that each image of an upload reserves, and how many of them are for its answer (the cap).
create or replace function autotag.reserve_for(p_queue autotag.queues, p_provider autotag.provider_limits, out each integer, out cap integer)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_brief autotag.briefs := autotag.job_brief(p_queue.job_id, p_provider);
begin
  cap := coalesce(v_brief.output_tokens, p_provider.output_tokens);
  each := coalesce(v_brief.tokens_per_image, p_provider.tokens_per_image) + greatest(p_queue.output_tokens - cap, 0);
  if v_brief.id is not null then
    each := autotag.fit_window(each, p_queue.workspace_id);
  end if;
end $$;

-- Releases the next images of one workspace: from its ready queue with the fewest released, at most one turn, and no more than
-- its window admits. If it can release none, the workspace is not ready until the time when it can.
-- An image reserves what its brief needs. If an answer of the job was cut off, each image reserves the larger cap of that retry.
-- p_tokens_left: the tokens in the provider's bucket. tokens: the sum of what the images reserve.
-- Called by release_in_turn(), which holds the locks.
create or replace function autotag.release_tasks(
  p_workspace autotag.workspaces, p_worker uuid, p_room integer, p_turn integer, p_provider autotag.provider_limits,
  p_tokens_left double precision, p_now timestamptz, out ids bigint[], out tokens bigint
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_queue autotag.queues := autotag.next_queue(p_workspace.workspace_id, p_now);
  v_admitted record;
  v_each integer;              -- tokens that each image reserves
  v_cap integer;               -- the cap on its answer
  v_ready_at timestamptz;      -- when the workspace becomes ready; null: now
begin
  ids := '{}';
  tokens := 0;
  if v_queue.job_id is null then
    v_ready_at := (
      select min(q.ready_at) from autotag.queues q where q.workspace_id = p_workspace.workspace_id and q.joined and q.queued > 0);
    if v_ready_at is null then   -- its last queue was deleted with its job
      update autotag.workspaces ws set queued = 0 where ws.workspace_id = p_workspace.workspace_id;
      return;
    end if;
  else
    select r.each, r.cap into v_each, v_cap from autotag.reserve_for(v_queue, p_provider) r;
    if v_each > p_provider.tokens_per_image then
      -- Wait until the bucket holds this many tokens. An image that needs 90% of a minute's limit or more does not wait, because
      -- the bucket may never hold so much.
      if floor(p_tokens_left / v_each) < 1 and v_each < 0.9 * p_provider.tokens_per_minute then
        v_ready_at := p_now + interval '1 min' * (v_each - p_tokens_left) / p_provider.tokens_per_minute;
      end if;
      p_room := least(p_room, greatest(floor(p_tokens_left / v_each), 1));
    end if;
    if v_ready_at is null then
      v_admitted := autotag.admit(p_workspace.workspace_id, 'realtime',
        least(p_room, v_queue.queued, p_turn, v_queue.chunk), v_each, true);
      if v_admitted.admitted = 0 then
        -- An image that can never fit its workspace's window waits until the limit is changed.
        v_ready_at := coalesce(v_admitted.retry_at, 'infinity');
      end if;
    end if;
  end if;
  if v_queue.job_id is null or v_ready_at is not null then
    update autotag.workspaces ws set ready = false, ready_at = v_ready_at
    where ws.workspace_id = p_workspace.workspace_id;
    return;
  end if;

  ids := autotag.take_tasks(v_queue, p_worker, v_admitted.admitted, v_admitted.at, v_each, v_cap, p_now);
  tokens := cardinality(ids)::bigint * v_each;
  if cardinality(ids) < v_admitted.admitted then   -- the upload was cancelled
    perform autotag.correct_window(p_workspace.workspace_id, 'realtime', v_admitted.at,
      cardinality(ids) - v_admitted.admitted, (cardinality(ids) - v_admitted.admitted) * v_each);
  end if;
end $$;

-- When an upload becomes overdue, that is when newer uploads may no longer pass it. p_images of its single calls have waited since
-- p_since. It is overdue upload_patience later; with more than chunk_max_images images, longer in proportion. Without a Batch API an
-- upload can be 50,000 single calls. If it went first after two minutes, other users would wait hours for one image.
create or replace function autotag.patience_ends_at(p_images integer, p_since timestamptz) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select p_since + s.upload_patience * greatest(1, p_images::double precision / greatest(s.chunk_max_images, 1)) from autotag.settings s);
end $$;

-- The next queue of a workspace: of its ready queues the one that has been overdue longest, or if none is overdue, the one with the
-- fewest released images. So small uploads pass large ones. Still, every upload ends, because only uploads that became overdue earlier
-- pass an overdue upload. Null: no queue is ready. A queue that was committed after join_queues() is left to the next claim, because its
-- workspace does not count it yet. A queue whose upload is being cancelled in an open transaction is not ready for a second.
-- Locks: its job (advisory, shared).
create or replace function autotag.next_queue(p_workspace_id autotag.workspace_id, p_now timestamptz) returns autotag.queues
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_queue autotag.queues;
begin
  loop
    select * into v_queue from autotag.queues q
    where q.workspace_id = p_workspace_id and q.joined and q.queued > 0 and q.overdue_at <= p_now and q.ready_at <= p_now
    order by q.overdue_at, q.job_id limit 1;
    if not found then
      select * into v_queue from autotag.queues q
      where q.workspace_id = p_workspace_id and q.joined and q.queued > 0 and q.ready_at <= p_now
      order by q.released, q.job_id limit 1;
    end if;
    exit when not found or pg_try_advisory_xact_lock_shared(autotag.job_key(v_queue.job_id));
    update autotag.queues q set ready_at = p_now + interval '1 s' where q.job_id = v_queue.job_id;
  end loop;
  return v_queue;
end $$;

-- Assigns the next p_count tasks of a queue to a worker, in upload order, counts them and returns their ids. p_at: when the
-- workspace's window admitted them; p_tokens: the tokens that each reserves there; p_output_tokens: the cap of their answers.
-- Called by release_tasks(). Locks: tasks.
create or replace function autotag.take_tasks(
  p_queue autotag.queues, p_worker uuid, p_count integer, p_at timestamptz, p_tokens integer, p_output_tokens integer, p_now timestamptz
) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
  v_gone integer;
begin
  with taken as (
    update autotag.tasks t
    set worker_id = p_worker, claim = (select wk.claim from autotag.workers wk where wk.id = p_worker), attempt = t.attempt + 1,
        reserved_at = p_at, reserved_tokens = p_tokens, output_tokens = greatest(t.min_output_tokens, p_output_tokens)
    where t.id = any (array(
      select waiting.id from autotag.tasks waiting
      where waiting.job_id = p_queue.job_id and waiting.id > p_queue.cursor
        and waiting.lane = 'realtime' and waiting.worker_id is null and waiting.retry_at is null and waiting.finished_at is null
      order by waiting.id limit p_count))
    returning t.id
  )
  select coalesce(array_agg(x.id order by x.id), '{}') into v_ids from taken x;

  -- Fewer tasks than counted: the queue's count is wrong. Set it to 0, or every claim would try again.
  v_gone := case when cardinality(v_ids) < p_count then p_queue.queued else cardinality(v_ids) end;
  update autotag.queues q
  set queued = q.queued - v_gone, released = q.released + cardinality(v_ids),
      cursor = coalesce(v_ids[cardinality(v_ids)], q.cursor),
      reached = greatest(q.reached, v_ids[cardinality(v_ids)]),
      output_tokens = case when q.queued > v_gone then q.output_tokens end,
      -- no delay for an overdue upload, or newer ones would pass it meanwhile
      ready_at = case when q.chunk is null or q.overdue_at <= p_now then q.ready_at
        else p_now + (select s.chunk_delay from autotag.settings s) end
  where q.job_id = p_queue.job_id;
  update autotag.workspaces ws
  set queued = ws.queued - v_gone, virtual_time = ws.virtual_time + cardinality(v_ids)
  where ws.workspace_id = p_queue.workspace_id;
  return v_ids;
end $$;

-- The only function that releases single calls, within every limit and in fair order.

-- claim: releases up to p_slots images (at most 1,000) of all workspaces to a worker as single calls, within the provider's
-- bucket and each workspace's window. The workspace with the lowest virtual time is served first, a few images at a time; within
-- it, the job with the fewest released images.
-- p_claim: the number of the claim: the worker's last one plus 1. If the reply was lost, a second call with the same number returns
-- the same images. p_question: the version of the question that the worker has; null: none.
--   tasks: ids of the released tasks; describe_tasks() says what they are.
--   wait: seconds until the next claim, unless a notification comes first; null: nothing is queued.
--   bound: why not more images were released; null: no more are queued.
--   question: what to ask about these images (describe_question() and its `version`); null: the worker has this version.
--
-- While the question is not proven (it is new, or tagging is paused), one image tries it. The next one does if the first has no
-- result after account_probe_interval. So a mistake in the configuration costs one call, and fails no image.
--
-- It holds the provider row, which every tenant needs. So it never waits for a lock that a tenant's transaction can hold, and
-- does not read the host's tables.
--
-- Plans are cached (force_generic_plan), because planning each release again takes a third of the claim. They always use the
-- indexes (enable_seqscan = off), because a plan made while the tables are almost empty must serve a million images. That makes
-- the scan of the one row of settings look expensive, which would start jit, so jit is off.
-- Locks: provider, windows (skip locked), then queued tasks (next_queue() keeps off those of a job that is being cancelled).
create or replace function autotag.claim(
  p_worker uuid, p_slots integer, p_claim integer, out tasks bigint[], out wait double precision, out bound text,
  p_question bigint default null, out question jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan' set random_page_cost = 1.1
  set enable_seqscan = off set jit = off
as $$
declare
  v_provider autotag.provider_limits;
  v_now timestamptz;
  v_released record;
begin
  tasks := '{}';
  p_slots := least(p_slots, 1000);   -- even with an escaped URL of 8 kB for each, describe_tasks() returns less than 50 MB
  if p_slots is null or p_slots < 1 or p_claim is null then
    return;
  end if;
  v_provider := autotag.sync_question(autotag.lock_provider());
  v_now := v_provider.refilled_at;
  if v_provider.question_version is distinct from p_question then
    question := v_provider.question || jsonb_build_object('version', v_provider.question_version);
  end if;
  if not autotag.lock_worker(p_worker) then
    wait := 1;  -- its next heartbeat returns false, and it registers again
    bound := 'lease';
    return;
  end if;
  if (select wk.claim from autotag.workers wk where wk.id = p_worker) >= p_claim then
    tasks := array(select t.id from autotag.tasks t where t.id = any (autotag.leased_tasks(p_worker)) and t.claim = p_claim order by t.id);
    wait := 0;
    return;
  end if;
  if autotag.asks_another_provider(p_worker, v_provider) then
    wait := autotag.real_seconds((select s.account_probe_interval from autotag.settings s));
    bound := 'superseded';
    return;
  end if;
  perform autotag.requeue_due(v_now, v_provider.virtual_time);
  perform autotag.join_queues(v_provider.virtual_time);
  if not v_provider.rerouted and autotag.reroute_upload(v_provider) then
    update autotag.provider_limits set rerouted = true where id;
    wait := 0;
    return;
  end if;

  update autotag.workspaces ws set ready = true where not ws.ready and ws.queued > 0 and ws.ready_at <= v_now;
  update autotag.workers wk set claim = p_claim where wk.id = p_worker;
  v_released := autotag.release_in_turn(p_worker, p_slots, v_provider);
  v_provider.virtual_time := v_released.virtual_time;
  v_provider := autotag.take_from_bucket(v_provider, cardinality(v_released.ids), v_released.tokens);
  tasks := v_released.ids;
  update autotag.workers wk
  set unsent = wk.unsent + cardinality(tasks),
      unsent_extra = wk.unsent_extra + greatest(v_released.tokens - cardinality(tasks)::bigint * v_provider.tokens_per_image, 0)
  where wk.id = p_worker and tasks <> '{}';
  bound := case when cardinality(tasks) = p_slots then 'slots' else autotag.describe_bound(v_provider) end;
  -- After an upload was rerouted, another one may be due.
  wait := case when v_provider.rerouted then 0 else autotag.real_seconds(autotag.next_release(v_provider) - v_now) end;
end $$;

-- Changes how one upload is processed, if that is due. True: the claim releases nothing and is called again at once. The next claim
-- only releases, so that no number of due uploads delays other images. False: nothing is due. Called by claim(), which holds the
-- provider row. Locks: one upload's job, batches, tasks (all skip locked).
create or replace function autotag.reroute_upload(p_provider autotag.provider_limits) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := p_provider.refilled_at;
  v_wait interval;
begin
  -- 429s have persisted for realtime_max_wait: single calls that have waited as long go into batches.
  if p_provider.limited_since <= v_now - (select s.realtime_max_wait from autotag.settings s)
     and p_provider.limited_at > v_now - interval '1 min' and p_provider.has_batches is distinct from false
     and autotag.single_calls_to_batch(v_now, null, 'The AI service kept refusing single calls, so the rest of these images go by batch.') then
    return true;
  end if;
  v_wait := coalesce(autotag.wait_when_day_is_used_up(p_provider), interval '0');   -- not null, because `null and f()` calls f()
  if p_provider.has_batches is distinct from false and v_wait > (select s.realtime_max_wait from autotag.settings s)
    and autotag.single_calls_to_batch(v_now, v_wait,
      'The AI service allows no more single calls today, so the rest of these images go by batch.') then
    return true;
  end if;
  -- When these batches were planned, nobody knew that the provider has no Batch API.
  if p_provider.has_batches is false and autotag.batches_to_single_calls(v_now) then
    return true;
  end if;
  -- The question is not proven and only batches wait: one of their images tries it as a single call.
  return p_provider.proven_at is null and coalesce(p_provider.probe_at, v_now) <= v_now and autotag.release_probe();
end $$;

-- Subtracts released images from the mirror of the provider's bucket, and returns the provider's new row. At most once a second
-- it also counts the waiting images, for predict_wait(). Called by claim(), which holds the provider row.
create or replace function autotag.take_from_bucket(p_provider autotag.provider_limits, p_images integer, p_tokens bigint)
returns autotag.provider_limits
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  p_provider.requests_left := p_provider.requests_left - p_images;
  p_provider.tokens_left := p_provider.tokens_left - p_tokens;
  p_provider.day_left := p_provider.day_left - p_images;
  if p_provider.proven_at is null and p_images > 0 then
    p_provider.probe_at := p_provider.refilled_at + (select s.account_probe_interval from autotag.settings s);
  end if;
  if p_provider.waiting_at < p_provider.refilled_at - interval '1 s' then
    select c.workspaces, c.images, p_provider.refilled_at
    into p_provider.waiting_workspaces, p_provider.waiting_images, p_provider.waiting_at
    from autotag.count_waiting() c;
  end if;
  update autotag.provider_limits p
  set requests_left = p_provider.requests_left,
      tokens_left = p_provider.tokens_left,
      day_left = p_provider.day_left,
      refilled_at = p_provider.refilled_at,
      virtual_time = p_provider.virtual_time,
      waiting_workspaces = p_provider.waiting_workspaces,
      waiting_images = p_provider.waiting_images,
      waiting_at = p_provider.waiting_at,
      rerouted = false,
      probe_at = p_provider.probe_at
  where p.id;
  return p_provider;
end $$;

-- describe_tasks: what a worker needs for the tasks that a claim has released to it, by id: [{task, attempt, workspace, job,
-- traceparent, waited (seconds since the upload), asset_id, bucket, path, url, refused, mark, cap (max tokens of the answer), brief}]. An
-- asset that does not exist any more has neither path nor url. This function reads the host's tables, and claim() does not. So a
-- transaction that holds a whole table delays only this call.
create or replace function autotag.describe_tasks(p_worker uuid, p_tasks bigint[]) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set random_page_cost = 1.1 set enable_seqscan = off set jit = off
as $$
begin
  perform set_config('request.jwt.claims', '', true);   -- the host's file rule trusts these claims
  perform autotag.check_ids(cardinality(p_tasks));
  if not autotag.is_own_worker(p_worker) then
    return '[]'::json;
  end if;
  return (
    with released as materialized (
      select t.id, t.attempt, t.asset_id, t.workspace_id, t.visible_mark, t.job_id, t.output_tokens from autotag.tasks t
      where t.id = any (p_tasks) and t.worker_id = p_worker
    ), uploads as materialized (
      select j.id, j.user_id, j.traceparent, j.brief_id, round(autotag.real_seconds(autotag.now() - j.created_at)::numeric, 3) as waited
      from autotag.jobs j where j.id = any (array(select r.job_id from released r))
    )
    select coalesce(json_agg(i order by i.task), '[]')
    from (
      select r.id as task, r.attempt, r.workspace_id::text as workspace, u.id as job, u.traceparent, u.waited, r.asset_id::text, r.output_tokens as cap, u.brief_id as brief,
        d.bucket, d.path, d.url, d.refused, d.mark
      from released r join uploads u on u.id = r.job_id
      left join autotag.locate(array(select asset_id from released order by id),
        array(select workspace_id from released order by id), array(select visible_mark from released order by id),
        array(select u.user_id from released o join uploads u on u.id = o.job_id order by o.id), true) d
        on d.asset_id = r.asset_id) i);
end $$;

-- Counts a failure for each of these images, and tries them again later. A worker calls it after describe_tasks() ended its session for
-- each of them alone (a damaged row crashes the server process). Ignores tasks that the worker does not hold. Locks: tasks by id (skip
-- locked).
create or replace function autotag.report_unreadable(p_worker uuid, p_tasks bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_settings autotag.settings;
  v_tries jsonb;
begin
  perform autotag.check_ids(cardinality(p_tasks));
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  select * into v_settings from autotag.settings;
  select jsonb_agg(jsonb_build_object('task', h.id, 'failures', 1, 'delay', autotag.growing_delay(h.failures, v_settings),
    'code', 'unreadable_row', 'message', 'The image''s row in the database cannot be read.'))
  into v_tries
  from (
    select t.id, t.failures from autotag.tasks t where t.id = any (p_tasks) and t.worker_id = p_worker
    order by t.id for update skip locked) h;
  if v_tries is not null then
    perform autotag.keep(autotag.requeue(v_tries), false);
    perform pg_notify('autotag', 'realtime');
  end if;
end $$;

-- Why a claim with free slots released no more; null: nothing is queued. p_provider: the row after the claim.
create or replace function autotag.describe_bound(p_provider autotag.provider_limits) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when not exists (select from autotag.workspaces ws where ws.queued > 0) then null
    when p_provider.blocked_until > p_provider.refilled_at then 'retry_after'
    when p_provider.account_error is not null then 'account'
    when p_provider.proven_at is null then 'unproven'
    when not exists (select from autotag.workspaces ws where ws.ready and ws.queued > 0) then 'workspaces'
    when p_provider.tokens_left < p_provider.tokens_per_image then 'provider_tokens'
    when p_provider.requests_left < 1 then 'provider_requests'
    else 'provider_day' end;
end $$;

-- When the next image can be released: the bucket has room for one, a workspace becomes ready, or a delayed task is due.
-- null: only after new images are queued. p_provider: the row after the claim.
create or replace function autotag.next_release(p_provider autotag.provider_limits) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select min(due) from (
    select greatest(p_provider.refilled_at, p_provider.blocked_until, case when p_provider.proven_at is null then p_provider.probe_at end,
      p_provider.refilled_at + interval '1 min' * greatest(
        (1 - p_provider.requests_left) / p_provider.requests_per_minute,
        (1 - p_provider.day_left) / (p_provider.requests_per_day / 1440.0),
        (p_provider.tokens_per_image - p_provider.tokens_left) / p_provider.tokens_per_minute))
    where exists (select from autotag.workspaces ws where ws.ready and ws.queued > 0)
    union all
    select greatest(p_provider.blocked_until, w.ready_at)
    from (select ws.ready_at from autotag.workspaces ws where not ws.ready and ws.queued > 0 order by ws.ready_at limit 1) w
    where w.ready_at < 'infinity'
    union all
    select min(t.retry_at) from autotag.tasks t where t.retry_at < 'infinity'
    union all  -- batches become single calls: reroute_upload() left them, because another transaction held their upload
    select p_provider.refilled_at + autotag.clock_interval(1) where p_provider.has_batches is false
      and exists (select from autotag.batches b where b.state in ('planned', 'preparing', 'uploading') and b.worker_id is null)
    union all  -- the day is used up: waiting calls may become due for a batch
    select p_provider.refilled_at + interval '1 min' where p_provider.day_left < 1 and p_provider.has_batches is distinct from false
      and exists (select from autotag.workspaces ws where ws.queued > 0)
  ) as due_times (due));
end $$;

-- The order of batches, and which of them have room in their workspace's window and in the provider's queue.

-- How full the provider's queue of batch tokens is, and whether all waiting batches fit into it together.
create or replace function autotag.measure_batch_queue(p_provider autotag.provider_limits, p_now timestamptz) returns autotag.batch_queue
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_queue autotag.batch_queue;
begin
  v_queue.tokens := (select coalesce(sum(b.reserved_tokens), 0) from autotag.batches b where b.reserved_tokens > 0);
  v_queue.short := v_queue.tokens + (
    select coalesce(sum((b.image_count - b.express_count)::bigint * p_provider.tokens_per_image + b.extra_tokens), 0) from autotag.batches b
    where b.state = 'planned' and b.worker_id is null and b.not_before <= p_now) > p_provider.queued_batch_tokens;
  v_queue.patient_since := case when v_queue.short
    then p_now - (select s.batch_patience from autotag.settings s) else '-infinity' end;
  return v_queue;
end $$;

-- Whether batches must wait: the question is not proven, and an image can try it as a single call.
create or replace function autotag.must_prove_first(p_provider autotag.provider_limits) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return p_provider.proven_at is null and (autotag.has_single_calls() or exists (
    select from autotag.batches b where b.state = 'planned' and b.image_count - b.express_count > 1));
end $$;

-- The next batches to work on, at most p_slots, in the order that claim_batches() describes. The planned batches of one workspace
-- leave one of the worker's slots free. A large upload keeps a worker busy for minutes, and other workspaces would wait for it.
create or replace function autotag.rank_batches(
  p_worker uuid, p_slots integer, p_provider autotag.provider_limits, p_queue autotag.batch_queue, p_now timestamptz
) returns uuid[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_unproven boolean := autotag.must_prove_first(p_provider);
  v_held autotag.workspace_id[] := array(select b.workspace_id from autotag.batches b where b.worker_id = p_worker);
  v_share integer := greatest(p_slots + cardinality(v_held) - 1, 1);
begin
  return array(
    with ready as (
      select b.id, b.workspace_id, b.state, b.ordinal, b.created_at, t.tokens, t.since,
        b.ordinal > 1 and t.since > p_queue.patient_since as later
      from autotag.batches b
      cross join lateral (
        select (b.image_count - b.express_count)::bigint * p_provider.tokens_per_image + b.extra_tokens as tokens,
               greatest(b.created_at, b.not_before) as since) t
      where b.worker_id is null and b.not_before <= p_now
        and (b.state in ('ended', 'harvesting', 'creating')
          or b.state in ('planned', 'preparing', 'uploading') and not v_unproven and p_provider.has_batches is distinct from false)
        and (b.state <> 'planned' or t.since <= p_queue.patient_since
          or p_queue.tokens = 0 or p_queue.tokens + t.tokens <= p_provider.queued_batch_tokens)
    ), ranked as (
      select r.id, r.workspace_id, r.state, row_number() over (
        order by r.state in ('ended', 'harvesting') desc, r.state = 'planned', r.later,
          -- the workspace's tokens in the queue, plus those of its batches ahead of this one
          case when p_queue.short and r.state = 'planned' then coalesce(q.tokens, 0) - r.tokens + r.tokens_until end,
          r.since, r.created_at, r.ordinal) as place
      from (
        select r.*, sum(r.tokens) over (
          partition by r.workspace_id, r.state = 'planned' order by r.later, r.since, r.created_at, r.ordinal) as tokens_until
        from ready r) r
      left join (
        select b.workspace_id, sum(b.reserved_tokens) as tokens
        from autotag.batches b where b.reserved_tokens > 0 group by b.workspace_id
      ) q on q.workspace_id = r.workspace_id
    )
    select x.id
    from (
      select r.id, r.state, r.place, row_number() over (partition by r.workspace_id order by r.place)
        + (select count(*) from unnest(v_held) h where h = r.workspace_id) as nth
      from ranked r) x
    where x.state <> 'planned' or x.nth <= v_share
    order by x.place limit p_slots);
end $$;

-- Assigns the candidates that can go now to a worker, in their order: a batch in progress continues, and a planned one starts if
-- its workspace's window and the provider's queue have room. again: a batch found no room in its window, so the worker should claim
-- again at once to get those behind it. A batch whose row or window another transaction holds is left out for a second. Called by
-- claim_batches(), which holds the provider row. Locks: windows by workspace, batches by id (both skip locked).
create or replace function autotag.take_batches(
  p_worker uuid, p_candidates uuid[], p_provider autotag.provider_limits, p_queue autotag.batch_queue, p_now timestamptz,
  out ids uuid[], out again boolean
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_free uuid[];
  v_batch autotag.batches;
  v_images integer;
  v_tokens bigint;
  v_held boolean := false;     -- the rest of the provider's queue is kept for a batch that others may no longer overtake
begin
  ids := array[]::uuid[];
  again := false;
  v_free := autotag.lock_candidates(p_candidates, p_now);
  for v_batch in
    select b.* from unnest(p_candidates) with ordinality c (id, i)
    join autotag.batches b on b.id = c.id
    where b.worker_id is null and b.id = any (v_free) order by c.i
  loop
    if v_batch.state = 'planned' then
      v_images := v_batch.image_count - v_batch.express_count;
      if v_batch.admitted_at is null and autotag.put_off(v_batch, p_now) then
        again := true;
        continue;
      end if;
      v_tokens := v_images::bigint * p_provider.tokens_per_image + v_batch.extra_tokens;
      -- An empty queue takes any batch, because waiting could not make more room.
      if v_held or p_queue.tokens > 0 and p_queue.tokens + v_tokens > p_provider.queued_batch_tokens then
        v_held := v_held or greatest(v_batch.created_at, v_batch.not_before) <= p_queue.patient_since;
        continue;
      end if;
      if v_batch.admitted_at is null then
        select a.at into v_batch.admitted_at
        from autotag.admit(v_batch.workspace_id, 'batch', 1, v_images, false) a where a.admitted > 0;
        if not found then  -- a concurrent check_rate_limit took the room
          again := true;
          continue;
        end if;
      end if;
      p_queue.tokens := p_queue.tokens + v_tokens;
      v_batch.reserved_tokens := v_tokens;
    end if;
    perform autotag.assign_batch(v_batch, p_worker, p_provider, p_now);
    ids := ids || v_batch.id;
  end loop;
end $$;

-- Locks these batches, and the windows of those that are not admitted yet. Returns the batches that can be assigned now. A batch whose
-- window another transaction holds is left out for a second. Locks: as in take_batches(); the right to insert a window (advisory).
create or replace function autotag.lock_candidates(p_candidates uuid[], p_now timestamptz) returns uuid[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_workspaces autotag.workspace_id[];
  v_free autotag.workspace_id[];
  v_batches uuid[] := array(
    select b.id from autotag.batches b where b.id = any (p_candidates) order by b.id for no key update skip locked);
begin
  v_workspaces := array(
    select distinct b.workspace_id from autotag.batches b
    where b.id = any (v_batches) and b.state = 'planned' and b.admitted_at is null);
  v_free := array(
    select wn.workspace_id from autotag.windows wn
    where wn.request_type = 'batch' and wn.workspace_id = any (v_workspaces)
    order by wn.workspace_id for no key update skip locked);
  v_free := v_free || array(
    select w from unnest(v_workspaces) w
    where w <> all (v_free)
      and not exists (select from autotag.windows wn where wn.workspace_id = w and wn.request_type = 'batch')
      and pg_try_advisory_xact_lock(autotag.window_key(w, 'batch')));
  with held as (
    update autotag.batches b set not_before = p_now + interval '1 s'
    where b.id = any (v_batches) and b.state = 'planned' and b.admitted_at is null and b.workspace_id <> all (v_free)
    returning b.id
  )
  select array(select unnest(v_batches) except select h.id from held h) into v_batches;
  return v_batches;
end $$;

-- Puts a planned batch off until its workspace's window has room for it, so that other workspaces do not wait. False: there is room.
-- not_before `infinity`: the window never has room with the present limits, and split_oversized() splits the batch. All batches of the
-- workspace that cannot have room either, because they are later or larger, are put off, too. (One by one, 3,000 batches took 751
-- claims.) The caller holds the provider row and the batch. Locks: batches (skip locked).
create or replace function autotag.put_off(p_batch autotag.batches, p_now timestamptz) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_images integer := p_batch.image_count - p_batch.express_count;
  v_max_requests integer := (select l.max_requests from autotag.window_limits(p_batch.workspace_id, 'batch') l);
  v_ahead integer;             -- planned batches of earlier uploads, which need room in the same window
  v_later_at timestamptz;      -- when the window has room for one more batch after those; null: now
  v_larger_at timestamptz;     -- when it has room for these images; null: now
begin
  -- The first batch of an upload goes before later batches of earlier uploads, but it must not take the room in the window that
  -- they were planned for.
  select count(*) into v_ahead from autotag.batches b
  where b.workspace_id = p_batch.workspace_id and b.state = 'planned' and b.admitted_at is null
    and b.created_at < p_batch.created_at;
  -- Ask for a whole window at most. More would never fit, and this batch would wait for ever.
  select coalesce(a.retry_at, 'infinity') into v_later_at
  from autotag.admit(p_batch.workspace_id, 'batch', least(v_ahead + 1, v_max_requests), 0, false, p_take => false) a where a.admitted = 0;
  select coalesce(a.retry_at, 'infinity') into v_larger_at
  from autotag.admit(p_batch.workspace_id, 'batch', 1, v_images, false, p_take => false) a where a.admitted = 0;
  if v_later_at is null and v_larger_at is null then
    return false;
  end if;
  update autotag.batches b
  set waits_for_window = true, not_before = greatest(case when b.created_at >= p_batch.created_at then v_later_at end,
    case when b.image_count - b.express_count >= v_images then v_larger_at end)
  where b.id in (
    select behind.id from autotag.batches behind
    where behind.workspace_id = p_batch.workspace_id and behind.state = 'planned' and behind.worker_id is null
      and behind.admitted_at is null and behind.not_before <= p_now
      and (v_later_at is not null and behind.created_at >= p_batch.created_at
        or v_larger_at is not null and behind.image_count - behind.express_count >= v_images)
    for no key update skip locked);
  return true;
end $$;

-- Assigns a batch to a worker and sets the state in which it continues. p_batch has its new admitted_at and reserved_tokens.
-- The caller holds its row.
create or replace function autotag.assign_batch(
  p_batch autotag.batches, p_worker uuid, p_provider autotag.provider_limits, p_now timestamptz
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  -- Its file asks an older question. In state `uploading` the worker finds the file by its name, deletes it and builds a new one.
  v_brief autotag.briefs := autotag.job_brief(p_batch.job_id, p_provider);
  v_stale boolean := p_batch.state = 'planned' and coalesce(p_batch.asked_at < p_provider.question_since, false);
begin
  update autotag.batches b
  set worker_id = p_worker, claim = (select wk.batch_claim from autotag.workers wk where wk.id = p_worker), attempt = b.attempt + 1,
      admitted_at = p_batch.admitted_at, reserved_tokens = p_batch.reserved_tokens,
      output_tokens = case when b.input_file_id is null or v_stale then coalesce(v_brief.output_tokens, p_provider.output_tokens) else b.output_tokens end,
      asked_at = case when b.input_file_id is null or v_stale then p_now else b.asked_at end,
      keep_files = p_provider.keep_files,
      input_file_id = case when v_stale then null else b.input_file_id end,
      state = case
        when b.state = 'planned' and b.input_file_id is null then 'preparing'
        when b.state = 'planned' and v_stale then 'uploading'
        when b.state = 'planned' then 'creating'
        when b.state = 'ended' then 'harvesting'
        else b.state end
  where b.id = p_batch.id;
end $$;

-- Assigns batches to workers, which build or harvest them, within the workspaces' windows and the provider's queue.

-- How many more batches a workspace can start within its window, after its planned ones (so the number may be negative), and the
-- most images that one window admits. Reads only.
create or replace function autotag.batches_left(p_workspace_id autotag.workspace_id, out batches integer, out window_images integer)
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select (l.max_requests - coalesce(sum(wn.requests[i]) filter (where wn.admitted_at[i] > autotag.now() - l.length), 0))::integer
           - (select count(*)::integer from autotag.batches b where b.workspace_id = p_workspace_id and b.state = 'planned'),
         l.max_units
  from autotag.window_limits(p_workspace_id, 'batch') l
  left join autotag.windows wn on wn.workspace_id = p_workspace_id and wn.request_type = 'batch'
  left join lateral generate_subscripts(wn.admitted_at, 1) i on true
  group by l.max_requests, l.max_units
$$;

-- claim_batches: assigns at most p_slots whole batches to a worker, and the poll of the provider if it is due. p_claim: the number
-- of the claim, as in claim(); a second call with the same number returns the same batches. p_question: the version of the question
-- that the worker has; null: none.
--   batches: [{batch, attempt, state, image_count, since, cancelled, openai_batch_id, input_file_id, output_file_id,
--     error_file_id, keep_files, brief}], in the order to work on them: batches that OpenAI has finished, batches in progress (they hold
--     queued tokens), the first batch of each upload, the others. If the provider's queue is too short for all of them, the
--     workspace with the fewest tokens in it goes first. Smaller batches overtake one that does not fit, until it has waited for
--     batch_patience; after that no planned batch starts before it. A workspace leaves one slot of each worker to the others.
--     since: epoch seconds; the batch and its files at OpenAI are not older. keep_files: seconds after which the provider is to
--     delete its files; null: the provider supports no expiry.
--   poll: [{id, since}] of all batches in flight if a poll is due, else null.
--   cancel: ids of those to cancel at OpenAI now (take_cancellations).
--   files: ids of files to delete at OpenAI (reported with files_deleted).
--   unrecorded: [{id, since}] of batches that are over and may have input files at OpenAI whose ids nobody recorded. The worker
--     finds those by the batch's name, deletes them, and reports the batches with files_deleted, too.
--   question: as in claim().
--   look_up: name of the model to check at the provider now (provider_checked), else null.
--   wait: seconds until the next call; null: wait for a notification.
-- While the question is not proven, no batch starts: single calls try it first, if necessary with an image of a planned batch
-- (release_probe). Locks: provider, windows by workspace, batches by id (both skip locked).
create or replace function autotag.claim_batches(
  p_worker uuid, p_slots integer, p_claim integer,
  out batches jsonb, out poll jsonb, out cancel jsonb, out files jsonb, out wait double precision,
  p_question bigint default null, out question jsonb, out look_up text, out unrecorded jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.sync_question(autotag.lock_provider());
  v_now timestamptz := greatest(v_provider.refilled_at, v_provider.question_since);  -- so asked_at shows that it asks this question
  v_settings autotag.settings;
  v_slots integer := least(greatest(coalesce(p_slots, 0), 0), 1000);
  v_queue autotag.batch_queue;
  v_taken record;
  v_polls record;
begin
  select * into v_settings from autotag.settings;
  batches := '[]'; files := '[]';
  if v_provider.question_version is distinct from p_question then
    question := v_provider.question || jsonb_build_object('version', v_provider.question_version);
  end if;
  if p_claim is null or not autotag.lock_worker(p_worker) then
    wait := 1;  -- its next heartbeat returns false, and it registers again
    return;
  end if;
  if (select wk.batch_claim >= p_claim from autotag.workers wk where wk.id = p_worker) then
    batches := autotag.describe_batches(array(
      select b.id from autotag.batches b where b.worker_id = p_worker and b.claim = p_claim order by b.created_at, b.ordinal));
    wait := 0;
    return;
  end if;
  update autotag.workers wk set batch_claim = p_claim where wk.id = p_worker;
  if autotag.asks_another_provider(p_worker, v_provider) then
    wait := autotag.real_seconds(v_settings.account_probe_interval);
    return;
  end if;
  if v_provider.account_error is not null then
    if v_provider.probe_at > v_now then
      wait := autotag.real_seconds(v_provider.probe_at - v_now);
      return;
    end if;
    v_slots := least(v_slots, 1);
  end if;

  v_queue := autotag.measure_batch_queue(v_provider, v_now);
  v_taken := autotag.take_batches(p_worker, autotag.rank_batches(p_worker, v_slots, v_provider, v_queue, v_now), v_provider, v_queue, v_now);
  batches := autotag.describe_batches(v_taken.ids);
  perform pg_notify('autotag', 'realtime') where v_provider.proven_at is null;  -- that lane sends the probe
  v_polls := autotag.assign_poll(p_worker, v_provider, v_settings, v_now);
  poll := v_polls.poll; cancel := v_polls.cancel; files := v_polls.files; unrecorded := v_polls.unrecorded; look_up := v_polls.look_up;
  v_provider.next_poll_at := v_polls.next_poll_at;
  update autotag.provider_limits p
  set next_poll_at = v_provider.next_poll_at,
      probe_at = case when p.account_error is null or v_taken.ids = '{}' then p.probe_at
        else v_now + v_settings.account_probe_interval end,
      -- if this worker does not report, another one checks the model in 10 minutes
      checked_at = case when look_up is null then p.checked_at else v_now - v_settings.model_check_interval + interval '10 min' end where p.id;
  wait := case when v_taken.again then 0
    else autotag.real_seconds(autotag.next_batch_claim(v_provider, files <> '[]', v_now) - v_now) end;
end $$;

-- Assigns the poll of the provider to a worker if it is due (claim_batches: poll, cancel, files, unrecorded, look_up). next_poll_at:
-- the new value in the provider's row. Called by claim_batches(), which holds that row and the worker's.
create or replace function autotag.assign_poll(
  p_worker uuid, p_provider autotag.provider_limits, p_settings autotag.settings, p_now timestamptz,
  out poll jsonb, out cancel jsonb, out files jsonb, out unrecorded jsonb, out look_up text, out next_poll_at timestamptz
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  files := '[]';
  next_poll_at := p_provider.next_poll_at;
  if p_provider.ask_after > p_now then
    return;
  end if;
  cancel := autotag.take_cancellations(next_poll_at <= p_now, p_now);
  if next_poll_at <= p_now then
    select l.poll, l.files, l.unrecorded into poll, files, unrecorded from autotag.list_polls(p_now - p_settings.batch_create_grace) l;
    next_poll_at := case when poll is null and files = '[]' and unrecorded is null then '-infinity' else p_now + p_settings.batch_poll_interval end;
  end if;
  -- Somebody waits for the end of a cancelled batch. (OpenAI takes up to ten minutes.)
  if cancel is not null or exists (
    select from autotag.batches b join autotag.jobs j on j.id = b.job_id
    where b.state = 'submitted' and b.cancel_requested and j.cancelled_at > p_now - interval '10 min') then
    next_poll_at := least(next_poll_at, p_now + interval '5 s');
  end if;
  if p_provider.proven_at is not null and p_provider.checked_at <= p_now - p_settings.model_check_interval then
    look_up := p_provider.question ->> 'model';
  end if;
  if poll is not null or files <> '[]' or unrecorded is not null or look_up is not null or cancel is not null then
    -- Allows the worker's reports about the provider (record_poll, report_poll_failure, provider_checked). A poll that does not find
    -- a batch counts by this time, so a cancellation does not change it.
    update autotag.workers wk
    set poll_assigned_at = case when poll is null and wk.poll_assigned_at is not null then wk.poll_assigned_at else p_now end
    where wk.id = p_worker;
  end if;
end $$;

-- The batches p_ids, in this order, as claim_batches() returns them.
create or replace function autotag.describe_batches(p_ids uuid[]) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_agg(jsonb_build_object(
      'batch', b.id, 'attempt', b.attempt, 'state', b.state, 'image_count', b.image_count,
      'since', autotag.real_epoch(b.created_at), 'cancelled', b.cancel_requested,
      'openai_batch_id', b.openai_batch_id, 'input_file_id', b.input_file_id,
      'output_file_id', b.output_file_id, 'error_file_id', b.error_file_id, 'keep_files', b.keep_files,
      'brief', (select j.brief_id from autotag.jobs j where j.id = b.job_id)) order by t.i), '[]')
    from unnest(p_ids) with ordinality t (id, i) join autotag.batches b on b.id = t.id);
end $$;

-- Ids of batches to cancel at OpenAI, at most 100 at a time, of all workspaces alike. A batch is returned once as soon as its upload
-- is cancelled, and again with each poll (p_due) until OpenAI is cancelling it. The order is random, so that a batch that the provider
-- refuses to cancel does not hold back others for long. Called by claim_batches(), which holds the provider row. Locks: batches by id
-- (skip locked).
create or replace function autotag.take_cancellations(p_due boolean, p_now timestamptz) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids jsonb;
begin
  with chosen as (
    select b.id from autotag.batches b
    where b.state = 'submitted' and b.cancel_requested and b.openai_status is distinct from 'cancelling'
      and (p_due or b.cancel_sent_at is null)
    order by row_number() over (partition by b.workspace_id order by random()) limit 100
  ), locked as (
    select b.id from autotag.batches b where b.id in (select c.id from chosen c) order by b.id for no key update skip locked
  ), asked as (
    update autotag.batches b set cancel_sent_at = p_now from locked l where b.id = l.id returning b.openai_batch_id as id
  )
  select jsonb_agg(a.id order by random()) into v_ids from asked a;
  return v_ids;
end $$;

-- The batches to poll, and the files to delete at OpenAI (claim_batches: poll, files, unrecorded). p_over: a batch that ended before
-- this time has all its unrecorded files at OpenAI by now.
create or replace function autotag.list_polls(p_over timestamptz, out poll jsonb, out files jsonb, out unrecorded jsonb)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select jsonb_agg(jsonb_build_object('id', b.openai_batch_id, 'since', autotag.real_epoch(b.created_at))
           order by b.ordinal, b.created_at)
  into poll
  from autotag.batches b where b.state = 'submitted';
  select coalesce(jsonb_agg(f.id), '[]') into files
  from (
    select unnest(array[b.input_file_id, b.output_file_id, b.error_file_id]) as id
    from autotag.batches b
    where b.state in ('done', 'cancelled')
      and (b.input_file_id is not null or b.output_file_id is not null or b.error_file_id is not null)
    order by b.id limit 300) f
  where f.id is not null;
  select jsonb_agg(jsonb_build_object('id', f.id, 'since', autotag.real_epoch(f.created_at))) into unrecorded
  from (
    select b.id, b.created_at from autotag.batches b
    where b.state in ('done', 'cancelled') and b.unrecorded_files > 0 and b.finished_at <= p_over order by b.id limit 100) f;
end $$;

-- When a worker should call claim_batches() again: for the next poll, or when a delayed batch is due; null: only after a
-- notification. p_more_files: there may be more files to delete.
create or replace function autotag.next_batch_claim(p_provider autotag.provider_limits, p_more_files boolean, p_now timestamptz)
returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select min(due) from (
    select greatest(p_now, p_provider.next_poll_at, p_provider.ask_after)
    where p_more_files or p_provider.ask_after > p_now or exists (select from autotag.batches b where b.state = 'submitted')
    union all
    select min(b.not_before) from autotag.batches b
    where b.worker_id is null and b.not_before > p_now and b.not_before < 'infinity'
      and b.state in ('planned', 'preparing', 'uploading', 'creating', 'ended', 'harvesting')
    union all
    select greatest(p_provider.next_poll_at, p_provider.ask_after, min(b.finished_at) + (select s.batch_create_grace from autotag.settings s))
    from autotag.batches b where b.state in ('done', 'cancelled') and b.unrecorded_files > 0 having count(*) > 0
  ) due_times (due));
end $$;

-- Locks a batch and its job, and returns the batch. Refuses a worker that does not hold it (any more) with this attempt, and
-- workers of another login. Refuses as `busy` if another transaction holds one of the rows (for example a tenant's, which called
-- cancel_tagging); the worker calls again later. The caller does not hold the provider row. Locks: job, batch.
create or replace function autotag.lock_held_batch(p_worker uuid, p_batch uuid, p_attempt integer) returns autotag.batches
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  v_batch autotag.batches;
begin
  perform from autotag.jobs j
  where j.id = (select b.job_id from autotag.batches b where b.id = p_batch and b.worker_id = p_worker) for no key update;
  select * into v_batch from autotag.batches b
  where b.id = p_batch and b.worker_id = p_worker and b.attempt = p_attempt for no key update;
  if not found or not autotag.is_own_worker(p_worker) then
    perform autotag.refuse(409, 'batch_not_held', 'This worker does not hold this batch any more.',
      'Stop working on it: another worker has it, or it was cancelled.', jsonb_build_object('batch', p_batch));
  end if;
  return v_batch;
exception when lock_not_available then
  perform autotag.refuse(503, 'busy', 'Another transaction holds this batch.', 'Call again in a moment.',
    jsonb_build_object('batch', p_batch, 'retry_after', 1));
  return null;
end $$;

-- The steps from a planned batch to a batch at OpenAI.

-- One page of a batch's images that still need an answer: the next p_limit (at most 1,000) after task p_after, as
-- [{task, asset_id, bucket, path, url, refused, mark, cap}]. Empty if the worker does not hold the batch.
create or replace function autotag.batch_images(
  p_worker uuid, p_batch uuid, p_attempt integer, p_after bigint, p_limit integer
) returns jsonb
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  with page as (
    select t.id, t.asset_id, t.workspace_id, t.visible_mark, j.user_id, greatest(t.min_output_tokens, b.output_tokens) as cap
    from autotag.tasks t join autotag.batches b on b.id = t.batch_id join autotag.jobs j on j.id = b.job_id
    where t.batch_id = p_batch and t.id > p_after and t.finished_at is null
      and b.worker_id = p_worker and b.attempt = p_attempt and autotag.is_own_worker(p_worker)
    order by t.id limit greatest(least(p_limit, 1000), 0)
  )
  select coalesce(jsonb_agg(jsonb_build_object('task', i.id, 'asset_id', i.asset_id::text,
    'bucket', d.bucket, 'path', d.path, 'url', d.url, 'refused', d.refused, 'mark', d.mark, 'cap', i.cap) order by i.id), '[]')
  from page i
  left join autotag.locate(array(select asset_id from page order by id),
    array(select workspace_id from page order by id), array(select visible_mark from page order by id),
    array(select user_id from page order by id)) d
    on d.asset_id = i.asset_id
$$;

-- Moves the images after p_last_task to a new planned batch, because the input file is full. Does nothing if the old or the new
-- batch would have no image, or if the file is not being built. Locks: job, batches, tasks.
create or replace function autotag.batch_split(p_worker uuid, p_batch uuid, p_attempt integer, p_last_task bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  v_rest bigint[];
  v_new uuid;
begin
  v_rest := array(select id from unnest(autotag.lock_batch_tasks(p_batch)) id where id > p_last_task);
  if v_rest = '{}' or v_batch.state <> 'preparing' or cardinality(v_rest) >= v_batch.image_count - v_batch.express_count then
    return;
  end if;
  insert into autotag.batches (job_id, workspace_id, ordinal, image_count, extra_tokens, created_at)
  select v_batch.job_id, v_batch.workspace_id, max(b.ordinal) + 1, cardinality(v_rest),
    cardinality(v_rest) * autotag.extra_tokens((select j.brief_id from autotag.jobs j where j.id = v_batch.job_id)), v_batch.created_at
  from autotag.batches b where b.job_id = v_batch.job_id
  returning id into v_new;
  update autotag.batches b set image_count = b.image_count - cardinality(v_rest) where b.id = p_batch;
  update autotag.tasks t set batch_id = v_new where t.id = any (v_rest);
  perform pg_notify('autotag', 'batch');
end $$;

-- Locks the unfinished tasks of a batch by id, and returns their ids.
create or replace function autotag.lock_batch_tasks(p_batch uuid) returns bigint[]
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

-- The worker that holds a batch reports its next step: preparing (also again, until the batch is being created), uploading, then
-- creating with the id of the input file. Locks: job, batch, tasks.
create or replace function autotag.batch_step(
  p_worker uuid, p_batch uuid, p_attempt integer, p_state text, p_input_file_id text default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
begin
  p_input_file_id := autotag.clean_id(p_input_file_id);
  if not coalesce(case p_state
      when 'preparing' then v_batch.state in ('preparing', 'uploading')
      when 'uploading' then v_batch.state in ('preparing', 'uploading')
      when 'creating' then v_batch.state in ('uploading', 'creating') and p_input_file_id is not null end, false) then
    perform autotag.refuse(400, 'step_out_of_order',
      format('A batch that is %s cannot be %s next.', v_batch.state, coalesce(autotag.printable(p_state, 20), 'nothing')),
      'The order is preparing, uploading, creating; creating needs the id of the input file.', jsonb_build_object('batch', p_batch));
  end if;
  update autotag.batches b
  set state = p_state, input_file_id = coalesce(p_input_file_id, b.input_file_id),
      unrecorded_files = b.unrecorded_files
        + case when p_state = 'uploading' then 1 when p_state = 'creating' and b.state = 'uploading' then -1 else 0 end
  where b.id = p_batch;
  if p_state = 'preparing' then
    -- Errors that an earlier worker recorded while it built the file are void, because the images are prepared again.
    update autotag.tasks t set error_code = null, error = null, image_notes = null
    where t.batch_id = p_batch and (t.error_code is not null or t.image_notes is not null);
    perform autotag.broadcast_progress(v_batch.job_id);
  end if;
end $$;

-- Records what the worker did to images of the file that it builds: [{task, image}], image as in clean_image_notes(). The notes are
-- stored with the answers. Locks: job, batch, tasks.
create or replace function autotag.note_images(p_worker uuid, p_batch uuid, p_attempt integer, p_notes jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_list(p_notes);
  perform autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  with noted as materialized (
    select case when e -> 'task' between '1' and '9223372036854775807' then (e -> 'task')::bigint end as task,
      autotag.clean_image_notes(e -> 'image') as notes
    from jsonb_array_elements(p_notes) e
  ), locked as materialized (
    select t.id from autotag.tasks t
    where t.id = any (array(select n.task from noted n)) and t.batch_id = p_batch and t.finished_at is null order by t.id for update
  )
  update autotag.tasks t set image_notes = n.notes from noted n join locked l on l.id = n.task where t.id = l.id;
end $$;

-- Records that OpenAI has created the batch. The worker no longer holds it, and the next poll covers it. Then the worker calls
-- show_batch().
-- Locks: job, batch, provider.
create or replace function autotag.batch_submitted(
  p_worker uuid, p_batch uuid, p_attempt integer, p_openai_batch_id text, p_status text, p_input_file_id text
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz;
  v_batch autotag.batches;
begin
  v_batch := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  v_now := autotag.now();
  p_openai_batch_id := autotag.clean_id(p_openai_batch_id);
  if v_batch.state <> 'creating' or p_openai_batch_id is null
    or exists (select from autotag.batches b where b.openai_batch_id = p_openai_batch_id) then
    perform autotag.refuse(400, 'step_out_of_order', 'This batch is not being created.',
      'Create it at the provider first, and pass the id that the provider returned.', jsonb_build_object('batch', p_batch));
  end if;
  update autotag.batches b
  set state = 'submitted', worker_id = null, openai_batch_id = p_openai_batch_id,
      openai_status = coalesce(autotag.clean_status(p_status), 'validating'),
      input_file_id = coalesce(autotag.clean_id(p_input_file_id), b.input_file_id), submitted_at = v_now, progress_at = v_now,
      not_before = v_now, missing_polls = 0, running_at = null, request_total = default, request_done = default,
      predicted_seconds = (autotag.predict_batch(b.image_count - b.express_count, v_now, v_now, null, 0, b.id)).p50
  where b.id = p_batch;
  perform autotag.broadcast_progress(v_batch.job_id, autotag.refresh_eta(v_batch.job_id));
  perform autotag.lock_provider();
  -- This ends a pause that a batch began. It does not prove the question, because only an answer does.
  perform autotag.resume_tagging('batch');
  update autotag.provider_limits p
  set next_poll_at = case
    -- its webhook arrived before its id was stored
    when exists (select from autotag.webhooks wh where wh.openai_batch_id = p_openai_batch_id) then '-infinity'
    when p.next_poll_at < v_now then v_now + s.batch_poll_interval
    else least(p.next_poll_at, v_now + s.batch_poll_interval) end
  from autotag.settings s where p.id;
  perform pg_notify('autotag', 'batch');
end $$;

-- Writes stage and ETA to the host's rows of a batch's images: OpenAI has the batch (submitted) or works on it (processing). At most
-- p_limit images after task p_after. Returns the last task shown; null: there are no more, or the batch is in another state. Refuses as
-- `busy` if another transaction holds the upload's row, so that no row changes without a message that names it; the worker calls again
-- later. An image's row that another transaction holds, or that raises, is left out. Locks: job (skip locked), assets (show).
create or replace function autotag.show_batch(p_worker uuid, p_batch uuid, p_after bigint, p_limit integer) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
  v_page record;
  v_has_job boolean;
  v_stage text;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  -- First, so that the batch stays in this state until its rows are written.
  perform from autotag.jobs j
  where j.id = (select b.job_id from autotag.batches b where b.id = p_batch and b.state = 'submitted') for no key update skip locked;
  v_has_job := found;
  select * into v_batch from autotag.batches b where b.id = p_batch and b.state = 'submitted';
  if not found or not autotag.is_own_worker(p_worker) then
    return null;
  end if;
  select array_agg(page.asset_id) as assets, max(page.id) as last into v_page
  from (
    select t.id, t.asset_id from autotag.tasks t where t.batch_id = p_batch and t.id > p_after and t.finished_at is null
    order by t.id limit greatest(least(p_limit, 10000), 0)) page;
  if v_page.last is null then
    return null;
  elsif not v_has_job then
    perform autotag.refuse(503, 'busy', 'Another transaction holds this upload.', 'Call again in a moment.',
      jsonb_build_object('batch', p_batch, 'retry_after', 1));
  end if;
  v_stage := case when v_batch.running_at is null then 'submitted' else 'processing' end;
  perform autotag.show(v_batch.workspace_id, v_page.assets, v_stage, autotag.stage_progress(v_stage),
    (autotag.batch_eta(v_batch, autotag.now())).p50, true);
  perform autotag.broadcast_progress(v_batch.job_id, null, v_page.assets);
  return v_page.last;
end $$;

-- Batches that cannot go on: they are retried, planned again, or replaced by single calls.

-- Records that a worker could not go on with a batch. p_error: {kind, code, message, retry_after, origin, parameter}.
--   account         Both lanes pause.
--   transient       Any worker retries later; in `creating` not before batch_create_grace has passed, because a request that
--                   seemed to fail may still arrive.
--   image           The provider refuses this batch and says why. Its images are sent as single calls, whose errors say more. The
--                   same happens after max_bad_answers times `request_refused`, and after 3 × max_failures failures of any kind
--                   while single calls work.
--   no_batch_api    The routes for files or batches do not exist while single calls work: the provider has no Batch API, and
--                   claim() turns the planned batches into single calls.
--   expires_after   The provider refuses this expiry of files: the next one is tried (7 days, 14 days, none).
-- Locks: job, batch, tasks, provider.
create or replace function autotag.report_batch_failure(p_worker uuid, p_batch uuid, p_attempt integer, p_error jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_batch autotag.batches := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  v_proven boolean := (select p.proven_at is not null from autotag.provider_limits p);
begin
  select * into v_settings from autotag.settings;
  p_error := autotag.judge_batch_error(v_batch, autotag.clean_error(p_error, null), v_proven);
  -- After so many refusals or failures, another try would not succeed either.
  if p_error ->> 'kind' = 'image'
    or p_error ->> 'code' = 'request_refused' and v_batch.failures + 1 >= v_settings.max_bad_answers
    or v_proven and v_batch.failures + 1 >= 3 * v_settings.max_failures and (v_batch.state <> 'harvesting'
      -- the answers are paid for, so workers try to read them for as long as the batch might have taken
      or v_batch.ended_at <= autotag.now() - v_settings.batch_give_up_after) then
    perform autotag.requeue_batch(v_batch, false, 0, p_error ->> 'code', p_error ->> 'message');
    perform autotag.end_batch(v_batch, p_error ->> 'message');
  else
    perform autotag.delay_batch(v_batch, p_error, v_settings);
  end if;
  perform autotag.apply_batch_error(p_worker, v_batch, p_error);
  perform pg_notify('autotag', 'batch');
  perform pg_notify('autotag', 'realtime');
end $$;

-- The error of a batch with the kind that it has in the present situation (report_batch_failure). p_proven: single calls work.
create or replace function autotag.judge_batch_error(p_batch autotag.batches, p_error jsonb, p_proven boolean) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_error ->> 'code' = 'no_batch_api' and p_batch.state not in ('preparing', 'uploading', 'creating') then
    return p_error || '{"kind": "transient", "code": "provider_error"}';  -- only a file is missing
  elsif p_error ->> 'code' = 'no_batch_api' and p_proven or p_error ->> 'parameter' = 'expires_after' and p_batch.keep_files is not null then
    return p_error || '{"kind": "rate_limit"}';
  elsif p_error ->> 'kind' = 'account' and autotag.is_about_request(p_error) and exists (
      select from autotag.jobs j where j.id = p_batch.job_id and j.brief_id is not null) then
    return p_error || '{"kind": "image"}';   -- single calls will show whether the brief is the cause (blame_brief)
  elsif not p_proven and p_error ->> 'kind' = 'transient' and p_error ->> 'origin' = 'provider' then
    return p_error || '{"kind": "account"}';
  end if;
  return p_error;
end $$;

-- Records what the error of a batch says about the provider and the account. p_error: as judge_batch_error() returns it. The caller
-- calls this last. Locks: provider.
create or replace function autotag.apply_batch_error(p_worker uuid, p_batch autotag.batches, p_error jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_error ->> 'code' = 'no_batch_api' and p_error ->> 'kind' = 'rate_limit' then
    update autotag.provider_limits set has_batches = false, batches_refused = true, degraded_at = autotag.now()
      where id;
  elsif p_error ->> 'parameter' = 'expires_after' and p_batch.keep_files is not null then
    -- Azure requires at least 14 days; other providers support no expiry. One step, however many batches report the refusal.
    update autotag.provider_limits p
    set keep_files = case when p_batch.keep_files < 1209600 then 1209600 end, degraded_at = autotag.now()
    where p.keep_files = p_batch.keep_files;
  elsif p_error ->> 'kind' = 'account' then
    perform autotag.pause_tagging(autotag.explain_account(p_error),
      case p_error ->> 'origin' when 'storage' then 'storage' else 'batch' end);
    perform autotag.offer_switch(array[p_worker]);
  end if;
end $$;

-- Releases a batch after an error, for a later try. The caller holds its row.
create or replace function autotag.delay_batch(p_batch autotag.batches, p_error jsonb, p_settings autotag.settings) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- After three failures because OpenAI did not find the input file, the file is lost and is built again.
  update autotag.batches b
  set worker_id = null, error = p_error ->> 'message',
      failures = b.failures + (select k.counts::integer from autotag.error_kinds k where k.kind = p_error ->> 'kind'),
      state = case when v_lost.file or p_error ->> 'code' = 'no_batch_api' then 'planned' else b.state end,
      input_file_id = case when v_lost.file then null else b.input_file_id end,
      reserved_tokens = case when v_lost.file or p_error ->> 'code' = 'no_batch_api' then 0 else b.reserved_tokens end,
      not_before = autotag.now() + greatest(
        case when b.state = 'creating' and p_error ->> 'code' <> all ('{file_not_there_yet,rate_limited}')
          then p_settings.batch_create_grace else interval '0' end,
        case when p_error ->> 'kind' = 'account' or p_error ->> 'code' = 'no_batch_api' or p_error ->> 'parameter' is not null
            then interval '0'
          else make_interval(secs => greatest((p_error ->> 'retry_after')::double precision,
            (0.5 + random() / 2) * least(extract(epoch from p_settings.retry_delay_max),
              extract(epoch from p_settings.retry_delay) * power(2, least(b.failures, 20))))) end)
  from (select p_error ->> 'code' = 'file_not_there_yet' and p_batch.state = 'creating' and p_batch.failures >= 3 as file) v_lost
  where b.id = p_batch.id;
end $$;

-- A poll failed as a whole. An account error pauses both lanes if the worker was assigned a poll. The next poll is the retry; it
-- waits for retry_after, even if another batch or a webhook makes it due earlier. Locks: provider.
create or replace function autotag.report_poll_failure(p_worker uuid, p_error jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  p_error := autotag.clean_error(p_error, null);
  if p_error ->> 'kind' = 'account' and autotag.is_poll_assigned(p_worker) is not null then
    perform autotag.pause_tagging(autotag.explain_account(p_error), 'poll');
  end if;
  update autotag.provider_limits p
  set ask_after = greatest(p.ask_after, autotag.now() + autotag.clock_interval((p_error ->> 'retry_after')::double precision))
  where p_error ->> 'retry_after' is not null;
end $$;

-- Whether a single call is queued, requeued or in flight, which can try a question that is not proven. Every claim asks this while the
-- question is not proven. No index has worker_id, so the calls in flight are found through the queues, as leased_tasks() does.
create or replace function autotag.has_single_calls() returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off
  set jit = off
as $$
begin
  return exists (
    select from autotag.workspaces ws where ws.queued > 0 and (ws.ready or ws.ready_at < 'infinity')
    union all select from autotag.tasks t where t.retry_at < 'infinity'
    union all select from autotag.queues q where q.reached > 0 and (
      select t.id from autotag.tasks t where t.job_id = q.job_id and t.id <= q.reached and t.worker_id is not null limit 1) is not null);
end $$;

-- Queues one image of a planned batch as a single call, to try a question that is not proven. False: single calls are queued or
-- in flight that can try it, or no planned batch has a second image. Called by claim(), which holds the provider row.
-- Locks: job, batch, task (all skip locked).
create or replace function autotag.release_probe() returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
  v_task bigint;
begin
  if autotag.has_single_calls() then
    return false;
  end if;
  select b.* into v_batch from autotag.batches b join autotag.jobs j on j.id = b.job_id
  where b.state = 'planned' and b.worker_id is null and b.image_count - b.express_count > 1
  order by b.created_at, b.ordinal limit 1 for no key update skip locked;
  if not found then
    return false;
  end if;
  select t.id into v_task from autotag.tasks t
  where t.batch_id = v_batch.id and t.finished_at is null order by t.id limit 1 for update skip locked;
  if not found then
    return false;
  end if;
  update autotag.batches b set express_count = b.express_count + 1 where b.id = v_batch.id;
  update autotag.tasks t set lane = 'realtime', batch_id = null, retry_at = autotag.now() where t.id = v_task;
  return true;
end $$;

-- Turns the unsubmitted batches of one job into single calls, because the provider has no Batch API. False: there is no such job, or
-- other transactions hold all of them. One job per call. Called by claim(), which holds the provider row.
-- Locks: job, batches, tasks (all skip locked).
create or replace function autotag.batches_to_single_calls(p_now timestamptz) returns boolean
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
  order by b.created_at limit 1 for no key update skip locked;
  if not found then
    return false;
  end if;
  v_batches := array(
    select b.id from autotag.batches b
    where b.job_id = v_job.id and b.worker_id is null and b.state in ('planned', 'preparing', 'uploading')
    order by b.id for no key update skip locked);
  update autotag.batches b
  set state = 'cancelled', reserved_tokens = 0, finished_at = p_now,
      error = 'The provider has no Batch API.'
  where b.id = any (v_batches);
  v_tasks := array(
    select t.id from autotag.tasks t where t.batch_id = any (v_batches) and t.finished_at is null
    order by t.id for update skip locked);
  update autotag.queues q set chunk = s.chunk_size from autotag.settings s where q.job_id = v_job.id;
  update autotag.jobs j
  set strategy = 'realtime-chunked', fallback = 'The AI provider has no Batch API, so these images are sent as single calls.'
  where j.id = v_job.id;
  perform autotag.keep(autotag.requeue(jsonb_agg(jsonb_build_object('task', id, 'failures', 0))), false)
  from unnest(v_tasks) id having count(*) > 0;
  perform autotag.refresh_eta(v_job.id);
  return true;
end $$;

-- Plans a batch again and keeps its file. OpenAI refused the batch, because OpenAI's queue of tokens is full; other programs or batches
-- may fill it. A refusal counts if none of our other batches is in the queue, or if the batch is older than batch_patience. After
-- max_bad_answers such refusals the batch is halved, and each half is halved after one more. A batch with at most chunk_max_images images
-- is sent as single calls instead, but only once it is older than batch_patience, because single calls cost twice as much. The caller
-- holds job and batch. Locks: tasks, window (skip locked).
create or replace function autotag.refuse_tokens(
  p_batch autotag.batches, p_error text, p_settings autotag.settings, p_now timestamptz
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_late boolean := p_batch.created_at <= p_now - p_settings.batch_patience;
  v_counts boolean := v_late or not exists (select from autotag.batches b where b.reserved_tokens > 0 and b.id <> p_batch.id);
begin
  update autotag.batches b
  set state = 'planned', openai_batch_id = null, openai_status = null, reserved_tokens = 0, error = p_error,
      not_before = p_now + p_settings.batch_poll_interval, token_refusals = b.token_refusals + v_counts::integer
  where b.id = p_batch.id returning * into p_batch;
  if p_batch.token_refusals < p_settings.max_bad_answers then
    return;
  end if;
  if p_batch.image_count - p_batch.express_count > greatest(p_settings.chunk_max_images, 1) then
    perform autotag.split_batch(p_batch, 2, p_error);
  elsif v_late then
    perform autotag.requeue_batch(p_batch, false, 0, 'batch_refused', p_error);
    perform autotag.end_batch(p_batch, p_error);
    update autotag.jobs j
    set fallback = 'The AI service did not accept a batch of these images, so they are sent as single calls.' where j.id = p_batch.job_id;
  end if;
end $$;

-- Moves the images of a planned batch into p_parts new batches, and cancels the old batch, whose file is deleted at OpenAI. The first new
-- batch takes over the old batch's admission to the workspace's window. The window gets back the images of the other new batches. The
-- caller holds job and batch. Locks: tasks, window (skip locked).
create or replace function autotag.split_batch(p_batch autotag.batches, p_parts integer, p_reason text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tasks bigint[] := autotag.lock_batch_tasks(p_batch.id);
  v_count integer := cardinality(v_tasks);
  v_last integer := (select max(b.ordinal) from autotag.batches b where b.job_id = p_batch.job_id);
begin
  p_parts := least(p_parts, v_count);
  update autotag.batches b
  set state = 'cancelled', worker_id = null, reserved_tokens = 0, finished_at = autotag.now(), error = p_reason where b.id = p_batch.id;
  with made as (
    insert into autotag.batches (job_id, workspace_id, ordinal, image_count, extra_tokens, token_refusals, admitted_at, created_at)
    select p_batch.job_id, p_batch.workspace_id, v_last + n,
      (n::bigint * v_count / p_parts - (n - 1)::bigint * v_count / p_parts)::integer, ceil(p_batch.extra_tokens::numeric / p_parts)::bigint,
      greatest(p_batch.token_refusals - 1, 0), case when n = 1 then p_batch.admitted_at end, p_batch.created_at
    from generate_series(1, p_parts) n
    returning id, ordinal
  )
  update autotag.tasks t set batch_id = m.id
  from unnest(v_tasks) with ordinality u (id, i)
  join made m on m.ordinal = v_last + (u.i * p_parts + v_count - 1) / v_count
  where t.id = u.id;
  perform autotag.give_back_images(p_batch, v_count - v_count / p_parts);
  perform pg_notify('autotag', 'batch');
end $$;

-- Gives images of a batch back to the workspace's window that admitted them, if the window still counts them and no other transaction
-- holds it. Locks: window (skip locked).
create or replace function autotag.give_back_images(p_batch autotag.batches, p_images integer) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_batch.admitted_at is not null and p_images > 0 then
    perform from autotag.windows wn
    where wn.workspace_id = p_batch.workspace_id and wn.request_type = 'batch' for no key update skip locked;
    if found then
      perform autotag.correct_window(p_batch.workspace_id, 'batch', p_batch.admitted_at, 0, -p_images);
    end if;
  end if;
end $$;

-- Splits planned batches that a limit no longer admits because it was lowered since: the images or requests of one batch, the
-- workspace's images in an hour, or the provider's queue (batches of up to a fifth more are tried, because the tokens of an image are
-- an estimate). At most 20 per call. Called by tick(). Locks: job, batch (both skip locked), tasks, window (skip locked).
create or replace function autotag.split_oversized() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_found record;
  v_batch autotag.batches;
begin
  for v_found in
    select b.id, b.job_id, x.images, m.images as max_images
    from autotag.batches b
    cross join lateral (select b.image_count - b.express_count as images) x
    cross join autotag.settings s cross join autotag.provider_limits p
    cross join lateral autotag.window_limits(b.workspace_id, 'batch') l
    cross join lateral (select greatest(1, least(s.batch_max_requests::bigint, l.max_units::bigint,
      case when x.images::bigint * p.tokens_per_image + b.extra_tokens > 1.2 * p.queued_batch_tokens
        then p.queued_batch_tokens * x.images / (x.images::bigint * p.tokens_per_image + b.extra_tokens) end)) as images) m
    where b.state = 'planned' and b.worker_id is null and x.images > 1 and x.images > m.images
    limit 20   -- without an order, because one by id would read every batch that ever existed
  loop
    perform from autotag.jobs j where j.id = v_found.job_id for no key update skip locked;
    continue when not found;
    select * into v_batch from autotag.batches b
    where b.id = v_found.id and b.state = 'planned' and b.worker_id is null for no key update skip locked;
    continue when not found;
    perform autotag.split_batch(v_batch, ceil(v_found.images::numeric / v_found.max_images)::integer,
      'A limit was lowered, so this batch was split.');
  end loop;
end $$;

-- Retries a batch's images without an answer, in the cheapest way allowed: in new batches if p_by_batch and there are more than
-- chunk_max_images, else as single calls. p_failures are added to the images without a recorded error (batch_answers() counted
-- the others). Images that reach max_failures fail with their recorded error, or else with p_code and p_message. The others wait
-- like a single call with as many failures, and at least as long as the errors of the batch's images asked for (leave_to_finish).
-- The caller holds job and batch. Locks: tasks by id, window (skip locked).
create or replace function autotag.requeue_batch(
  p_batch autotag.batches, p_by_batch boolean, p_failures integer, p_code text, p_message text
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_settings autotag.settings;
  v_tasks bigint[] := autotag.lock_batch_tasks(p_batch.id);
  v_job autotag.jobs;
  v_again bigint[] := array[]::bigint[];
  v_failures integer;          -- the largest number of one image
  v_wait double precision := case when p_batch.worker_id is not null and p_batch.not_before > v_now
    then extract(epoch from p_batch.not_before - v_now) else 0 end;
begin
  select * into v_settings from autotag.settings;
  select * into v_job from autotag.jobs j where j.id = p_batch.job_id;
  if p_by_batch and not p_batch.stuck and v_job.cancelled_at is null
     and (select p.has_batches from autotag.provider_limits p) is distinct from false
     and cardinality(v_tasks) > v_settings.chunk_max_images then
    with again as (
      update autotag.tasks t set failures = t.failures + case when t.error_code is null then p_failures else 0 end
      where t.id = any (v_tasks)
        and t.failures + case when t.error_code is null then p_failures else 0 end < v_settings.max_failures
      returning t.id, t.failures
    )
    select coalesce(array_agg(a.id order by a.id), '{}'), max(a.failures) into v_again, v_failures from again a;
  end if;
  perform autotag.keep(autotag.requeue(jsonb_agg(jsonb_build_object(
    'task', t.id, 'failures', x.more, 'delay', greatest(v_wait, autotag.growing_delay(t.failures + x.more - 1, v_settings)),
    'code', coalesce(t.error_code, p_code), 'message', coalesce(t.error, p_message)))), false)
  from autotag.tasks t cross join lateral (select case when t.error_code is null then p_failures else 0 end as more) x
  where t.id = any (v_tasks) and t.id not in (select unnest(v_again)) having count(*) > 0;
  perform autotag.place_in_batches(v_job, v_again,
    v_now + make_interval(secs => greatest(v_wait, autotag.growing_delay(greatest(v_failures - 1, 0), v_settings))),
    case when p_batch.openai_batch_id is null then p_batch end);
  perform pg_notify('autotag', 'realtime');
end $$;

-- Puts the waiting single calls of one upload into batches, if the upload is older than realtime_max_wait and batches are expected to
-- finish sooner. p_wait: how long the single calls would wait; null: unknown, and then a batch has to start within realtime_max_wait.
-- p_reason: a sentence for the user. The upload of the workspace with the fewest waiting batches goes first. False: there is no such
-- upload, or other transactions hold all of them. One upload per call. Called by claim(), which holds the provider row. Locks: job, tasks
-- by id (both skip locked).
create or replace function autotag.single_calls_to_batch(p_now timestamptz, p_wait interval, p_reason text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_max_wait interval := (select s.realtime_max_wait from autotag.settings s);
  v_job autotag.jobs;
  v_tasks bigint[];
  v_batch record;
begin
  select j.* into v_job
  from autotag.queues q join autotag.jobs j on j.id = q.job_id
  where q.queued > 0 and j.cancelled_at is null and j.created_at <= p_now - v_max_wait
    -- Images of an upload that was moved to batches before come back one by one. They wait until most are back, because a
    -- workspace may start few batches an hour.
    and (j.fallback is null or q.queued > (
      select count(*) from autotag.tasks t where t.job_id = j.id and t.lane = 'realtime' and t.worker_id is not null))
  order by (select count(*) from autotag.batches b
    where b.workspace_id = j.workspace_id and b.state = 'planned' and b.admitted_at is null), j.created_at
  limit 1 for no key update of j skip locked;
  if not found then
    return false;
  end if;
  v_batch := autotag.predict_new_batch(v_job.workspace_id, (select q.queued from autotag.queues q where q.job_id = v_job.id), p_now);
  if (case when p_wait is null then v_batch.starts_at > p_now + v_max_wait else v_batch.ends_at >= p_now + p_wait end) then
    return false;
  end if;
  v_tasks := array(
    select t.id from autotag.tasks t
    where t.job_id = v_job.id and t.lane = 'realtime' and t.worker_id is null and t.retry_at is null
      and t.finished_at is null order by t.id for update skip locked);
  update autotag.workspaces ws set queued = greatest(0, ws.queued - q.queued)
  from autotag.queues q where q.job_id = v_job.id and q.joined and ws.workspace_id = v_job.workspace_id;
  update autotag.queues q set queued = 0 where q.job_id = v_job.id;
  perform autotag.place_in_batches(v_job, v_tasks);
  update autotag.jobs j set fallback = p_reason where j.id = v_job.id;
  return true;
end $$;

-- Other reports about the provider: the model's shutdown date, the Batch API, deleted files, webhooks.

-- When a worker (of the caller's login) was last assigned a poll of the provider; null: never.
create or replace function autotag.is_poll_assigned(p_worker uuid) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select wk.poll_assigned_at from autotag.workers wk where wk.id = p_worker and wk.login = session_user);
end $$;

-- Records the daily check of the model and the provider (claim_batches: look_up). p_facts: {model, shutdown_date, batches}, each
-- optional; batches: whether the provider has a Batch API. Ignores workers without an assigned poll, and the shutdown date of
-- another model than the present one. Returns a sentence for the log if the model shuts down soon, else null.
-- Locks: the model's row, provider.
create or replace function autotag.provider_checked(p_worker uuid, p_facts jsonb) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := (select p.question ->> 'model' from autotag.provider_limits p where p.question ->> 'model' = p_facts ->> 'model');
  m autotag.models := autotag.find_model(v_model);
  v_date date;
begin
  if autotag.is_poll_assigned(p_worker) is null then
    return null;
  end if;
  if p_facts ->> 'shutdown_date' ~ E'^20\\d{2}-\\d{2}-\\d{2}$' then
    begin
      v_date := (p_facts ->> 'shutdown_date')::date;
    exception when datetime_field_overflow then
      v_date := null;
    end;
  end if;
  if v_date is not null and v_model is not null then
    -- This comes before the lock of the provider row, so that no transaction that holds it waits for a model's row. The model
    -- gets its own row, a copy of its family's, because the shutdown date of one snapshot does not apply to the others.
    m.name := v_model;
    m.shutdown_date := v_date;
    m.cap_parameter := coalesce(m.cap_parameter, 'max_completion_tokens');
    m.answer_format := coalesce(m.answer_format, 'json_schema');
    m.sends_effort := coalesce(m.sends_effort, true);
    m.sends_detail := coalesce(m.sends_detail, true);
    m.sends_tier := coalesce(m.sends_tier, true);
    m.degraded := coalesce(m.degraded, '{}');
    m.batch_discount := coalesce(m.batch_discount, 0.5);
    m.flex_discount := coalesce(m.flex_discount, 0.5);
    m.priority_factor := coalesce(m.priority_factor, 2);
    insert into autotag.models as mo values (m.*)
    on conflict (name) do update set shutdown_date = v_date where mo.shutdown_date is distinct from v_date;
  end if;
  update autotag.provider_limits p
  set checked_at = autotag.now(),
      -- A failed attempt outweighs this check: a provider may list batches and not be able to create one.
      has_batches = case when p.batches_refused then false
        when jsonb_typeof(p_facts -> 'batches') = 'boolean' then (p_facts ->> 'batches')::boolean else p.has_batches end
  where p.id;
  perform pg_notify('autotag', 'realtime');
  return (autotag.describe_shutdown()) ->> 'message';
end $$;

-- Removes the ids of files that were deleted at OpenAI, so that they are not deleted again. p_unrecorded: batches whose unrecorded
-- files were deleted. Ignores batches that have not ended. A false report only means that OpenAI keeps the files until they expire.
-- Locks: batches by id.
create or replace function autotag.files_deleted(p_worker uuid, p_files text[], p_unrecorded uuid[] default '{}') returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_ids(cardinality(p_files));
  perform autotag.check_ids(cardinality(p_unrecorded));
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  update autotag.batches b
  set input_file_id = case when b.input_file_id = any (p_files) then null else b.input_file_id end,
      output_file_id = case when b.output_file_id = any (p_files) then null else b.output_file_id end,
      error_file_id = case when b.error_file_id = any (p_files) then null else b.error_file_id end,
      unrecorded_files = case when b.id = any (p_unrecorded) then 0 else b.unrecorded_files end
  where b.id in (
    select ended.id from autotag.batches ended
    where ended.state in ('done', 'cancelled')
      and (ended.input_file_id = any (p_files) or ended.output_file_id = any (p_files) or ended.error_file_id = any (p_files)
        or ended.id = any (p_unrecorded))
    order by ended.id for update);
end $$;

-- Handles a verified webhook delivery. Returns `accepted` (the next poll is due at once), `replayed` (this delivery was received
-- before), `ignored` (another type of event, or more than 600 deliveries in a minute) or `unknown` (no batch in flight has this
-- id; if it is being created, batch_submitted() makes the poll due). Locks: provider.
create or replace function autotag.receive_webhook(p_webhook_id text, p_event_type text, p_openai_batch_id text) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
begin
  if p_event_type is null or p_event_type not in
    ('batch.completed', 'batch.failed', 'batch.expired', 'batch.cancelled') then
    return 'ignored';
  end if;
  if coalesce(p_webhook_id !~ '^[!-~]{1,200}$', true) or autotag.clean_id(p_openai_batch_id) is null then
    perform autotag.refuse(400, 'bad_webhook', 'A webhook delivery needs an id and the id of a batch.',
      'Pass the header webhook-id and the event''s data.id.');
  end if;
  v_provider := autotag.lock_provider();
  if (select count(*) from autotag.webhooks wh where wh.received_at > v_provider.refilled_at - interval '1 min') >= 600 then
    return 'ignored';   -- no account ends that many batches; the next poll sees what is left out here
  end if;
  insert into autotag.webhooks (id, openai_batch_id, received_at)
  values (p_webhook_id, p_openai_batch_id, v_provider.refilled_at) on conflict do nothing;
  if not found then
    return 'replayed';
  end if;
  if not exists (
    select from autotag.batches b where b.openai_batch_id = p_openai_batch_id and b.state = 'submitted') then
    return 'unknown';
  end if;
  update autotag.provider_limits set next_poll_at = '-infinity' where id;
  perform pg_notify('autotag', 'batch');
  return 'accepted';
end $$;

-- What a worker's poll of the batches at OpenAI changes: they progress, end, get lost or get stuck.

-- Records a poll: [{id, status, output_file_id, error_file_id, total, done, error_code, error, error_kind}]. Status `gone`:
-- OpenAI does not know the batch (any more, or with this key); `unread`: the worker cannot read its state. What happens to a batch:
--   it has ended                       it waits to be harvested
--   it failed: OpenAI's queue is full  it is planned again, which is no failure. One that is too large for the queue is halved, and
--                                      in the end its images are sent as single calls (refuse_tokens)
--   gone in several polls in a row     it ends, and its images are retried
--   no progress for too long           it is cancelled, if the limits admit its images as single calls
--   in flight for two days, or unread  it ends as if it were gone: OpenAI's window is 24 h
--     after two days
-- Ignores workers without an assigned poll, batches that are not in flight, and invalid elements. Writes only rows that change.
-- A batch that another transaction holds is left to the next poll, so a worker reports many batches in several calls. Returns the
-- batches for which the worker calls show_batch() next.
-- Locks: jobs by id, batches by id (both skip locked), tasks by id, provider (if it pauses or resumes tagging).
create or replace function autotag.record_poll(p_worker uuid, p_polled jsonb) returns uuid[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_look timestamptz := autotag.is_poll_assigned(p_worker);
  v_proven boolean := (select p.proven_at is not null from autotag.provider_limits p);  -- single calls work
  v_polls autotag.batch_poll[];
  v_free uuid[];
  v_changed uuid[];
  v_error text;                -- a batch failed with an account error
  v_limit bigint;              -- of the provider's queue, as the refusal of a batch states it
  v_job uuid;
begin
  perform autotag.check_list(p_polled);
  if v_look is null then
    return array[]::uuid[];
  end if;
  v_polls := autotag.clean_poll(p_polled);
  v_free := array(
    select j.id from autotag.jobs j where j.id in (
      select b.job_id from autotag.batches b
      join unnest(v_polls) seen on seen.id = b.openai_batch_id where b.state = 'submitted')
    order by j.id for no key update skip locked);
  v_free := array(
    select b.id from autotag.batches b
    where b.openai_batch_id in (select seen.id from unnest(v_polls) seen) and b.job_id = any (v_free)
    order by b.id for no key update skip locked);
  v_polls := autotag.blame_briefs(v_polls);
  v_error := (
    select seen.error from unnest(v_polls) seen join autotag.batches b on b.openai_batch_id = seen.id and b.state = 'submitted'
    where b.id = any (v_free) and seen.status = 'failed' and seen.error_kind = 'account' limit 1);
  v_limit := (
    select min(autotag.stated_limit(seen.error)) from unnest(v_polls) seen join autotag.batches b on b.openai_batch_id = seen.id
    where b.id = any (v_free) and b.state = 'submitted' and seen.status = 'failed' and seen.error_code = 'token_limit_exceeded');
  v_changed := autotag.apply_poll(v_polls, v_free, v_look, v_proven, v_now);
  -- Once per upload, even if several of its batches have changed.
  for v_job in select distinct b.job_id from autotag.batches b where b.id = any (v_changed) order by 1 loop
    perform autotag.broadcast_progress(v_job, autotag.refresh_eta(v_job));
  end loop;
  perform autotag.judge_poll(v_error, v_limit);
  return array(select b.id from autotag.batches b where b.id = any (v_changed) and b.state = 'submitted' and b.running_at = v_now);
end $$;

-- Validates a worker's poll and clamps its numbers. Drops elements without a valid batch id or status.
create or replace function autotag.clean_poll(p_polled jsonb) returns autotag.batch_poll[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  -- total and done count lines, and a file has at most 50,000.
  return array(
    select row(i.id, i.status, autotag.clean_id(e ->> 'output_file_id'), autotag.clean_id(e ->> 'error_file_id'),
      coalesce(autotag.clean_number(e, 'total', 0, 50000), 0)::integer,
      coalesce(autotag.clean_number(e, 'done', 0, 50000), 0)::integer,
      autotag.printable(e ->> 'error_code', 100), autotag.printable(e ->> 'error', 1000),
      autotag.printable(e ->> 'error_kind', 20))::autotag.batch_poll
    from jsonb_array_elements(p_polled) e
    cross join lateral (select autotag.clean_id(e ->> 'id') as id, autotag.clean_status(e ->> 'status') as status) i
    where i.id is not null and i.status is not null);
end $$;

-- If a batch was refused for something that its brief may have caused (is_about_request), the error says nothing about the account.
-- It becomes an error of the batch's images. They are sent as single calls, whose errors say more (blame_brief).
create or replace function autotag.blame_briefs(p_polls autotag.batch_poll[]) returns autotag.batch_poll[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_refused text[] := array(
    select seen.id from unnest(p_polls) seen where seen.status = 'failed' and seen.error_kind = 'account'
      and autotag.is_about_request(jsonb_build_object('kind', seen.error_kind, 'code', seen.error_code)));
begin
  if v_refused = '{}' then
    return p_polls;
  end if;
  v_refused := array(
    select b.openai_batch_id from autotag.batches b join autotag.jobs j on j.id = b.job_id
    where b.openai_batch_id = any (v_refused) and j.brief_id is not null);
  return array(
    select row(seen.id, seen.status, seen.output_file_id, seen.error_file_id, seen.total, seen.done, seen.error_code, seen.error,
      case when seen.id = any (v_refused) then 'image' else seen.error_kind end)::autotag.batch_poll
    from unnest(p_polls) with ordinality seen order by seen.ordinality);
end $$;

-- Bounds a poll's counts by the batch: it has at most as many lines as images, at least as many as earlier polls reported, and at most
-- all of them are done. A total of 0 is unknown.
create or replace function autotag.bound_counts(p_poll autotag.batch_poll, p_batch autotag.batches) returns autotag.batch_poll
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  p_poll.total := greatest(p_batch.request_total, least(p_poll.total, p_batch.image_count - p_batch.express_count));
  if p_poll.total > 0 then
    p_poll.total := greatest(p_poll.total, p_batch.request_done);
  end if;
  p_poll.done := least(p_poll.done, coalesce(nullif(p_poll.total, 0), p_batch.image_count - p_batch.express_count));
  return p_poll;
end $$;

-- Applies a poll to the account: a poll that works ends the pause that a failed poll began, and a batch that failed with an
-- account error (p_error: no credit) pauses tagging, as a single call would. p_limit: the limit of the provider's queue, if a
-- refusal stated it. Locks: provider, in these cases.
create or replace function autotag.judge_poll(p_error text, p_limit bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from autotag.provider_limits p where p.account_error_from = 'poll') then
    perform autotag.resume_tagging('poll');
    perform pg_notify('autotag', 'realtime');
  end if;
  if p_error is not null then
    perform autotag.pause_tagging(p_error, 'batch');
  end if;
  update autotag.provider_limits p set queued_batch_tokens = p_limit where p.queued_batch_tokens <> p_limit;
end $$;

-- The limit that a refusal states: `Enqueued token limit reached for gpt-4o-mini in organization org-x. Limit: 2,000,000 enqueued
-- tokens.` Null: it states none.
create or replace function autotag.stated_limit(p_error text) returns bigint
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case when n.digits is not null then least(greatest(n.digits::bigint, 1000), 1000000000000) end
  from (select replace(substring(p_error from '[Ll]imit: ?([0-9][0-9,]{0,17}) enqueued'), ',', '') as digits) n
$$;

-- Applies a poll to each of p_batches that is in flight, and returns the batches that have changed. p_look: when the worker was
-- assigned this poll; p_proven: single calls work. The caller holds the batches and their jobs.
create or replace function autotag.apply_poll(
  p_polled autotag.batch_poll[], p_batches uuid[], p_look timestamptz, p_proven boolean, p_now timestamptz
) returns uuid[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_poll autotag.batch_poll;
  v_batch autotag.batches;
  v_changed uuid[] := array[]::uuid[];
begin
  select * into v_settings from autotag.settings;
  for v_poll in
    select seen.* from unnest(p_polled) seen
    join autotag.batches b on b.openai_batch_id = seen.id and b.state = 'submitted'
    where b.id = any (p_batches) order by b.id
  loop
    select * into v_batch from autotag.batches b where b.openai_batch_id = v_poll.id and b.state = 'submitted';
    v_poll := autotag.bound_counts(v_poll, v_batch);
    if v_poll.status = 'gone' then
      perform autotag.count_missing_poll(v_batch, p_look);
    elsif v_poll.status in ('validating', 'in_progress', 'finalizing', 'cancelling', 'unread')
      and v_batch.submitted_at <= p_now - 2 * v_settings.batch_give_up_after then
      perform autotag.requeue_batch(v_batch, true, 1, 'batch_gone', 'OpenAI never finished the batch of this image.');
      perform autotag.end_batch(v_batch, 'OpenAI has not finished this batch within two days.');
    elsif v_poll.status = 'unread' then
      null;
    elsif v_poll.status = 'failed' and v_poll.error_code = 'token_limit_exceeded' then
      perform autotag.refuse_tokens(v_batch, v_poll.error, v_settings, p_now);
    -- If single calls work, an account error counts: after max_bad_answers, this account or deployment cannot do batches.
    elsif v_poll.status = 'failed'
      and v_poll.error_kind = 'account' and (not p_proven or v_batch.failures + 1 < v_settings.max_bad_answers) then
      update autotag.batches b
      set state = 'planned', openai_batch_id = null, openai_status = null, reserved_tokens = 0, error = v_poll.error,
          not_before = p_now + v_settings.batch_poll_interval,
          failures = b.failures + p_proven::integer
      where b.id = v_batch.id;
    elsif v_batch.openai_status is distinct from v_poll.status or v_batch.request_done < v_poll.done or v_batch.missing_polls > 0 then
      perform autotag.move_batch(v_batch, v_poll, p_now);
      v_changed := array_append(v_changed, v_batch.id);
    elsif not v_batch.cancel_requested and v_poll.status in ('validating', 'in_progress', 'finalizing')
      and (v_batch.progress_at <= p_now - v_settings.batch_stuck_after
        or v_batch.submitted_at <= p_now - v_settings.batch_give_up_after)
      and autotag.predict_wait(v_batch.workspace_id, v_batch.image_count - v_batch.express_count - v_batch.request_done)
        <= v_settings.realtime_max_wait
    then
      update autotag.batches b set cancel_requested = true, stuck = true where b.id = v_batch.id;
      update autotag.jobs j
      set fallback = 'A batch made no progress, so the rest of its images are sent as single calls.'
      where j.id = v_batch.job_id;
    end if;
  end loop;
  return v_changed;
end $$;

-- Counts a poll that did not find the batch at OpenAI. After batch_max_missing_polls in a row the batch ends, and its images are
-- retried. p_look: as in apply_poll(). The caller holds job and batch.
create or replace function autotag.count_missing_poll(p_batch autotag.batches, p_look timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_batch.last_missing_poll_at = p_look then  -- this poll is counted already
    return;
  end if;
  update autotag.batches b set missing_polls = b.missing_polls + 1, last_missing_poll_at = p_look where b.id = p_batch.id;
  if p_batch.missing_polls + 1 >= (select s.batch_max_missing_polls from autotag.settings s) then
    perform autotag.requeue_batch(p_batch, true, 1, 'batch_gone', 'OpenAI lost the batch of this image.');
    perform autotag.end_batch(p_batch, 'OpenAI does not know this batch (any more, or with this key).');
  end if;
end $$;

-- Updates a batch whose status or count of answers has changed. One that has ended waits to be harvested. The caller holds job and
-- batch.
create or replace function autotag.move_batch(p_before autotag.batches, p_polled autotag.batch_poll, p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
begin
  update autotag.batches b
  set openai_status = p_polled.status, request_total = p_polled.total,
      request_done = greatest(b.request_done, p_polled.done), progress_at = p_now, missing_polls = 0,
      running_at = coalesce(b.running_at, case when p_polled.status = 'in_progress' then p_now end),
      output_file_id = p_polled.output_file_id, error_file_id = p_polled.error_file_id, error = p_polled.error
  where b.id = p_before.id returning * into v_batch;
  if p_polled.status in ('completed', 'failed', 'expired', 'cancelled') then
    update autotag.batches b set state = 'ended', ended_at = p_now, reserved_tokens = 0 where b.id = v_batch.id;
    if p_polled.status = 'completed' then
      perform autotag.record_duration(v_batch, p_now);
    end if;
    perform pg_notify('autotag', 'batch');
  end if;
end $$;

-- Harvests a batch that has ended: stores its answers, and retries its images without an answer.

-- Ends a batch, however it went. Broadcasts batch-complete if OpenAI had the batch and no outcome waits for the host; otherwise
-- announce_stored() broadcasts it after the last outcome. requeue_batch() deals with images without an answer. p_error: null keeps
-- the row's error. The caller holds the batch and its job.
create or replace function autotag.end_batch(p_batch autotag.batches, p_error text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.batches b
  set state = 'done', worker_id = null, finished_at = autotag.now(), reserved_tokens = 0, error = coalesce(p_error, b.error)
  where b.id = p_batch.id;
  perform autotag.announce_stored(array[p_batch.id]);
end $$;

-- Broadcasts that all answers of a batch are stored. Only announce_stored() calls it, once per batch.
create or replace function autotag.broadcast_stored(p_batch autotag.batches) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_batch.openai_batch_id is not null then
    perform autotag.broadcast('batch-updates', 'batch-complete',
      jsonb_build_object('batch_id', p_batch.openai_batch_id), false);
    perform autotag.broadcast_to_workspace(p_batch.workspace_id, 'batch-complete', jsonb_build_object(
      'batch_id', p_batch.openai_batch_id, 'job_id', p_batch.job_id,
      'image_count', p_batch.image_count, 'status', p_batch.openai_status));
  end if;
end $$;

-- Puts tasks of a job, in this order, into new planned batches of the job. p_not_before: when the batches may start. p_from: the
-- batch that the tasks come from, if OpenAI never had it; the first new batch takes over its admission to the workspace's window.
-- The caller holds job and tasks. Locks: window (skip locked).
create or replace function autotag.place_in_batches(
  p_job autotag.jobs, p_tasks bigint[], p_not_before timestamptz default '-infinity', p_from autotag.batches default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_count integer := cardinality(p_tasks);
  v_last integer := (select coalesce(max(b.ordinal), 0) from autotag.batches b where b.job_id = p_job.id);
  v_left record;
  v_batches integer;
begin
  if v_count = 0 then
    return;
  end if;
  select * into v_left from autotag.batches_left(p_job.workspace_id);
  v_batches := autotag.plan_batches(v_count, v_left.batches, v_left.window_images);
  with placed as materialized (
    -- The sizes of the batches differ by one at most. A join by ranges would compare each task with each batch.
    select u.id, v_last + (u.i * v_batches + v_count - 1) / v_count as ordinal from unnest(p_tasks) with ordinality u (id, i)
  ), made as (
    insert into autotag.batches (job_id, workspace_id, ordinal, image_count, extra_tokens, created_at, not_before, admitted_at)
    select p_job.id, p_job.workspace_id, x.ordinal, count(*),
      sum(greatest(t.min_output_tokens - p.output_tokens, 0)) + count(*) * autotag.extra_tokens(p_job.brief_id), autotag.now(),
      p_not_before, case when x.ordinal = v_last + 1 then p_from.admitted_at end
    from placed x join autotag.tasks t on t.id = x.id cross join autotag.provider_limits p group by x.ordinal
    returning id, ordinal
  )
  update autotag.tasks t set lane = 'batch', batch_id = m.id, error_code = null, error = null
  from placed x join made m on m.ordinal = x.ordinal where t.id = x.id;
  perform autotag.give_back_images(p_from, p_from.image_count - p_from.express_count - v_count / v_batches);
  perform autotag.refresh_eta(p_job.id);
  perform pg_notify('autotag', 'batch');
end $$;

-- Stores answers of a batch, and errors of images that could not become lines of its file: [{task, result | error, usage, mark}].
-- Ignores tasks that are not in this batch any more or have their answer, so a second harvest changes nothing. An error that
-- allows a retry is only recorded on its task, once, with its failure; batch_finish() retries these images, because only then
-- their number is known. p_keep: as in settle(). Returns {accepted, notices: [{event, notice}]}: how many tasks ended, and
-- sentences for the log.
-- Locks: job, batch, tasks, assets (finish), usage, provider (skip locked).
create or replace function autotag.batch_answers(
  p_worker uuid, p_batch uuid, p_attempt integer, p_answers jsonb, p_keep boolean default false
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set random_page_cost = 1.1
as $$
declare
  v_batch autotag.batches;
  v_report autotag.provider_report;
  v_judged record;
  v_answers autotag.answer[];
  v_again autotag.answer[];    -- of these, the errors that allow a retry
  v_notices jsonb;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  perform autotag.check_list(p_answers);
  v_batch := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  v_answers := autotag.read_batch_answers(v_batch, p_answers);
  v_report := autotag.summarize_calls(p_worker, '{}', null);
  v_report.asked_at := v_batch.asked_at;
  if exists (select from unnest(v_answers) a where a.error is not null) then
    v_judged := autotag.reclassify_errors(v_answers, v_batch.asked_at);
    v_answers := v_judged.answers;
    v_report.form_changed := v_judged.form_changed;
  end if;
  v_report.answers := v_answers;
  if exists (select from unnest(v_answers) a where a.error is not null) then
    v_answers := autotag.judge_retries(v_answers, true, v_batch.asked_at);
    v_again := autotag.leave_to_finish(v_batch.id, v_answers);
    v_answers := array(select a from unnest(v_answers) a where a.task not in (select g.task from unnest(v_again) g));
  end if;
  v_notices := autotag.apply_answers(v_batch.workspace_id, v_answers, not p_keep);
  perform autotag.add_usage(v_report.answers, true, null, v_batch.asked_at);
  return jsonb_build_object('accepted', cardinality(v_answers), 'notices', v_notices || autotag.report_provider(v_report));
end $$;

-- Validates answers and returns those for images of this batch that still need one, at most one per image. The plan is kept, as in
-- read_reports().
create or replace function autotag.read_batch_answers(p_batch autotag.batches, p_answers jsonb) returns autotag.answer[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_max_allowed record := autotag.believable_usage();
  v_brief bigint := (select j.brief_id from autotag.jobs j where j.id = p_batch.job_id);   -- as its lines asked
begin
  return array(
    with reported as materialized (
      select * from autotag.read_answers(p_answers, v_max_allowed.input)
    ), held as materialized (
      select t.id, t.attempt, t.job_id, t.asset_id, greatest(t.min_output_tokens, p_batch.output_tokens) as output_tokens,
        t.error_code is not null as failed, t.image_notes, t.batch_id, t.finished_at
      from autotag.tasks t
      -- By id alone: the index of batches would lead to all of this batch's images, for every page of answers.
      where t.id = any (array(select r.task from reported r))
    )
    select row(x.id, x.attempt, x.job_id, p_batch.workspace_id, null, null, x.output_tokens, x.result,
      case when x.error is not null or x.result is null then autotag.clean_error(x.error, x.result) end,
      case when x.valid_usage then x.usage else autotag.clean_usage(x.usage, v_max_allowed.input,
        greatest(coalesce(4 * x.output_tokens + 4000, 100000), v_max_allowed.uncapped)) end,
      true, x.mark, x.asset_id, v_brief)::autotag.answer
    from (
      select distinct on (h.id) h.*, case when v_brief is null then r.result else autotag.fit_result(r.result, r.fields, v_brief) end
          || case when h.image_notes is null then '{}' else autotag.image_part(h.image_notes) end as result, r.error, r.usage, r.valid_usage, r.mark
      -- a task with a recorded error accepts only a result, so that no error counts twice
      from reported r join held h on h.id = r.task and (not h.failed or r.result is not null)
      where h.batch_id = p_batch.id and h.finished_at is null
      order by h.id, r.place) x);
end $$;

-- Records the errors that allow a retry on their tasks, and returns those answers: batch_finish() retries all images without an
-- answer together, and not before the time that an error asks for. The caller holds the batch and its job. Locks: tasks.
create or replace function autotag.leave_to_finish(p_batch uuid, p_answers autotag.answer[]) returns autotag.answer[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_again autotag.answer[];
begin
  v_again := array(
    select a from unnest(p_answers) a
    join autotag.tasks t on t.id = a.task
    where a.error is not null and not autotag.is_final(a, t.failures));
  update autotag.tasks t
  set error_code = a.error ->> 'code', error = a.error ->> 'message', failures = t.failures + (k.counts or a.error ? 'counts')::integer,
      min_output_tokens = coalesce(autotag.next_cap(a), t.min_output_tokens)
  from unnest(v_again) a join autotag.error_kinds k on k.kind = a.error ->> 'kind'
  where t.id = a.task;
  update autotag.batches b set not_before = greatest(b.not_before, a.until)
  from (
    select autotag.now() + make_interval(secs => max((x.error ->> 'retry_after')::double precision)) as until from unnest(v_again) x) a
  where b.id = p_batch and a.until is not null;
  return v_again;
end $$;

-- All answers of the batch are stored or kept: ends it, and retries the images without an answer (those of a cancelled job fail).
-- Locks: job, batch, tasks.
create or replace function autotag.batch_finish(p_worker uuid, p_batch uuid, p_attempt integer) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
begin
  perform autotag.requeue_batch(v_batch, v_batch.openai_status is distinct from 'failed', 1,
    'no_answer', 'OpenAI gave no answer for this image.');
  perform autotag.end_batch(v_batch, null);
end $$;

-- Validation of workers' reports, before any other function reads them.

-- Validates a worker's result: {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model} without further keys; at most 50
-- tags of 50 characters with different keys, and a caption of 300. Drops invalid tags (empty, not a string, longer) and confidences
-- without a tag. Null: there is no list of tags, or none of them is valid.
create or replace function autotag.clean_result(p_result jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_tags jsonb := p_result -> 'tags';
  v_kept text[];
  v_sure jsonb;
begin
  if v_tags is null or jsonb_typeof(p_result) <> 'object' or jsonb_typeof(v_tags) <> 'array' then
    return null;
  end if;
  v_kept := array(
    select kept.tag from (
      select distinct on (x.tag) x.tag, x.i from (
        select autotag.printable(e #>> '{}', 51) as tag, i from jsonb_array_elements(v_tags) with ordinality u (e, i)
        where jsonb_typeof(e) = 'string' limit 1000) x
      where length(x.tag) between 1 and 50 order by x.tag, x.i) kept
    order by kept.i limit 50);
  if v_kept = '{}' and v_tags <> '[]' then
    return null;
  end if;
  if not autotag.are_different(to_jsonb(v_kept)) then
    v_kept := array(
      select (array_agg(kept.tag order by kept.i))[1] from unnest(v_kept, autotag.tag_keys(v_kept)) with ordinality kept (tag, key, i)
      group by kept.key order by min(kept.i));
  end if;
  if jsonb_typeof(p_result -> 'confidence') = 'object' then
    select jsonb_object_agg(tag, autotag.clean_number(p_result -> 'confidence', tag, 0, 1)) into v_sure
    from unnest(v_kept) tag where jsonb_typeof(p_result -> 'confidence' -> tag) = 'number';
  end if;
  return jsonb_build_object('tags', to_jsonb(v_kept), 'confidence', coalesce(v_sure, '{}'),
    'caption', coalesce(autotag.printable(case when jsonb_typeof(p_result -> 'caption') = 'string' then p_result ->> 'caption' end, 300), ''),
    'model', coalesce(autotag.printable(case when jsonb_typeof(p_result -> 'model') = 'string' then p_result ->> 'model' end, 100), ''));
end $$;

-- For each result: true only if clean_result() would return it unchanged. (Some that it would return unchanged are false, too, which
-- costs only time.) Nearly every result passes, so this decides how long a report takes: 4 µs an image instead of 30. It checks the JSON
-- as text, and all results in one query, because a function call for each would take as long again.
create or replace function autotag.canonical_results(p_results jsonb[]) returns boolean[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select coalesce(texts.tags is not null
      and cardinality(texts.list) <= 50 and r.result - '{tags,confidence,caption,model}'::text[] = '{}'
      and length(texts.caption) <= 300 and length(texts.model) <= 100
      and texts.tags || texts.caption || texts.model !~ autotag.unprintable() and strpos(texts.tags || texts.sure, E'\\') = 0
      -- spaces that printable() would remove
      and strpos(texts.tags || texts.caption || texts.model, '  ') = 0 and texts.caption = btrim(texts.caption) and texts.model = btrim(texts.model)
      -- no element that is not a string; no tag or key that is empty or has a space at an end; no confidence outside 0 to 1
      and texts.tags !~ E'\\[[^"\\]]|, [^"]|""|" |[^,] "|, "[],]' and texts.sure !~ ': (1[^,}]|0[^.,}]|[^01])|""'
      -- As many tags as confidences, and every confidence has its tag: so no tag is there twice. (The cast to varchar(50) finds
      -- tags that are too long; `[^"]{51}` in the pattern above would take three quarters of the time.)
      and texts.list::varchar(50)[]::text[] = texts.list and (r.result -> 'confidence') - texts.list = '{}'
      and 3 * cardinality(texts.list) = length(texts.sure) - length(replace(texts.sure, '": ', ''))
      and (texts.tags !~ autotag.odd_tags() or autotag.are_different(r.result -> 'tags')), false)
    from unnest(p_results) with ordinality r (result, i)
    -- offset 0 makes each text once. Only results with the right types and at most 8 kB are read, because a number of a few bytes can be
    -- a text of 131 kB.
    left join lateral (
      select x.*, string_to_array(left(right(x.tags, -2), -2), '", "') as list from (
        select (r.result -> 'tags')::text as tags, (r.result -> 'confidence')::text as sure, r.result ->> 'caption' as caption,
          r.result ->> 'model' as model
        where pg_column_size(r.result) < 8000 and jsonb_typeof(r.result -> 'tags') = 'array'
          and jsonb_typeof(r.result -> 'confidence') = 'object'
          and jsonb_typeof(r.result -> 'caption') = 'string' and jsonb_typeof(r.result -> 'model') = 'string' offset 0) x offset 0) texts on true
    order by r.i);
end $$;

-- Validates a worker's notes about an image, for its user, for example {truncated: 0.97}: at most 8 names, each with a number, a boolean,
-- a text of 100 characters or a list of 8 numbers. Null: no notes.
create or replace function autotag.clean_image_notes(p_notes jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  if p_notes is null or jsonb_typeof(p_notes) <> 'object' then
    return null;
  end if;
  return (
    select jsonb_object_agg(x.name, x.note) from (
      select n.name, case jsonb_typeof(n.note)
        when 'string' then to_jsonb(nullif(autotag.printable(n.note #>> '{}', 100), ''))
        when 'array' then case when jsonb_array_length(n.note) <= 8 and length(n.note::text) <= 200
          and not exists (select from jsonb_array_elements(n.note) e where jsonb_typeof(e) <> 'number') then n.note end
        when 'number' then case when length(n.note::text) <= 30 then n.note end
        when 'boolean' then n.note end as note
      from jsonb_each(p_notes) n (name, note) where n.name ~ '^[a-z][a-z0-9_]{0,29}$' order by n.name limit 8) x
    where x.note is not null);
end $$;

-- The same as a part of a result: {image: …}, or nothing.
create or replace function autotag.image_part(p_notes jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_strip_nulls(jsonb_build_object('image', autotag.clean_image_notes(p_notes)));
end $$;

-- Reads answers as workers report them, in their order: [{task, attempt, result | error, usage, called, mark}]. result: as clean_result()
-- returns it, with image: clean_image_notes(); fields: as the worker gave them, for fit_result(). valid_usage: clean_usage() would
-- return this usage unchanged with any cap, because the answer has at most 4,000 tokens, and the prompt at most p_input.
-- error and another usage are as the worker gave them.
create or replace function autotag.read_answers(p_answers jsonb, p_input integer)
returns table (task bigint, attempt integer, result jsonb, fields jsonb, error jsonb, usage jsonb, valid_usage boolean, called boolean, mark uuid, place bigint)
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp rows 500
as $$
declare
  v_max jsonb := jsonb_build_object('max', p_input);
  v_canonical boolean[] := autotag.canonical_results(array(
    select case when jsonb_typeof(e -> 'result') = 'object' then (e -> 'result') - '{fields,image}'::text[] end from jsonb_array_elements(p_answers) e));
begin
  return query
    -- A JSON path compares numbers three times as fast as jsonb's operators. A value that is not a number never matches.
    select case when jsonb_path_match(e, 'strict $.task >= 1 && $.task <= 9223372036854775807', '{}', true) then (e -> 'task')::bigint end,
      case when jsonb_path_match(e, 'strict $.attempt >= 1 && $.attempt <= 2147483647', '{}', true) then (e -> 'attempt')::integer end,
      case when not v_canonical[i] then autotag.clean_result(e -> 'result')
        else (e -> 'result') - '{fields,image}'::text[] end
        || case when e -> 'result' ? 'image' then autotag.image_part(e #> '{result,image}') else '{}' end, e -> 'result' -> 'fields',
      nullif(e -> 'error', 'null'), u.usage,
      coalesce(jsonb_path_match(u.usage, 'strict $.input >= 0 && $.input <= $max && $.output >= 0 && $.output <= 4000
          && $.cached >= 0 && $.cached <= $max && $.cache_write >= 0 && $.cache_write <= $max && $.reasoning >= 0 && $.reasoning <= 4000',
          v_max, true)
        and u.model <> '' and u.tier <> '' and length(u.model) <= 100 and length(u.tier) <= 20
        and u.model || u.tier !~ autotag.unprintable(), false),
      e -> 'called' is distinct from 'false',
      -- The mark must look like a uuid as Postgres prints it. One pattern for all of this takes twice as long.
      case when u.mark like '________-____-____-____-____________' and u.mark !~ '[^0-9a-f-]' and length(replace(u.mark, '-', '')) = 32
        then u.mark::uuid end, i
    from jsonb_array_elements(p_answers) with ordinality a (e, i)
    cross join lateral (
      select e -> 'usage' as usage, e -> 'usage' ->> 'model' as model, e -> 'usage' ->> 'tier' as tier, e ->> 'mark' as mark offset 0) u;
end $$;

-- Validates a worker's error: its kind is one of error_kinds (else transient), texts are short and printable, waits are at most
-- an hour. Without an error the result must be storable (p_result, from clean_result()), or the error is `no_result`. Null: no
-- error.
create or replace function autotag.clean_error(p_error jsonb, p_result jsonb default '{"tags": []}') returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_error is null or jsonb_typeof(p_error) = 'null' then
    if p_result is not null then
      return null;
    end if;
    p_error := '{"kind": "transient", "code": "no_result"}';
  end if;
  return jsonb_build_object(
    'kind', coalesce((select k.kind from autotag.error_kinds k where k.kind = p_error ->> 'kind'), 'transient'),
    'code', coalesce(nullif(autotag.printable(p_error ->> 'code', 100), ''), 'unknown'),
    'message', coalesce(nullif(autotag.printable(p_error ->> 'message', 1000), ''), 'This image could not be tagged.'),
    'retry', coalesce(p_error ->> 'retry', '') = 'true',
    'retry_after', autotag.clean_number(p_error, 'retry_after', 0, 3600),
    'origin', case when p_error ->> 'origin' in ('provider', 'storage', 'host', 'worker') then p_error ->> 'origin' end,
    'parameter', case when p_error ->> 'parameter' in
      ('token_cap', 'reasoning_effort', 'response_format', 'detail', 'service_tier', 'expires_after')
      then p_error ->> 'parameter' end,
    'about_request', coalesce(p_error ->> 'about_request', '') = 'true');
end $$;

-- The largest believable usage of one answer in tokens, so that no report uses up a quota. input: 20 times what a prompt reserves, at
-- least 20,000. output: 4 times the cap plus 4,000, because some providers count reasoning separately; at least 4 times
-- max_output_tokens if the provider accepts no cap (uncapped).
create or replace function autotag.believable_usage(out input integer, out uncapped integer)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select greatest(20 * (p.tokens_per_image - p.output_tokens), 20000),
    case when p.question ->> 'cap_parameter' = 'none' then (select 4 * s.max_output_tokens from autotag.settings s) else 0 end
  into input, uncapped from autotag.provider_limits p;
end $$;

-- Validates a worker's usage figures: {input, cached, cache_write, output, reasoning} (tokens, clamped to 0 to p_input and
-- p_output), model (that answered) and tier (null: not given). Null: the provider gave no figures.
create or replace function autotag.clean_usage(p_usage jsonb, p_input integer default 10000000, p_output integer default 10000000)
returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := p_usage ->> 'model';
  v_tier text := p_usage ->> 'tier';
begin
  if p_usage is null or jsonb_typeof(p_usage) <> 'object' then
    return null;
  end if;
  return jsonb_build_object(
    'input', coalesce(autotag.clean_number(p_usage, 'input', 0, p_input), 0)::integer,
    'cached', coalesce(autotag.clean_number(p_usage, 'cached', 0, p_input), 0)::integer,
    'cache_write', coalesce(autotag.clean_number(p_usage, 'cache_write', 0, p_input), 0)::integer,
    'output', coalesce(autotag.clean_number(p_usage, 'output', 0, p_output), 0)::integer,
    'reasoning', coalesce(autotag.clean_number(p_usage, 'reasoning', 0, p_output), 0)::integer,
    'model', nullif(autotag.printable(v_model, 100), ''), 'tier', nullif(autotag.printable(v_tier, 20), ''));
end $$;

-- Validates what a worker has observed of the provider's limits: the numbers among those that update_provider_limits() and
-- record_sent() read, which bound them further. Null: nothing.
create or replace function autotag.clean_observed(p_observed jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  if p_observed is null or jsonb_typeof(p_observed) <> 'object' then
    return null;
  end if;
  return (
    select jsonb_object_agg(n, autotag.clean_number(p_observed, n, 0, 2000000000))
    from unnest('{requests_limit,requests_left,tokens_limit,tokens_left,day_limit,day_left,unclear_limit,unclear_left,age,retry_after,sent,sent_age}'::text[]) n
    where jsonb_typeof(p_observed -> n) = 'number');
end $$;

-- Records the stages of a worker's single calls of one workspace: [{task, attempt, stage}], stages between `queued` and `completed`.
-- Ignores tasks that the worker does not hold (any more), and workers of another login. Only `processing` is written to
-- the host's row, because each write fires the host's triggers, webhooks and Postgres Changes; tagging_job() shows the others.
-- It also broadcasts changes that no message has named yet (broadcast_held), so a worker calls it once more a second after a report.
-- p_sent: {sent, sent_age (seconds)}, as in record_sent(). Returns sentences for the operator's log, as settle() does.
-- Locks: tasks by id (skip locked), jobs (skip locked), assets (show), provider (skip locked).
create or replace function autotag.report_stages(p_worker uuid, p_workspace_id autotag.workspace_id, p_stages jsonb, p_sent jsonb default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_moved autotag.ended[];
  v_free uuid[];
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  perform autotag.check_list(p_stages);
  if not autotag.is_own_worker(p_worker) then
    return '[]'::jsonb;
  end if;
  with reported as (
    select case when e -> 'task' between '1' and '9223372036854775807' then (e -> 'task')::bigint end as task,
      case when e -> 'attempt' between '1' and '2147483647' then (e -> 'attempt')::integer end as attempt,
      e ->> 'stage' as stage
    from jsonb_array_elements(p_stages) e
  ), held as (
    select t.id, r.stage from reported r
    join autotag.tasks t on t.id = r.task and t.attempt = r.attempt and t.worker_id = p_worker and t.workspace_id = p_workspace_id
    where r.stage in ('preparing', 'submitted', 'processing', 'completing')
      and autotag.stage_rank(t.stage) < autotag.stage_rank(r.stage)
    order by t.id for update of t skip locked
  ), moved as (
    update autotag.tasks t set stage = h.stage from held h where t.id = h.id returning t.asset_id, t.job_id, t.stage
  )
  select array_agg(row(m.job_id, 0, 0, m.assets)::autotag.ended) into v_moved
  from (
    select x.job_id, coalesce(array_agg(x.asset_id) filter (where x.stage = 'processing'), '{}') as assets from moved x group by x.job_id) m;
  -- Rows of an upload that another transaction holds are left out, so that no row changes without a message.
  v_free := array(
    select j.id from autotag.jobs j where j.id in (select m.job_id from unnest(v_moved) m) order by j.id for no key update skip locked);
  perform autotag.show(p_workspace_id, array(select a from unnest(v_moved) m, unnest(m.assets) a where m.job_id = any (v_free)),
    'processing', autotag.stage_progress('processing'), null, true);
  perform autotag.broadcast_progress(m.job_id, null, m.assets) from unnest(v_moved) m where m.job_id = any (v_free);
  perform autotag.broadcast_held(p_workspace_id);
  return case when p_sent is null then '[]'::jsonb else autotag.report_provider(autotag.summarize_calls(p_worker, '{}', p_sent)) end;
end $$;

-- People's tags and the tags of autotag are in one column. What autotag stores is decided here, by comparing the column with what it
-- remembers in tagging_result. The memory has three lists:
--
--   given     tags that autotag gave and that are in the column, spelled as there. Every other tag of the column is a person's.
--   added     people's tags, as autotag last saw them
--   removed   the keys of tags that were in one of the two lists and later not in the column: people have removed them
--
-- autotag stores nothing else. So it does not notice if a tag is removed and typed again between two runs. A tag that is in the column
-- more than once, or that is spelled in another way than autotag gave it, is a person's.
--
-- Bounds: a list of 1,000 tags or 65,536 bytes takes 6 ms, 10 with capitals and 18 with punctuation. Longer ones are left as they are, and the row says so.

-- The keys of tags (tag_key), as a vocabulary compares them. A tag without a letter or digit has no such key, so its key is its lower
-- case. Null stays null. (Most tags are their own key. A call for each of them would take longer.)
create or replace function autotag.tag_keys(p_tags text[]) returns text[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select case when u.tag ~ '^[a-z0-9]+( [a-z0-9]+)*$' then u.tag
      else coalesce(nullif(autotag.tag_key(u.tag), ''), btrim(regexp_replace(normalize(lower(u.tag)), E'\\s+', ' ', 'g'))) end
    from unnest(p_tags) with ordinality u (tag, i) order by u.i);
end $$;

-- Matches a list of tags (JSON as text) of which two can have the same key: one of them has a capital, a compatible character, or
-- anything else that tag_key() changes. Planning replaces the call by its value.
create or replace function autotag.odd_tags() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select E'[^][[:alnum:] ",]|[[:upper:]\\u00aa\\u00b2-\\u00b3\\u00b5\\u00b9-\\u00ba\\u0132-\\u0133\\u013f-\\u0140\\u0149\\u017f\\u01c4-\\u01cc\\u01f1-\\u01f3\\u02b0-\\u02b8\\u02bc\\u02e0-\\u02e4\\u0300-\\u0385\\u03c2\\u03d0-\\u03d6\\u03f0-\\u03f9\\u0587\\u0675-\\u0678\\u0958-\\u095f\\u09dc-\\u09df\\u0a33-\\u0a5e\\u0b5c-\\u0b5d\\u0e33\\u0eb3\\u0edc-\\u0edd\\u0f0c-\\u0fbf\\u10fc\\u1100-\\u11ff\\u1c80-\\u1c8f\\u1d2c-\\u1dbf\\u1e9a-\\u1e9b\\u1f71-\\u1fff\\u2070-\\u24ff\\u2c7c-\\u2c7d\\u2d6f\\u2e80-\\u2fdf\\u3130-\\u318f\\u3164\\u3038-\\u303a\\u3099-\\u309f\\u30ff\\u3192-\\u33ff\\ua69c-\\ua69d\\ua770\\ua7f2-\\ua7f9\\uab5c-\\uab69\\uf900-\\uffff\\U00010000-\\U0010ffff]' $$;

-- Whether each of an answer's tags has its own key. In ASCII, tags with one key have the same letters and digits. So it seldom has to
-- make keys, which takes longer.
create or replace function autotag.are_different(p_tags jsonb) returns boolean
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_text text := p_tags::text;
begin
  if v_text !~ autotag.odd_tags() or v_text !~ E'[^ -~]|\\\\' and (
      select count(distinct w) = count(*)
      from unnest(string_to_array(translate(lower(left(right(v_text, -2), -2)), ' !#$%&''()*+-./:;<=>?@^_`{|}~', ''), '","')) w) then
    return true;
  end if;
  return (select count(distinct k) = count(*) from unnest(autotag.tag_keys(array(select jsonb_array_elements_text(p_tags)))) k);
end $$;

-- The keys of the vocabulary's tags that have one of people's words as a name, or a name that is nearly the same (know_tags). p_names:
-- the names in an answer (match_tags); p_keys: the words' keys. Only words that begin like a name are looked up.
create or replace function autotag.near_tags(p_workspace_id autotag.workspace_id, p_names jsonb, p_keys text[]) returns text[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_begins text[];
  v_keys text[];
begin
  if p_names = '{}' or p_keys = '{}' then
    return array[]::text[];
  end if;
  v_begins := array(select distinct left(k, 3) from jsonb_each(p_names) n cross join lateral jsonb_array_elements_text(n.value) k);
  v_keys := array(select distinct k from unnest(p_keys) k where left(k, 3) = any (v_begins));
  if v_keys = '{}' then
    return array[]::text[];
  end if;
  return array(select v.key from unnest(autotag.know_tags(p_workspace_id, v_keys)) k join autotag.vocabulary v on v.id = k.id);
end $$;

-- One list (p_list) of tagging_result. Empty if tagging_result does not have the form that merge_tags() writes.
create or replace function autotag.recall_tags(p_memory jsonb, p_list text) returns text[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  if coalesce(jsonb_typeof(p_memory) = 'object' and p_memory ?& '{given,confidence,caption,model}'
    and jsonb_typeof(p_memory -> p_list) = 'array', false) then
    return array(select e #>> '{}' from jsonb_array_elements(p_memory -> p_list) e where jsonb_typeof(e) = 'string');
  end if;
  return array[]::text[];
end $$;

-- The tags of an answer, without parents that were only added for tags that people removed (`above` of match_tags). p_removed: the
-- removed keys; p_there: the keys of the tags in the column.
create or replace function autotag.answered_tags(p_answer jsonb, p_removed text[], p_there text[], p_workspace_id autotag.workspace_id)
returns text[]
language plpgsql stable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_tags text[] := array(select jsonb_array_elements_text(p_answer -> 'tags'));
  v_gone text[];               -- those of them that people removed
begin
  if p_answer -> 'above' is null or p_removed = '{}' then
    return v_tags;
  end if;
  v_gone := p_removed || autotag.near_tags(p_workspace_id, p_answer -> 'names', p_removed);
  v_gone := array(
    select t.tag from unnest(v_tags, autotag.tag_keys(v_tags)) t (tag, key)
    where (t.key = any (p_removed) or p_answer -> 'names' -> t.tag ?| v_gone)
      and (t.key = any (p_there)) is not true);
  return array(
    select t.tag from unnest(v_tags) with ordinality t (tag, i)
    where (p_answer -> 'above' -> t.tag <@ to_jsonb(v_gone)) is not true order by t.i);
end $$;

-- What the answer of a run changes. p_tags: the tags in the column; null: an element that is not a text. p_memory: the present
-- tagging_result. p_answer: as in store_tags; a tag is left out if one of its `names` (match_tags) is a person's tag or was removed, or
-- is nearly the same as one (near_tags). p_longest: the column's limit of a tag's length, if it has one. dropped: the places of tags
-- that an earlier run gave and this one does not. fresh: the tags to append. result: the new tagging_result.
create or replace function autotag.merge_tags(
  p_tags text[], p_memory jsonb, p_answer jsonb, p_longest integer, p_workspace_id autotag.workspace_id,
  out dropped integer[], out fresh text[], out result jsonb
)
language plpgsql stable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_keys text[] := autotag.tag_keys(p_tags);
  v_given text[] := autotag.recall_tags(p_memory, 'given');
  v_added text[];
  v_removed text[];
  v_kept text[];               -- the keys of what stays in the column
  v_answer text[];
  v_answer_keys text[];
  v_names jsonb := coalesce(p_answer -> 'names', '{}');
  v_taken text[];              -- the keys of people's tags, of those that they removed, and of what is nearly the same in the vocabulary
begin
  v_removed := array(
    select k from unnest(autotag.tag_keys(
      v_given || autotag.recall_tags(p_memory, 'added') || autotag.recall_tags(p_memory, 'removed'))) k
    where k <> '' except select unnest(v_keys) order by 1);
  v_answer := autotag.answered_tags(p_answer, v_removed, v_keys, p_workspace_id);
  v_answer_keys := autotag.tag_keys(v_answer);
  select coalesce(array_agg(t.i) filter (where t.given and not t.again), '{}'),
    coalesce(array_agg(t.tag order by t.i) filter (where t.given and t.again), '{}'),
    array_agg(t.tag order by t.i) filter (where not t.given),
    coalesce(array_agg(t.key) filter (where not t.given or t.again), '{}'), array_agg(t.key) filter (where not t.given)
  into dropped, v_given, v_added, v_kept, v_taken
  from (
    select u.tag, u.i, u.key, u.tag = any (v_answer) as again,
      u.tag in (select unnest(v_given)) and count(*) over (partition by u.tag) = 1 as given
    from unnest(p_tags, v_keys) with ordinality u (tag, key, i) where u.tag <> '') t;
  v_taken := v_taken || v_removed;
  v_taken := v_taken || autotag.near_tags(p_workspace_id, v_names, v_taken);
  fresh := array(
    select (array_agg(t.tag order by t.i))[1] from unnest(v_answer, v_answer_keys) with ordinality t (tag, key, i)
    where t.key not in (select k from unnest(v_kept || v_removed) k where k is not null)
      and (v_names -> t.tag ?| v_taken) is not true and (p_longest is null or length(t.tag) <= p_longest)
    group by t.key order by min(t.i));
  v_given := v_given || fresh;
  result := autotag.remember_tags(p_answer || jsonb_build_object('confidence', (p_answer -> 'confidence') - array(
    select t.tag from unnest(v_answer, v_answer_keys) t (tag, key)
    where t.tag <> all (v_given) and t.key not in (select k from unnest(v_keys) k where k is not null))), v_given, v_added, v_removed);
end $$;

-- The memory of a row, corrected after its tags were stored, because triggers of the host can change what autotag writes. p_tags: the
-- texts in the column now; null: the column is too large. Null: the memory is right already.
--   * A given tag that is not in the column counts neither as given nor as removed by a person.
--   * A given tag that is spelled differently there counts as given, in that spelling.
--   * If given tags are missing and all of people's are there, other tags have replaced the missing ones (a trigger that knows synonyms),
--     so they count as given. Otherwise they are a person's.
--   * A given tag that became a tag that people have or removed counts as removed, because each run would bring it again.
create or replace function autotag.kept_tags(p_tags text[], p_memory jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_keys text[];               -- of p_tags
  v_given text[];
  v_added text[];
  v_given_keys text[];
  v_lost text[];               -- the keys of people's tags that are not there as they were spelled
  v_gone text[];               -- the keys of given tags that are not there
  v_removed text[] := autotag.recall_tags(p_memory, 'removed');
  v_named text[];              -- the tags with a confidence
begin
  if ((p_memory -> 'given') || coalesce(p_memory -> 'added', '[]') <@ to_jsonb(p_tags)) is not false
    or jsonb_typeof(p_memory -> 'confidence') is distinct from 'object' then
    return null;
  end if;
  v_keys := autotag.tag_keys(p_tags);
  v_given := autotag.recall_tags(p_memory, 'given');
  v_added := autotag.recall_tags(p_memory, 'added');
  v_given_keys := autotag.tag_keys(v_given);
  v_lost := autotag.tag_keys(array(select a from unnest(v_added) a where a <> all (p_tags)));
  v_gone := array(select k from unnest(v_given_keys) k except select unnest(v_keys));
  if exists (
      select from unnest(p_tags, v_keys) u (tag, key) where u.tag <> '' group by u.tag
      having count(*) > greatest((select count(*) from unnest(v_added) a where a = u.tag), 1)
        or min(u.key) = any (v_removed) and u.tag <> all (v_added)) then
    v_removed := array(select k from unnest(v_removed || v_gone) k group by k order by k);
  end if;
  select coalesce(array_agg(t.tag order by t.i) filter (where t.given), '{}'), array_agg(t.tag order by t.i) filter (where not t.given)
  into v_given, v_added
  from (
    select u.tag, u.i, u.tag <> all (v_added) and u.key <> all (v_lost) and count(*) over (partition by u.tag) = 1
      and (u.key = any (v_given_keys) or v_lost = '{}' and v_gone <> '{}') as given
    from unnest(p_tags, v_keys) with ordinality u (tag, key, i) where u.tag <> '') t;
  v_named := array(select jsonb_object_keys(p_memory -> 'confidence'));
  return autotag.remember_tags(p_memory - '{added,removed}'::text[] || jsonb_build_object('confidence', (
      select coalesce(jsonb_object_agg(coalesce(g.tag, c.tag), p_memory -> 'confidence' -> c.tag), '{}')
      from unnest(v_named, autotag.tag_keys(v_named)) c (tag, key)
      left join unnest(v_given, autotag.tag_keys(v_given)) g (tag, key) on g.key = c.key
      where c.key = any (v_keys))),
    v_given, v_added, v_removed);
end $$;

-- An answer without its tags, with the three lists.
create or replace function autotag.remember_tags(p_answer jsonb, p_given text[], p_added text[], p_removed text[]) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return p_answer - '{tags,names,above}'::text[] || jsonb_build_object('given', p_given)
    || case when p_added <> '{}' then jsonb_build_object('added', p_added) else '{}' end
    || case when p_removed <> '{}' then jsonb_build_object('removed', p_removed) else '{}' end;
end $$;

-- The same for a row whose tags autotag leaves as they are. It keeps the lists, so that nothing is forgotten, and adds the reason.
create or replace function autotag.leave_tags(p_memory jsonb, p_answer jsonb, p_reason text, out result jsonb, out error text)
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  result := autotag.remember_tags(p_answer, autotag.recall_tags(p_memory, 'given'), autotag.recall_tags(p_memory, 'added'),
    autotag.recall_tags(p_memory, 'removed'));
  error := case p_reason
    when 'form' then 'The tags of this image are not a list, so they stay as they are.'
    when 'objects' then 'The tags of this image are objects, so they stay as they are.'
    when 'size' then 'This image has too many tags to add to, so they stay as they are.'
    else 'People have removed too many tags of this image to remember more, so its tags stay as they are.' end;
end $$;

-- Merges an answer into a column of texts (text[], varchar[], citext[]), for store_tags. p_large: the value is too large to be read
-- (p_tags is null then). tags: the new value; null: unchanged. error: a sentence for the user.
create or replace function autotag.merge_array(
  p_tags text[], p_large boolean, p_memory jsonb, p_answer jsonb, p_longest integer, p_workspace_id autotag.workspace_id,
  out tags text[], out result jsonb, out error text
)
language plpgsql stable set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_merged record;
  v_reason text;
begin
  if coalesce(p_tags = '{}', not p_large) and p_memory is null and p_longest is null then
    tags := array(select jsonb_array_elements_text(p_answer -> 'tags'));
    result := autotag.remember_tags(p_answer, tags, '{}', '{}');
    return;
  end if;
  v_reason := case when p_large or cardinality(p_tags) > 1000 or pg_column_size(p_tags) > 65536 then 'size'
    when array_ndims(p_tags) > 1 then 'form' end;
  if v_reason is null then
    v_merged := autotag.merge_tags(p_tags, p_memory, p_answer, p_longest, p_workspace_id);
    v_reason := case when pg_column_size(v_merged.result) > 131072 then 'memory' end;
  end if;
  if v_reason is not null then
    select l.result, l.error into result, error from autotag.leave_tags(p_memory, p_answer, v_reason) l;
    return;
  end if;
  result := v_merged.result;
  if v_merged.dropped <> '{}' then
    tags := array(select u.tag from unnest(p_tags) with ordinality u (tag, i) where u.i <> all (v_merged.dropped) order by u.i)
      || v_merged.fresh;
  elsif p_tags is null or v_merged.fresh <> '{}' then
    tags := p_tags || v_merged.fresh;
  end if;
end $$;

-- The same for a column of JSON (jsonb, json). Elements stay as they are written, even if they are not texts. A list with an object is
-- left alone, because texts among objects would break its readers.
create or replace function autotag.merge_json(
  p_tags json, p_large boolean, p_memory jsonb, p_answer jsonb, p_workspace_id autotag.workspace_id, out tags json, out result jsonb, out error text
)
language plpgsql stable set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_list text[];           -- the elements as JSON
  v_texts text[];          -- the same as texts
  v_objects boolean;       -- one is an object
  v_merged record;
  v_reason text;
begin
  if not p_large and (p_tags is null or p_tags::text = '[]') and p_memory is null then
    tags := p_answer -> 'tags';
    result := autotag.remember_tags(p_answer, array(select jsonb_array_elements_text(p_answer -> 'tags')), '{}', '{}');
    return;
  end if;
  v_reason := case when p_large or octet_length(p_tags::text) > 65536 then 'size'
    when coalesce(json_typeof(p_tags) not in ('array', 'null'), false) then 'form' end;
  if v_reason is null and json_typeof(p_tags) = 'array' then
    begin
      select array_agg(e::text order by i), array_agg(case when json_typeof(e) = 'string' then e #>> '{}' end order by i),
        bool_or(json_typeof(e) = 'object')
      into v_list, v_texts, v_objects from json_array_elements(p_tags) with ordinality u (e, i);
    exception when data_exception then
      v_reason := 'form';   -- JSON can hold texts that Postgres cannot: "\u0000"
    end;
  end if;
  if v_reason is null then
    v_reason := case when cardinality(v_list) > 1000 then 'size' when v_objects then 'objects' end;
  end if;
  if v_reason is null then
    v_merged := autotag.merge_tags(v_texts, p_memory, p_answer, null, p_workspace_id);
    v_reason := case when pg_column_size(v_merged.result) > 131072 then 'memory' end;
  end if;
  if v_reason is not null then
    select l.result, l.error into result, error from autotag.leave_tags(p_memory, p_answer, v_reason) l;
    return;
  end if;
  result := v_merged.result;
  if v_list is null or v_merged.dropped <> '{}' or v_merged.fresh <> '{}' then
    v_list := array(select u.e from unnest(v_list) with ordinality u (e, i) where u.i <> all (v_merged.dropped) order by u.i)
      || array(select to_json(t)::text from unnest(v_merged.fresh) with ordinality u (t, i) order by u.i);
    tags := ('[' || array_to_string(v_list, ', ') || ']')::json;
  end if;
end $$;

-- A json value as jsonb; null if Postgres cannot read it ("\u0000", a number of a million digits).
create or replace function autotag.read_json(p_json json) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return p_json::jsonb;
exception when data_exception then
  return null;
end $$;

-- The outcome of an image after its call: tags, a failure, or a retry.

-- A plan that was cached while the tasks table was empty would scan all of it when it is full. So queries that join it are planned
-- each time: by `execute` in functions that run for every report, by `plan_cache_mode` in the others.

-- Requeues tasks as single calls: once their delay is over, the next claim puts them into their queues. Returns those that are not
-- requeued, because they reach max_failures or their job was cancelled; the caller fails them (finish, keep).
-- p_tries: [{task, failures (to add), delay (seconds; absent: none), code, message, output_tokens (lowest cap of the next answer;
-- absent: unchanged), suspect (its error paused tagging: the code is recorded, and the second such error counts as a failure)}].
-- Locks: tasks.
create or replace function autotag.requeue(p_tries jsonb) returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_max integer := (select s.max_failures from autotag.settings s);
  v_now timestamptz := autotag.now();
  v_ended autotag.finished[];
begin
  select coalesce(array_agg(row(t.id, t.job_id, t.asset_id, null,
      case when j.cancelled_at is null then r.code else 'cancelled' end,
      case when j.cancelled_at is null then r.message else 'Tagging was cancelled.' end, null)::autotag.finished order by t.id), '{}')
  into v_ended
  from jsonb_to_recordset(p_tries) r (task bigint, failures integer, code text, message text)
  join autotag.tasks t on t.id = r.task and t.finished_at is null
  join autotag.jobs j on j.id = t.job_id
  where j.cancelled_at is not null or t.failures + r.failures >= v_max;
  update autotag.tasks t
  set lane = 'realtime', worker_id = null, claim = null, batch_id = null,
      -- tagging_job() derives the stage of a batch's image; from here on, the task has it
      stage = coalesce((select autotag.batch_stage(b.state, b.running_at, b.submitted_at) from autotag.batches b where b.id = t.batch_id), t.stage),
      failures = t.failures + r.failures,
      min_output_tokens = coalesce(r.output_tokens, t.min_output_tokens),
      error_code = case when r.suspect then r.code else t.error_code end,
      retry_at = v_now + make_interval(secs => coalesce(r.delay, 0))
  from jsonb_to_recordset(p_tries)
    r (task bigint, failures integer, delay double precision, output_tokens integer, suspect boolean, code text)
  where t.id = r.task and t.finished_at is null and t.id not in (select e.task from unnest(v_ended) e);
  return v_ended;
end $$;

-- Applies answers to the tasks of one workspace: stores tags, fails or requeues images with an error. Each task has at most one
-- answer: a result, or an error (clean_error) whose kind decides (error_kinds). An error of kind image fails its image, unless
-- `retry` says that another answer may help. Such retries end after max_bad_answers, because every answer is billed. After an
-- answer that was cut off, the retry has four times the cap, up to max_cap(). p_marks[i]: the mark of the picture of p_answers[i].
-- p_store: false: only keeps what has ended, for store_waiting(). Returns sentences for the operator's log: [{event, notice}].
create or replace function autotag.apply_answers(p_workspace_id autotag.workspace_id, p_answers autotag.answer[], p_store boolean) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_ended autotag.finished[];
  v_failed record;
  v_notices jsonb := '[]'::jsonb;
begin
  v_ended := array(
    select row(a.task, a.job_id, a.asset_id, a.result, null, null, a.mark)::autotag.finished
    from unnest(p_answers) a where a.error is null order by a.task);
  if exists (select from unnest(p_answers) a where a.error is not null) then
    select * into v_settings from autotag.settings;
    v_failed := autotag.end_failed(p_answers);
    v_notices := v_failed.notices;
    v_ended := v_ended || v_failed.items || autotag.try_again(p_answers, v_settings);
  end if;
  if p_store then
    return v_notices || autotag.finish(p_workspace_id, v_ended, true);
  end if;
  perform autotag.keep(v_ended, false);
  return v_notices;
end $$;

-- Whether no retry can fix an error of an image that has failed p_failures times.
create or replace function autotag.is_final(p_answer autotag.answer, p_failures integer) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.error_kinds k where k.kind = p_answer.error ->> 'kind' and k.ends)
    and (not (p_answer.error ->> 'retry')::boolean
      or case when p_answer.error ->> 'code' = 'answer_too_long'
        then p_answer.output_tokens >= autotag.max_cap(p_answer.workspace_id)
        else p_failures + 1 >= (select s.max_bad_answers from autotag.settings s) end);
end $$;

-- The images whose error no retry can fix, for finish(), and sentences about them for the operator's log.
create or replace function autotag.end_failed(p_answers autotag.answer[], out items autotag.finished[], out notices jsonb)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select coalesce(array_agg(row(t.id, t.job_id, t.asset_id, null, a.error ->> 'code', a.error ->> 'message', null)::autotag.finished
           order by t.id), '{}'),
         coalesce(jsonb_agg(jsonb_build_object('event', 'answer_cut_off', 'notice', format(
             'The answer for image %s was cut off at %s tokens, the most that settings.max_output_tokens allows within the limits.',
             t.asset_id, a.output_tokens))) filter (where a.error ->> 'code' = 'answer_too_long'), '[]')
  into items, notices
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  where a.error is not null and autotag.is_final(a, t.failures);
end $$;

-- Requeues the other images with an error, each after the delay of its kind. Returns those that are not requeued (requeue).
create or replace function autotag.try_again(p_answers autotag.answer[], p_settings autotag.settings) returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tries jsonb;
begin
  select jsonb_agg(jsonb_build_object(
      'task', a.task, 'code', a.error ->> 'code', 'message', a.error ->> 'message',
      'failures', (k.counts or a.error ? 'counts')::integer, 'suspect', k.pauses, 'output_tokens', autotag.next_cap(a),
      'delay', case
        -- longer than the probe interval, so that the next probe is another image
        when k.pauses then extract(epoch from p_settings.account_probe_interval) + 1
        -- a host of images asks to wait, which has nothing to do with the provider's limits
        when k.delays or a.error ->> 'origin' = 'host' then greatest((a.error ->> 'retry_after')::double precision, autotag.growing_delay(t.failures, p_settings)) end))
  into v_tries
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  join autotag.error_kinds k on k.kind = a.error ->> 'kind'
  where a.error is not null and t.finished_at is null and not autotag.is_final(a, t.failures);
  if v_tries is null then
    return array[]::autotag.finished[];
  end if;
  perform pg_notify('autotag', 'realtime');
  return autotag.requeue(v_tries);
end $$;

-- Seconds until the next try of an image that had failed p_failures times before its last failure; null: it has not failed.
create or replace function autotag.growing_delay(p_failures integer, p_settings autotag.settings) returns double precision
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_failures >= 0 then (0.8 + random() / 5) * least(extract(epoch from p_settings.retry_delay_max),
    extract(epoch from p_settings.retry_delay) * power(2, least(p_failures, 20))) end;
end $$;

-- The highest cap that an answer of a workspace may have: max_output_tokens, or less if less fits into its window and into the
-- provider's limit beside the prompt. An image with a higher cap would wait forever. (jit is off because the planner does not
-- know that these tables have one row each, and would compile for their product.)
create or replace function autotag.max_cap(p_workspace_id autotag.workspace_id) returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off
as $$
  select greatest(s.min_output_tokens, least(s.max_output_tokens,
    w.max_units - (p.tokens_per_image - p.output_tokens),
    (0.9 * p.tokens_per_minute)::integer - (p.tokens_per_image - p.output_tokens)))
  from autotag.settings s, autotag.provider_limits p, autotag.window_limits(p_workspace_id, 'realtime') w
$$;

-- The lowest cap of the next answer about an image: four times the cap of an answer that was cut off, up to max_cap(); null: the
-- answer was not cut off.
create or replace function autotag.next_cap(p_answer autotag.answer) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_answer.error ->> 'code' = 'answer_too_long'
    then least(4 * p_answer.output_tokens, autotag.max_cap(p_answer.workspace_id)) end;
end $$;

-- Reclassifies errors that are not the image's fault, and returns all answers:
--   * A refused parameter: the model's row gets its next request form, and the image is retried at once.
--   * An error of the provider or an unreadable answer while the question is not proven: it becomes an account error, because the
--     configuration is probably wrong.
--   * A second account error of one image, although others had succeeded before it was asked: it counts as a failure of the image,
--     so that one image cannot pause tagging forever.
--   * A refusal because of a brief: blame_brief().
-- form_changed: the model's row got another form, which the caller reports (report_provider).
-- p_asked_at: when a batch's file was built; null: single calls, which have their own times. Locks: the model's row without waiting.
create or replace function autotag.reclassify_errors(
  p_answers autotag.answer[], p_asked_at timestamptz default null, out answers autotag.answer[], out form_changed boolean
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_answer autotag.answer;
  v_asked_at timestamptz;
  v_blamed jsonb;
  v_settled text[] := array[]::text[];    -- parameters whose next form this call has set
  v_suspects text[] := (select k.suspects from autotag.error_kinds k where k.kind = 'account');
begin
  answers := array[]::autotag.answer[];
  select * into v_provider from autotag.provider_limits;
  foreach v_answer in array p_answers loop
    if v_answer.error is not null and (v_answer.error ->> 'kind' <> 'image'
      -- text instead of JSON while the question is not proven: the provider ignores response_format
      or v_answer.error ->> 'parameter' is not null and v_provider.proven_at is null) then
      v_asked_at := coalesce(p_asked_at, v_answer.reserved_at);
      v_blamed := autotag.blame_brief(v_answer, v_provider, v_asked_at);
      if v_blamed is not null then
        v_answer.error := v_blamed;
      elsif v_answer.error ->> 'parameter' is not null and (
          v_asked_at < v_provider.question_since
          or v_answer.error ->> 'parameter' = any (v_settled)
          or autotag.downgrade_request_form(v_provider.question ->> 'model', v_answer.error ->> 'parameter')) then
        v_settled := v_settled || (v_answer.error ->> 'parameter');
        v_answer.error := v_answer.error || '{"kind": "rate_limit", "code": "request_form_changed"}';
      elsif v_provider.proven_at is null and v_answer.error ->> 'kind' = 'transient'
        and v_answer.error ->> 'origin' = 'provider' and v_asked_at >= v_provider.question_since then
        v_answer.error := v_answer.error || '{"kind": "account"}';
      elsif v_answer.error ->> 'kind' = 'account' and (
          -- too large for this provider: a smaller image may pass, so this image may be the cause
          v_answer.error ->> 'code' = any (v_suspects)
          or v_asked_at >= v_provider.proven_at
            and exists (select from autotag.tasks t where t.id = v_answer.task and t.error_code is not null)) then
        v_answer.error := v_answer.error || '{"counts": true}';
      end if;
    elsif v_provider.proven_at is null and v_answer.error ->> 'code' = 'bad_answer' then
      v_blamed := autotag.blame_brief(v_answer, v_provider, coalesce(p_asked_at, v_answer.reserved_at));
      -- A model whose answers cannot be read would fail every image, so it pauses tagging, and a failure of this image is counted.
      v_answer.error := coalesce(v_blamed,
        v_answer.error || '{"kind": "account", "counts": true, "message": "The model''s answers cannot be read."}');
    end if;
    answers := answers || v_answer;
  end loop;
  form_changed := cardinality(v_settled) > 0;
end $$;

-- Decides whether the brief of an image (what its workspace's profile asks) is the cause of an error. Returns the changed error if it is,
-- otherwise null. Once another workspace gets the same refusal and no call succeeds in between, the provider is the cause. The error
-- counts as the provider's, too, if it could harm no other workspace. While the question is proven, an image with such an error fails,
-- and the refusal of a second workspace counts only if its call was made at least a minute later, because a success in that minute would
-- contradict it. Otherwise the image is tried again, after the images of other workspaces. record_outcomes() remembers the error under
-- the name in its `refusal`.
create or replace function autotag.blame_brief(p_answer autotag.answer, p_provider autotag.provider_limits, p_asked_at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  e jsonb := p_answer.error;
  v_what text := coalesce(e ->> 'parameter', e ->> 'code');
  v_first jsonb := p_provider.refusals -> v_what;
  v_works boolean := p_provider.proven_at is not null;
  v_agrees boolean := coalesce(v_first ->> 'workspace' <> p_answer.workspace_id::text
    and (v_first ->> 'at')::timestamptz >= p_provider.question_since, false);
begin
  if p_answer.brief_id is null or not autotag.is_about_request(e) or p_asked_at < p_provider.question_since and e ->> 'parameter' is not null
    or e ->> 'kind' = 'transient' and v_works
    or v_agrees and (not v_works or p_asked_at >= (v_first ->> 'at')::timestamptz + interval '1 min')
    -- this very request has worked in this form, so the provider has changed
    or e ->> 'parameter' is not null and exists (
      select from autotag.learned l where l.model = p_provider.question ->> 'model' and l.brief_id = p_answer.brief_id
        and l.learned_at >= p_provider.question_since)
    or not exists (select from autotag.workspaces ws where ws.workspace_id <> p_answer.workspace_id)
    or not v_works and not exists (
      select from autotag.jobs j where j.finished_at is null and j.workspace_id <> p_answer.workspace_id) then
    return null;
  end if;
  e := e || jsonb_build_object('refusal', v_what, 'parameter', null);
  return case when e ->> 'kind' = 'image' then e
    else e || jsonb_build_object('kind', case when v_works and not v_agrees then 'image' else 'transient' end, 'retry', false,
      'code', 'profile_refused', 'message', 'The AI provider refuses what this workspace''s profile asks: '
        || regexp_replace(e ->> 'message', '^(The provider|The AI service) [^:]{1,60}: ', '')) end;
end $$;

-- Whether a provider's error can come from what one request asks: its length, its schema, a parameter. Key, credit and model cannot. (A
-- worker may not know the words of a provider, but a code that names the context is clear.)
create or replace function autotag.is_about_request(p_error jsonb) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce(p_error ->> 'origin', 'provider') not in ('storage', 'host') and (
    coalesce(p_error ->> 'parameter' <> 'expires_after', false) or coalesce((p_error ->> 'about_request')::boolean, false)
    or p_error ->> 'code' in ('bad_answer', 'request_refused', 'unsupported_parameter')
    or p_error ->> 'kind' = 'account' and (p_error ->> 'code' like '%context%'
      or p_error ->> 'code' = any ((select k.suspects from autotag.error_kinds k where k.kind = 'account')::text[])));
end $$;

-- Stores the first refusal of each parameter or code (blame_brief). Deletes refusals of calls that were made before a call that
-- succeeded. The caller holds the provider row.
create or replace function autotag.record_refusals(p_answers autotag.answer[], p_provider autotag.provider_limits, p_asked_at timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_success timestamptz;
  v_new jsonb;
begin
  select max(coalesce(p_asked_at, a.reserved_at)) filter (where a.error is null),
    coalesce(jsonb_object_agg(a.error ->> 'refusal', jsonb_build_object('workspace', a.workspace_id, 'at', coalesce(p_asked_at, a.reserved_at)))
      filter (where a.error ? 'refusal'), '{}')
  into v_success, v_new from unnest(p_answers) a;
  if v_new = '{}' and (p_provider.refusals = '{}' or v_success is null) then
    return;
  end if;
  update autotag.provider_limits p
  set refusals = coalesce((
    select jsonb_object_agg(r.key, r.value) from (
      select x.key, x.value from jsonb_each(v_new || p_provider.refusals) x
      where (x.value ->> 'at')::timestamptz >= p_provider.question_since
        and coalesce((x.value ->> 'at')::timestamptz > v_success, true)
      order by x.value ->> 'at' desc limit 20) r), '{}')   -- at most 20, because workers choose the names
  where p.id;
end $$;

-- The prompt and answer tokens of answers to the present question, for learn(). p_asked_at: as in reclassify_errors().
create or replace function autotag.tokens_to_learn(
  p_answers autotag.answer[], p_asked_at timestamptz default null, out inputs integer[], out outputs integer[], out briefs bigint[]
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select coalesce(array_agg((a.usage -> 'input')::integer), '{}'),
    -- the length of a cut-off answer is unknown: it is estimated by the cap of the retry
    coalesce(array_agg(case when a.error ->> 'code' = 'answer_too_long' then coalesce(autotag.next_cap(a), 1)
      else greatest((a.usage -> 'output')::integer, 1) end), '{}'),
    coalesce(array_agg(a.brief_id), '{}')
  into inputs, outputs, briefs
  from unnest(p_answers) a
  where (a.usage -> 'input')::integer > 0
    and coalesce(p_asked_at, a.reserved_at) >= (select p.question_since from autotag.provider_limits p);
end $$;

-- Applies answers to the account and the estimates: an account error pauses tagging, a usable answer resumes it, and the usage of
-- answers to the present question is learned. p_worker: whose answers they are. p_asked_at: as in reclassify_errors(). The caller
-- holds the provider row.
create or replace function autotag.record_outcomes(p_worker uuid, p_answers autotag.answer[], p_asked_at timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_error jsonb;
  v_learnt record;
  v_failed boolean;            -- one of them has an error
  v_good boolean;
  v_works boolean;             -- one of them was asked after the last account error or change of address, so tagging works now
begin
  select * into v_provider from autotag.provider_limits;
  v_learnt := autotag.tokens_to_learn(p_answers, p_asked_at);
  perform autotag.learn(v_learnt.inputs, v_learnt.outputs, null, v_learnt.briefs);
  select coalesce(bool_or(a.error is not null), false),
    coalesce(bool_or(a.error is null and coalesce(p_asked_at, a.reserved_at) >= v_provider.question_since), false),
    coalesce(bool_or(a.error is null and coalesce(p_asked_at, a.reserved_at) >=
      greatest(v_provider.account_error_at, v_provider.fingerprint_since, v_provider.question_since)), false)
  into v_failed, v_good, v_works
  from unnest(p_answers) a;
  if v_failed or v_provider.refusals <> '{}' then
    perform autotag.record_refusals(p_answers, v_provider, p_asked_at);
  end if;
  if v_good then
    update autotag.provider_limits p set has_rate_headers = false where p.has_rate_headers is null;
  end if;
  -- Errors of calls from before the question or the address changed do not count.
  select a.error into v_error from unnest(p_answers) a
  where v_failed and a.error ->> 'kind' = 'account' and coalesce(p_asked_at, a.reserved_at) >=
    greatest(v_provider.question_since, v_provider.fingerprint_since, case when p_asked_at is null then v_provider.proven_at end)
  limit 1;
  if found then
    perform autotag.pause_tagging(autotag.explain_account(v_error), coalesce(v_error ->> 'origin', 'provider'));
    perform autotag.offer_switch(array[p_worker]);
  elsif v_works and (v_provider.account_error is not null or v_provider.proven_at is null) then
    perform autotag.resume_tagging();
    -- The address and key of a worker that succeeded become the present ones.
    perform autotag.switch_provider(wk.base_url, wk.fingerprint)
    from autotag.workers wk where wk.fingerprint is not null and wk.id = p_worker and p_asked_at is null;
    perform pg_notify('autotag', 'realtime');
    perform pg_notify('autotag', 'batch');
  elsif v_provider.proven_at is null and exists (
    select from unnest(p_answers) a where a.error ->> 'kind' = 'image' or a.error ? 'refusal' or not a.called) then
    -- This image has proven nothing, so the next one tries at once.
    update autotag.provider_limits p set probe_at = null where p.account_error is null;
    perform pg_notify('autotag', 'realtime');
  end if;
end $$;

-- The sentence for the operator about an account error with p_model (null: the present model). If the model has been shut down,
-- it says so and names the successor.
create or replace function autotag.explain_account(p_error jsonb, p_model text default null) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_end jsonb := autotag.describe_shutdown(coalesce(p_model, (select p.question ->> 'model' from autotag.provider_limits p)));
begin
  return concat_ws(' ', p_error ->> 'message', case when p_error ->> 'origin' = 'provider' and (v_end ->> 'days')::integer <= 0 then
    concat_ws(' ', v_end ->> 'message', 'update autotag.settings set model = ' || quote_literal(v_end ->> 'successor') || ';') end);
end $$;

-- Single calls: a worker reports their outcomes in bulk.

-- settle: records the outcomes of a worker's single calls of one workspace.
-- p_reports: [{task, attempt, result | error, usage: {input, cached, cache_write, output, reasoning, model, tier}, called, mark}].
--   usage: given whenever the provider answered, even if the answer was unusable. called: false if the call was not sent.
--   mark: of the picture that the model saw, as describe_tasks() gave it.
-- p_observed: the newest limits from response headers (update_provider_limits), and {sent, sent_age} (record_sent).
-- p_keep: the host's rows are slow (an earlier call was cancelled for it): keep the outcomes for store_waiting() instead.
-- Ignores reports for tasks that the worker does not hold (any more), with an older attempt, or from another login.
-- Returns {accepted, busy, notices: [{event, notice}], held}: the number of accepted reports, and sentences for the log. busy: another
-- call of this worker for this workspace is still running; nothing was done, so call again. held: messages have not named all
-- changed rows yet, so call report_stages() in a second.
--
-- This transaction writes the host's rows of one workspace only, and holds nothing that other workspaces need until its end:
-- report_provider() comes last, and takes the provider row if it is free.
-- Locks: the worker's workspace (advisory), window (skip locked), tasks, jobs, assets (finish), usage, provider (skip locked).
create or replace function autotag.settle(
  p_worker uuid, p_workspace_id autotag.workspace_id, p_reports jsonb, p_observed jsonb default null, p_keep boolean default false
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan' set random_page_cost = 1.1
as $$
declare
  v_answers autotag.answer[];
  v_failed boolean;            -- one of them has an error
  v_report autotag.provider_report;
  v_judged record;
  v_notices jsonb;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  perform autotag.check_list(p_reports);
  if not autotag.is_own_worker(p_worker) then
    return jsonb_build_object('accepted', 0, 'busy', false, 'notices', '[]'::jsonb);
  end if;
  -- The worker calls again after a broken connection, while the first call may still run.
  if not pg_try_advisory_xact_lock(hashtextextended('autotag.settle ' || p_worker || p_workspace_id, 0)) then
    return jsonb_build_object('accepted', 0, 'busy', true, 'notices', '[]'::jsonb);
  end if;
  v_answers := autotag.read_reports(p_worker, p_workspace_id, p_reports);
  v_report := autotag.summarize_calls(p_worker, v_answers, p_observed);
  v_failed := exists (select from unnest(v_answers) a where a.error is not null);
  if v_failed then
    v_judged := autotag.reclassify_errors(v_answers);
    v_answers := v_judged.answers;
    v_report.form_changed := v_judged.form_changed;
  end if;
  v_report.answers := v_answers;
  v_report.windows := autotag.correct_windows(autotag.window_corrections(v_answers));
  if v_failed then
    v_answers := autotag.judge_retries(v_answers, false);
  end if;
  v_notices := autotag.apply_answers(p_workspace_id, v_answers, not p_keep);
  perform autotag.add_usage(v_answers, false);
  return jsonb_build_object('accepted', cardinality(v_answers), 'busy', false,
    'held', exists (
      select from autotag.jobs j
      where j.id = any (array(select distinct a.job_id from unnest(v_answers) a)) and j.finished_at is null and j.changed is distinct from '{}'),
    'notices', v_notices || autotag.report_provider(v_report));
end $$;

-- Validates reports and returns those for tasks of the workspace that the worker holds, at most one per task. (The plan is kept. The
-- enable_… options make it use the index. Without them, a plan from when the table was empty would scan all of the full table.)
create or replace function autotag.read_reports(p_worker uuid, p_workspace_id autotag.workspace_id, p_reports jsonb) returns autotag.answer[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_max_allowed record := autotag.believable_usage();
begin
  return array(
    with reported as materialized (
      select * from autotag.read_answers(p_reports, v_max_allowed.input)
    ), held as materialized (
      select t.id, t.attempt, t.job_id, t.asset_id, t.reserved_at, t.reserved_tokens, t.output_tokens,
        (select j.brief_id from autotag.jobs j where j.id = t.job_id) as brief_id,
        greatest(coalesce(4 * t.output_tokens + 4000, 100000), v_max_allowed.uncapped) as max_output
      from autotag.tasks t
      where t.id = any (array(select r.task from reported r)) and t.worker_id = p_worker and t.workspace_id = p_workspace_id
    )
    select row(x.id, x.attempt, x.job_id, p_workspace_id, x.reserved_at, x.reserved_tokens, x.output_tokens, x.result,
      case when x.error is not null or x.result is null then autotag.clean_error(x.error, x.result) end,
      case when x.valid_usage then x.usage else autotag.clean_usage(x.usage, v_max_allowed.input, x.max_output) end,
      x.called, x.mark, x.asset_id, x.brief_id)::autotag.answer
    from (
      select distinct on (h.id) h.*, case when h.brief_id is null then r.result else autotag.fit_result(r.result, r.fields, h.brief_id) end as result, r.error, r.usage, r.valid_usage, r.called, r.mark
      from reported r join held h on h.id = r.task and h.attempt = r.attempt order by h.id, r.place) x);
end $$;

-- What these calls have to say about the provider: the reservations that they did not use, and p_observed (as in settle).
create or replace function autotag.summarize_calls(p_worker uuid, p_answers autotag.answer[], p_observed jsonb) returns autotag.provider_report
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_report autotag.provider_report;
begin
  v_report.worker_id := p_worker;
  v_report.at := autotag.now();
  v_report.observed := autotag.clean_observed(p_observed);
  v_report.form_changed := false;
  v_report.answers := array[]::autotag.answer[];
  v_report.windows := '[]';
  -- Refund the over-reservation: everything if no call was made or it got a 429, otherwise all but the prompt and the cap.
  select coalesce(sum(u.requests), 0)::integer, coalesce(sum(u.tokens), 0)::bigint into v_report.requests, v_report.tokens
  from unnest(p_answers) a
  cross join lateral (
    select case when not a.called or a.error ->> 'code' = 'rate_limited' then 1 else 0 end as requests,
      case when not a.called or a.error ->> 'code' = 'rate_limited' then a.reserved_tokens
        when a.usage is not null then a.reserved_tokens - (a.usage -> 'input')::integer - a.output_tokens
        else 0 end as tokens) u
  where a.reserved_tokens is not null;
  return v_report;
end $$;

-- How the usage of these answers changes the windows of their workspaces, in the form that correct_windows() expects.
create or replace function autotag.window_corrections(p_answers autotag.answer[]) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- A call that was not sent counts no request and no tokens; one that the provider refused or failed counts no tokens. If the
  -- usage is unknown because the connection broke before the answer, the reservation stays.
  return coalesce((
    select jsonb_agg(w) from (
      select a.workspace_id, a.reserved_at,
        -count(*) filter (where not a.called)::integer as requests,
        least(sum(case when a.usage is not null
              then (a.usage -> 'input')::integer + (a.usage -> 'output')::integer - a.reserved_tokens
            when a.error ->> 'code' = 'provider_unreachable' then 0
            else -a.reserved_tokens end), 1000000000)::integer as units
      from unnest(p_answers) a
      where a.reserved_at is not null
      group by a.workspace_id, a.reserved_at order by a.workspace_id, a.reserved_at) w), '[]');
end $$;

-- Corrects windows of single calls: [{workspace_id, reserved_at, requests, units}]. Returns the corrections of windows that another
-- transaction holds. Locks: windows by workspace (skip locked).
create or replace function autotag.correct_windows(p_corrections jsonb) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_window record;
  v_held jsonb := '[]'::jsonb;
begin
  for v_window in
    select c.* from jsonb_to_recordset(p_corrections) c (workspace_id autotag.workspace_id, reserved_at timestamptz, requests integer, units integer)
    order by c.workspace_id, c.reserved_at
  loop
    perform from autotag.windows wn
    where wn.workspace_id = v_window.workspace_id and wn.request_type = 'realtime' for no key update skip locked;
    if found then
      perform autotag.correct_window(v_window.workspace_id, 'realtime', v_window.reserved_at, v_window.requests, v_window.units);
    elsif exists (
      select from autotag.windows wn
      where wn.workspace_id = v_window.workspace_id and wn.request_type = 'realtime'
        and wn.admitted_at[cardinality(wn.admitted_at)] > autotag.now() - interval '1 min') then
      v_held := v_held || to_jsonb(v_window);
    end if;
  end loop;
  return v_held;
end $$;

-- Writes outcomes to the host's rows. The host's triggers, constraints and transactions can refuse or hold up any row. So all rows are
-- written together first. If that raises an error, smaller parts are written (next_part), down to single rows. An outcome is kept for
-- later (unstored) while another transaction has locked its row, and for a limited time if the error may pass. After any other error, the
-- image fails with the code not_stored. So a bad row affects only its own image, nothing waits for it, and every image ends.

-- Stores the outcomes of images of one workspace: tags or failures, the counts, progress and broadcasts. Outcomes of tasks that
-- have ended meanwhile are dropped. p_own: the transaction is autotag's own, so constraints that the host has deferred are checked
-- here, where an error costs one image. Returns sentences for the operator's log: [{event, notice}].
-- p_waits: how long its parts may wait for locks; then the rest is kept without another try. 150 ms is enough for three parts,
-- and a second finds one image in 500 whose trigger waits for a lock.
-- The caller does not hold the provider row. Locks: tasks, jobs by id, assets; it waits for none longer than lock_timeout.
create or replace function autotag.finish(
  p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_own boolean, p_waits interval default interval '150 ms'
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_parts autotag.parts := autotag.first_part(cardinality(p_items));
  v_next integer := 1;                     -- of p_items, the first one after v_items
  v_items autotag.finished[] := array[]::autotag.finished[];   -- to be stored next: at most 1,000 at a time, because each part copies them
  v_part autotag.finished[];
  v_unshown autotag.finished[] := array[]::autotag.finished[];   -- outcomes that the host's rows refuse to show
  v_try record;
  v_odd record;
  v_ended autotag.ended[] := array[]::autotag.ended[];
  v_notices jsonb := '[]'::jsonb;
begin
  loop
    if v_items = '{}' then
      v_items := p_items[v_next : v_next + greatest(v_parts.size, 1000) - 1];
      v_next := v_next + cardinality(v_items);
      exit when v_items = '{}';
    end if;
    if p_waits <= interval '0' then
      perform autotag.keep(v_items || p_items[v_next:]);
      exit;
    end if;
    v_part := v_items[:v_parts.size];
    v_items := v_items[v_parts.size + 1:];
    v_try := autotag.try_outcomes(p_workspace_id, v_part, p_own);
    v_parts := autotag.next_part(v_parts, cardinality(v_part), v_try.state is not null);
    if autotag.is_lock_error(v_try.state) then
      p_waits := p_waits - v_try.took;
    end if;
    if v_try.state is null then
      v_ended := v_ended || v_try.ended;
      continue;
    elsif cardinality(v_part) = 1 then
      v_odd := autotag.end_odd(p_workspace_id, v_part[1], p_own, v_try.state, v_try.error);
      v_ended := v_ended || v_odd.ended;
      v_unshown := v_unshown || v_odd.unshown;
      v_notices := v_notices || v_odd.notices;
      continue;
    elsif autotag.is_lock_error(v_try.state) then
      v_part := autotag.keep_held(v_part);
    end if;
    if cardinality(v_part) > 1000 then     -- the first try, of all
      p_items := v_part;
      v_next := 1;
    else
      v_items := v_part || v_items;
    end if;
  end loop;
  if v_unshown <> '{}' then
    v_ended := v_ended || autotag.write_outcomes(p_workspace_id, v_unshown, p_own, false);
  end if;
  -- Once for all parts: each update of a job's row makes the next one slower, as long as this transaction runs.
  perform autotag.count_ended(v_ended);
  return v_notices;
end $$;

-- The first part of p_count rows: all of them.
create or replace function autotag.first_part(p_count integer) returns autotag.parts
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return row(greatest(p_count, 1), 0, 64, 0)::autotag.parts;
end $$;

-- The next part, after a part of p_size rows was written or raised (p_raised). A part that raised is halved, down to the row that raises.
-- If one of N rows has raised so far, the next part has N / 2 rows. So each row is tried about twice, however many raise. (To halve the
-- whole each time would try all rows again: 50,000 with 1 % that raise took 60 s.)
create or replace function autotag.next_part(p_parts autotag.parts, p_size integer, p_raised boolean) returns autotag.parts
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  if p_raised and p_size > 1 then
    p_parts.odd := p_size;
  elsif p_raised then
    p_parts.odd := 0;
    p_parts.raised := p_parts.raised + 1;
  else
    p_parts.odd := greatest(p_parts.odd - p_size, 0);
    p_parts.written := p_parts.written + p_size;
  end if;
  p_parts.size := greatest(least(1000, p_parts.written / (2 * (p_parts.raised + 1)),
    case when p_parts.odd > 0 then p_parts.odd / 2 end), 1);
  return p_parts;
end $$;

-- Stores outcomes together (write_outcomes). Its error is returned, not raised: state is its SQLSTATE, null: none. took: how long.
create or replace function autotag.try_outcomes(
  p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_own boolean,
  out ended autotag.ended[], out state text, out error text, out took interval
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_began timestamptz := clock_timestamp();
begin
  ended := autotag.write_outcomes(p_workspace_id, p_items, p_own);
exception when others or assert_failure then
  get stacked diagnostics state = returned_sqlstate, error = message_text;
  took := clock_timestamp() - v_began;
end $$;

-- Decides about one image whose outcome raised this error: it is tagged again (its picture was replaced), kept (keep_error), or refused.
-- unshown: the outcome, if the row did not accept it in any form; the caller stores it without the row.
create or replace function autotag.end_odd(
  p_workspace_id autotag.workspace_id, p_item autotag.finished, p_own boolean, p_state text, p_error text,
  out ended autotag.ended[], out unshown autotag.finished[], out notices jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_try record;
begin
  ended := array[]::autotag.ended[];
  unshown := array[]::autotag.finished[];
  notices := '[]';
  -- Whoever raised AT001: judge_unwritten(), or the host.
  if p_state = 'AT001' and autotag.is_replaced(p_workspace_id, p_item) then
    perform autotag.tag_again(p_item.task);
    return;
  end if;
  notices := autotag.keep_error(array[p_item], p_state, p_error);
  if notices is not null then
    return;
  end if;
  unshown := array[p_item];
  if p_item.result is not null then
    unshown[1].result := null;
    unshown[1].code := 'not_stored';
    unshown[1].message := 'The database refused to store the tags of this image.';
    v_try := autotag.try_outcomes(p_workspace_id, unshown, p_own);
    if v_try.state is null then
      ended := v_try.ended;
      unshown := array[]::autotag.finished[];
    elsif autotag.is_lock_error(v_try.state) then
      notices := autotag.keep_error(array[p_item], v_try.state, v_try.error);   -- another transaction holds its row: keep it for a later try
      if notices is not null then
        unshown := array[]::autotag.finished[];
        return;
      end if;
    end if;
  end if;
  notices := jsonb_build_array(jsonb_build_object('event', 'not_stored', 'notice',
    format('The database refused to store the outcome of image %s: %s', p_item.asset_id, autotag.printable(p_error, 500))));
end $$;

-- Whether the row of an image names another picture than the one that the model saw.
create or replace function autotag.is_replaced(p_workspace_id autotag.workspace_id, p_item autotag.finished) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return p_item.result is not null and p_item.mark is not null and exists (
    select from autotag.describe_assets(array[p_item.asset_id]) d
    where d.workspace_id = p_workspace_id and d.mark is distinct from p_item.mark);
exception when others or assert_failure then
  return false;
end $$;

-- Keeps those of these images whose rows are held, and returns the others.
create or replace function autotag.keep_held(p_items autotag.finished[]) returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_held autotag.asset_id[] := autotag.try_held(p_items);
begin
  perform autotag.keep(array(select i from unnest(p_items) i where i.asset_id in (select unnest(v_held))));
  return array(select i from unnest(p_items) i where i.asset_id not in (select unnest(v_held)));
end $$;

-- Whether an error says that a lock was not free: lock_not_available, deadlock_detected, serialization_failure.
create or replace function autotag.is_lock_error(p_state text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return p_state in ('55P03', '40P01', '40001');
end $$;

-- Queues an image again, because its picture was replaced after the model saw it, and drops its answer, even if that was kept. After
-- max_failures the image fails. Locks: the task.
create or replace function autotag.tag_again(p_task bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_ended autotag.finished[] := autotag.requeue(jsonb_build_array(jsonb_build_object('task', p_task, 'failures', 1,
    'code', 'picture_replaced', 'message', 'The picture was replaced again and again while it was being tagged.')));
begin
  if v_ended = '{}' then
    delete from autotag.unstored un where un.task_id = p_task;
    perform pg_notify('autotag', 'realtime');
  else
    perform autotag.keep(v_ended, false);
  end if;
end $$;

-- Keeps the outcome of one image whose row raised this error, if the error may pass. Null: it cannot pass, or the patience is used up.
-- Otherwise sentences for the operator's log: [{event, notice}].
--   * A row that another transaction holds is tried until it is free.
--   * Other errors use up patience. If the row is free, a lock's error comes from a trigger, which waits for something else or raises
--     the error itself: 64 tries, an hour.
--   * Lack of resources and failures of the server: twenty tries, a quarter of an hour.
--   * Missing columns, tables or privileges are mistakes in the adapter or in a trigger, and a rule on the table (0A) prevents every
--     update (diagnose_rules). Somebody may be fixing that: eight tries, a minute.
--   * All other errors are about the row itself and do not pass.
create or replace function autotag.keep_error(p_items autotag.finished[], p_state text, p_error text) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_costs numeric := case when autotag.is_lock_error(p_state) then 1.0 / 64 when left(p_state, 2) in ('53', '58', 'XX') then 1.0 / 20
    when left(p_state, 2) in ('42', '0A') then 1.0 / 8 end;
begin
  if autotag.is_lock_error(p_state) and autotag.try_held(p_items) <> '{}' then
    perform autotag.keep(p_items);
    return '[]'::jsonb;
  elsif v_costs is null or exists (select from autotag.unstored un where un.task_id = p_items[1].task and un.patience_used >= 1) then
    return null;
  end if;
  perform autotag.keep(p_items, true, v_costs);
  return jsonb_build_array(jsonb_build_object('event', 'store_failed', 'notice', format(
    'The outcome of image %s could not be stored yet: %s', p_items[1].asset_id, autotag.printable(p_error, 500))));
end $$;

-- The images among these whose rows or jobs another transaction holds; all of them if another transaction holds the whole table; none if
-- the look-up fails.
create or replace function autotag.try_held(p_items autotag.finished[]) returns autotag.asset_id[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_jobs uuid[];
begin
  v_jobs := array(
    select j.id from autotag.jobs j where j.id in (select i.job_id from unnest(p_items) i) for no key update skip locked);
  return autotag.held_assets(array(select i.asset_id from unnest(p_items) i))
    || array(select i.asset_id from unnest(p_items) i where i.job_id not in (select unnest(v_jobs)));
exception when others then
  return array(select i.asset_id from unnest(p_items) i where autotag.is_lock_error(sqlstate));
end $$;

-- Stores these outcomes together, or raises. An image whose row is gone or has moved counts as completed. One whose picture was
-- replaced is tagged again. p_show: write the host's rows. Outcomes of tasks that have ended meanwhile are dropped. Returns what the
-- caller has to count (count_ended).
create or replace function autotag.write_outcomes(
  p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_own boolean, p_show boolean default true
) returns autotag.ended[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tagged autotag.finished[];
  v_failed autotag.finished[] := array(select i from unnest(p_items) i where i.result is null);
  v_written autotag.asset_id[];
begin
  perform from autotag.jobs j
  where j.id = any (array(select distinct i.job_id from unnest(p_items) i)) order by j.id for no key update;
  if cardinality(v_failed) < cardinality(p_items) then
    v_tagged := autotag.end_tagged(array(select i from unnest(p_items) i where i.result is not null));
    if p_show and v_tagged <> '{}' then
      v_written := autotag.store_tags(array(select i.asset_id from unnest(v_tagged) i), p_workspace_id,
        autotag.match_results(p_workspace_id, array(select i.result from unnest(v_tagged) i)), array(select i.mark from unnest(v_tagged) i));
      if coalesce(cardinality(v_written), 0) < cardinality(v_tagged) then
        perform autotag.judge_unwritten(p_workspace_id, v_tagged, v_written);
      end if;
    end if;
  end if;
  if v_failed <> '{}' then
    v_failed := autotag.fail_tasks(p_workspace_id, v_failed, p_show);
  end if;
  if p_own and p_show then
    set constraints all immediate;
  end if;
  return array(
    select row(i.job_id, count(i.result), count(i.code), case when count(*) <= 100 then array_agg(i.asset_id) end)::autotag.ended
    from unnest(v_tagged || v_failed) i group by i.job_id);
end $$;

-- Counts the images that have ended in their jobs. The caller holds the jobs.
create or replace function autotag.count_ended(p_ended autotag.ended[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_part autotag.ended;
  v_job autotag.ended;   -- the sum of its parts
begin
  for v_part in select e.* from unnest(p_ended) e order by e.job_id loop
    if v_part.job_id = v_job.job_id then
      v_job.completed := v_job.completed + v_part.completed;
      v_job.failed := v_job.failed + v_part.failed;
      v_job.assets := autotag.add_changed(v_job.assets, v_part.assets);
      continue;
    end if;
    perform autotag.report_job(v_job.job_id, v_job.completed, v_job.failed, v_job.assets) where v_job.job_id is not null;
    v_job := v_part;
  end loop;
  perform autotag.report_job(v_job.job_id, v_job.completed, v_job.failed, v_job.assets) where v_job.job_id is not null;
end $$;

-- Deletes the tasks of tagged images, and returns the images whose tasks had not ended. The caller holds their jobs. (The plan is
-- kept, as in read_reports().)
create or replace function autotag.end_tagged(p_items autotag.finished[]) returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_deleted bigint[];
begin
  with deleted as (
    -- coalesce keeps the plan from using the index of live tasks, all of which it might read
    delete from autotag.tasks t
    where t.id = any (array(select i.task from unnest(p_items) i)) and coalesce(t.finished_at, 'infinity') = 'infinity'
    returning t.id
  )
  select coalesce(array_agg(d.id), '{}') into v_deleted from deleted d;
  if cardinality(v_deleted) = cardinality(p_items) then
    return p_items;
  end if;
  return array(select i from unnest(p_items) i join unnest(v_deleted) d on d = i.task);
end $$;

-- Looks at tagged images whose rows were not written. Returns if all of them are gone or have moved. Raises AT001 if a picture was
-- replaced after the model saw it: its task is queued again (end_odd). Raises if a row is there but did not change: a trigger
-- of the host has refused it silently.
create or replace function autotag.judge_unwritten(p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_written autotag.asset_id[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_row record;
begin
  select i.asset_id, i.mark is not null and d.mark is distinct from i.mark as replaced into v_row
  from unnest(p_items) i
  join autotag.describe_assets(array(select m.asset_id from unnest(p_items) m where m.asset_id not in (select unnest(p_written)))) d
    on d.asset_id = i.asset_id
  where d.workspace_id = p_workspace_id limit 1;
  if v_row.replaced then
    raise exception 'the picture of image % was replaced', v_row.asset_id using errcode = 'AT001';
  elsif found then
    raise exception 'the row of image % did not change', v_row.asset_id using errcode = 'triggered_data_change_violation';
  end if;
end $$;

-- Fails tasks and shows that on the host's rows (p_show). Returns those that had not ended. The caller holds their jobs and counts
-- them. (The plan is kept, as in read_reports(). Planning takes 0.2 ms, and 2 ms after a part of 10,000 rows has raised, because the
-- planner then searches dead entries for the ends of the index.)
create or replace function autotag.fail_tasks(p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_show boolean)
returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_now timestamptz := autotag.now();   -- called once: a call per row would take a tenth of the time
  v_failed autotag.finished[];
begin
  with failed as (
    update autotag.tasks t
    set stage = 'failed', error_code = i.code, error = i.message, finished_at = v_now,
        worker_id = null, claim = null, retry_at = null
    from unnest(p_items) i
    where t.id = i.task and t.finished_at is null
    returning i as item
  )
  select array(select f.item from failed f) into v_failed;
  delete from autotag.unstored un where un.task_id in (select i.task from unnest(v_failed) i);
  if p_show and v_failed <> '{}' then
    perform autotag.show_stage(array(select i.asset_id from unnest(v_failed) i), p_workspace_id, 'failed', 0, null,
      array(select i.message from unnest(v_failed) i));
  end if;
  return v_failed;
end $$;

-- Outcomes that wait for the host's rows: kept now, stored later.

-- Keeps outcomes for store_waiting(). Their tasks end for workers and queues, and stay live until they are stored. p_tried: their
-- rows were just tried without success, so the next try is delayed: by a quarter of a second, twice as long each time, at most a minute.
-- p_costs: the part of an image's patience that its error used up (keep_error).
-- Locks: tasks by id. It waits for them (another transaction may be reporting the image's stage), because an outcome that is not kept is
-- lost. In finish() it waits no longer than lock_timeout, and raises; then the worker settles again.
create or replace function autotag.keep(p_items autotag.finished[], p_tried boolean default true, p_costs numeric default 0) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_now timestamptz := autotag.now();
begin
  if coalesce(cardinality(p_items), 0) = 0 then
    return;
  end if;
  with live as (
    select t.id, t.workspace_id, t.batch_id, i.result, i.code, i.message, i.mark
    from autotag.tasks t join unnest(p_items) i on i.task = t.id
    where t.finished_at is null order by t.id for update of t
  ), kept as (
    insert into autotag.unstored as un
      (task_id, workspace_id, batch_id, result, error_code, error, mark, tries, patience_used, next_at, kept_at)
    select l.id, l.workspace_id, l.batch_id, l.result, l.code, l.message, l.mark, p_tried::integer, p_costs,
      v_now + case when p_tried then interval '0.25 s' else interval '0' end, v_now
    from live l
    on conflict (task_id) do update
    set tries = un.tries + 1, patience_used = un.patience_used + p_costs, result = excluded.result,
        error_code = excluded.error_code, error = excluded.error,
        next_at = v_now + least(interval '1 min', interval '0.25 s' * power(2, least(un.tries, 10)))
    returning un.task_id
  )
  update autotag.tasks t set worker_id = null, claim = null, batch_id = null, lane = 'realtime', retry_at = 'infinity'
  from kept k where t.id = k.task_id and t.retry_at is distinct from 'infinity';
  perform pg_notify('autotag', 'store');
end $$;

-- workspaces: those with due outcomes. wait: seconds until the next outcome is due; null: there is none. All workers call this whenever
-- an outcome is kept, so it has to be fast: it jumps through the index from workspace to workspace. (The plan is kept, as in
-- read_reports().)
create or replace function autotag.list_unstored(p_worker uuid, out workspaces autotag.workspace_id[], out wait double precision)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
  v_now timestamptz := autotag.now();
begin
  workspaces := '{}';
  if autotag.is_own_worker(p_worker) then
    with recursive found as (
      (select un.workspace_id, un.next_at from autotag.unstored un order by un.workspace_id, un.next_at limit 1)
      union all
      select n.* from found f
      cross join lateral (
        select un.workspace_id, un.next_at from autotag.unstored un where un.workspace_id > f.workspace_id
        order by un.workspace_id, un.next_at limit 1) n
    )
    select coalesce((array_agg(f.workspace_id order by f.next_at) filter (where f.next_at <= v_now))[:1000], '{}') into workspaces from found f;
    wait := autotag.real_seconds((select min(un.next_at) from autotag.unstored un where un.next_at > v_now) - v_now);
  end if;
end $$;

-- The tasks of at most p_limit outcomes of a workspace that are due, for store_waiting(). Skips outcomes that another worker is storing.
-- This is a separate call, so that the worker knows what it tried even if store_waiting() fails (postpone_stores).
create or replace function autotag.pick_unstored(p_worker uuid, p_workspace_id autotag.workspace_id, p_limit integer) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_now timestamptz := autotag.now();
begin
  return array(
    select un.task_id from autotag.unstored un
    where un.workspace_id = p_workspace_id and un.next_at <= v_now and autotag.is_own_worker(p_worker)
    order by un.next_at, un.task_id limit greatest(least(p_limit, 1000), 0) for update skip locked);
end $$;

-- Stores these outcomes of a workspace (pick_unstored) if they are still due. Those whose rows are still held wait longer. Ends the
-- batches whose last answer is stored. Returns {stored, more (whether others are due), notices: [{event, notice}]}.
-- Locks: unstored (skip locked), then as in finish(), batches.
create or replace function autotag.store_waiting(p_worker uuid, p_workspace_id autotag.workspace_id, p_tasks bigint[]) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_now timestamptz := autotag.now();
  v_due bigint[];
  v_items autotag.finished[];
  v_batches uuid[];
  v_notices jsonb;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  perform autotag.check_ids(cardinality(p_tasks));
  if not autotag.is_own_worker(p_worker) then
    return jsonb_build_object('stored', 0, 'more', false, 'notices', '[]'::jsonb);
  end if;
  v_due := array(
    select un.task_id from autotag.unstored un
    where un.task_id = any (p_tasks) and un.workspace_id = p_workspace_id and un.next_at <= v_now limit 1000 for update skip locked);
  select coalesce(array_agg(row(t.id, t.job_id, t.asset_id, un.result, un.error_code, un.error, un.mark)::autotag.finished order by t.id), '{}'),
    array_agg(distinct un.batch_id) filter (where un.batch_id is not null)
  into v_items, v_batches
  from autotag.unstored un join autotag.tasks t on t.id = un.task_id and t.finished_at is null
  where un.task_id = any (v_due);
  v_notices := autotag.finish(p_workspace_id, v_items, true, interval '1 s');
  delete from autotag.unstored un
  where un.task_id = any (v_due) and not exists (select from autotag.tasks t where t.id = un.task_id and t.finished_at is null);
  perform autotag.announce_stored(v_batches);
  return jsonb_build_object('stored', (select count(*) from unnest(v_due) d where not exists (
      select from autotag.unstored un where un.task_id = d)),
    'more', exists (select from autotag.unstored un where un.workspace_id = p_workspace_id and un.next_at <= v_now),
    'notices', v_notices);
end $$;

-- Postpones these outcomes, because store_waiting() took too long for them and was cancelled. For a single outcome, the image's own row
-- is to blame: after max_failures such timeouts it fails with the code not_stored, and its row is not touched again. p_lost: the
-- connection broke several times. That counts as three timeouts, because a row that crashes the server process must not do so for long.
-- Returns sentences for the operator's log: [{event, notice}]. Locks: unstored (skip locked), then as in finish().
create or replace function autotag.postpone_stores(p_worker uuid, p_workspace_id autotag.workspace_id, p_tasks bigint[], p_lost boolean default false)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_now timestamptz := autotag.now();
  v_max integer := (select s.max_failures from autotag.settings s);
  v_alone boolean := cardinality(p_tasks) = 1;
  v_timeouts integer := case when v_alone then 1 + 2 * p_lost::integer else 0 end;
  v_row autotag.unstored;
  v_task autotag.tasks;
begin
  perform autotag.check_ids(cardinality(p_tasks));
  if not autotag.is_own_worker(p_worker) then
    return '[]'::jsonb;
  end if;
  for v_row in
    select un.* from autotag.unstored un
    where un.task_id = any (p_tasks) and un.workspace_id = p_workspace_id and un.next_at <= v_now
    limit 1000 for update skip locked
  loop
    if v_alone and v_row.timeouts + v_timeouts >= v_max then
      select * into v_task from autotag.tasks t where t.id = v_row.task_id;
      perform autotag.count_ended(autotag.write_outcomes(p_workspace_id, array[row(v_task.id, v_task.job_id, v_task.asset_id, null,
        'not_stored', case when p_lost then 'The database could not store the tags of this image.'
          else 'The database took too long to store the tags of this image.' end, null)::autotag.finished], true, false));
      return jsonb_build_array(jsonb_build_object('event', 'not_stored', 'notice', format(case when p_lost
        then 'Writing the row of image %s ended the session each time. A trigger on the table does that, or the row is damaged.'
        else 'Writing the row of image %s took too long %s times. A trigger on the table is probably slow.' end, v_task.asset_id, v_max)));
    end if;
    update autotag.unstored un
    set tries = un.tries + 1, timeouts = un.timeouts + v_timeouts,
        next_at = v_now + case when v_alone then least(interval '1 min', interval '0.25 s' * power(2, least(un.tries, 10)))
          else interval '0' end
    where un.task_id = v_row.task_id;
  end loop;
  return '[]'::jsonb;
end $$;

-- Broadcasts batch-complete for each of these batches that has ended, if its last answer is stored. Locks: batches by id.
create or replace function autotag.announce_stored(p_batches uuid[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
begin
  for v_batch in
    select b.* from autotag.batches b
    where b.id = any (p_batches) and b.state = 'done' and not b.stored
      and not exists (select from autotag.unstored un where un.batch_id = b.id)
    order by b.id for no key update skip locked
  loop
    update autotag.batches b set stored = true where b.id = v_batch.id;
    perform autotag.broadcast_stored(v_batch);
  end loop;
end $$;

-- Usage per workspace and user, and its cost.

-- Adds the usage of these answers (count_usage). A row without a cost is priced as a whole as soon as its model has a price.
-- All settles of a workspace write the same row, and wait for it until this transaction ends. So this comes after the host's rows.
-- Locks: usage by key.
create or replace function autotag.add_usage(p_answers autotag.answer[], p_batch boolean, p_question jsonb default null, p_asked_at timestamptz default null) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  insert into autotag.usage as us (workspace_id, user_id, day, model, service_tier, images, requests,
    input_tokens, cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost)
  select c.* from autotag.count_usage(p_answers, p_batch, p_question, p_asked_at) c
  on conflict (workspace_id, day, user_id, model, service_tier) do update set
    images = us.images + excluded.images, requests = us.requests + excluded.requests,
    input_tokens = us.input_tokens + excluded.input_tokens,
    cached_tokens = us.cached_tokens + excluded.cached_tokens,
    cache_write_tokens = us.cache_write_tokens + excluded.cache_write_tokens,
    output_tokens = us.output_tokens + excluded.output_tokens,
    reasoning_tokens = us.reasoning_tokens + excluded.reasoning_tokens,
    cost = excluded.cost + coalesce(us.cost, autotag.price_tokens(us.model, us.service_tier,
      us.input_tokens, us.cached_tokens, us.cache_write_tokens, us.output_tokens));
end $$;

-- The usage of these answers, each by its model (not given: the one in p_question; null: the present one) and service
-- tier. An answer to the present question costs at most as much as the model and tier that were asked. Answers without figures get the
-- tier `unknown` and no cost. An answer without a job (a comparison) counts as a request, not as a tagged image.
create or replace function autotag.count_usage(p_answers autotag.answer[], p_batch boolean, p_question jsonb, p_asked_at timestamptz)
returns table (workspace_id autotag.workspace_id, user_id autotag.user_id, day date, model text, service_tier text, images bigint, requests bigint, input_tokens bigint,
  cached_tokens bigint, cache_write_tokens bigint, output_tokens bigint, reasoning_tokens bigint, cost numeric)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_question jsonb := p_question;
  v_since timestamptz := timestamptz '-infinity';   -- since when it is the question
begin
  if v_question is null then
    select p.question, p.question_since into v_question, v_since from autotag.provider_limits p;
  end if;
  return query
    select t.workspace_id, t.user_id, t.day, t.model, t.tier, t.images, t.requests, t.input, t.cached, t.cache_write, t.output, t.reasoning,
      autotag.price_answers(case when t.present then v_question end, t.model, t.tier, t.input, t.cached, t.cache_write, t.output)
    from (
      select b.workspace_id, j.user_id, (autotag.now() at time zone 'utc')::date as day, b.model, b.tier,
        sum(b.images)::bigint as images, sum(b.requests)::bigint as requests, sum(b.input)::bigint as input, sum(b.cached)::bigint as cached,
        sum(b.cache_write)::bigint as cache_write, sum(b.output)::bigint as output, sum(b.reasoning)::bigint as reasoning,
        bool_and(b.present) as present
      from (
        select a.job_id, a.workspace_id, coalesce(a.usage ->> 'model', v_question ->> 'model') as model,
          case when a.usage is null then 'unknown' when p_batch then 'batch' else coalesce(a.usage ->> 'tier', 'default') end as tier,
          count(*) filter (where a.error is null and a.job_id is not null) as images, count(*) as requests,
          coalesce(sum((a.usage -> 'input')::integer), 0) as input,
          coalesce(sum(least((a.usage -> 'cached')::integer, (a.usage -> 'input')::integer)), 0) as cached,
          coalesce(sum((a.usage -> 'cache_write')::integer), 0) as cache_write,
          coalesce(sum((a.usage -> 'output')::integer), 0) as output,
          coalesce(sum((a.usage -> 'reasoning')::integer), 0) as reasoning,
          bool_and(p_question is not null or coalesce(coalesce(p_asked_at, a.reserved_at) >= v_since, false)) as present
        from unnest(p_answers) a
        where a.usage is not null or a.error is null
        group by 1, 2, 3, 4) b
      left join autotag.jobs j on j.id = b.job_id
      group by b.workspace_id, j.user_id, b.model, b.tier
      order by b.workspace_id, j.user_id, b.model, b.tier) t;
end $$;

-- Price of answers of one model and tier (price_tokens) to a question: at most that of the model and tier that the question names,
-- if they differ. A dated name of the model that was asked is that model; a question without a tier leaves it to the account.
-- If that price is zero, the answer costs zero even if the model that answered is unknown, because self-hosted servers use their own
-- names. p_asked null: no bound.
create or replace function autotag.price_answers(
  p_asked jsonb, p_model text, p_tier text, p_input numeric, p_cached numeric, p_cache_write numeric, p_output numeric
) returns numeric
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_price numeric := autotag.price_tokens(p_model, p_tier, p_input, p_cached, p_cache_write, p_output);
  v_tier text := case when p_tier = 'batch' then p_tier else coalesce(p_asked ->> 'service_tier', p_tier) end;
  v_max_allowed numeric;
begin
  if p_asked is null or v_tier = p_tier and autotag.names_model(p_asked ->> 'model', p_model) then
    return v_price;
  end if;
  v_max_allowed := autotag.price_tokens(p_asked ->> 'model', v_tier, p_input, p_cached, p_cache_write, p_output);
  return case when v_price > v_max_allowed or v_max_allowed = 0 then v_max_allowed else v_price end;
end $$;

-- Prices the earlier usage of models that now have a price.
create or replace function autotag.price_usage() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.usage us
  set cost = autotag.price_tokens(us.model, us.service_tier, us.input_tokens, us.cached_tokens, us.cache_write_tokens, us.output_tokens)
  where us.cost is null
    and autotag.price_tokens(us.model, us.service_tier, us.input_tokens, us.cached_tokens, us.cache_write_tokens, us.output_tokens) is not null;
  return null;
end $$;

create or replace trigger autotag_price_usage after insert or update of input_price, output_price on autotag.models
  for each statement execute function autotag.price_usage();

-- tagging_usage: rows per user, day, model and service tier, for members of the workspace. cost: dollars; null: the model has
-- no price in autotag.models.
create or replace function autotag.list_usage(p_workspace_id autotag.workspace_id, p_since date, p_until date)
returns table (user_id autotag.user_id, day date, model text, service_tier text, images integer, requests integer, input_tokens bigint,
  cached_tokens bigint, cache_write_tokens bigint, output_tokens bigint, reasoning_tokens bigint, cost numeric)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_member(p_workspace_id);
  return query
    select us.user_id, us.day, us.model, us.service_tier, us.images, us.requests, us.input_tokens,
      us.cached_tokens, us.cache_write_tokens, us.output_tokens, us.reasoning_tokens, us.cost
    from autotag.usage us
    where us.workspace_id = p_workspace_id and us.day between p_since and p_until
    order by us.day, us.user_id, us.model, us.service_tier;
end $$;

-- Broadcasts to browsers, sent by the transaction that makes them true, and the right to receive them.

-- Broadcasts a message. It only warns of an error of Realtime (a partition is missing), which must not undo the reported change.
create or replace function autotag.broadcast(p_topic text, p_event text, p_payload jsonb, p_private boolean) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if to_regprocedure('realtime.send(jsonb,text,text,boolean)') is not null then
    -- the cast picks the overload; newer servers also have one for bytea
    perform realtime.send(p_payload::jsonb, p_event, p_topic, p_private);
  else
    insert into autotag.outbox (topic, event, payload, private, created_at)
    values (p_topic, p_event, p_payload, p_private, autotag.now());
    perform pg_notify('autotag', 'outbox');
  end if;
exception when others or assert_failure then
  raise warning 'autotag could not broadcast %: %', p_event, sqlerrm;
end $$;

create or replace function autotag.broadcast_to_workspace(p_workspace_id autotag.workspace_id, p_event text, p_payload jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.broadcast('tagging:' || p_workspace_id, p_event, p_payload, true);
end $$;

-- Takes messages out of the outbox for delivery: [{topic, event, payload, private}]. They are deleted at once, because Realtime
-- delivers at most once, and clients rely on it that no message comes twice.
create or replace function autotag.take_outbox(p_limit integer) returns jsonb
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  with taken as (
    delete from autotag.outbox ob where ob.id in (
      select oldest.id from autotag.outbox oldest order by oldest.id limit greatest(least(p_limit, 1000), 0) for update skip locked)
    returning ob.*
  )
  select coalesce(jsonb_agg(jsonb_build_object(
    'topic', t.topic, 'event', t.event, 'payload', t.payload, 'private', t.private) order by t.id), '[]')
  from taken t
$$;

-- Whether the caller may join a private topic: tagging:<workspace_id> of one of their workspaces.
-- The id has to be written as Postgres prints it, as in the topics of broadcasts.
create or replace function autotag.may_listen(p_topic text) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_workspace_id autotag.workspace_id;
begin
  if starts_with(p_topic, 'tagging:') then
    begin
      v_workspace_id := substr(p_topic, 9)::autotag.workspace_id;
    exception when data_exception then
      return false;
    end;
    return coalesce(p_topic = 'tagging:' || v_workspace_id and autotag.is_member(v_workspace_id), false);
  end if;
  return false;
end $$;

-- What users see: stage, progress and eta of each image, and the counts of each upload. The adapter's show_stage and store_tags
-- write the rows: queued, one or two stages in between (submitted, processing), and the end. Broadcasts and tagging_job() report
-- everything finer, because each write of a row fires the host's triggers, webhooks and Postgres Changes.

-- The order of the seven stages. A pass moves only forward and ends with completed or failed.
create or replace function autotag.stage_rank(stage text) returns integer
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case stage
    when 'queued' then 1 when 'preparing' then 2 when 'submitted' then 3 when 'processing' then 4
    when 'completing' then 5 when 'completed' then 6 when 'failed' then 6 end
$$;

-- Progress of an image when it enters a stage, in percent.
create or replace function autotag.stage_progress(p_stage text) returns integer
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case p_stage when 'queued' then 0 when 'preparing' then 10 when 'submitted' then 20
    when 'processing' then 30 when 'completing' then 90 when 'completed' then 100 end
$$;

-- Writes a stage to the host's rows of images of one workspace. A row that is held or that raises is left out, because the image's
-- outcome follows. It writes in parts and waits for locks as finish() does. While autotag.quiet is set, it writes nothing
-- (seal_uploads). p_own: the transaction is a worker's own, so constraints that the host has deferred are checked here, because an error
-- at the commit would undo everything. The caller does not hold the provider row. Locks: assets.
create or replace function autotag.show(
  p_workspace_id autotag.workspace_id, p_asset_ids autotag.asset_id[], p_stage text, p_progress integer, p_eta timestamptz,
  p_own boolean default false
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_parts autotag.parts := autotag.first_part(cardinality(p_asset_ids));
  v_waits interval := interval '150 ms';
  v_next integer := 1;
  v_part autotag.asset_id[];
  v_free autotag.asset_id[];   -- of v_part, the rows that nobody holds
  v_try record;
begin
  if current_setting('autotag.quiet', true) = 'true' then
    return;
  end if;
  while v_next <= cardinality(p_asset_ids) and v_waits > interval '0' loop
    v_part := p_asset_ids[v_next : v_next + v_parts.size - 1];
    v_try := autotag.try_stage(p_workspace_id, v_part, p_stage, p_progress, p_eta, p_own);
    v_parts := autotag.next_part(v_parts, cardinality(v_part), v_try.state is not null);
    if v_try.state is null or cardinality(v_part) = 1 then
      v_next := v_next + cardinality(v_part);
    elsif autotag.is_lock_error(v_try.state) then
      v_free := autotag.free_assets(v_part);
      if cardinality(v_free) < cardinality(v_part) then
        p_asset_ids := v_free || p_asset_ids[v_next + cardinality(v_part):];
        v_next := 1;
      end if;
    end if;
    if autotag.is_lock_error(v_try.state) then
      v_waits := v_waits - v_try.took;
    end if;
  end loop;
end $$;

-- Shows a stage on all these rows (show_stage). Its error is returned as in try_outcomes(), except this: at the isolation levels
-- repeatable read and serializable, a row that has changed since the caller's snapshot ends the call with 40001. The caller would not see
-- what has happened to the image meanwhile, and it would be tagged and paid twice.
create or replace function autotag.try_stage(
  p_workspace_id autotag.workspace_id, p_asset_ids autotag.asset_id[], p_stage text, p_progress integer, p_eta timestamptz, p_own boolean,
  out state text, out took interval
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_began timestamptz := clock_timestamp();
begin
  -- whole seconds: a prediction is no more exact, and clients fetch it for each image
  perform autotag.show_stage(p_asset_ids, p_workspace_id, p_stage, p_progress, date_trunc('second', p_eta));
  if p_own then
    set constraints all immediate;
  end if;
exception when others or assert_failure then
  get stacked diagnostics state = returned_sqlstate;
  if state = '40001' and current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise;
  end if;
  took := clock_timestamp() - v_began;
end $$;

-- The images among these whose rows no other transaction holds; none if another transaction holds the whole table.
create or replace function autotag.free_assets(p_asset_ids autotag.asset_id[]) returns autotag.asset_id[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_held autotag.asset_id[];
begin
  v_held := autotag.held_assets(p_asset_ids);
  return array(select a from unnest(p_asset_ids) a where a not in (select unnest(v_held)));
exception when others or assert_failure then
  return array[]::autotag.asset_id[];
end $$;

-- The stage of the images of a batch that have no outcome yet. A batch that is planned again stays where it was: stages move only
-- forward.
create or replace function autotag.batch_stage(p_state text, p_running_at timestamptz, p_submitted_at timestamptz) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case when p_state not in ('planned', 'preparing', 'uploading', 'creating', 'submitted') then 'completing'
    when p_running_at is not null then 'processing'
    when p_submitted_at is not null then 'submitted'
    when p_state = 'planned' then 'queued'
    else 'preparing' end
$$;

-- Progress of a job in percent: finished images count fully, those that OpenAI has done in its batches 90 %.
create or replace function autotag.measure_progress(p_job autotag.jobs) returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select greatest(p_job.progress, least(99, floor(100 * (
    p_job.completed + p_job.failed
    + 0.9 * coalesce((
        select sum(least(b.request_done, b.image_count - b.express_count)) from autotag.batches b
        where b.job_id = p_job.id and b.state in ('submitted', 'ended', 'harvesting') and not b.stored), 0)
  ) / p_job.image_count)::integer))
$$;

-- The images of a job whose rows have changed since its last message, each once or several times; null: more than a client should
-- request by id in one URL.
create or replace function autotag.add_changed(p_changed autotag.asset_id[], p_more autotag.asset_id[]) returns autotag.asset_id[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_all autotag.asset_id[] := case when cardinality(p_changed) <= 100 and cardinality(p_more) <= 100 then p_changed || p_more end;
begin
  if cardinality(v_all) > 100 or pg_column_size(v_all) > 8000 then  -- often the same images in their next stage
    v_all := array(select distinct i from unnest(v_all) i);
  end if;
  -- a key that is a text can have 2,700 bytes
  return case when cardinality(v_all) <= 100 and pg_column_size(v_all) <= 8000 then v_all end;
end $$;

-- Counts finished images of a job; the last one finishes the job. Broadcasts job-progress at most once per broadcast_interval, and
-- job-complete at the end. p_changed: the images whose rows this transaction has changed; null: many. The next message includes those
-- that no message has named yet (broadcast_held). p_eta: the job's eta, if it was just computed. Updates the job's row once. The caller
-- holds the job's lock.
create or replace function autotag.report_job(
  p_job_id uuid, p_completed integer, p_failed integer, p_changed autotag.asset_id[], p_eta timestamptz default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_job autotag.jobs;
  v_told autotag.asset_id[];
  v_due boolean;
  v_end record;
  v_status text;
  v_ids jsonb;
begin
  select * into v_job from autotag.jobs j where j.id = p_job_id and j.finished_at is null;
  if not found then
    return;
  end if;
  v_job.completed := v_job.completed + p_completed;
  v_job.failed := v_job.failed + p_failed;
  v_job.changed := autotag.add_changed(v_job.changed, p_changed);
  v_told := v_job.changed;
  v_due := v_job.broadcast_at <= v_now - (select s.broadcast_interval from autotag.settings s);
  if v_job.completed + v_job.failed = v_job.image_count then
    v_job.finished_at := v_now;
    v_job.progress := 100;
    v_job.eta := null;
    v_job.eta_p90 := null;
    v_job.changed := array[]::autotag.asset_id[];
  elsif v_due then
    v_job.broadcast_at := v_now;
    v_job.progress := autotag.measure_progress(v_job);
    if p_eta is null then
      v_end := autotag.predict_job(p_job_id, null);
      v_job.eta := v_end.p50;
      v_job.eta_p90 := v_end.p90;
    end if;
    v_job.changed := array[]::autotag.asset_id[];
  elsif p_completed + p_failed = 0 and p_changed = '{}' then
    return;
  end if;
  update autotag.jobs j
  set completed = v_job.completed, failed = v_job.failed, finished_at = v_job.finished_at, progress = v_job.progress,
      eta = v_job.eta, eta_p90 = v_job.eta_p90, broadcast_at = v_job.broadcast_at, changed = v_job.changed
  where j.id = p_job_id;
  if v_job.finished_at is not null then
    perform autotag.broadcast_end(v_job, v_told);
  elsif v_due then
    v_status := autotag.job_status(v_job);
    v_ids := autotag.unique_ids(v_told);
    perform autotag.broadcast_to_workspace(v_job.workspace_id, 'job-progress', jsonb_build_object(
      'job_id', v_job.id, 'status', v_status, 'completed', v_job.completed, 'failed', v_job.failed, 'image_count', v_job.image_count,
      'progress', v_job.progress, 'eta', v_job.eta, 'asset_ids', v_ids, 'many', v_told is null));
  end if;
end $$;

-- Broadcasts that a job has ended. p_told: the images whose rows changed since its last message. If no batch-complete follows, clients
-- that listen only to the public topic get one without a batch id (broadcast_single_calls).
create or replace function autotag.broadcast_end(p_job autotag.jobs, p_told autotag.asset_id[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_status text := autotag.job_status(p_job);
  v_ids jsonb := autotag.unique_ids(p_told);
begin
  perform autotag.broadcast_to_workspace(p_job.workspace_id, 'job-complete', jsonb_build_object(
    'job_id', p_job.id, 'status', v_status, 'completed', p_job.completed, 'failed', p_job.failed, 'image_count', p_job.image_count,
    'asset_ids', v_ids, 'many', p_told is null));
  if (select s.broadcast_single_calls from autotag.settings s) and not exists (
    select from autotag.batches b where b.job_id = p_job.id and b.openai_batch_id is not null and not b.stored) then
    perform autotag.broadcast('batch-updates', 'batch-complete', jsonb_build_object('batch_id', null), false);
  end if;
end $$;

-- An image that changed twice between two messages is told of once.
create or replace function autotag.unique_ids(p_ids autotag.asset_id[]) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return to_jsonb(case when p_ids is not null then array(select distinct i from unnest(p_ids) i) end);
end $$;

-- Broadcasts a job's progress, if no message was sent within broadcast_interval (report_job). The caller holds the job's lock.
create or replace function autotag.broadcast_progress(
  p_job_id uuid, p_eta timestamptz default null, p_changed autotag.asset_id[] default '{}'
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.report_job(p_job_id, 0, 0, p_changed, p_eta);
end $$;

-- Broadcasts changes that no message has named yet, because another message had just been sent: those of at most 100 uploads of a
-- workspace; null: of all workspaces. (A plan with seqscan may read all uploads that ever finished.) Locks: jobs (skip locked).
create or replace function autotag.broadcast_held(p_workspace_id autotag.workspace_id) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
  set plan_cache_mode = 'force_custom_plan' set enable_seqscan = off set jit = off
as $$
declare
  v_until timestamptz := autotag.now() - (select s.broadcast_interval from autotag.settings s);
begin
  perform autotag.broadcast_progress(h.id) from (
    select j.id from autotag.jobs j
    where j.finished_at is null and (j.workspace_id = p_workspace_id or p_workspace_id is null)
      and j.changed is distinct from '{}' and j.broadcast_at <= v_until
    limit 100 for no key update skip locked) h;
end $$;

-- tagging_job: one upload as the UI shows it (describe_upload).
create or replace function autotag.describe_job(p_job_id uuid) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.describe_upload(autotag.visible_job(p_job_id));
end $$;

-- tagging_jobs: the uploads of a workspace, the newest first, as tagging_job describes each; p_before: only older ones. Uploads that
-- began at the same moment come on one page, which is then longer than p_limit, so no page begins between them.
create or replace function autotag.list_jobs(p_workspace_id autotag.workspace_id, p_only_live boolean, p_before timestamptz, p_limit integer)
returns setof jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
begin
  perform autotag.check_member(p_workspace_id);
  p_limit := least(greatest(coalesce(p_limit, 20), 1), 100);
  return query
    select autotag.describe_upload(f.job) from (
      select j as job from autotag.jobs j
      -- the plan is made for these values, so it uses the index of live uploads for them
      where j.workspace_id = p_workspace_id and (j.finished_at is null or not coalesce(p_only_live, true))
        and j.created_at < coalesce(p_before, 'infinity')
      order by j.created_at desc fetch first p_limit rows with ties) f
    order by (f.job).created_at desc, (f.job).id;
end $$;

-- The status of an upload. A cancelled upload is `cancelling` until its last image has ended, and then `cancelled`.
create or replace function autotag.job_status(p_job autotag.jobs) returns text
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_job.finished_at is null then case when p_job.cancelled_at is null then 'running' else 'cancelling' end
    when p_job.cancelled_at is null then 'completed' else 'cancelled' end;
end $$;

-- One upload as the UI shows it. `stages` maps each of the seven stages to its number of images.
create or replace function autotag.describe_upload(p_job autotag.jobs) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_stages jsonb;
  v_error text;
  v_eta record := autotag.current_eta(p_job);
begin
  select jsonb_object_agg(st.stage, case st.stage when 'completed' then p_job.completed else coalesce(c.images, 0) end)
  into v_stages
  from unnest(array['queued', 'preparing', 'submitted', 'processing', 'completing', 'completed', 'failed']) st (stage)
  left join (
    select o.stage, count(*) as images
    from autotag.tasks t left join autotag.batches b on b.id = t.batch_id
    cross join lateral (select case when t.finished_at is not null then t.stage
      when t.retry_at = 'infinity' then 'completing'   -- its outcome waits for the host's row
      when b.id is not null then autotag.batch_stage(b.state, b.running_at, b.submitted_at)
      else t.stage end as stage) o
    where t.job_id = p_job.id group by o.stage) c using (stage);
  -- the most frequent error
  select t.error into v_error from autotag.tasks t
  where t.job_id = p_job.id and t.stage = 'failed' group by t.error order by count(*) desc, t.error limit 1;
  return jsonb_build_object(
    'job_id', p_job.id, 'status', autotag.job_status(p_job), 'strategy', p_job.strategy, 'image_count', p_job.image_count,
    'stages', v_stages, 'completed', p_job.completed, 'failed', p_job.failed,
    'progress', case when p_job.finished_at is null then autotag.measure_progress(p_job) else 100 end,
    'eta', v_eta.p50, 'eta_p90', v_eta.p90, 'error', v_error, 'fallback', p_job.fallback,
    'batches', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'batch_id', b.openai_batch_id, 'state', b.state, 'image_count', b.image_count) order by b.ordinal), '[]')
      from autotag.batches b where b.job_id = p_job.id),
    'created_at', p_job.created_at, 'finished_at', p_job.finished_at,
    'cancelled', p_job.cancelled_at is not null);
end $$;

-- Predicts when a job ends. Single calls: from their schedule under the present limits and queues. Batches: from the durations
-- of earlier ones (by size and time of day, the newest weigh most), and once a batch makes progress, from its pace. Users see
-- the median; the 90th percentile is available too. Predictions run inside uploads, reports and polls, and read values that providers
-- and operators set. So they never raise: predict_batch, batch_eta, predict_new_batch, predict_single_calls, predict_job, predict_wait
-- and estimate_seconds warn and return null instead (that takes 5 µs of the millisecond of a prediction).

-- Possible durations of a batch of p_images images that starts at p_started, in seconds with weights: those of recent batches
-- and a prior with a median of settings.batch_seconds (45 min), from a third (15 min) to 16 times that (12 h); OpenAI promises
-- 24 h. A batch in flight counts with its projection: by its pace once 10 % are done; before, if it is overdue, the predicted
-- duration plus twice the delay. So a slow day shows before its first batch has ended.
create or replace function autotag.batch_lengths(p_images integer, p_started timestamptz, p_now timestamptz, p_except uuid)
returns table (seconds double precision, weight double precision)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_half_life double precision;    -- in days
begin
  select * into v_settings from autotag.settings;
  v_half_life := least(greatest(v_settings.eta_half_life_days, 0.000001), 1000000);
  return query
    -- 100 half-lives weigh as good as nothing (10^-30), and beyond 1,074 power() fails.
    select s.seconds,
      power(0.5, least(greatest(date_part('epoch', p_now - s.known_at), 0) / 86400 / v_half_life, 100))
      * exp(-abs(ln(s.images::double precision / p_images)))
      * (0.65 + 0.35 * cos(2 * pi() * date_part('epoch', s.started_at - p_started) / 86400)) * s.boost
    from (
      select d.seconds, d.images, d.started_at, d.started_at + make_interval(secs => d.seconds) as known_at, 1.0 as boost
      from (select * from autotag.durations order by started_at desc limit 300) d
      union all
      select f.heading, f.images, f.submitted_at, p_now, 2.0
      from (
        select b.image_count - b.express_count as images, b.submitted_at,
          case when d.share > 0.1 and b.running_at is not null
            then autotag.projected_duration(b.submitted_at, b.running_at, p_now, d.share)
            else 2 * nullif(greatest(date_part('epoch', p_now - b.submitted_at) - b.predicted_seconds, 0), 0)
              + b.predicted_seconds end as heading
        from autotag.batches b cross join lateral (select autotag.share_done(b) as share offset 0) d
        where b.state = 'submitted' and b.id is distinct from p_except
        order by b.submitted_at desc limit 50) f
      where f.heading is not null
    ) s
    union all
    select v_settings.batch_seconds * x, 0.3
    from unnest(array[0.33, 0.5, 0.75, 1, 2, 5, 16]::double precision[]) x;
end $$;

-- How much of a batch is done, from 0 to 1: of the lines that the provider counts, or of its images if the provider does not say.
create or replace function autotag.share_done(p_batch autotag.batches) returns double precision
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return least(1, p_batch.request_done::double precision
    / coalesce(nullif(p_batch.request_total, 0), p_batch.image_count - p_batch.express_count));
end $$;

-- Total duration of a batch whose share p_share is done: the wait until p_running, then a constant pace.
create or replace function autotag.projected_duration(
  p_started timestamptz, p_running timestamptz, p_now timestamptz, p_share double precision
) returns double precision
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select date_part('epoch', p_running - p_started) + date_part('epoch', p_now - p_running) / p_share
$$;

-- Predicts the total duration of a batch in seconds: median and 90th percentile. p_running: when OpenAI began to work on it
-- (null: not yet); p_share: how much of it is done. Only durations longer than its age count. Once a third is done, only its own pace
-- counts.
create or replace function autotag.predict_batch(
  p_images integer, p_started timestamptz, p_now timestamptz, p_running timestamptz, p_share double precision,
  p_except uuid, out p50 double precision, out p90 double precision
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_age double precision;
  v_trust double precision;
  v_heading double precision;
  v_unsure double precision;    -- ln(p90 / p50) of the history, weighted by 1 - v_trust
begin
  v_age := greatest(date_part('epoch', p_now - p_started), 0);
  v_trust := case when p_running is null then 0 else least(1, 3 * p_share) end;
  select min(l.seconds) filter (where l.upto >= 0.5 * l.total), min(l.seconds) filter (where l.upto >= 0.9 * l.total)
  into p50, p90
  from (
    select h.seconds, sum(h.weight) over (order by h.seconds) as upto, sum(h.weight) over () as total
    from autotag.batch_lengths(p_images, p_started, p_now, p_except) h
    where h.seconds > v_age) l;
  p50 := coalesce(p50, 1.5 * v_age);
  p90 := greatest(coalesce(p90, 3 * v_age), 1.1 * p50);
  if v_trust > 0 then
    v_heading := greatest(autotag.projected_duration(p_started, p_running, p_now, p_share), v_age);
    v_unsure := (1 - v_trust) * ln(p90 / p50);
    p50 := greatest(v_age, exp((1 - v_trust) * ln(p50) + v_trust * ln(greatest(v_heading, 1))));
    -- In one case of ten the rest takes a third longer than at the pace so far.
    p90 := exp(v_unsure) * (p50 + v_trust * (p50 - v_age) / 3);
  end if;
exception when others then
  raise warning 'autotag could not predict a batch: %', sqlerrm;
  p50 := null; p90 := null;
end $$;

-- When a batch may start. A batch that the workspace's window has not admitted waits until the window has room for the batches
-- ahead and for itself; each max_requests batches ahead of it delay it by one full window.
create or replace function autotag.batch_start_eta(p_batch autotag.batches, p_now timestamptz) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_turn timestamptz := greatest(p_now, case when p_batch.not_before < 'infinity' then p_batch.not_before end);
  v_before integer;
  v_window record;
begin
  if p_batch.state <> 'planned' or p_batch.admitted_at is not null then
    return v_turn;
  end if;
  select count(*) into v_before from autotag.batches b
  where b.workspace_id = p_batch.workspace_id and b.state = 'planned' and b.admitted_at is null
    and (b.created_at, b.ordinal) < (p_batch.created_at, p_batch.ordinal);
  select l.length, l.max_requests, a.retry_at into v_window
  from autotag.window_limits(p_batch.workspace_id, 'batch') l
  cross join lateral autotag.admit(
    p_batch.workspace_id, 'batch', v_before % l.max_requests + 1, 0, false, p_take => false) a;
  return greatest(v_turn, coalesce(v_window.retry_at, p_now) + v_before / v_window.max_requests * v_window.length);
end $$;

-- Predicted end of a batch: median and 90th percentile. One that was not submitted starts at batch_start_eta().
create or replace function autotag.batch_eta(p_batch autotag.batches, p_now timestamptz, out p50 timestamptz, out p90 timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_started timestamptz;
  v_seconds record;
begin
  v_started := coalesce(p_batch.submitted_at, autotag.batch_start_eta(p_batch, p_now));
  v_seconds := autotag.predict_batch(p_batch.image_count - p_batch.express_count, v_started, greatest(p_now, v_started),
    p_batch.running_at, autotag.share_done(p_batch), p_batch.id);
  p50 := v_started + make_interval(secs => v_seconds.p50);
  p90 := v_started + make_interval(secs => v_seconds.p90);
exception when others then
  raise warning 'autotag could not predict the end of a batch: %', sqlerrm;
  p50 := null; p90 := null;
end $$;

-- When one more batch of p_images images would start and end, behind all batches of the workspace that wait for its window.
create or replace function autotag.predict_new_batch(
  p_workspace_id autotag.workspace_id, p_images integer, p_now timestamptz, out starts_at timestamptz, out ends_at timestamptz
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
begin
  v_batch.workspace_id := p_workspace_id;
  v_batch.state := 'planned';
  v_batch.image_count := p_images;
  v_batch.express_count := 0;
  v_batch.created_at := 'infinity';   -- later than the others
  v_batch.ordinal := 1;
  starts_at := autotag.batch_start_eta(v_batch, p_now);
  ends_at := (autotag.batch_eta(v_batch, p_now)).p50;
exception when others then
  raise warning 'autotag could not predict the start of a batch: %', sqlerrm;
  starts_at := null; ends_at := null;
end $$;

-- When the last single call of a job ends: it waits for the limits and for its chunk. p_wait: the wait for the limits, if the caller
-- has computed it. Null: no prediction is possible.
create or replace function autotag.predict_single_calls(p_job_id uuid, p_wait interval) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_settings autotag.settings;
begin
  select * into v_settings from autotag.settings;
  return v_now + make_interval(secs => v_settings.call_seconds) + coalesce((
    select greatest(coalesce(p_wait, autotag.predict_wait(q.workspace_id, 0, true)),
      case when q.chunk is not null then greatest(q.ready_at, v_now) - v_now
        + v_settings.chunk_delay * ((q.queued - 1) / q.chunk) end)
    from autotag.queues q where q.job_id = p_job_id and q.queued > 0), interval '0');
exception when others then
  raise warning 'autotag could not predict single calls: %', sqlerrm;
  return null;
end $$;

-- Predicts the end of a job: its last batch, or the last of its single calls, which wait for the limits and for their chunks.
-- p_wait: the wait for the limits, if the caller has computed it.
create or replace function autotag.predict_job(p_job_id uuid, p_wait interval, out p50 timestamptz, out p90 timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_single timestamptz;
  v_batches record;
begin
  v_single := autotag.predict_single_calls(p_job_id, p_wait);
  select max(e.p50) as p50, max(e.p90) as p90 into v_batches
  from (
    -- Batches that wait for the window are mostly alike, so only the last one is predicted.
    select distinct on (b.openai_batch_id, b.not_before, b.image_count - b.express_count) b as batch
    from autotag.batches b where b.job_id = p_job_id and b.state not in ('done', 'cancelled')
    order by b.openai_batch_id, b.not_before, b.image_count - b.express_count, b.ordinal desc) d
  cross join lateral autotag.batch_eta(d.batch, v_now) e;
  p50 := greatest(v_single, v_batches.p50);
  p90 := greatest(v_single + (v_single - v_now), v_batches.p90);
exception when others then
  raise warning 'autotag could not predict the end of an upload: %', sqlerrm;
  p50 := null; p90 := null;
end $$;

-- The predicted end of a job as it is shown, never in the past. A stored prediction that is over, or nearly so, is computed again. Null:
-- the job has ended, or no prediction is possible.
create or replace function autotag.current_eta(p_job autotag.jobs, out p50 timestamptz, out p90 timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_end record;
begin
  if p_job.finished_at is null and p_job.eta < autotag.now() + interval '1 s' then
    v_end := autotag.predict_job(p_job.id, null);
    p50 := v_end.p50;
    p90 := v_end.p90;
  else
    p50 := p_job.eta;
    p90 := p_job.eta_p90;
  end if;
end $$;

-- Predicts the end of a job (predict_job) and stores it. The caller holds the job's lock.
create or replace function autotag.refresh_eta(p_job_id uuid, p_wait interval default null) returns timestamptz
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_end record;
  v_eta timestamptz;
begin
  -- The write is outside of predict_job()'s subtransaction, which would have to get an id for it.
  v_end := autotag.predict_job(p_job_id, p_wait);
  update autotag.jobs j set eta = v_end.p50, eta_p90 = v_end.p90
  where j.id = p_job_id and j.finished_at is null
  returning j.eta into v_eta;
  return v_eta;
end $$;

-- Records the duration of a batch that OpenAI completed.
create or replace function autotag.record_duration(p_batch autotag.batches, p_now timestamptz) returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  insert into autotag.durations (images, started_at, seconds)
  select p_batch.image_count - p_batch.express_count, p_batch.submitted_at,
    greatest(date_part('epoch', p_now - p_batch.submitted_at), 1)
$$;

-- The state of the whole system for an operator (`autotag status`).

-- The model, how it is asked, what it uses, when it shuts down, and what the provider supports: {name, reasoning_effort,
-- service_tier, answer_format, cap_parameter, prompt_tokens, output_tokens (means), cap, reserved, priced, cost_per_1000
-- (dollars), proven, shutdown (describe_shutdown), provider: {base_url, batches, rate_headers, keep_files}}.
-- null in provider: not known yet.
create or replace function autotag.describe_model(p_provider autotag.provider_limits) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- The question from the next claim on; its model may differ from the last claim's.
  return (autotag.describe_question() - 'model' - 'max_tags' - 'tag_language') || jsonb_build_object(
    'name', (select s.model from autotag.settings s), 'prompt_tokens', p_provider.prompt_mean, 'output_tokens', p_provider.output_mean,
    'cap', p_provider.output_tokens, 'reserved', p_provider.tokens_per_image,
    'priced', autotag.expected_cost() is not null, 'cost_per_1000', round(1000 * autotag.expected_cost(), 4),
    'proven', p_provider.proven_at is not null and p_provider.question = autotag.describe_question(), 'shutdown', autotag.describe_shutdown(),
    'provider', jsonb_build_object('base_url', p_provider.base_url, 'batches', p_provider.has_batches,
      'rate_headers', p_provider.has_rate_headers, 'keep_files', p_provider.keep_files));
end $$;

-- Errors of images that failed within the last day, at most p_max, most frequent first: [{code, message, images, last_at}].
create or replace function autotag.recent_errors(p_max integer, p_now timestamptz) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_agg(to_jsonb(x) order by x.images desc, x.code), '[]') from (
      select t.error_code as code, min(t.error) as message, count(*) as images, max(t.finished_at) as last_at
      from autotag.jobs j join autotag.tasks t on t.job_id = j.id
      where (j.finished_at is null or j.finished_at > p_now - interval '1 day') and t.stage = 'failed'
        and t.finished_at > p_now - interval '1 day'
      group by t.error_code order by count(*) desc limit p_max) x);
end $$;

-- The work that waits, and why, at most p_max of each kind: [{kind, workspace_id, id, images, reason, until}]. until null: it waits
-- until the owner changes something. kind: batch, upload (of automatic mode), workspace (its single calls), or outcomes (tags that wait
-- for the host's rows). Only batch and upload have an id.
create or replace function autotag.list_waiting(p_max integer, p_now timestamptz) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_agg(jsonb_build_object('kind', x.kind, 'workspace_id', x.workspace_id::text, 'id', x.id, 'images', x.images,
      'reason', x.reason, 'until', nullif(x.until, 'infinity')) order by x.until desc, x.kind, x.workspace_id, x.id), '[]')
    from (
      (select 'batch' as kind, b.workspace_id, b.id::text as id, (b.image_count - b.express_count)::bigint as images, b.not_before as until,
        case when b.not_before = 'infinity' then 'It has more images than the workspace may send in an hour; it is split within a minute.'
          when b.admitted_at is null and b.state = 'planned' then 'The workspace has used up its batches or images of this hour.'
          else coalesce(b.error, 'It is tried again.') end as reason
      from autotag.batches b
      where b.state not in ('done', 'cancelled') and b.worker_id is null and b.not_before > p_now order by b.not_before desc, b.id limit p_max)
      union all
      (select 'workspace', ws.workspace_id, null, ws.queued, ws.ready_at,
        case when ws.ready_at = 'infinity' then format('One image reserves more than the workspace''s %s tokens a minute.', l.max_units)
          else 'The workspace has used up its limit of this minute, or its next chunk is not due.' end
      from autotag.workspaces ws cross join lateral autotag.window_limits(ws.workspace_id, 'realtime') l
      where ws.queued > 0 and not ws.ready and ws.ready_at > p_now order by ws.ready_at desc, ws.workspace_id limit p_max)
      union all
      (select 'upload', up.workspace_id, up.id::text, (select count(*) from autotag.arrivals ar where ar.upload_id = up.id), up.seal_at,
        case when up.failures = 0 then 'A quota is used up, or the workspace has as many unfinished images as it may have.'
          else 'Its rows are held, or the database refuses to write them; the log of the workers says why.' end
      from autotag.uploads up where up.seal_at > p_now order by up.seal_at desc, up.id limit p_max)
      union all
      (select 'outcomes', un.workspace_id, null, count(*), min(un.next_at), 'Other transactions hold the rows of these images, or writing them takes too long.'
      from autotag.unstored un group by un.workspace_id order by 4 desc limit p_max)) x);
end $$;

-- The state of the system as one JSON object; lists are cut to p_max (at most 200). The README shows how it is printed.
-- It contains ids of workspaces, uploads, batches and workers, and no image. Knowing an id gives no rights.
create or replace function autotag.status(p_max integer default 20) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_provider autotag.provider_limits := autotag.refilled_provider(v_now);
  v_counts jsonb := autotag.metrics();
begin
  p_max := least(greatest(coalesce(p_max, 20), 0), 200);
  return jsonb_build_object(
    'at', v_now,
    'queue', jsonb_build_object('workspaces', v_counts -> 'queued_workspaces', 'queued', v_counts -> 'queued',
      'delayed', v_counts -> 'delayed', 'live', v_counts -> 'live'),
    'jobs', (
      select coalesce(jsonb_agg(to_jsonb(x) order by x.created_at), '[]') from (
        select j.id as job_id, j.workspace_id::text, j.strategy, j.image_count, j.completed, j.failed,
          autotag.measure_progress(j) as progress, j.created_at, j.eta, j.eta_p90, j.fallback
        from autotag.jobs j where j.finished_at is null order by j.created_at limit p_max) x),
    'batches', (
      select coalesce(jsonb_agg(to_jsonb(x) order by x.created_at, x.ordinal), '[]') from (
        select live.id as batch, live.job_id, live.ordinal, live.openai_batch_id, live.state, live.openai_status,
          live.image_count - live.express_count as images, live.request_done as done, live.created_at, live.submitted_at,
          e.p50 as eta, e.p90 as eta_p90, live.failures, live.error
        from (select * from autotag.batches b where b.state not in ('done', 'cancelled')
              order by b.created_at, b.ordinal limit p_max) live
        cross join lateral autotag.batch_eta(live::autotag.batches, v_now) e) x),
    'limits', jsonb_build_object(
      'requests_per_minute', v_provider.requests_per_minute,
      'requests_left', floor(greatest(v_provider.requests_left, 0)),
      'tokens_per_minute', v_provider.tokens_per_minute,
      'tokens_left', floor(greatest(v_provider.tokens_left, 0)),
      'requests_per_day', v_provider.requests_per_day,
      'requests_left_today', case when v_provider.requests_per_day is not null then floor(greatest(v_provider.day_left, 0)) end,
      'queued_batch_tokens', v_provider.queued_batch_tokens,
      'queued_batch_tokens_used', (
        select coalesce(sum(b.reserved_tokens), 0) from autotag.batches b where b.reserved_tokens > 0),
      'blocked_until', case when v_provider.blocked_until > v_now then v_provider.blocked_until end,
      'account_error', v_provider.account_error, 'account_error_from', v_provider.account_error_from,
      'account_error_at', v_provider.account_error_at),
    'model', autotag.describe_model(v_provider),
    'workers', (
      select coalesce(jsonb_agg(jsonb_build_object('worker', wk.id, 'host', wk.host, 'version', wk.version,
        'listening', wk.listening, 'started_at', wk.started_at, 'last_heartbeat_at', wk.last_heartbeat_at, 'alive', wk.lease_until > v_now,
        'held', cardinality(autotag.leased_tasks(wk.id))) order by wk.started_at), '[]')
      from autotag.workers wk),
    'errors', autotag.recent_errors(p_max, v_now),
    'waiting', autotag.list_waiting(p_max, v_now),
    'today', (
      select jsonb_build_object('images', coalesce(sum(us.images), 0), 'requests', coalesce(sum(us.requests), 0),
        'input_tokens', coalesce(sum(us.input_tokens), 0), 'output_tokens', coalesce(sum(us.output_tokens), 0),
        'cost', coalesce(sum(us.cost), 0),
        -- requests to models without a price, whose cost is not included
        'unpriced_requests', coalesce(sum(us.requests) filter (where us.cost is null), 0),
        'unpriced_models', coalesce(jsonb_agg(distinct us.model) filter (where us.cost is null), '[]'))
      from autotag.usage us where us.day = (v_now at time zone 'utc')::date));
end $$;

-- Metrics for a monitoring system.

-- Metrics for a monitoring system: counts, ages in seconds, and what is left of the provider's bucket. Each query is short, and
-- none gets slower with the number of images already tagged.
create or replace function autotag.metrics() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_provider autotag.provider_limits := autotag.refilled_provider(v_now);
begin
  return (
    select jsonb_build_object(
      'queued', c.images, 'queued_workspaces', c.workspaces,
      'oldest_queued', (
        select extract(epoch from v_now - min(j.created_at)) from autotag.queues q join autotag.jobs j on j.id = q.job_id
        where q.queued > 0 and j.finished_at is null),
      'delayed', k.delayed, 'live', l.images,
      'work', c.images + k.held + k.due + g.images,
      'batches', g.states, 'oldest_batch', extract(epoch from v_now - g.oldest))
    || jsonb_build_object(
      'requests_left', floor(v_provider.requests_left), 'requests_per_minute', v_provider.requests_per_minute,
      'tokens_left', floor(v_provider.tokens_left), 'tokens_per_minute', v_provider.tokens_per_minute,
      'blocked_seconds', extract(epoch from greatest(v_provider.blocked_until, v_now) - v_now),
      'account_error', (v_provider.account_error is not null)::integer,
      'workers', (select count(*) from autotag.workers wk where wk.lease_until > v_now),
      'outbox', o.messages, 'oldest_message', extract(epoch from v_now - o.oldest),
      'unstored', n.images, 'oldest_unstored', extract(epoch from v_now - n.oldest),
      'images_today', u.images, 'cost_today', u.cost, 'unpriced_today', u.unpriced,
      'shutdown_days', (select m.shutdown_date from autotag.settings s, autotag.find_model(s.model) m) - (v_now at time zone 'utc')::date)
    from autotag.count_waiting() c
    cross join (select count(*) filter (where t.retry_at is not null) as delayed,
                  count(*) filter (where t.retry_at <= v_now) as due,
                  count(*) filter (where t.worker_id is not null) as held
                from autotag.tasks t where t.finished_at is null) k
    cross join (select coalesce(sum(j.image_count - j.completed - j.failed), 0) as images
                from autotag.jobs j where j.finished_at is null) l
    cross join (select coalesce(jsonb_object_agg(x.state, x.batches), '{}') as states, min(x.oldest) as oldest,
                  coalesce(sum(x.images) filter (where x.state not in ('submitted')), 0) as images
                from (select b.state, count(*) as batches, min(b.created_at) as oldest,
                        sum(b.image_count - b.express_count) filter (where b.not_before <= v_now) as images
                      from autotag.batches b where b.state not in ('done', 'cancelled') group by b.state) x) g
    cross join (select count(*) as messages, min(ob.created_at) as oldest from autotag.outbox ob) o
    cross join (select count(*) as images, min(un.kept_at) as oldest from autotag.unstored un) n
    cross join (select coalesce(sum(us.images), 0) as images, coalesce(sum(us.cost), 0) as cost,
                  coalesce(sum(us.requests) filter (where us.cost is null), 0) as unpriced
                from autotag.usage us where us.day = (v_now at time zone 'utc')::date) u);
end $$;

-- The findings of `autotag doctor` that the database can make by itself, each with its fix.

-- One finding. level: ok, warning (works, but not as well as it should) or error (does not work).
create or replace function autotag.finding(p_check text, p_level text, p_message text, p_fix text default null) returns jsonb
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object('check', p_check, 'level', p_level, 'message', p_message,
    'fix', case when p_level <> 'ok' then p_fix end)
$$;

-- Checks the installation: {findings: [{check, level, message, fix}] in the order to show them, now (epoch seconds), model,
-- sample, storage_hosts (of the adapter)}. sample: bucket and path of one image, which the doctor tries to read. It is the only image
-- whose location a worker's login learns without a claim.
create or replace function autotag.diagnose() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_logins name[] := autotag.worker_logins();
  v_host record;
begin
  select * into v_provider from autotag.provider_limits;
  v_host := autotag.diagnose_host();
  return jsonb_build_object(
    'findings', jsonb_build_array(autotag.diagnose_roles(v_logins), autotag.diagnose_grants()) || v_host.findings
      || jsonb_build_array(autotag.diagnose_cron(), autotag.diagnose_clock(), autotag.diagnose_broadcasts(), autotag.diagnose_workers(), autotag.diagnose_waiting(),
        autotag.diagnose_account(v_provider), autotag.diagnose_day(v_provider), autotag.diagnose_spending(), autotag.diagnose_temporary(v_logins))
      || autotag.diagnose_model(v_provider),
    'now', extract(epoch from autotag.now()), 'model', (select s.model from autotag.settings s), 'sample', v_host.sample,
    'storage_hosts', to_jsonb(autotag.storage_hosts()));
end $$;

-- The doctor's checks of logins and rights.

-- Whether a login may do everything: it is a superuser, or a member of the role that owns autotag's schema or the database.
create or replace function autotag.is_owner(p_login name) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select exists (
    select from pg_roles m
    where m.rolname = p_login and (m.rolsuper
      or pg_has_role(m.oid, (select n.nspowner from pg_namespace n where n.nspname = 'autotag'), 'member')
      or pg_has_role(m.oid, (select d.datdba from pg_database d where d.datname = current_database()), 'member')))
$$;

-- The logins of workers: those in autotag_worker that are not owners (is_owner). On a hosted project, cli_login_postgres is an
-- owner, too.
create or replace function autotag.worker_logins() returns name[]
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select array(
    select m.rolname from pg_roles m
    where m.rolcanlogin and pg_has_role(m.oid, 'autotag_worker', 'member') and not autotag.is_owner(m.rolname)
    order by m.rolname)
$$;

-- Whether workers have logins of their own (p_logins: worker_logins).
create or replace function autotag.diagnose_roles(p_logins name[]) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_owners text;               -- logins of live workers that may do everything
begin
  select autotag.name_some(array_agg(distinct wk.login::text)) into v_owners
  from autotag.workers wk where wk.lease_until > v_now and autotag.is_owner(wk.login);
  return case
    when p_logins = '{}' then autotag.finding('roles', 'warning',
      'No separate login has the role autotag_worker, so workers have to log in as the owner, which may do everything.',
      E'create role tagger login in role autotag_worker;   -- then its password with psql''s \\password tagger')
    when v_owners is not null then autotag.finding('roles', 'warning',
      format('A worker is logged in as %s, which may do everything.', v_owners),
      format('Use a login for workers (%s) in its DATABASE_URL and restart it.', autotag.name_some(p_logins::text[])))
    else autotag.finding('roles', 'ok', format('Workers may log in as %s.', autotag.name_some(p_logins::text[]))) end;
end $$;

-- Whether signed-in users may call the RPCs, anon may call none of autotag's functions, and the API does not expose their schema.
create or replace function autotag.diagnose_grants() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_problem text;
begin
  select autotag.name_some(array_agg(p.oid::regprocedure::text)) into v_problem
  from pg_catalog.pg_proc p
  where p.pronamespace in ('autotag'::regnamespace) and has_function_privilege('anon', p.oid, 'execute');
  return case
    when v_problem is not null then autotag.finding('grants', 'error', 'anon may call ' || v_problem || '.',
      'revoke execute on all functions in schema autotag from public, anon;')
    when exists (select from pg_catalog.pg_db_role_setting s cross join unnest(s.setconfig) c
        where c ~ '^pgrst[.]db_schemas=(.*[, ])?"?autotag"?([, ]|$)')
      then autotag.finding('grants', 'error', 'The API exposes the schema autotag; only its functions in public are for users.',
        'Remove autotag from the exposed schemas (Project Settings, Data API), or: alter role authenticator set pgrst.db_schemas = ''public'';')
    when not has_function_privilege('authenticated', 'public.enqueue_tagging'::regproc, 'execute')
      then autotag.finding('grants', 'error', 'Signed-in users may not call enqueue_tagging.',
        'grant execute on function public.enqueue_tagging to authenticated;')
    else autotag.finding('grants', 'ok', 'Signed-in users may call the RPCs, anon may call nothing.') end;
end $$;

-- Whether workers' logins may create temporary objects.
create or replace function autotag.diagnose_temporary(p_logins name[]) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when exists (
      select from unnest(p_logins) login where has_database_privilege(login, current_database(), 'temporary'))
      then autotag.finding('temporary objects', 'warning',
        'Workers'' logins may create temporary objects, which autotag does not need.',
        format('revoke temporary on database %I from public;   -- then grant it to the roles that need it', current_database()))
    else autotag.finding('temporary objects', 'ok', 'Workers'' logins may not create temporary objects.') end;
end $$;

-- The doctor's checks of the host's tables.

-- {bucket, path} of an image in Storage, of the workspace with the newest upload, so that the doctor can try to read it; null:
-- there is none.
create or replace function autotag.sample_image() returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object('bucket', d.bucket, 'path', d.path)
  from (select j.workspace_id from autotag.jobs j order by j.created_at desc limit 1) newest
  cross join autotag.describe_assets(autotag.list_assets(newest.workspace_id, false, null, 20)) d
  where d.bucket is not null and d.path is not null limit 1
$$;

-- Whether rows name files of their own workspace only, and whether signed-in users could write other rows.
create or replace function autotag.diagnose_files() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_rule text := autotag.file_rule();
  v_files record := autotag.check_files(10000);
  v_open text := case when v_files.may_write is not null
    then format(' Signed-in users can write rows that name any file (%s).', v_files.may_write) else '' end;
begin
  if v_rule = 'any' then
    return autotag.finding('files', 'warning',
      'A row may name any file of the project (rule any), and its workspace gets that image''s tags.' || v_open,
      'Set a rule: autotag init --file-rule workspace-folder   (docs/install.md, "Whose a file is")');
  elsif v_files.foreign_files > 0 then
    return autotag.finding('files', 'warning',
      format('%s of %s checked rows name a file of another workspace (rule %s) and are not tagged, for example %s.',
        v_files.foreign_files, v_files.checked, v_rule, array_to_string(v_files.examples, ', ')) || v_open,
      'Correct these rows, or the rule in autotag.describe_assets.');
  end if;
  return autotag.finding('files', case when v_open <> '' and v_rule in ('uploader-folder', 'owner') then 'warning' else 'ok' end,
    format('Rows name files of %s (rule %s; %s rows checked).',
        case when v_rule in ('uploader-folder', 'owner') then 'members of their workspace' else 'their own workspace' end,
        v_rule, v_files.checked)
      || case when not autotag.users_see_files() and v_rule <> 'none'
        then ' Row level security of storage.objects is not checked (autotag.users_see_files).' else '' end
      || v_open || case
        when v_open = '' then ''
        when v_rule in ('uploader-folder', 'owner') then ' They get the tags of any file of a colleague, in any workspace.'
        else ' autotag does not tag them.' end,
    case when v_open <> '' and v_rule in ('uploader-folder', 'owner')
      then 'Add a policy that lets users insert only rows that name them as the uploader (… = (select auth.uid())).' end);
end $$;

-- Whether a rule on the host's table prevents updates, so that tags are paid for and cannot be stored. Postgres rewrites
-- `update … returning` only by an unconditional rule with its own `returning`, and not at all within `with`.
create or replace function autotag.diagnose_rules() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_rules text[] := array(
    select r.rulename::text from pg_rewrite r
    where r.ev_class = autotag.image_table() and r.ev_type = '2' and r.ev_enabled <> 'D' order by 1);
begin
  return case when v_rules = '{}' then autotag.finding('rules', 'ok', 'No rule changes the updates of the table of images.')
    else autotag.finding('rules', 'error',
      format('%s has a rule on update (%s), so no tags can be stored there: every image is paid for and fails.',
        autotag.image_table(), autotag.name_some(v_rules)),
      format('Use a trigger instead, and: drop rule %I on %s;', v_rules[1], autotag.image_table())) end;
end $$;

-- Which images of their workspace members may tag: those whose rows they see, if signed-in users read the table themselves.
create or replace function autotag.diagnose_rows() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text := autotag.image_table()::text;
  v_reads text := autotag.may_read_images('authenticated');
  v_secure boolean := (select c.relrowsecurity from pg_class c where c.oid = autotag.image_table());
begin
  if v_reads = 'columns' and v_secure then
    return autotag.finding('rows', 'warning',
      format('Signed-in users may read columns of %s, but not its ids, so which rows they see cannot be found out, and they may tag no image.', v_table),
      format('grant select (%I) on %s to authenticated;', autotag.adapter_answers() #>> '{choices,id}', v_table));
  end if;
  return autotag.finding('rows', 'ok', case
    when v_reads is null
      then format('Signed-in users have no privilege to read %s, so members may tag every image of their workspace.', v_table)
    when not v_secure
      then format('Row level security of %s is off, so members may tag every image of their workspace.', v_table)
    else format('Members may tag the images whose rows they see under row level security of %s.', v_table) end);
end $$;

-- The triggers of the host that run when autotag writes a row.
create or replace function autotag.update_triggers() returns text[]
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select array(
    select tg.tgname::text from pg_trigger tg
    where tg.tgrelid = autotag.image_table() and not tg.tgisinternal and tg.tgenabled in ('O', 'A') and tg.tgtype & 16 <> 0 order by 1)
$$;

-- Writes tags to the row of one image as a worker's report does, and rolls that back, including what triggers did in this database. The
-- image is the last one whose row refused its tags, or any. p_tag: the first of ten tags. error: null if there was none. tried: false if
-- there is no image. kept: how many of the tags were in the row, or had been removed by people; null: the row's tags do not change.
create or replace function autotag.try_write(p_tag text, out tried boolean, out state text, out error text, out kept integer)
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '1s'
as $$
declare
  v_image record;
  v_tags text[] := p_tag || '{field,sky,grass,fence,tree,cloud,summer,wood,countryside}'::text[];
begin
  select d.asset_id, d.workspace_id into v_image
  from unnest(array[
    (select t.asset_id from autotag.tasks t where t.error_code = 'not_stored' order by t.id desc limit 1),
    (autotag.tags_in_use(null, null, 1) ->> 'last')::autotag.asset_id]) with ordinality u (id, place)
  cross join lateral autotag.describe_assets(array[u.id]) d
  where u.id is not null and d.workspace_id is not null order by u.place limit 1;
  tried := found;
  if tried then
    perform autotag.show_stage(array[v_image.asset_id], v_image.workspace_id, 'processing', 50);
    if autotag.store_tags(array[v_image.asset_id], v_image.workspace_id, array[jsonb_build_object(
      'tags', v_tags, 'confidence', jsonb_build_object(p_tag, 0.98, 'field', 0.9), 'caption', 'A red barn in a field.', 'model', 'autotag doctor')],
      array[null]::uuid[]) is null then
      raise exception 'the row did not change';
    end if;
    set constraints all immediate;
    select case when s.error is null then (
        select count(*) from unnest(autotag.tag_keys(v_tags)) k
        where k = any (autotag.tag_keys(s.tags) || autotag.recall_tags(s.result, 'removed'))) end
    into kept from autotag.stored_tags(array[v_image.asset_id]) s;
    raise exception 'it works' using errcode = 'AT002';
  end if;
exception when others or assert_failure then
  tried := true;
  if sqlstate <> 'AT002' then
    state := sqlstate;
    error := sqlerrm;
  end if;
end $$;

-- Whether a row accepts tags (try_write). p_triggers: try it even if triggers of the host run then. The doctor does that only on request,
-- because some effects of a trigger cannot be rolled back (a call of dblink, a request that it waits for).
create or replace function autotag.diagnose_write(p_triggers boolean) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text := autotag.image_table()::text;
  v_triggers text[] := autotag.update_triggers();
  v_try record;
  v_capital record;            -- the same with a capital, which tags of a vocabulary can have
  v_keep text := case v_triggers when '{}' then 'Let the column take tags of 50 characters.'
    else format('Let its triggers keep the tags: %s.', autotag.name_some(v_triggers)) end;
begin
  if v_triggers <> '{}' and p_triggers is not true then
    return autotag.finding('write', 'skipped', format('Not tried, because triggers of %s would run (%s).',
      v_table, autotag.name_some(v_triggers)), 'autotag doctor --try-write');
  end if;
  v_try := autotag.try_write('barn');
  v_capital := v_try;
  if v_try.tried and v_try.state is null then
    v_capital := autotag.try_write('Barn');
  end if;
  return case
    when not v_try.tried then autotag.finding('write', 'skipped', 'There is no image yet whose row could be written.',
      'Run autotag doctor again once there is one.')
    when autotag.is_lock_error(v_capital.state) then autotag.finding('write', 'warning',
      'The row that was tried is locked by another transaction.', 'Run autotag doctor again.')
    when v_try.state is not null then autotag.finding('write', 'error',
      format('%s refuses what autotag writes, so images are paid for and fail: %s', v_table, autotag.printable(v_try.error, 500)),
      'Let the constraint or trigger accept it. (Workers have no token: auth.uid() is null in triggers then.)')
    when v_try.kept = 0 then autotag.finding('write', 'error',
      format('%s kept none of ten tags, so images are paid for and get none.', v_table),
      v_keep)
    when v_try.kept < 10 then autotag.finding('write', 'warning', format('%s kept %s of ten tags.', v_table, v_try.kept),
      'If that is not meant: ' || v_keep)
    when v_capital.state is not null then autotag.finding('write', 'warning',
      format('%s takes tags, but none with a capital, which tags of a vocabulary can have: %s', v_table, autotag.printable(v_capital.error, 500)),
      'Let the constraint or trigger accept it, or write the vocabulary in lower case.')
    else autotag.finding('write', 'ok', 'A row takes tags (tried with one image, and taken back).') end;
end $$;

-- Whether rows have refused their tags lately. No finding if none has.
create or replace function autotag.diagnose_stored() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_images bigint := (
    select sum((e ->> 'images')::bigint) from jsonb_array_elements(autotag.recent_errors(100, autotag.now())) e
    where e ->> 'code' = 'not_stored');
begin
  return case when v_images is null then '[]' else jsonb_build_array(autotag.finding('stored', 'warning',
    format('The rows of %s images refused their tags within the last day (not_stored); they were paid for.', v_images),
    'autotag doctor --try-write   (says why; then: autotag enqueue --workspace …)')) end;
end $$;

-- Warns about profiles that allow only tags of the vocabulary while the vocabulary is empty, because then no tag is stored. No such
-- profile: no finding.
create or replace function autotag.diagnose_vocabulary() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_empty bigint := (
    select count(*) from (
      select distinct on (pr.workspace_id) pr.workspace_id, pr.vocabulary_mode
      from autotag.profiles pr order by pr.workspace_id, pr.version desc) p
    where p.vocabulary_mode = 'only' and not autotag.has_vocabulary(p.workspace_id));
begin
  return case when v_empty = 0 then '[]' else jsonb_build_array(autotag.finding('vocabulary', 'warning',
    format('%s of the profiles (autotag.profiles) allow only tags of a vocabulary that is empty, so their images get no tags.', v_empty),
    'autotag vocabulary import tags.csv --workspace …   (or: autotag profile set --vocabulary-mode prefer)')) end;
end $$;

-- Whether the adapter's functions fit the host's tables, and whether rows name the right files. sample: as in sample_image().
create or replace function autotag.diagnose_host(out findings jsonb, out sample jsonb)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform from autotag.describe_assets(array[null]::autotag.asset_id[]);
  perform autotag.caller();
  perform autotag.is_member(null);
  perform from autotag.tagged_assets(null, 1);
  sample := autotag.sample_image();
  findings := jsonb_build_array(
    autotag.finding('host adapter', 'ok', 'The adapter''s functions fit the host''s tables.'),
    autotag.diagnose_rules(), autotag.diagnose_rows(), autotag.diagnose_files())
    || autotag.diagnose_stored() || autotag.diagnose_vocabulary();
exception when others then
  findings := jsonb_build_array(autotag.finding('host adapter', 'error',
    'The adapter does not fit the host''s tables: ' || sqlerrm,
    'Correct autotag.is_member, autotag.describe_assets, autotag.store_tags and autotag.show_stage.'));
end $$;

-- The doctor's checks of what runs: pg_cron, the clock, broadcasts, workers.

-- Whether pg_cron runs both jobs, and whether their last runs succeeded. The queries are dynamic, because without the extension
-- its tables do not exist.
create or replace function autotag.diagnose_cron() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_jobs text[];
  v_failed text;
begin
  if to_regclass('cron.job') is null then
    return autotag.finding('pg_cron', 'warning', 'pg_cron is not installed; a running worker does its work instead.',
      'Enable pg_cron in the dashboard (Integrations), then: select autotag.schedule_cron();');
  end if;
  execute format('select array_agg(j.jobname::text order by j.jobname) from %I.job j
    where j.active and j.jobname like ''autotag-%%'' and j.database = current_database()', 'cron') into v_jobs;
  if v_jobs is distinct from array['autotag-housekeeping', 'autotag-tick'] then
    return autotag.finding('pg_cron', 'error',
      format('The jobs autotag-tick and autotag-housekeeping should be scheduled; these are: %s.',
        coalesce(autotag.name_some(v_jobs), 'none')),
      'select autotag.schedule_cron();');
  end if;
  execute format('select concat(x.jobname, '': '', x.return_message) from (
      select distinct on (j.jobid) j.jobname, d.status, d.return_message
      from %1$I.job j join %1$I.job_run_details d on d.jobid = j.jobid
      where j.jobname like ''autotag-%%'' and d.status in (''succeeded'', ''failed'')
      order by j.jobid, d.runid desc) x
    where x.status = ''failed'' limit 1', 'cron') into v_failed;
  if v_failed is not null then
    return autotag.finding('pg_cron', 'error', 'The last run of a job failed: ' || v_failed,
      'select * from cron.job_run_details order by runid desc limit 5;');
  end if;
  return autotag.finding('pg_cron', 'ok', 'Both jobs are scheduled, and no last run failed.');
end $$;

-- Whether tick() runs, and autotag.now() is the real time.
create or replace function autotag.diagnose_clock() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_ticked timestamptz := (select c.ticked_at from autotag.clock c);
begin
  return case
    when (select s.test_clock from autotag.settings s) then autotag.finding('clock', 'error',
      'settings.test_clock is on: any session can change autotag''s time.', 'update autotag.settings set test_clock = false;')
    when v_ticked = '-infinity' then autotag.finding('clock', 'warning',
      'autotag.tick() has never run.', 'autotag worker   (or wait a minute for pg_cron)')
    when v_ticked < v_now - interval '5 min' then autotag.finding('clock', 'error',
      format('autotag.tick() last ran %s ago; neither pg_cron nor a worker is running.',
        date_trunc('second', v_now - v_ticked)), 'autotag worker')
    else autotag.finding('clock', 'ok', 'autotag.tick() runs regularly.') end;
end $$;

-- Sends a broadcast without a meaning, so that the doctor can check whether broadcasts arrive. More than five a second are ignored.
create or replace function autotag.send_test_broadcast(p_nonce uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.clock c set probed_at = autotag.now() where c.probed_at <= autotag.now() - interval '200 ms';
  if found then
    perform autotag.broadcast('autotag-doctor', 'probe', jsonb_build_object('nonce', p_nonce), false);
  end if;
end $$;

-- Whether broadcasts are sent.
create or replace function autotag.diagnose_broadcasts() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_waiting integer;
begin
  select count(*)::integer into v_waiting from autotag.outbox ob where ob.created_at < v_now - interval '1 min';
  return case
    when to_regprocedure('realtime.send(jsonb,text,text,boolean)') is not null then
      autotag.finding('realtime.send', 'ok', 'Broadcasts are sent when their transaction commits.')
    when v_waiting > 0 then autotag.finding('realtime.send', 'error',
      format('This stack has no realtime.send, and %s broadcasts wait for a worker to send them.', v_waiting),
      'autotag worker   (with SUPABASE_URL and SUPABASE_SECRET_KEY set)')
    else autotag.finding('realtime.send', 'warning',
      'This stack has no realtime.send; workers send broadcasts over HTTP.', 'Upgrade Realtime.') end;
end $$;

-- Whether workers are alive and can receive notifications.
create or replace function autotag.diagnose_workers() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_workers integer;
  v_polling integer;
  v_versions text;
begin
  select count(*)::integer, count(*) filter (where not wk.listening)::integer, autotag.name_some(array_agg(distinct wk.version))
  into v_workers, v_polling, v_versions
  from autotag.workers wk where wk.lease_until > v_now;
  return case
    when v_workers = 0 then autotag.finding('workers', 'error', 'No worker is alive, so nothing is tagged.', 'autotag worker')
    when v_polling > 0 then autotag.finding('workers', 'warning',
      format('%s of %s workers poll, because their connection cannot LISTEN.', v_polling, v_workers),
      'Give them a direct or session-mode DATABASE_URL (port 5432).')
    else autotag.finding('workers', 'ok', format('%s alive, version %s.', v_workers, v_versions)) end;
end $$;

-- Whether work waits that only a change of limits can release (list_waiting).
create or replace function autotag.diagnose_waiting() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_stuck jsonb := (
    select jsonb_agg(w) from jsonb_array_elements(autotag.list_waiting(200, autotag.now())) w where w -> 'until' = 'null');
begin
  return case when v_stuck is null then autotag.finding('waiting', 'ok', 'Everything that waits has a time when it goes on.')
    else autotag.finding('waiting', 'warning',
      format('%s images of workspace %s wait without a time. %s', v_stuck #>> '{0,images}', v_stuck #>> '{0,workspace_id}', v_stuck #>> '{0,reason}'),
      'Raise its max_units in public.workspace_rate_limits.') end;
end $$;

-- The doctor's checks of the provider: the account, quotas, the model.

-- Whether an error of the provider's account or of Storage pauses tagging.
create or replace function autotag.diagnose_account(p_provider autotag.provider_limits) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when p_provider.account_error is not null then autotag.finding('account', 'error',
      format('Tagging has been paused since %s: %s', to_char(p_provider.account_error_at, 'YYYY-MM-DD HH24:MI TZ'),
        p_provider.account_error), 'Fix the cause; tagging then resumes by itself.')
    else autotag.finding('account', 'ok', 'No error of the account or of Storage pauses tagging.') end;
end $$;

-- Whether the provider's limit of requests per day holds back single calls.
create or replace function autotag.diagnose_day(p_provider autotag.provider_limits) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_left double precision := (autotag.refill(p_provider, autotag.now())).day_left;
  v_waiting bigint := (select c.images from autotag.count_waiting() c);
begin
  return case
    when p_provider.requests_per_day is null then autotag.finding('daily limit', 'ok', 'No limit of requests per day is known.')
    when v_left < 1 then autotag.finding('daily limit', 'warning',
      format('The provider''s %s requests of a day are used up: single calls go on at %s an hour, and %s for one.',
        p_provider.requests_per_day, round(p_provider.requests_per_day / 24.0),
        case v_waiting when 1 then '1 image waits' else v_waiting || ' images wait' end),
      'Raise the limit in the provider''s account. Meanwhile, uploads that would wait longer than realtime_max_wait go by batch.')
    else autotag.finding('daily limit', 'ok', format('%s of the provider''s %s requests of a day are left.',
      floor(v_left), p_provider.requests_per_day)) end;
end $$;

-- Whether a quota in dollars limits every workspace.
create or replace function autotag.diagnose_spending() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when exists (select from autotag.quotas qu where qu.max_cost is not null and qu.scope = 'workspace' and qu.workspace_id is null)
      then autotag.finding('spending', 'ok', 'Every workspace has a quota in dollars.')
    else autotag.finding('spending', 'warning', 'No quota limits what a workspace may spend.',
      'insert into autotag.quotas (scope, period, max_cost) values (''workspace'', ''month'', 20);   -- dollars, every workspace') end;
end $$;

-- Findings about the model (shutdown date, price, request form) and about what the provider does not support.
create or replace function autotag.diagnose_model(p_provider autotag.provider_limits) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := (select s.model from autotag.settings s);
  m autotag.models := autotag.find_model(v_model);
  v_end jsonb := autotag.describe_shutdown();
  v_missing text := concat_ws(', ',
    case when p_provider.has_batches is false then 'a Batch API (everything is sent as single calls)' end,
    case when p_provider.has_rate_headers is false then 'rate-limit headers (the limits in autotag.provider_limits apply)' end,
    case when p_provider.keep_files is null then 'expiring files' end);
  v_forms text := concat_ws(', ',
    case when m.cap_parameter = 'max_tokens' then 'max_tokens instead of max_completion_tokens'
         when m.cap_parameter = 'none' then 'no cap of the answer' end,
    case when m.answer_format = 'json_object' then 'json_object instead of json_schema'
         when m.answer_format = 'text' then 'no response_format' end,
    case when not m.sends_effort then 'no reasoning_effort' end,
    case when not m.sends_detail then 'no detail' end,
    case when not m.sends_tier then 'no service_tier' end);
begin
  return jsonb_build_array(
    case when v_end is not null then autotag.finding('model', v_end ->> 'level', v_end ->> 'message', v_end ->> 'fix')
      when m.shutdown_date is not null then autotag.finding('model', 'ok', format('%s shuts down on %s.', v_model, m.shutdown_date))
      else autotag.finding('model', 'ok', format('%s%s; no shutdown date is announced.', v_model,
        coalesce(' with reasoning effort ' || m.reasoning_effort, ''))) end,
    case when m.input_price is not null and m.output_price is not null then autotag.finding('price', 'ok',
        format('%s costs $%s and $%s per million tokens, about $%s for 1,000 images one by one.', v_model,
          to_char(m.input_price, 'FM9990.0099'), to_char(m.output_price, 'FM9990.0099'), to_char(1000 * autotag.expected_cost(), 'FM9990.009')))
      else autotag.finding('price',
        case when exists (select from autotag.quotas qu where qu.max_cost is not null) then 'error' else 'warning' end,
        format('The price of %s is not known, so costs are shown as unknown%s.', v_model,
          case when exists (select from autotag.quotas qu where qu.max_cost is not null)
            then ' and no quota in dollars is enforced' else '' end),
        case when m.name is null
          then format('insert into autotag.models (name, input_price, output_price) values (%L, …, …);   -- dollars per million tokens', v_model)
          else format('update autotag.models set input_price = …, output_price = … where name = %L;   -- dollars per million tokens', m.name) end) end,
    case when v_forms <> '' then autotag.finding('request', 'ok', format('%s is asked with %s.', v_model, v_forms))
      else autotag.finding('request', 'ok', format('%s is asked as OpenAI documents it.', v_model)) end,
    case when v_missing <> '' then autotag.finding('provider', 'ok', format('This provider does not support %s.', v_missing))
      else autotag.finding('provider', 'ok', 'No feature is known to be missing.') end);
end $$;

-- Initial rows of every installation. It may run again: existing rows stay, and error kinds get this version's values.

insert into autotag.settings default values on conflict do nothing;

-- Prices: OpenAI's pages, autumn 2026. Cache writes of the 5.6 and 6 families cost 1.25 times the input. Shutdowns: OpenAI's
-- page of deprecations on 2026-11-28. Reasoning is off where it can be, because tagging needs none (OpenAI's own advice for the
-- move from the 4.1 family). OpenAI publishes no image tokens for the newer models; 1.62 per patch is gpt-4.1-mini's figure.
insert into autotag.models (name, input_price, cached_price, cache_write_price, output_price, reasons, reasoning_effort, patch_tokens) values
  ('gpt-6-luna', 0.10, 0.01, 0.125, 0.50, true, 'none', 1.62),
  ('gpt-6.1-terra', 1.00, 0.05, 1.25, 5.00, true, 'none', 1.62),
  ('gpt-5.6-luna', 0.20, 0.02, 0.25, 1.20, true, 'none', 1.62),
  ('gpt-5.6-terra', 2.00, 0.20, 2.50, 12.00, true, 'none', 1.62),
  ('gpt-5.6-sol', 4.00, 0.40, 5.00, 20.00, true, 'none', 1.62),
  ('gpt-5.4-mini', 0.75, 0.075, null, 4.50, true, 'none', 1.62)
on conflict do nothing;

insert into autotag.models (name, input_price, cached_price, output_price, reasons, patch_tokens, base_tokens, tile_tokens, shutdown_date, successor) values
  ('gpt-4.1-mini', 0.40, 0.10, 1.60, false, 1.62, null, null, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4o-mini', 0.15, 0.075, 0.60, false, null, 2833, 5667, '2027-01-14', 'gpt-6-luna'),
  -- their shutdown is announced; prices are left out
  ('gpt-4.1', null, null, null, false, null, 85, 170, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4o', null, null, null, false, null, 85, 170, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4.1-nano', null, null, null, false, 2.46, null, null, '2026-10-23', null),
  ('o4-mini', null, null, null, true, 1.72, null, null, '2026-10-23', null),
  ('gpt-5', null, null, null, true, null, 70, 140, '2026-12-11', null),
  ('gpt-5-mini', null, null, null, true, 1.62, null, null, '2026-12-11', null),
  ('gpt-5-nano', null, null, null, true, 2.46, null, null, '2026-12-11', null)
on conflict do nothing;

insert into autotag.provider_limits default values on conflict do nothing;

-- A new installation starts with the default question as proven; the first worker's fingerprint makes it unproven.
do $$
declare
  v_provider autotag.provider_limits;
begin
  select * into v_provider from autotag.provider_limits p where p.question = '{}' for update;
  if not found then
    return;
  end if;
  perform autotag.sync_question(v_provider);
  update autotag.provider_limits p set proven_at = '-infinity' where p.proven_at is null;
end $$;

insert into autotag.clock default values on conflict do nothing;

insert into autotag.error_kinds values
  ('transient', true, true, false, false, 'a broken connection, an error of the service, or an unknown error: retried later', '{}'),
  ('rate_limit', false, false, false, false, 'the provider asks to wait: retried when it says', '{}'),
  ('account', false, true, true, false, 'key, credit, model, address or an unsupported request: retried until the configuration is fixed',
    '{http_413,context_too_small}'),
  ('image', true, false, false, true, 'only this image, as the provider says or its file shows', '{}')
on conflict (kind) do update set counts = excluded.counts, delays = excluded.delays, pauses = excluded.pauses,
  ends = excluded.ends, meaning = excluded.meaning, suspects = excluded.suspects;

-- The types that the public RPCs take and return, so that `supabase gen types` gives exact types. As tried with the real CLI (3.1), a
-- jsonb result becomes `Json`, OUT parameters become `Record<string, unknown>`, `returns table` an array without any null, and a
-- composite type an object whose fields may all be null. Only the row of a relation in an exposed schema keeps `not null`, also through
-- a view. So each result is the row of a view of autotag.shapes, which never has a row. Nobody may read the views (grants.sql).

-- Your own column tagging_stage stays text with a check: your triggers, policies and clients compare it with text.
create type public.tagging_stage as enum ('queued', 'preparing', 'submitted', 'processing', 'completing', 'completed', 'failed');
create type public.tagging_strategy_name as enum ('realtime', 'realtime-chunked', 'batch', 'batch-parallel');
create type public.tagging_request_type as enum ('realtime', 'batch');
create type public.tagging_job_status as enum ('running', 'cancelling', 'completed', 'cancelled');

-- One column of each type that the results have, and one of each that may be null. (A view's column keeps `not null` only if it is a
-- column of a table.)
create table autotag.shapes (
  id boolean primary key check (false),
  a_uuid uuid not null, maybe_uuid uuid,
  a_text text not null, maybe_text text, texts text[] not null,
  an_integer integer not null, maybe_integer integer, a_bigint bigint not null, a_number double precision not null, maybe_number double precision,
  maybe_numeric numeric,
  a_boolean boolean not null,
  a_date date not null, a_time timestamptz not null, maybe_time timestamptz,
  a_json jsonb not null,
  a_strategy public.tagging_strategy_name not null, maybe_strategy public.tagging_strategy_name,
  a_status public.tagging_job_status not null
);
do $$
begin
  -- the base type of the domain, which generated client types do not follow
  execute (select format('alter table autotag.shapes add column maybe_user %s', format_type(k.atttypid, null))
    from pg_attribute k where k.attrelid = 'autotag.keys'::regclass and k.attname = 'user_id');
end $$;
alter table autotag.shapes enable row level security;

-- The number of images in each stage.
create view public.tagging_stage_counts with (security_invoker = true) as
  select sh.an_integer as queued, sh.an_integer as preparing, sh.an_integer as submitted, sh.an_integer as processing,
    sh.an_integer as completing, sh.an_integer as completed, sh.an_integer as failed
  from autotag.shapes sh;
create view public.tagging_batch_result with (security_invoker = true) as
  select sh.maybe_text as batch_id, sh.a_text as state, sh.an_integer as image_count from autotag.shapes sh;
create view public.tagging_vocabulary_tag with (security_invoker = true) as
  select sh.a_text as tag, sh.texts as aliases, sh.maybe_text as description, sh.maybe_text as parent, sh.a_boolean as general
  from autotag.shapes sh;
alter table autotag.shapes  -- it never has a row
  -- squawk-ignore adding-required-field
  add column a_stage_counts public.tagging_stage_counts not null,
  -- squawk-ignore adding-required-field
  add column batches public.tagging_batch_result[] not null,
  -- squawk-ignore adding-required-field
  add column tags public.tagging_vocabulary_tag[] not null;

-- tagging_job, tagging_jobs
create view public.tagging_job_result with (security_invoker = true) as
  select sh.a_uuid as job_id, sh.a_status as status, sh.a_strategy as strategy, sh.an_integer as image_count, sh.a_stage_counts as stages,
    sh.an_integer as completed, sh.an_integer as failed, sh.an_integer as progress, sh.maybe_time as eta, sh.maybe_time as eta_p90,
    sh.maybe_text as error, sh.maybe_text as fallback, sh.batches, sh.a_time as created_at, sh.maybe_time as finished_at,
    sh.a_boolean as cancelled
  from autotag.shapes sh;
-- enqueue_tagging, retry_tagging
create view public.tagging_upload_result with (security_invoker = true) as
  select sh.maybe_uuid as job_id, sh.maybe_strategy as strategy, sh.an_integer as image_count, sh.an_integer as skipped,
    sh.an_integer as batches, sh.maybe_time as eta
  from autotag.shapes sh;
create view public.tagging_cancel_result with (security_invoker = true) as
  select sh.a_uuid as job_id, sh.an_integer as cancelled from autotag.shapes sh;
create view public.tagging_strategy_result with (security_invoker = true) as
  select sh.a_strategy as type, sh.an_integer as chunks, sh.a_bigint as delay_ms, sh.an_integer as batches,
    sh.maybe_number as estimate_seconds, sh.maybe_text as note
  from autotag.shapes sh;
-- check_rate_limit, peek_rate_limit
create view public.tagging_limit_result with (security_invoker = true) as
  select sh.a_boolean as allowed, sh.maybe_number as retry_after, sh.maybe_text as reason from autotag.shapes sh;
create view public.tagging_usage_result with (security_invoker = true) as
  select sh.maybe_user as user_id, sh.a_date as day, sh.a_text as model, sh.a_text as service_tier, sh.an_integer as images,
    sh.an_integer as requests, sh.a_bigint as input_tokens, sh.a_bigint as cached_tokens, sh.a_bigint as cache_write_tokens,
    sh.a_bigint as output_tokens, sh.a_bigint as reasoning_tokens, sh.maybe_numeric as cost
  from autotag.shapes sh;
-- tagging_profile, set_tagging_profile
create view public.tagging_profile_result with (security_invoker = true) as
  select sh.an_integer as version, sh.a_boolean as own, sh.a_text as instructions, sh.maybe_text as language,
    sh.maybe_integer as tag_count, sh.a_number as min_confidence, sh.a_text as vocabulary_mode, sh.a_boolean as add_parents,
    sh.a_json as fields, sh.maybe_time as created_at
  from autotag.shapes sh;
create view public.tagging_vocabulary_result with (security_invoker = true) as
  select sh.a_text as mode, sh.a_boolean as add_parents, sh.a_boolean as may_edit, sh.tags from autotag.shapes sh;
-- set_tagging_vocabulary, edit_tagging_vocabulary
create view public.tagging_vocabulary_change with (security_invoker = true) as
  select sh.an_integer as tags, sh.an_integer as added, sh.an_integer as changed, sh.an_integer as removed from autotag.shapes sh;
create view public.tagging_webhook_result with (security_invoker = true) as
  select sh.a_text as result from autotag.shapes sh;

-- The public RPCs: thin wrappers with clean parameter names. grants.sql says who may call them. Errors are documented where
-- they are raised; each has a `code` in its detail. Ids have the base types of the domains (autotag.keys). Results are rows of the
-- views in api_types.sql, which generated client types name; jsonb_populate_record() makes them from the jsonb of autotag's functions.
create or replace function public.enqueue_tagging(asset_ids autotag.keys.asset_ids%type) returns public.tagging_upload_result
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_visible asset_ids%type;
begin
  perform autotag.check_image_count(cardinality(asset_ids));   -- before any function reads that many
  v_visible := autotag.visible_assets(asset_ids);
  return jsonb_populate_record(null::public.tagging_upload_result,
    -- Rows are checked before files. If a row is not visible, enqueue() refuses the call, so no file is looked up or counts as seen.
    autotag.enqueue(asset_ids, case when v_visible = asset_ids then autotag.visible_file_marks(asset_ids)
      else array_fill('00000000-0000-0000-0000-000000000000'::uuid, array[cardinality(asset_ids)]) end, v_visible));
end $$;

create or replace function public.cancel_tagging(job_id uuid) returns public.tagging_cancel_result
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_cancel_result, autotag.cancel(job_id)) $$;

create or replace function public.retry_tagging(job_id uuid) returns public.tagging_upload_result
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_asset_ids autotag.asset_id[] := autotag.visible_assets(autotag.failed_assets(job_id));
begin
  perform autotag.check_image_count(greatest(cardinality(v_asset_ids), 1));   -- retry() refuses an upload without failed images
  return jsonb_populate_record(null::public.tagging_upload_result,
    autotag.retry(job_id, v_asset_ids, autotag.visible_file_marks(v_asset_ids)));
end $$;

create or replace function public.tagging_job(job_id uuid) returns public.tagging_job_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_job_result, autotag.describe_job(job_id)) $$;

-- The uploads of a workspace, the newest first. The next page: `before` is created_at of the last one.
create or replace function public.tagging_jobs(
  workspace_id autotag.keys.workspace_id%type, only_live boolean default true, before timestamptz default null, "limit" integer default 20
) returns setof public.tagging_job_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$
  select jsonb_populate_record(null::public.tagging_job_result, j)
  from autotag.list_jobs(workspace_id, only_live, before, "limit") with ordinality l (j, i) order by i
$$;

-- tagging_strategy: previews an upload of p_images images. chunks: releases of single calls (1: all at once; 0: batches);
-- delay_ms: time between two chunks.
create or replace function autotag.describe_strategy(p_images integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_type text;
  v_batches integer := 0;
begin
  perform autotag.check_image_count(p_images);
  select * into v_settings from autotag.settings;
  v_type := autotag.choose_strategy(p_images);
  if v_type in ('batch', 'batch-parallel') then
    v_batches := autotag.plan_batches(p_images, v_settings.batch_batches_per_hour, v_settings.batch_images_per_hour);
  end if;
  return jsonb_build_object(
    'type', v_type,
    'chunks', case v_type when 'realtime' then 1
      when 'realtime-chunked' then ceil(p_images::numeric / v_settings.chunk_size) else 0 end,
    'delay_ms', case v_type when 'realtime-chunked' then (extract(epoch from v_settings.chunk_delay) * 1000)::bigint else 0 end,
    'batches', v_batches,
    'estimate_seconds', autotag.estimate_seconds(p_images, v_batches))
    -- the reason why that many images are not sent in a batch
    || case when v_type = 'realtime-chunked' and p_images > v_settings.chunk_max_images
      then jsonb_build_object('note', 'The AI provider has no Batch API, so these images are sent as single calls.')
      else '{}' end;
end $$;

create or replace function public.tagging_strategy(image_count integer) returns public.tagging_strategy_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_strategy_result, autotag.describe_strategy(image_count)) $$;

create or replace function public.check_rate_limit(
  workspace_id autotag.keys.workspace_id%type, request_type public.tagging_request_type, image_count integer
) returns public.tagging_limit_result
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer public.tagging_limit_result;
begin
  v_answer := autotag.take_allowance(workspace_id, request_type::text, image_count, true);
  return v_answer;
end $$;

-- The same without counting against the limit, for UIs.
create or replace function public.peek_rate_limit(
  workspace_id autotag.keys.workspace_id%type, request_type public.tagging_request_type, image_count integer
) returns public.tagging_limit_result
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer public.tagging_limit_result;
begin
  v_answer := autotag.take_allowance(workspace_id, request_type::text, image_count, false);
  return v_answer;
end $$;

create or replace function public.tagging_usage(workspace_id autotag.keys.workspace_id%type, since date default '-infinity', until date default 'infinity')
returns setof public.tagging_usage_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select * from autotag.list_usage(workspace_id, since, until) $$;

-- The vocabulary in force for a workspace.
create or replace function public.tagging_vocabulary(workspace_id autotag.keys.workspace_id%type) returns public.tagging_vocabulary_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_vocabulary_result, autotag.describe_vocabulary(workspace_id)) $$;

-- Replaces a workspace's own vocabulary.
create or replace function public.set_tagging_vocabulary(workspace_id autotag.keys.workspace_id%type, entries jsonb) returns public.tagging_vocabulary_change
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_vocabulary_change, autotag.edit_vocabulary(workspace_id, entries, '{}', true)) $$;

-- Changes some of its entries, so that two people who edit it do not overwrite each other's.
create or replace function public.edit_tagging_vocabulary(
  workspace_id autotag.keys.workspace_id%type, entries jsonb default '[]', removed text[] default '{}'
) returns public.tagging_vocabulary_change
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_vocabulary_change, autotag.edit_vocabulary(workspace_id, entries, removed, false)) $$;

-- The profile in force for a workspace: {version, own, instructions, language, tag_count, min_confidence, vocabulary_mode, add_parents,
-- fields, created_at}. For its members.
create or replace function public.tagging_profile(workspace_id autotag.keys.workspace_id%type) returns public.tagging_profile_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_profile_result, autotag.read_profile(workspace_id)) $$;

-- Changes it, by the same names; what is not named stays. For editors (autotag.is_editor) and services.
create or replace function public.set_tagging_profile(workspace_id autotag.keys.workspace_id%type, profile jsonb) returns public.tagging_profile_result
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_profile_result, autotag.edit_profile(workspace_id, profile)) $$;

-- For the Edge Function that receives OpenAI's webhook where no worker has a public address: passes on a delivery that it has
-- verified. Not for users.
create or replace function public.openai_webhook(webhook_id text, event_type text, batch_id text) returns public.tagging_webhook_result
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_webhook_result, jsonb_build_object('result', autotag.receive_webhook(webhook_id, event_type, batch_id))) $$;

-- Runs once a minute: releases what dead workers held, and wakes live workers for work that has become due.
create or replace function autotag.tick() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
begin
  perform autotag.expire_worker();
  perform autotag.split_oversized();
  perform autotag.end_empty_jobs();
  perform autotag.look_at_windows(v_now);
  perform autotag.broadcast_held(null);
  if exists (select from autotag.workspaces ws where ws.queued > 0 and (ws.ready or ws.ready_at <= v_now))
     or exists (select from autotag.tasks t where t.retry_at <= v_now) then
    perform pg_notify('autotag', 'realtime');
  end if;
  if exists (select from autotag.batches b where b.worker_id is null and b.not_before <= v_now
       and b.state in ('planned', 'preparing', 'uploading', 'creating', 'ended', 'harvesting'))
     or exists (select from autotag.batches b, autotag.provider_limits p
       where b.state = 'submitted' and greatest(p.next_poll_at, p.ask_after) <= v_now) then
    perform pg_notify('autotag', 'batch');
  end if;
  -- If two workers store the last answers of a batch at the same time, neither sees that the batch is complete.
  perform autotag.announce_stored(array(select b.id from autotag.batches b where b.state = 'done' and not b.stored));
  if exists (select from autotag.unstored un where un.next_at <= v_now) then
    perform pg_notify('autotag', 'store');
  end if;
  -- Last, because these lock the provider row.
  perform autotag.follow_clock();
  perform autotag.repair_queues();
  perform autotag.retry_features(v_now - (select s.model_check_interval from autotag.settings s));
  update autotag.clock set ticked_at = v_now where id;
end $$;

-- Lets batches start that wait for their workspace's window, if it has room earlier than expected (the limit was raised, or an upload
-- was cancelled): of each size as many as would fit. Called by tick(). Locks: batches (skip locked).
create or replace function autotag.look_at_windows(p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.batches b set not_before = p_now
  where b.id in (
    select fitting.id
    from (
      select waiting.workspace_id, waiting.image_count - waiting.express_count as images,
        array_agg(waiting.id order by waiting.created_at, waiting.ordinal) as ids
      from autotag.batches waiting
      where waiting.state = 'planned' and waiting.admitted_at is null and waiting.worker_id is null
        and waiting.waits_for_window and waiting.not_before > p_now
      group by 1, 2) g
    cross join lateral autotag.admit(g.workspace_id, 'batch', cardinality(g.ids), g.images, true, p_take => false) a
    join autotag.batches fitting on fitting.id = any (g.ids[1 : a.admitted])
    for no key update of fitting skip locked);
end $$;

-- After the server's clock was set back: moves every time of the old clock back, too. Otherwise, nothing would happen until the new clock
-- has reached these times. Rows that another transaction holds get a new time from it. Called by
-- tick(). Locks: provider, then batches, tasks, jobs, unstored, uploads, windows, workers (all skip locked), workspaces, queues, clock.
create or replace function autotag.follow_clock() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz;
  v_back interval;
begin
  if autotag.clock_setback(autotag.now()) is null then
    return;
  end if;
  perform from autotag.provider_limits for update;   -- only its holder writes refilled_at, so the clock is compared once more
  v_now := autotag.now();
  v_back := autotag.clock_setback(v_now);
  if v_back is null then
    return;
  end if;
  raise warning 'autotag: the clock was set back by %. Everything that waits is due earlier by this time.', v_back;
  perform autotag.move_work(v_back, v_now);
  update autotag.provider_limits p
  set refilled_at = autotag.earlier(p.refilled_at, v_back, v_now), blocked_until = autotag.earlier(p.blocked_until, v_back, v_now),
    limited_since = autotag.earlier(p.limited_since, v_back, v_now), limited_at = autotag.earlier(p.limited_at, v_back, v_now),
    day_seen_at = autotag.earlier(p.day_seen_at, v_back, v_now), question_since = autotag.earlier(p.question_since, v_back, v_now),
    fingerprint_since = autotag.earlier(p.fingerprint_since, v_back, v_now), proven_at = autotag.earlier(p.proven_at, v_back, v_now),
    account_error_at = autotag.earlier(p.account_error_at, v_back, v_now), degraded_at = autotag.earlier(p.degraded_at, v_back, v_now),
    checked_at = autotag.earlier(p.checked_at, v_back, v_now), probe_at = autotag.earlier(p.probe_at, v_back, v_now),
    next_poll_at = autotag.earlier(p.next_poll_at, v_back, v_now), ask_after = autotag.earlier(p.ask_after, v_back, v_now),
    waiting_at = autotag.earlier(p.waiting_at, v_back, v_now)
  where p.id;
  update autotag.workspaces ws set ready_at = ws.ready_at - v_back where ws.ready_at > v_now;
  update autotag.queues q set ready_at = autotag.earlier(q.ready_at, v_back, v_now), overdue_at = autotag.earlier(q.overdue_at, v_back, v_now)
  where greatest(q.ready_at, q.overdue_at) > v_now;
  -- Heartbeats may have written the lease in the new clock already. A lease that ended in the past would end the worker at once.
  update autotag.workers wk
  set lease_until = least(wk.lease_until, v_now + (select s.lease from autotag.settings s)), last_heartbeat_at = least(wk.last_heartbeat_at, v_now),
    resumed_at = autotag.earlier(wk.resumed_at, v_back, v_now), poll_assigned_at = autotag.earlier(wk.poll_assigned_at, v_back, v_now)
  where wk.id in (select worker.id from autotag.workers worker for no key update skip locked);
  update autotag.clock c
  set housekeeping_at = autotag.earlier(c.housekeeping_at, v_back, v_now), probed_at = autotag.earlier(c.probed_at, v_back, v_now) where c.id;
  perform pg_notify('autotag', channel.name) from unnest(array['realtime', 'batch', 'store']) channel (name);
end $$;

-- By how much the clock was set back since the last tick or refill; null: by at most a minute.
create or replace function autotag.clock_setback(p_now timestamptz) returns interval
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_last timestamptz := (select greatest(c.ticked_at, p.refilled_at) from autotag.clock c, autotag.provider_limits p);
begin
  return case when isfinite(v_last) and v_last > p_now + interval '1 min' then v_last - p_now end;
end $$;

-- follow_clock() for the work of the workspaces. A window's entries and the reservations in them move together (correct_window).
create or replace function autotag.move_work(p_back interval, p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.batches b
  set not_before = autotag.earlier(b.not_before, p_back, p_now), submitted_at = autotag.earlier(b.submitted_at, p_back, p_now),
    running_at = autotag.earlier(b.running_at, p_back, p_now), progress_at = autotag.earlier(b.progress_at, p_back, p_now),
    ended_at = autotag.earlier(b.ended_at, p_back, p_now), cancel_sent_at = autotag.earlier(b.cancel_sent_at, p_back, p_now),
    last_missing_poll_at = autotag.earlier(b.last_missing_poll_at, p_back, p_now), created_at = autotag.earlier(b.created_at, p_back, p_now),
    admitted_at = autotag.earlier(b.admitted_at, p_back, p_now), asked_at = autotag.earlier(b.asked_at, p_back, p_now),
    finished_at = autotag.earlier(b.finished_at, p_back, p_now)
  where b.id in (
    select batch.id from autotag.batches batch
    where batch.finished_at is null or batch.finished_at > p_now for no key update skip locked);
  update autotag.tasks t
  set retry_at = autotag.earlier(t.retry_at, p_back, p_now), reserved_at = autotag.earlier(t.reserved_at, p_back, p_now)
  where t.id in (
    select task.id from autotag.tasks task
    where task.finished_at is null and greatest(task.retry_at, task.reserved_at) > p_now for no key update skip locked);
  update autotag.jobs j set broadcast_at = autotag.earlier(j.broadcast_at, p_back, p_now), created_at = autotag.earlier(j.created_at, p_back, p_now)
  where j.id in (select job.id from autotag.jobs job where job.finished_at is null for no key update skip locked);
  update autotag.unstored un
  set next_at = autotag.earlier(un.next_at, p_back, p_now), kept_at = autotag.earlier(un.kept_at, p_back, p_now)
  where un.task_id in (select outcome.task_id from autotag.unstored outcome for no key update skip locked);
  update autotag.uploads up set seal_at = up.seal_at - p_back
  where up.id in (select upload.id from autotag.uploads upload where upload.seal_at > p_now for no key update skip locked);
  update autotag.windows wn
  set admitted_at = array(select autotag.earlier(u.at, p_back, p_now) from unnest(wn.admitted_at) with ordinality u (at, place) order by u.place)
  where (wn.workspace_id, wn.request_type) in (
    select ahead.workspace_id, ahead.request_type from autotag.windows ahead
    where ahead.admitted_at[cardinality(ahead.admitted_at)] > p_now for no key update skip locked);
end $$;

-- A time of a clock that was set back by p_back: a future time moves with it, a past one stays.
create or replace function autotag.earlier(p_time timestamptz, p_back interval, p_now timestamptz) returns timestamptz
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_time > p_now then p_time - p_back else p_time end;
end $$;

-- Ends uploads that have no unfinished task, because somebody deleted their tasks by hand. Missing images count as failed. Called by
-- tick(). Locks: jobs (skip locked).
create or replace function autotag.end_empty_jobs() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
  v_job autotag.jobs;
begin
  for v_job in
    select j.* from autotag.jobs j
    -- This is a look-up per live upload. A join may read all live images, and an order by id all uploads that ever finished.
    where j.finished_at is null and (select t.id from autotag.tasks t where t.job_id = j.id and t.finished_at is null limit 1) is null
    limit 100 for no key update skip locked
  loop
    -- a report may have ended the last one between the query and the lock
    select * into v_job from autotag.jobs j where j.id = v_job.id;
    if v_job.finished_at is null and not exists (select from autotag.tasks t where t.job_id = v_job.id and t.finished_at is null) then
      perform autotag.report_job(v_job.id, 0, v_job.image_count - v_job.completed - v_job.failed, null);
    end if;
  end loop;
end $$;

-- Runs daily: deletes what is no longer needed. An upload that a tenant's transaction holds is left to the next day.
-- Locks: finished jobs, windows, uploads and arrivals (all skip locked), usage; provider, then what is learned, briefs, workspaces and workers.
create or replace function autotag.housekeeping() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
begin
  delete from autotag.jobs j
  where j.id in (
    select finished.id from autotag.jobs finished
    where finished.finished_at < v_now - (select s.keep_finished from autotag.settings s) order by finished.id for update skip locked);
  delete from autotag.windows wn
  using (
    select unused.workspace_id, unused.request_type from autotag.windows unused
    where unused.max_requests is null and unused.max_units is null
      and coalesce(unused.admitted_at[cardinality(unused.admitted_at)], '-infinity') < v_now - interval '1 h'
    for update skip locked) old
  where wn.workspace_id = old.workspace_id and wn.request_type = old.request_type;
  delete from autotag.pictures pi using autotag.jobs j
  where j.id = pi.job_id and j.finished_at < v_now - (select s.repeat_window from autotag.settings s);
  delete from autotag.uploads up
  where up.id in (
    select empty.id from autotag.uploads empty
    where not exists (select from autotag.arrivals ar where ar.upload_id = empty.id) for update skip locked);
  update autotag.arrivals ar set upload_id = null
  where ar.id in (
    select orphan.id from autotag.arrivals orphan
    where orphan.upload_id is not null and not exists (select from autotag.uploads up where up.id = orphan.upload_id) for update skip locked);
  delete from autotag.webhooks wh where wh.received_at < v_now - interval '4 days';  -- OpenAI retries for three days
  delete from autotag.durations d where d.started_at < v_now - interval '90 days';
  delete from autotag.outbox ob where ob.created_at < v_now - interval '1 day';
  delete from autotag.usage us
  where us.day < (v_now at time zone 'utc')::date - (select s.keep_usage from autotag.settings s);
  -- These come last, because they need the provider row. A deleted workspace comes back with its next upload.
  perform from autotag.provider_limits for update;
  delete from autotag.learned l where l.learned_at < v_now - interval '90 days';  -- not used for 90 days
  delete from autotag.briefs br   -- no upload that is kept was asked this
  where br.created_at < v_now - interval '90 days' and not exists (select from autotag.learned l where l.brief_id = br.id)
    and br.id not in (select j.brief_id from autotag.jobs j where j.brief_id is not null);
  delete from autotag.workspaces ws
  where ws.queued = 0 and not exists (
    select from autotag.jobs j where j.workspace_id = ws.workspace_id and j.finished_at is null);
  delete from autotag.workers wk where wk.lease_until < v_now - interval '2 days';   -- can_expire() lets them go after one
  update autotag.clock set housekeeping_at = v_now where id;
end $$;

-- Deletes the tasks of deleted jobs.
create or replace function autotag.delete_tasks() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  delete from autotag.unstored un using autotag.tasks t, gone g where t.job_id = g.id and un.task_id = t.id;
  delete from autotag.tasks t using gone g where t.job_id = g.id;
  return null;
end $$;

create or replace trigger autotag_delete_tasks after delete on autotag.jobs referencing old table as gone
  for each statement execute function autotag.delete_tasks();

-- Whether tick() is overdue, or can expire a worker.
create or replace function autotag.is_tick_due(p_now timestamptz) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.clock c where c.ticked_at <= p_now - interval '59 s')
    or autotag.clock_setback(p_now) is not null or coalesce(autotag.can_expire(p_now), false);
end $$;

-- Called after a heartbeat that says so: runs tick() and housekeeping() if they are overdue. One caller at a time; others do not wait.
-- Returns whether another worker's lease has ended, so that the caller should call again.
create or replace function autotag.tick_if_due() returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_clock autotag.clock;
  v_now timestamptz := autotag.now();
begin
  select * into v_clock from autotag.clock;
  if not autotag.is_tick_due(v_now) then
    return false;
  end if;
  if not pg_try_advisory_xact_lock(hashtext('autotag.tick')) then
    return false;
  end if;
  if v_clock.housekeeping_at < v_now - interval '25 h' then
    perform autotag.housekeeping();   -- first, because tick() holds the provider row from its first expired worker on
  end if;
  perform autotag.tick();
  return coalesce(autotag.can_expire(v_now), false);
end $$;

-- Schedules tick() and housekeeping() in pg_cron under fixed names, so that scheduling again changes nothing. False: pg_cron is
-- not installed. The SQL is dynamic, because without the extension pg_cron's objects do not exist.
create or replace function autotag.schedule_cron() returns boolean
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if to_regclass('cron.job') is null then
    return false;
  end if;
  execute format('select %I.schedule($1, $2, $3)', 'cron')
    using 'autotag-tick', '* * * * *', 'select autotag.tick()';
  -- pg_cron keeps a row of every run forever, so the daily job also deletes the old ones of these two jobs.
  execute format('select %I.schedule($1, $2, $3)', 'cron')
    using 'autotag-housekeeping', '17 3 * * *', $run$select autotag.housekeeping();
      delete from cron.job_run_details where end_time < now() - interval '7 days'
        and jobid in (select jobid from cron.job where jobname in ('autotag-tick', 'autotag-housekeeping'))$run$;
  return true;
end $$;

do $$
begin
  if exists (select from pg_catalog.pg_available_extensions where name = 'pg_cron') then
    begin
      create extension if not exists pg_cron with schema pg_catalog;
    exception when others then
      raise notice 'pg_cron is available but cannot be created here (%); the workers'' heartbeats will run tick() instead', sqlerrm;
    end;
  end if;
  perform autotag.schedule_cron();
end $$;

-- The version of the schema; the worker of the same release has the same version.
create or replace function autotag.schema_version() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select '0.1.0'::text $$;

select pg_notify('autotag', 'version');  -- running workers compare versions

-- All privileges and all policies of row level security. This file may run again at any time.
--
-- New functions are executable by everyone (and by anon through the default privileges of Supabase projects), so everything is
-- revoked first.
revoke all on schema autotag from public, anon;
grant usage on schema autotag to authenticated, service_role, autotag_worker, autotag_operator;
revoke all on all functions in schema autotag from public, anon, authenticated, service_role;
revoke all on all tables in schema autotag from public, anon, authenticated, service_role;
revoke all on all sequences in schema autotag from public, anon, authenticated, service_role;
revoke all on public.workspace_rate_limits from anon, authenticated;
grant select on autotag.windows, public.workspace_rate_limits to authenticated;
grant all on autotag.windows, public.workspace_rate_limits to service_role;
-- the shapes of results (api_types.sql), which nobody reads
revoke all on public.tagging_stage_counts, public.tagging_batch_result, public.tagging_vocabulary_tag, public.tagging_job_result,
  public.tagging_upload_result, public.tagging_cancel_result, public.tagging_strategy_result, public.tagging_limit_result,
  public.tagging_usage_result, public.tagging_profile_result, public.tagging_vocabulary_result, public.tagging_vocabulary_change,
  public.tagging_webhook_result from anon, authenticated, service_role;
revoke all on function
  public.enqueue_tagging, public.cancel_tagging, public.retry_tagging, public.tagging_job, public.tagging_jobs,
  public.tagging_strategy, public.check_rate_limit, public.peek_rate_limit, public.tagging_usage,
  public.tagging_vocabulary, public.set_tagging_vocabulary, public.edit_tagging_vocabulary,
  public.tagging_profile, public.set_tagging_profile
  from public, anon;
revoke all on function public.openai_webhook from public, anon, authenticated;

-- users: the RPCs, the functions that they call with the user's rights, and those in row level security policies
grant execute on function
  public.enqueue_tagging, public.cancel_tagging, public.retry_tagging, public.tagging_job, public.tagging_jobs,
  public.tagging_strategy, public.check_rate_limit, public.peek_rate_limit, public.tagging_usage,
  public.tagging_profile, public.set_tagging_profile, autotag.read_profile, autotag.edit_profile,
  autotag.check_image_count, autotag.enqueue, autotag.visible_file_marks, autotag.files_to_check,
  autotag.visible_assets, autotag.has_to_see, autotag.check_caller, autotag.failed_assets,
  autotag.cancel, autotag.retry,
  autotag.describe_job, autotag.list_jobs,
  autotag.describe_strategy, autotag.take_allowance, autotag.list_usage
  to authenticated, service_role;
grant execute on function
  public.tagging_vocabulary, public.set_tagging_vocabulary, public.edit_tagging_vocabulary,
  autotag.describe_vocabulary, autotag.edit_vocabulary
  to authenticated, service_role;
grant execute on function autotag.is_member, autotag.may_listen to authenticated;

-- the project's own server
grant execute on function public.openai_webhook, autotag.receive_webhook to service_role;

-- workers: their reports are validated (results/reports.sql), and they can act only on what they hold
grant execute on function
  autotag.register_worker, autotag.worker_settings, autotag.heartbeat, autotag.tick_if_due,
  autotag.release_worker, autotag.release_lost, autotag.claim, autotag.describe_tasks, autotag.describe_brief, autotag.report_unreadable, autotag.seal_uploads, autotag.report_stages, autotag.settle,
  autotag.list_unstored, autotag.pick_unstored, autotag.store_waiting, autotag.postpone_stores,
  autotag.claim_batches, autotag.batch_images, autotag.batch_step, autotag.batch_split, autotag.note_images, autotag.batch_submitted, autotag.show_batch,
  autotag.report_batch_failure, autotag.report_poll_failure, autotag.files_deleted, autotag.provider_checked, autotag.record_poll, autotag.batch_answers, autotag.batch_finish,
  autotag.take_outbox, autotag.receive_webhook, autotag.diagnose, autotag.diagnose_write, autotag.send_test_broadcast, autotag.status, autotag.metrics
  to autotag_worker;

-- its owner is authenticated; locate() runs as this login
grant execute on function autotag.may_see_file to current_user;

-- operators: monitoring, existing images, comparisons. They see images, tags and usage of every workspace.
grant execute on function
  autotag.diagnose, autotag.diagnose_write, autotag.send_test_broadcast, autotag.status, autotag.metrics,
  autotag.preview_backfill, autotag.backfill, autotag.list_usage,
  autotag.show_profile, autotag.set_profile, autotag.profile_history, autotag.knows_workspace,
  autotag.preview_comparison, autotag.comparison_sample, autotag.admit_comparison, autotag.settle_comparison
  to autotag_operator;

grant execute on function
  autotag.edit_vocabulary, autotag.list_vocabulary, autotag.tags_in_use, autotag.count_uses
  to autotag_operator;

-- everyone who has to compare versions
grant execute on function autotag.schema_version to autotag_worker, autotag_operator, service_role;

-- row level security
drop policy if exists "members see the limits of their workspaces" on autotag.windows;
create policy "members see the limits of their workspaces" on autotag.windows for select to authenticated
  using ((select autotag.is_member(workspace_id)));

do $$
begin
  if to_regclass('realtime.messages') is not null then
    drop policy if exists "autotag: members listen to their workspaces" on realtime.messages;
    create policy "autotag: members listen to their workspaces" on realtime.messages
      for select to authenticated
      using ((select autotag.may_listen((select realtime.topic()))));
  end if;
end $$;
