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
