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
create policy "members see the limits of their workspaces" on public.workspace_rate_limits for select to authenticated
  using ((select autotag.is_member(workspace_id)));

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
  fingerprint text,                      -- of its address and the key: another one has to prove itself (is_outdone, pass_turn) …
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
insert into autotag.provider_limits default values;
alter table autotag.provider_limits enable row level security;

-- How long a window is, and what one workspace may do in it.
create function autotag.window_limits(p_workspace_id uuid, p_request_type text)
returns table (length interval, max_requests integer, max_units integer) rows 1
language sql stable set search_path = pg_catalog, pg_temp
as $$
  select case p_request_type when 'realtime' then interval '1 min' else interval '1 h' end,
         coalesce(w.max_requests, case p_request_type
           when 'realtime' then s.realtime_requests_per_minute else s.batch_batches_per_hour end),
         coalesce(w.max_units, case p_request_type
           when 'realtime' then s.realtime_tokens_per_minute else s.batch_images_per_hour end)
  from autotag.settings s
  left join public.workspace_rate_limits w on w.workspace_id = p_workspace_id and w.request_type = p_request_type
$$;

-- Admits what fits of p_wanted requests of p_units_each units: all or nothing, or (p_partial) as many as
-- fit. Says how many were admitted, and, where not all were, when the next fits: `retry_at` is exact, one
-- moment earlier is refused. Null there means that it never fits. p_units_each null: what one image is
-- expected to cost. Without p_take it only looks.
--
-- It decides by what it reads without a lock, and writes only if that version of the row still stands (no other
-- row can have both its ctid and its xmin): whoever was quicker makes it look again, and a refusal writes and locks
-- nothing at all. Locks the window's row when it admits.
create function autotag.admit(
  p_workspace_id uuid, p_request_type text, p_wanted integer, p_units_each integer, p_partial boolean,
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
  v_need_requests bigint;      -- what must leave the window before the next fits
  v_need_units bigint;
  v_least integer;             -- the least that is worth waiting for
begin
  loop
    select w.ctid, w.xmin, s.test_clock,
      coalesce(w.max_requests, case p_request_type
        when 'realtime' then s.realtime_requests_per_minute else s.batch_batches_per_hour end),
      coalesce(w.max_units, case p_request_type
        when 'realtime' then s.realtime_tokens_per_minute else s.batch_images_per_hour end),
      coalesce(p_units_each, p.tokens_per_image),
      coalesce(w.admitted_at, '{}'), coalesce(w.requests, '{}'), coalesce(w.units, '{}')
    into v_ctid, v_xmin, v_test_clock, v_max_requests, v_max_units, v_each, v_at, v_requests, v_units
    from autotag.settings s
    cross join autotag.provider_limits p
    left join public.workspace_rate_limits w on w.workspace_id = p_workspace_id and w.request_type = p_request_type;

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
      insert into public.workspace_rate_limits (workspace_id, request_type) values (p_workspace_id, p_request_type)
      on conflict do nothing;
      continue;
    end if;
    if v_count > 0 and v_at[v_count] = at then
      update public.workspace_rate_limits w
      set requests = v_requests[v_old + 1 : v_count - 1] || (v_requests[v_count] + admitted),
          units = v_units[v_old + 1 : v_count - 1] || (v_units[v_count] + admitted * v_each),
          admitted_at = v_at[v_old + 1 :]
      where w.ctid = v_ctid and w.xmin = v_xmin;
    else
      update public.workspace_rate_limits w
      set requests = v_requests[v_old + 1 :] || admitted,
          units = v_units[v_old + 1 :] || (admitted * v_each),
          admitted_at = v_at[v_old + 1 :] || at
      where w.ctid = v_ctid and w.xmin = v_xmin;
    end if;
    exit when found;
  end loop;

  if admitted < p_wanted then
    v_least := case when p_partial then 1 else p_wanted end;
    if v_least <= v_max_requests and v_least::bigint * v_each <= v_max_units then
      v_need_requests := v_used_requests + admitted + v_least - v_max_requests;
      v_need_units := v_used_units + (admitted + v_least)::bigint * v_each - v_max_units;
      for i in v_old + 1 .. v_count loop
        exit when v_need_requests <= 0 and v_need_units <= 0;
        v_need_requests := v_need_requests - v_requests[i];
        v_need_units := v_need_units - v_units[i];
        retry_at := v_at[i] + v_length;
      end loop;
      -- Only what is admitted now stands in the way (it will have left after one whole window).
      if v_need_requests > 0 or v_need_units > 0 then
        retry_at := at + v_length;
      end if;
    end if;
  end if;
end $$;

-- Corrects what was reserved by estimate to what was used. p_at is the moment that admit() returned; a
-- reservation that has left its window needs no correction. Real use may be more than the estimate: then the
-- window is over its limit until enough has left it, and admits nothing meanwhile.
create function autotag.correct_window(
  p_workspace_id uuid, p_request_type text, p_at timestamptz, p_requests_delta integer, p_units_delta integer
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update public.workspace_rate_limits w
  set requests[array_position(w.admitted_at, p_at)] =
        greatest(0, w.requests[array_position(w.admitted_at, p_at)] + p_requests_delta),
      units[array_position(w.admitted_at, p_at)] =
        least(greatest(0, w.units[array_position(w.admitted_at, p_at)]::bigint + p_units_delta), 1000000000)
  where w.workspace_id = p_workspace_id and w.request_type = p_request_type
    and array_position(w.admitted_at, p_at) is not null;
end $$;

-- The mirror of the bucket, filled up to a moment. A little of the bucket is kept unused (provider_margin). And what
-- was released but has not been sent yet (its image is still being fetched) is still in the provider's bucket: that
-- one is full, and does not refill, when ours and the unsent together are.
create function autotag.refill(p_provider autotag.provider_limits, p_now timestamptz) returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  -- A bucket that was never used is full; so is one that has not been used for a day.
  v_minutes double precision := case when p_provider.refilled_at > p_now - interval '1 day'
    then greatest(0, extract(epoch from p_now - p_provider.refilled_at) / 60) else 1440 end;
  v_share double precision;    -- of a minute's worth, what may be used at once
  v_unsent integer;
begin
  select 1 - extract(epoch from s.provider_margin) / 60, (select coalesce(sum(w.unsent), 0) from autotag.workers w)
  into v_share, v_unsent from autotag.settings s;
  -- What a minute could never hold would stop everything: a guess may be too high for a small limit.
  p_provider.tokens_per_image := least(p_provider.tokens_per_image, greatest((0.9 * p_provider.tokens_per_minute)::integer, 1));
  p_provider.requests_left := least(p_provider.requests_per_minute * v_share - v_unsent,
    p_provider.requests_left + v_minutes * p_provider.requests_per_minute);
  p_provider.tokens_left := least(p_provider.tokens_per_minute * v_share - v_unsent::bigint * p_provider.tokens_per_image,
    p_provider.tokens_left + v_minutes * p_provider.tokens_per_minute);
  p_provider.day_left := case when p_provider.requests_per_day is null then 'infinity'
    else least(p_provider.requests_per_day,
      p_provider.day_left + v_minutes * p_provider.requests_per_day / 1440) end;
  p_provider.refilled_at := greatest(p_now, p_provider.refilled_at);
  return p_provider;
end $$;

-- The same of what the database holds, to look at.
create function autotag.refilled_provider(p_now timestamptz) returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
begin
  select * into v_provider from autotag.provider_limits;
  return autotag.refill(v_provider, p_now);
end $$;

-- And to decide by: every caller of the provider passes through here first, and the row's lock makes admission serial.
create function autotag.lock_provider() returns autotag.provider_limits
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
begin
  select * into v_provider from autotag.provider_limits for update;
  return autotag.refill(v_provider, autotag.now());
end $$;

-- A worker has sent so many of the calls that were released to it (or will not send them at all), the first of
-- them so many seconds ago. Had the bucket been full until then, it has refilled since. Locks the provider row.
create function autotag.note_sent(p_worker uuid, p_calls integer, p_age double precision) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.lock_provider();
  v_share double precision := (select 1 - extract(epoch from s.provider_margin) / 60 from autotag.settings s);
  v_unsent integer := (select coalesce(sum(w.unsent), 0) from autotag.workers w);
  v_minutes double precision := extract(epoch from autotag.clock_interval(least(greatest(p_age, 0), 3600))) / 60;
begin
  -- It cannot have sent more than it was given, nor before the last refill that could matter.
  update autotag.workers w set unsent = greatest(0, w.unsent - greatest(p_calls, 0))
  where w.id = p_worker and w.login = session_user;
  update autotag.provider_limits p
  set requests_left = v_provider.requests_left + case
        when v_provider.requests_left >= v_provider.requests_per_minute * v_share - v_unsent
        then v_minutes * v_provider.requests_per_minute else 0 end,
      tokens_left = v_provider.tokens_left + case
        when v_provider.tokens_left >= v_provider.tokens_per_minute * v_share
          - v_unsent::bigint * v_provider.tokens_per_image
        then v_minutes * v_provider.tokens_per_minute else 0 end,
      day_left = v_provider.day_left, refilled_at = v_provider.refilled_at;
end $$;

-- What the provider's answers say about its bucket: {requests_limit, requests_left, tokens_limit,
-- tokens_left, age, retry_after (at most an hour)}, each optional. `age` is how long ago the call was sent (seconds): by then
-- the bucket held what the answer says, and it has refilled since. A lower remaining than ours wins at once
-- (another program may use the same key), a changed limit is adopted, and retry-after holds for everybody.
-- Returns what changed, as a sentence for the log, or null. Locks the provider row.
create function autotag.observe_provider(p_seen jsonb) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.lock_provider();
  -- OpenAI's highest tier has 30,000 requests and 180 million tokens a minute (its guide "Rate limits"). A bucket of less than
  -- the least here would never hold a call, and no answer would ever say better.
  v_requests integer := coalesce(autotag.check_number(p_seen, 'requests_limit', 2, 1000000), v_provider.requests_per_minute);
  v_tokens integer := coalesce(autotag.check_number(p_seen, 'tokens_limit', 100, 2000000000), v_provider.tokens_per_minute);
  v_minutes double precision := extract(epoch from
    autotag.clock_interval(coalesce(autotag.check_number(p_seen, 'age', 0, 3600), 0))) / 60;
  v_retry_after double precision := autotag.check_number(p_seen, 'retry_after', 0, 3600);
begin
  update autotag.provider_limits p
  set requests_per_minute = v_requests,
      tokens_per_minute = v_tokens,
      -- the daily cap is tier 1's; a higher limit a minute is a higher tier
      requests_per_day = case when v_requests > p.requests_per_minute then null else p.requests_per_day end,
      requests_left = least(v_provider.requests_left + greatest(v_requests - p.requests_per_minute, 0),
        autotag.check_number(p_seen, 'requests_left', 0, v_requests) + v_minutes * v_requests),
      tokens_left = least(v_provider.tokens_left + greatest(v_tokens - p.tokens_per_minute, 0),
        autotag.check_number(p_seen, 'tokens_left', 0, v_tokens) + v_minutes * v_tokens),
      day_left = v_provider.day_left,
      refilled_at = v_provider.refilled_at,
      blocked_until = greatest(p.blocked_until, v_provider.refilled_at + autotag.clock_interval(v_retry_after)),
      limited_since = case
        when v_retry_after is null then p.limited_since
        when p.limited_since is not null and p.limited_at > v_provider.refilled_at - interval '1 min' then p.limited_since
        else v_provider.refilled_at end,
      limited_at = case when v_retry_after is null then p.limited_at else v_provider.refilled_at end,
      has_rate_headers = case when p_seen ? 'tokens_limit' or p_seen ? 'requests_limit' then true else p.has_rate_headers end;
  return case when (v_requests, v_tokens) <> (v_provider.requests_per_minute, v_provider.tokens_per_minute)
    then format('The provider''s limits are %s requests and %s tokens a minute now (they were %s and %s).',
      v_requests, v_tokens, v_provider.requests_per_minute, v_provider.tokens_per_minute) end;
end $$;

-- Gives back to the bucket what calls did not take from the provider's. It is never more than a minute's worth short by what
-- they took besides: whatever is reported, tagging goes on. Locks the provider row.
create function autotag.refund_provider(p_requests integer, p_tokens bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.provider_limits
  set requests_left = requests_left + p_requests, day_left = day_left + p_requests,
      tokens_left = greatest(tokens_left + p_tokens, least(tokens_left, -tokens_per_minute));
end $$;

-- Stops both lanes until a probe succeeds; every task stays queued. Locks the provider row.
create function autotag.stop_account(p_error text, p_from text default 'provider') returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  update autotag.provider_limits
  set account_error = left(p_error, 1000), account_error_from = p_from,
      account_error_at = coalesce(account_error_at, autotag.now()), proven_at = null,
      probe_at = autotag.now() + (select s.account_probe_interval from autotag.settings s)
$$;

-- What was in trouble works again: everything does (p_from null: a call has succeeded), or the part that stopped the lanes.
create function autotag.resume_account(p_from text default null) returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  update autotag.provider_limits
  set account_error = null, account_error_from = null, account_error_at = null, probe_at = null,
      proven_at = case when p_from is null then coalesce(proven_at, autotag.now()) else proven_at end
  where (account_error is not null or p_from is null and proven_at is null)
    and (p_from is null or account_error_from = p_from)
$$;

-- What one image reserves and what it costs on average, from what was learned about the present question; before there
-- are enough answers, the first guess. A few answers are trusted with a margin (2 / answers): ten may not have shown the
-- largest. The caller holds the provider row.
create function autotag.estimate_tokens(p_provider autotag.provider_limits) returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_learned autotag.learned;
  v_question jsonb := p_provider.question;
  v_prompt integer := autotag.guess_prompt(v_question);
  v_output integer := autotag.guess_output(v_question);
  v_margin double precision;
begin
  select * into v_settings from autotag.settings;
  select * into v_learned from autotag.learned l
  where l.model = v_question ->> 'model' and l.image_detail = v_question ->> 'image_detail'
    and l.reasoning_effort = coalesce(v_question ->> 'reasoning_effort', '')
    and l.max_tags = (v_question ->> 'max_tags')::integer and l.tag_language = v_question ->> 'tag_language';
  p_provider.prompt_mean := v_prompt;
  p_provider.output_mean := v_output / 3;
  if v_learned.answers >= 10 then
    v_margin := 1 + 2.0 / v_learned.answers;
    v_prompt := ceil(autotag.quantile(v_learned.prompt, 0.99) * v_margin);
    p_provider.prompt_mean := autotag.mean_size(v_learned.prompt);
    p_provider.output_mean := autotag.mean_size(v_learned.output);
    -- Half of a percent may be cut off: they cost another call, and a higher cap costs all of them their share of the limit.
    v_output := ceil(autotag.quantile(v_learned.output, 0.995) * 1.05 * v_margin) + 8;
    if v_learned.answers < 30 then
      v_output := greatest(v_output, autotag.guess_output(v_question));
    end if;
  end if;
  -- A cap that the limit a minute could never hold would stop everything.
  v_output := least(greatest(v_output, v_settings.min_output_tokens), v_settings.max_output_tokens,
    greatest((0.9 * p_provider.tokens_per_minute)::integer - v_prompt, v_settings.min_output_tokens));
  -- Whatever was learned, a workspace's minute holds two images, or what the first guess lets it hold: tagging may become
  -- slower by it, and never stands still. (Real use corrects the windows.)
  v_prompt := least(v_prompt, greatest(v_settings.realtime_tokens_per_minute / 2 - v_output, autotag.guess_prompt(v_question)));
  p_provider.output_tokens := v_output;
  p_provider.tokens_per_image := v_prompt + v_output;
  return p_provider;
end $$;

-- Notices that something else is asked than before (settings or models were changed): it has to prove itself, unless only
-- its words have changed, and what it costs is estimated anew. Every claim passes here. The caller holds the provider row.
create function autotag.sync_question(p_provider autotag.provider_limits) returns autotag.provider_limits
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_question jsonb := autotag.describe_question();
  v_words text[] := array['max_tags', 'tag_language'];
begin
  if v_question = p_provider.question then
    return p_provider;
  end if;
  if v_question - v_words <> p_provider.question - v_words then
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
      output_tokens = p_provider.output_tokens, prompt_mean = p_provider.prompt_mean, output_mean = p_provider.output_mean;
  return p_provider;
end $$;

-- Learns from what answers to a question (null: the present one) used: their prompts' and answers' tokens, in parallel. No
-- prompt is believed to be more than twenty times the first guess. The caller holds the provider row.
create function autotag.learn(p_inputs integer[], p_outputs integer[], p_question jsonb default null) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_question jsonb;
  v_memory integer := (select s.learning_memory from autotag.settings s);
  v_most integer;
begin
  if cardinality(p_inputs) = 0 then
    return;
  end if;
  select * into v_provider from autotag.provider_limits;
  v_question := coalesce(p_question, v_provider.question);
  v_most := 20 * autotag.guess_prompt(v_question);
  p_inputs := array(select least(i, v_most) from unnest(p_inputs) i);
  insert into autotag.learned as l (model, image_detail, reasoning_effort, max_tags, tag_language, answers, prompt, output, learned_at)
  values (v_question ->> 'model', v_question ->> 'image_detail',
    coalesce(v_question ->> 'reasoning_effort', ''), (v_question ->> 'max_tags')::integer,
    v_question ->> 'tag_language', cardinality(p_inputs),
    autotag.blend('{}', p_inputs, v_memory), autotag.blend('{}', p_outputs, v_memory), autotag.now())
  on conflict (model, image_detail, reasoning_effort, max_tags, tag_language) do update
  set answers = l.answers + cardinality(p_inputs), learned_at = excluded.learned_at,
      prompt = autotag.blend(l.prompt, p_inputs, v_memory), output = autotag.blend(l.output, p_outputs, v_memory);
  v_provider := autotag.estimate_tokens(v_provider);
  update autotag.provider_limits p
  set tokens_per_image = v_provider.tokens_per_image, output_tokens = v_provider.output_tokens,
      prompt_mean = v_provider.prompt_mean, output_mean = v_provider.output_mean
  where (p.tokens_per_image, p.output_tokens, p.prompt_mean, p.output_mean) is distinct from
    (v_provider.tokens_per_image, v_provider.output_tokens, v_provider.prompt_mean, v_provider.output_mean);
end $$;

-- A new installation asks what the settings' defaults say; the first worker that registers makes it prove itself.
do $$
declare
  v_provider autotag.provider_limits;
begin
  select * into v_provider from autotag.provider_limits for update;
  perform autotag.sync_question(v_provider);
  update autotag.provider_limits p set proven_at = '-infinity' where p.proven_at is null;
end $$;
