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
