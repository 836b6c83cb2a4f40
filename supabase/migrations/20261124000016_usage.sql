-- Who used what: one row per workspace, user, day (UTC), model and service tier, as the provider's own usage figures say.

create table autotag.usage (
  id bigint generated always as identity primary key,
  workspace_id uuid not null,
  user_id uuid,
  day date not null,
  model text not null,                   -- that answered, by its own word
  service_tier text not null,            -- that it was billed in: default, flex, priority …, or batch
  images integer not null default 0,     -- images tagged
  requests integer not null default 0,   -- answers the provider billed
  input_tokens bigint not null default 0,         -- prompts, the cached tokens included
  cached_tokens bigint not null default 0,
  cache_write_tokens bigint not null default 0,
  output_tokens bigint not null default 0,        -- answers, the reasoning included
  reasoning_tokens bigint not null default 0,
  cost numeric                           -- dollars, by the prices of autotag.models then; null: the model has none
) with (fillfactor = 50);
create unique index usage_key on autotag.usage (workspace_id, day, user_id, model, service_tier) nulls not distinct;
create index usage_day_idx on autotag.usage (day);
create index usage_user_idx on autotag.usage (user_id, day);
create index usage_unpriced_idx on autotag.usage (model) where cost is null;
alter table autotag.usage enable row level security;

-- Adds what these answers cost, each by its own model and service tier; an answer that names no model had the one that was
-- asked (p_question; null: at present). What the provider gave no figures for has the tier `unknown` and no cost. A row that
-- has no price yet gets one for all of it as soon as there is one. An answer without a job tags no image (a comparison).
create function autotag.add_usage(p_answers autotag.answer[], p_batch boolean, p_question jsonb default null) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  insert into autotag.usage as u (workspace_id, user_id, day, model, service_tier, images, requests,
    input_tokens, cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost)
  select t.*, autotag.price_tokens(t.model, t.tier, t.input, t.cached, t.cache_write, t.output)
  from (
    select b.workspace_id, j.user_id, (autotag.now() at time zone 'utc')::date as day, b.model, b.tier,
      count(*) filter (where b.error is null and b.job_id is not null) as images, count(*) as requests,
      sum(b.input) as input, sum(b.cached) as cached, sum(b.cache_write) as cache_write,
      sum(b.output) as output, sum(b.reasoning) as reasoning
    from (
      select a.job_id, a.workspace_id, a.error,
        coalesce(a.usage ->> 'model', coalesce(p_question, p.question) ->> 'model') as model,
        case when a.usage is null then 'unknown' when p_batch then 'batch' else coalesce(a.usage ->> 'tier', 'default') end as tier,
        coalesce((a.usage -> 'input')::bigint, 0) as input,
        coalesce(least((a.usage -> 'cached')::bigint, (a.usage -> 'input')::bigint), 0) as cached,
        coalesce((a.usage -> 'cache_write')::bigint, 0) as cache_write,
        coalesce((a.usage -> 'output')::bigint, 0) as output,
        coalesce((a.usage -> 'reasoning')::bigint, 0) as reasoning
      from unnest(p_answers) a, autotag.provider_limits p
      where a.usage is not null or a.error is null) b
    left join autotag.jobs j on j.id = b.job_id
    group by b.workspace_id, j.user_id, b.model, b.tier
    order by b.workspace_id, j.user_id, b.model, b.tier) t
  on conflict (workspace_id, day, user_id, model, service_tier) do update set
    images = u.images + excluded.images, requests = u.requests + excluded.requests,
    input_tokens = u.input_tokens + excluded.input_tokens,
    cached_tokens = u.cached_tokens + excluded.cached_tokens,
    cache_write_tokens = u.cache_write_tokens + excluded.cache_write_tokens,
    output_tokens = u.output_tokens + excluded.output_tokens,
    reasoning_tokens = u.reasoning_tokens + excluded.reasoning_tokens,
    cost = excluded.cost + coalesce(u.cost, autotag.price_tokens(u.model, u.service_tier,
      u.input_tokens, u.cached_tokens, u.cache_write_tokens, u.output_tokens));
end $$;

-- A model has got a price: what was used of it before gets it too.
create function autotag.price_usage() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.usage u
  set cost = autotag.price_tokens(u.model, u.service_tier, u.input_tokens, u.cached_tokens, u.cache_write_tokens, u.output_tokens)
  where u.cost is null
    and autotag.price_tokens(u.model, u.service_tier, u.input_tokens, u.cached_tokens, u.cache_write_tokens, u.output_tokens) is not null;
  return null;
end $$;
create trigger autotag_price_usage after insert or update of input_price, output_price on autotag.models
  for each statement execute function autotag.price_usage();

-- tagging_usage: rows per user, day, model and service tier, for members of the workspace. cost: dollars; null: the model
-- has no price in autotag.models.
create function autotag.list_usage(p_workspace_id uuid, p_since date, p_until date)
returns table (user_id uuid, day date, model text, service_tier text, images integer, requests integer, input_tokens bigint,
  cached_tokens bigint, cache_write_tokens bigint, output_tokens bigint, reasoning_tokens bigint, cost numeric)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_member(p_workspace_id);
  return query
    select u.user_id, u.day, u.model, u.service_tier, u.images, u.requests, u.input_tokens,
      u.cached_tokens, u.cache_write_tokens, u.output_tokens, u.reasoning_tokens, u.cost
    from autotag.usage u
    where u.workspace_id = p_workspace_id and u.day between p_since and p_until
    order by u.day, u.user_id, u.model, u.service_tier;
end $$;

