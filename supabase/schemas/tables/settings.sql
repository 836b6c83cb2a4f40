-- Every number that can be changed, in one row of typed columns:
--   update autotag.settings set chunk_delay = '1 s';
create table autotag.settings (
  id boolean primary key default true check (id),

  -- how an upload goes, by its number of images
  realtime_max_images integer not null default 5 check (realtime_max_images >= 0),  -- so many go as single calls, all at once
  chunk_max_images integer not null default 50 check (chunk_max_images >= realtime_max_images),  -- so many as single calls in chunks
  batch_max_images integer not null default 200 check (batch_max_images >= chunk_max_images),  -- so many as one batch, more as several
  job_max_images integer not null default 50000 check (job_max_images >= batch_max_images),  -- more are refused
  chunk_size integer not null default 5 check (chunk_size > 0),  -- images of a chunk
  chunk_delay interval not null default '2 s' check (chunk_delay >= '0'),  -- from one chunk to the next
  express_images integer not null default 5 check (express_images >= 0),  -- of an upload by batch, so many go ahead as single calls
  batch_split_images integer not null default 100 check (batch_split_images > 0),  -- of each of several batches, while the window has enough of them
  batch_max_requests integer not null default 50000 check (batch_max_requests between 1 and 50000),  -- lines of a batch's file; OpenAI's most
  batch_max_bytes bigint not null default 200000000 check (batch_max_bytes between 1 and 200000000),  -- its bytes; OpenAI's most
  live_images_max integer not null default 200000 check (live_images_max > 0),  -- of one workspace at the same time; more are refused until some are done

  -- limits
  realtime_requests_per_minute integer not null default 30 check (realtime_requests_per_minute > 0),  -- single calls of a workspace
  realtime_tokens_per_minute integer not null default 100000 check (realtime_tokens_per_minute > 0),  -- their tokens
  batch_batches_per_hour integer not null default 10 check (batch_batches_per_hour > 0),  -- batches that a workspace may start
  batch_images_per_hour integer not null default 5000 check (batch_images_per_hour > 0),  -- their images
  realtime_max_wait interval not null default '10 min' check (realtime_max_wait > '0'),  -- single calls that would wait longer go by the Batch API instead
  members_may_take boolean not null default false,  -- whether members may call check_rate_limit, which takes; peek_rate_limit is theirs anyway
  -- What may pass between the release of a call and its arrival at the provider: so much of the provider's bucket is
  -- never used, because a bucket that was full meanwhile has not refilled.
  provider_margin interval not null default '0.25 s' check (provider_margin between '0' and '10 s'),

  -- automatic mode: when what comes in is a complete upload
  upload_quiet interval not null default '2 s' check (upload_quiet > '0'),  -- nothing has come for so long
  upload_longest interval not null default '30 s' check (upload_longest >= upload_quiet),  -- or it began so long ago

  -- what is asked of the model (how it has to be asked, its reasoning effort and its prices are its row in autotag.models)
  model text not null default 'gpt-6-luna' check (length(model) between 1 and 100),  -- any that sees images
  image_detail text not null default 'low' check (image_detail in ('low', 'high')),  -- low: 512 pixels a side; high: 2048
  max_tags integer not null default 10 check (max_tags between 1 and 50),  -- of an image
  tag_language text not null default 'English',  -- as one would tell a person
  service_tier text not null default 'auto' check (service_tier in ('auto', 'default', 'flex', 'priority')),  -- of single calls; auto: not sent; flex: the batch price, slower, sometimes refused
  -- The cap of an answer (max_completion_tokens) follows what answers of this model were seen to need, within these bounds.
  min_output_tokens integer not null default 100 check (min_output_tokens between 16 and 128000),  -- the lowest cap
  max_output_tokens integer not null default 16000 check (max_output_tokens between 50 and 128000 and max_output_tokens >= min_output_tokens),  -- the highest: an answer that is cut off gets another try with four times its cap, up to this one
  learning_memory integer not null default 500 check (learning_memory between 20 and 100000),  -- an answer this many answers ago weighs about a third of a new one in what is reserved

  -- leases, retries, polling
  lease interval not null default '60 s' check (lease >= '1 s'),  -- a worker that is silent for so long has lost what it held
  max_failures integer not null default 8 check (max_failures > 0),  -- transient failures before an image is given up: with the delays below some four minutes
  max_bad_answers integer not null default 3 check (max_bad_answers > 0),  -- answers of no use (and paid for) before it is
  retry_delay interval not null default '2 s' check (retry_delay > '0'),  -- after the first failure; each doubles it …
  retry_delay_max interval not null default '60 s' check (retry_delay_max >= retry_delay),  -- … up to this
  account_probe_interval interval not null default '10 s' check (account_probe_interval > '0'),  -- while nothing works (wrong key, no credit, unknown model), one image is tried this often
  batch_poll_interval interval not null default '60 s' check (batch_poll_interval > '0'),  -- between looks at the batches in flight
  batch_create_grace interval not null default '10 s' check (batch_create_grace >= '0'),  -- a create that seemed to fail may yet arrive: nobody tries again before
  model_check_interval interval not null default '1 day' check (model_check_interval > '0'),  -- between questions to the provider about the model's end and what the provider can do
  batch_patience interval not null default '30 min' check (batch_patience >= '0'),  -- how long smaller batches may overtake one that does not fit into OpenAI's queue
  batch_looks_in_vain integer not null default 3 check (batch_looks_in_vain > 0),  -- looks in a row that do not find a batch at OpenAI before it is given up
  -- A batch without progress for so long is cancelled, and its images go as single calls, where the limits allow.
  batch_stuck_after interval not null default '6 h' check (batch_stuck_after > '0'),
  batch_give_up_after interval not null default '23 h' check (batch_give_up_after > '0'),  -- the same for one that is so old (OpenAI's window is 24 h)
  broadcast_interval interval not null default '1 s' check (broadcast_interval >= '0'),  -- between two job-progress of one upload, at least

  -- what is kept
  keep_finished interval not null default '30 days' check (keep_finished > '0'),  -- finished uploads
  keep_usage integer not null default 800 check (keep_usage >= 31),  -- days of usage; a quota of a month asks for all of it

  -- what an estimate starts from, before there is any history
  call_seconds double precision not null default 4 check (call_seconds > 0),  -- of one call
  batch_seconds double precision not null default 2700 check (batch_seconds > 0),  -- of one OpenAI Batch
  eta_half_life_days double precision not null default 1 check (eta_half_life_days > 0),  -- after so many days what a batch took counts half

  -- for tests
  test_clock boolean not null default false  -- lets sessions set autotag.now and autotag.speed; nobody can bend time while this is off
);
alter table autotag.settings enable row level security;

-- What happens by the clock. pg_cron calls these where it is installed; elsewhere a worker's heartbeat does.
create table autotag.clock (
  id boolean primary key default true check (id),
  ticked_at timestamptz not null default '-infinity',
  housekept_at timestamptz not null default '-infinity'
) with (fillfactor = 50);
alter table autotag.clock enable row level security;
