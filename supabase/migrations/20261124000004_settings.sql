-- Every number that can be changed, in one row of typed columns:
--   update autotag.settings set chunk_delay = '1 s';

create table autotag.settings (
  id boolean primary key default true check (id),

  -- strategy: images in an upload
  realtime_max_images integer not null default 5 check (realtime_max_images >= 0),
  chunk_max_images integer not null default 50 check (chunk_max_images >= realtime_max_images),
  batch_max_images integer not null default 200 check (batch_max_images >= chunk_max_images),
  job_max_images integer not null default 50000 check (job_max_images >= batch_max_images),
  chunk_size integer not null default 5 check (chunk_size > 0),
  chunk_delay interval not null default '2 s' check (chunk_delay >= '0'),
  express_images integer not null default 5 check (express_images >= 0),
  -- images of one workspace that are being tagged at the same time; more are refused until some are done
  live_images_max integer not null default 200000 check (live_images_max > 0),
  batch_split_images integer not null default 100 check (batch_split_images > 0),
  -- an OpenAI batch file holds at most 50,000 requests and 200 MB
  batch_max_requests integer not null default 50000 check (batch_max_requests between 1 and 50000),
  batch_max_bytes bigint not null default 200000000 check (batch_max_bytes between 1 and 200000000),

  -- single calls that would wait longer than this go by the Batch API instead
  realtime_max_wait interval not null default '10 min' check (realtime_max_wait > '0'),
  -- what may pass between the release of a call and its arrival at the provider: so much of the provider's
  -- bucket is never used, because a bucket that was full meanwhile has not refilled
  provider_margin interval not null default '0.25 s' check (provider_margin between '0' and '10 s'),

  -- windows of a workspace that has no limits of its own
  realtime_requests_per_minute integer not null default 30 check (realtime_requests_per_minute > 0),
  realtime_tokens_per_minute integer not null default 100000 check (realtime_tokens_per_minute > 0),
  batch_batches_per_hour integer not null default 10 check (batch_batches_per_hour > 0),
  batch_images_per_hour integer not null default 5000 check (batch_images_per_hour > 0),

  -- automatic mode: an upload is complete when nothing has come for so long, or after so long in any case
  upload_quiet interval not null default '2 s' check (upload_quiet > '0'),
  upload_longest interval not null default '30 s' check (upload_longest >= upload_quiet),

  -- what is asked of the model
  model text not null default 'gpt-4.1-mini',
  image_detail text not null default 'low' check (image_detail in ('low', 'high')),
  max_tags integer not null default 10 check (max_tags between 1 and 50),
  max_output_tokens integer not null default 400 check (max_output_tokens between 50 and 16000),
  tag_language text not null default 'English',

  -- leases, retries, polling
  lease interval not null default '60 s' check (lease >= '1 s'),
  -- failures of the moment before an image is given up: with the delays below some four minutes
  max_failures integer not null default 8 check (max_failures > 0),
  -- answers of no use (and paid for) before it is
  max_bad_answers integer not null default 3 check (max_bad_answers > 0),
  retry_delay interval not null default '2 s' check (retry_delay > '0'),
  retry_delay_max interval not null default '60 s' check (retry_delay_max >= retry_delay),
  account_probe_interval interval not null default '30 s' check (account_probe_interval > '0'),
  batch_poll_interval interval not null default '60 s' check (batch_poll_interval > '0'),
  -- a create that seemed to fail may yet arrive: nobody tries again before
  batch_create_grace interval not null default '10 s' check (batch_create_grace >= '0'),
  -- looks in a row that do not find a batch at OpenAI before it is given up
  batch_looks_in_vain integer not null default 3 check (batch_looks_in_vain > 0),
  -- a batch without progress for so long, or so old (OpenAI's window is 24 h), is cancelled and its images go as
  -- single calls, where the limits allow
  batch_stuck_after interval not null default '6 h' check (batch_stuck_after > '0'),
  batch_give_up_after interval not null default '23 h' check (batch_give_up_after > '0'),
  broadcast_interval interval not null default '1 s' check (broadcast_interval >= '0'),
  keep_finished interval not null default '30 days' check (keep_finished > '0'),
  keep_usage integer not null default 800 check (keep_usage > 0),   -- days

  -- what an estimate starts from: seconds of one call, and of one OpenAI Batch before there is any history
  call_seconds double precision not null default 4 check (call_seconds > 0),
  batch_seconds double precision not null default 2700 check (batch_seconds > 0),
  -- after so many days what a batch took counts half
  eta_half_life_days double precision not null default 1 check (eta_half_life_days > 0),

  -- dollars per million tokens; a batch costs half (OpenAI's price page, gpt-4.1-mini)
  input_price numeric not null default 0.40 check (input_price >= 0),
  cached_price numeric not null default 0.10 check (cached_price >= 0),
  output_price numeric not null default 1.60 check (output_price >= 0),
  batch_discount numeric not null default 0.5 check (batch_discount between 0 and 1),

  -- tests of hour-long windows set autotag.now; nobody can bend time while this is off
  test_clock boolean not null default false
);
insert into autotag.settings default values;
alter table autotag.settings enable row level security;

-- How much faster than the real one autotag's clock runs: 1, but in tests and benches that compress time
-- (`alter database … set autotag.speed = 10`). In plpgsql, as all that is called often: its plans are kept, while
-- a function in SQL that cannot be inlined is planned with every call.
create function autotag.speed() returns double precision
language plpgsql stable security definer set search_path = ''
as $$
begin
  if not (select s.test_clock from autotag.settings s) then
    return 1;
  end if;
  return coalesce(nullif(current_setting('autotag.speed', true), '')::double precision, 1);
end $$;

-- The time, everywhere in autotag. It moves within a transaction, so that a lock waited for counts.
create function autotag.now() returns timestamptz
language plpgsql volatile security definer set search_path = ''
as $$
begin
  if not (select s.test_clock from autotag.settings s) then
    return clock_timestamp();
  end if;
  return coalesce(nullif(current_setting('autotag.now', true), '')::timestamptz,
    timestamptz '2026-01-01' + (clock_timestamp() - timestamptz '2026-01-01') * autotag.speed());
end $$;

-- Seconds that a worker has to wait for what is so far away on autotag's clock, and the other way round.
create function autotag.real_seconds(p_interval interval) returns double precision
language plpgsql stable security definer set search_path = ''
as $$
begin
  return extract(epoch from p_interval) / autotag.speed();
end $$;

-- A moment of autotag's clock as others count it: epoch seconds.
create function autotag.real_epoch(p_moment timestamptz) returns double precision
language plpgsql stable security definer set search_path = ''
as $$
begin
  return extract(epoch from clock_timestamp()) - autotag.real_seconds(autotag.now() - p_moment);
end $$;

create function autotag.clock_interval(p_real_seconds double precision) returns interval
language plpgsql stable security definer set search_path = ''
as $$
begin
  return make_interval(secs => p_real_seconds * autotag.speed());
end $$;
