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