-- What may be used: images and dollars, a day or a month (UTC), by a workspace as a whole or by each of its users.
--   insert into autotag.quotas (scope, period, max_images) values ('user', 'day', 500);          -- every user
--   insert into autotag.quotas (workspace_id, scope, period, max_cost) values ('…', 'workspace', 'month', 20);
-- Of several that fit, for each scope and period the one that names the user counts, else the one that names the
-- workspace, else the general one. A null maximum is no limit, so that a special quota can also lift a general one.
create table autotag.quotas (
  id bigint generated always as identity primary key,
  workspace_id uuid,                     -- null: every workspace
  user_id uuid,                          -- null: every user (scope user)
  scope text not null check (scope in ('workspace', 'user')),
  period text not null check (period in ('day', 'month')),
  max_images integer check (max_images >= 0),
  max_cost numeric check (max_cost >= 0),
  check (scope = 'user' or user_id is null)
);
create unique index quotas_key on autotag.quotas (scope, period, workspace_id, user_id) nulls not distinct;
alter table autotag.quotas enable row level security;

-- Dollars that an answer is expected to cost (p_most: that it reserves, which is on the safe side) by what the provider's row
-- says of its question; null: the model has no price in autotag.models. p_tier: a service tier, or batch; null: the one that
-- is asked for, if the model takes one.
create function autotag.question_cost(p_provider autotag.provider_limits, p_most boolean, p_tier text default null)
returns numeric
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.price_tokens(
    p_provider.question ->> 'model', coalesce(p_tier, p_provider.question ->> 'service_tier', 'default'),
    case when p_most then p_provider.tokens_per_image - p_provider.output_tokens else p_provider.prompt_mean end, 0, 0,
    case when p_most then p_provider.output_tokens else p_provider.output_mean end);
end $$;

-- The same of one image with what is asked at present, by what answers used so far.
create function autotag.expected_cost(p_tier text default null, p_most boolean default false) returns numeric
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
begin
  select * into v_provider from autotag.provider_limits;
  v_provider.question := autotag.describe_question();
  return autotag.question_cost(v_provider, p_most, p_tier);
end $$;

-- What is left of each quota of a workspace and a user: what was used, and what is being tagged at the moment (which
-- is reserved until it is done, so that uploads at the same time cannot overshoot), are taken off. images_left: how
-- many more images that allows, at p_each dollars (null: what the model in use reserves). What was billed counts, failures
-- included. A quota of a user that names no workspace counts what the user does in all of them.
create function autotag.quotas_left(p_workspace_id uuid, p_user_id uuid, p_each numeric default null)
returns table (scope text, period text, kind text, maximum numeric, available numeric, images_left integer, renews_at timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_today date := (autotag.now() at time zone 'utc')::date;
  v_cost numeric;
  v_batch_cost numeric;
begin
  if not exists (select from autotag.quotas) then
    return;
  end if;
  -- Without a price dollars cannot be reserved; autotag doctor says so.
  v_cost := coalesce(autotag.expected_cost(null, true), 0);
  v_batch_cost := coalesce(autotag.expected_cost('batch', true), 0);
  return query
    with chosen as (
      select distinct on (q.scope, q.period) q.*,
        date_trunc(q.period, v_today::timestamp)::date as first_day,
        (date_trunc(q.period, v_today::timestamp) + ('1 ' || q.period)::interval) at time zone 'utc' as next_period
      from autotag.quotas q
      where (q.workspace_id is null or q.workspace_id = p_workspace_id)
        and (q.scope = 'workspace' or (p_user_id is not null and (q.user_id is null or q.user_id = p_user_id)))
      order by q.scope, q.period, q.user_id is null, q.workspace_id is null
    ), measured as (
      select c.*, u.answers + l.images as images, u.cost + l.cost as cost
      from chosen c
      cross join lateral (
        -- what was billed: an answer of no use costs as much as one that tags
        select coalesce(sum(greatest(u.requests, u.images)), 0) as answers, coalesce(sum(u.cost), 0) as cost
        from autotag.usage u
        where u.day >= c.first_day and case when c.scope = 'workspace' then u.workspace_id = p_workspace_id
          else u.user_id = p_user_id and (c.workspace_id is null or u.workspace_id = c.workspace_id) end) u
      cross join lateral (
        select coalesce(sum(n.images), 0) as images, coalesce(sum(n.images * n.price), 0) as cost
        from (
          select j.image_count - j.completed - j.failed as images,
            case when j.strategy like 'batch%' then v_batch_cost else v_cost end as price
          from autotag.jobs j
          where j.finished_at is null and case when c.scope = 'workspace' then j.workspace_id = p_workspace_id
            else j.user_id = p_user_id and (c.workspace_id is null or j.workspace_id = c.workspace_id) end) n) l
    )
    select m.scope, m.period, k.kind, k.maximum, greatest(k.maximum - k.used, 0),
      greatest(floor((k.maximum - k.used) / k.each), 0)::integer, m.next_period
    from measured m
    cross join lateral (values ('images', m.max_images::numeric, m.images::numeric, 1::numeric),
      ('cost', m.max_cost, m.cost, greatest(coalesce(p_each, v_cost), 0.0000001))) k (kind, maximum, used, each)
    where k.maximum is not null;
end $$;

-- Refuses so many images where a quota does not allow them: of an upload, for which the caller holds the workspace, so
-- that what is reserved holds; or, at p_each dollars, of a comparison.
create function autotag.check_quotas(p_workspace_id uuid, p_user_id uuid, p_images integer, p_each numeric default null)
returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_quota record;
begin
  -- Uploads of one user into several workspaces follow each other, like those into one do by its lock. It is taken last.
  if p_user_id is not null and exists (select from autotag.quotas q where q.scope = 'user') then
    perform pg_advisory_xact_lock(hashtextextended('autotag.user ' || p_user_id::text, 0));
  end if;
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
