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
