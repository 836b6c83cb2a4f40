-- What a workspace or a user may use per day or month.

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

-- The same for the present question.
create or replace function autotag.expected_cost(p_tier text default null, p_max boolean default false) returns numeric
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
begin
  select * into v_provider from autotag.provider_limits;
  v_provider.question := autotag.describe_question();
  return autotag.question_cost(v_provider, p_max, p_tier);
end $$;

-- What is left of each quota of a workspace and a user: the maximum less what was used and less what is being tagged (reserved
-- until it is done, so that concurrent uploads cannot exceed the quota). images_left: how many more images that allows, at
-- p_each dollars per image (null: what the model in use reserves). Everything billed counts, including failures. A user quota
-- without a workspace counts the user's images in all workspaces.
create or replace function autotag.quotas_left(p_workspace_id uuid, p_user_id uuid, p_each numeric default null)
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
  -- Without a price no dollars can be reserved; autotag doctor reports it.
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
        -- everything billed: an unusable answer costs as much as a usable one
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
      least(greatest(floor((k.maximum - k.used) / k.each), 0), 2147483647)::integer, m.next_period
    from measured m
    cross join lateral (values ('images', m.max_images::numeric, m.images::numeric, 1::numeric),
      ('cost', m.max_cost, m.cost, greatest(coalesce(p_each, v_cost), 0.0000001))) k (kind, maximum, used, each)
    where k.maximum is not null;
end $$;

-- Refuses p_images images if a quota does not allow them: those of an upload (the caller holds the workspace's lock, so that
-- no other upload reserves the same), or those of a comparison at p_each dollars. Locks: the user (advisory).
create or replace function autotag.check_quotas(p_workspace_id uuid, p_user_id uuid, p_images integer, p_each numeric default null)
returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_quota record;
begin
  -- Serializes uploads of one user into several workspaces; those into one are serialized by its lock. Taken last.
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
