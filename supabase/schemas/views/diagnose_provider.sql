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
