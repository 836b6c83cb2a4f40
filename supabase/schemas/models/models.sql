-- Models as rows of autotag.models: finding the row of a name, prices, the question, end of life.

-- Whether the row p_row covers the model p_model.
create or replace function autotag.names_model(p_row text, p_model text) returns boolean
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return p_model = p_row
    or right(p_row, 1) = '*' and starts_with(p_model, left(p_row, -1))
    -- a request for mistral-small-latest is answered by mistral-small-2506
    or right(p_row, 7) = '-latest' and starts_with(p_model, left(p_row, -6))
    or starts_with(p_model, p_row) and substr(p_model, length(p_row) + 1) ~ E'^[-@](latest|\\d{4}-?\\d{2}-?\\d{2}|\\d{4})$';
end $$;

-- The row of a model; all columns are null when there is none.
create or replace function autotag.find_model(p_model text) returns autotag.models
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_row autotag.models;
begin
  select * into v_row from autotag.models mo where mo.name = p_model;
  if not found then
    -- The first condition is in every form of names_model(), and costs a fraction of the call.
    select * into v_row from autotag.models mo
    where starts_with(p_model, case when right(mo.name, 1) = '*' then left(mo.name, -1)
        when right(mo.name, 7) = '-latest' then left(mo.name, -6) else mo.name end)
      and autotag.names_model(mo.name, p_model)
    order by length(mo.name) desc limit 1;
  end if;
  return v_row;
end $$;

-- Price of a model's tokens in a service tier (`batch` for a batch), in dollars. Null: unknown, because the model has no price
-- or the tier is unknown. A model whose prices are all zero (on one's own server) costs zero in any tier, and even without figures.
-- p_input includes cached and cache-written tokens, as in OpenAI's figures.
create or replace function autotag.price_tokens(
  p_model text, p_tier text, p_input numeric, p_cached numeric, p_cache_write numeric, p_output numeric
) returns numeric
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_model);
begin
  if 0 = all (array[m.input_price, m.output_price, coalesce(m.cached_price, 0), coalesce(m.cache_write_price, 0)]) then
    return 0;
  end if;
  return (
    greatest(p_input - p_cached - p_cache_write, 0) * m.input_price
    + p_cached * coalesce(m.cached_price, m.input_price)
    + p_cache_write * coalesce(m.cache_write_price, m.input_price)
    + p_output * m.output_price
  ) / 1000000 * case
    when p_tier in ('default', 'auto', 'standard', 'on_demand') then 1
    when p_tier = 'batch' then 1 - m.batch_discount
    when p_tier = 'flex' then 1 - m.flex_discount
    when p_tier in ('priority', 'fast') then m.priority_factor end;
end $$;

-- The question as workers get it: everything in the request but the image. p_effort null: the one in the model's row.
create or replace function autotag.question_for(p_model text, p_effort text default null) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  m autotag.models := autotag.find_model(p_model);
begin
  select * into v_settings from autotag.settings;
  return jsonb_build_object(
    'model', p_model, 'image_detail', v_settings.image_detail, 'image_side', v_settings.image_side,
    'max_tags', v_settings.max_tags, 'tag_language', v_settings.tag_language,
    'reasoning_effort', case when coalesce(m.sends_effort, true) then coalesce(p_effort, m.reasoning_effort) end,
    'service_tier', case when v_settings.service_tier <> 'auto' and coalesce(m.sends_tier, true) then v_settings.service_tier end,
    'cap_parameter', coalesce(m.cap_parameter, 'max_completion_tokens'),
    'answer_format', coalesce(m.answer_format, 'json_schema'),
    'sends_detail', coalesce(m.sends_detail, true));
end $$;

-- The question to the model in use. It is derived at every use (sync_question), so one UPDATE of settings or models changes it.
create or replace function autotag.describe_question() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.question_for((select s.model from autotag.settings s));
end $$;

-- Wakes the workers: their next claim picks up the change.
create or replace function autotag.notify_workers() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_notify('autotag', 'realtime');
  perform pg_notify('autotag', 'batch');
  return null;
end $$;

create or replace trigger autotag_announce after update on autotag.settings
  for each statement execute function autotag.notify_workers();

create or replace trigger autotag_announce after insert or update or delete on autotag.models
  for each statement execute function autotag.notify_workers();

-- Moves the model's row to the next form, because the provider refused a parameter. False: there is none, or another transaction holds
-- the row. A model without a row gets one (without prices). Locks: the model's row (skip locked).
create or replace function autotag.downgrade_request_form(p_model text, p_parameter text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_model);
  v_column text := case p_parameter when 'token_cap' then 'cap_parameter' when 'response_format' then 'answer_format'
    when 'reasoning_effort' then 'sends_effort' when 'detail' then 'sends_detail' when 'service_tier' then 'sends_tier' end;
  v_before jsonb;
  v_next jsonb;
begin
  if v_column is null then
    return false;
  end if;
  if m.name is null then
    insert into autotag.models (name) values (p_model) on conflict do nothing;
    m.name := p_model;
  end if;
  select * into m from autotag.models mo where mo.name = m.name for update skip locked;
  if not found then
    return false;
  end if;
  v_before := to_jsonb(m) -> v_column;
  v_next := (case
    when v_before = '"max_completion_tokens"' then '"max_tokens"' when v_before = '"max_tokens"' then '"none"'
    when v_before = '"json_schema"' then '"json_object"' when v_before = '"json_object"' then '"text"'
    when v_before = 'true' and (v_column <> 'sends_effort' or m.reasoning_effort is not null) then 'false' end)::jsonb;
  if v_next is null then
    return false;
  end if;
  m := jsonb_populate_record(m, jsonb_build_object(v_column, v_next));
  m.degraded := m.degraded || jsonb_build_object(v_column, jsonb_build_array(
    case when m.degraded -> v_column -> 1 = v_before then m.degraded -> v_column -> 0 else v_before end, v_next));
  update autotag.models mo
  set cap_parameter = m.cap_parameter, answer_format = m.answer_format, sends_effort = m.sends_effort,
      sends_detail = m.sends_detail, sends_tier = m.sends_tier, degraded = m.degraded, degraded_at = autotag.now()
  where mo.name = m.name;
  return true;
end $$;

-- Makes calls try again what refusals before p_before showed to be missing: parameters of the request, the Batch API, expiring files.
-- The provider may support it by now, or a worker may have lied. A call that is refused again is not billed.
-- Values that the owner changed meanwhile stay. Called by tick(). Locks: provider, models (skip locked).
create or replace function autotag.retry_features(p_before timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.provider_limits p
  set has_batches = case when not p.batches_refused then p.has_batches end, batches_refused = false, keep_files = 604800,
      degraded_at = null
  where p.degraded_at <= p_before;
  if exists (select from autotag.models mo where mo.degraded_at <= p_before) then
    update autotag.models mo
    set cap_parameter = case when mo.degraded #>> '{cap_parameter,1}' = mo.cap_parameter
          then mo.degraded #>> '{cap_parameter,0}' else mo.cap_parameter end,
        answer_format = case when mo.degraded #>> '{answer_format,1}' = mo.answer_format
          then mo.degraded #>> '{answer_format,0}' else mo.answer_format end,
        sends_effort = mo.sends_effort or mo.degraded ? 'sends_effort',
        sends_detail = mo.sends_detail or mo.degraded ? 'sends_detail',
        sends_tier = mo.sends_tier or mo.degraded ? 'sends_tier', degraded = '{}', degraded_at = null
    where mo.name in (select due.name from autotag.models due where due.degraded_at <= p_before order by due.name for update skip locked);
  end if;
end $$;

-- Forgets everything that workers have reported of the provider and of the token use of its answers, for example after a worker's
-- login was stolen. The next call has to prove that tagging works. Limits stay: headers correct them, or the owner sets them.
-- For the owner. Locks: provider, models.
create or replace function autotag.forget_provider() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.lock_provider();
  update autotag.provider_limits p
  set has_batches = null, batches_refused = false, keep_files = 604800, has_rate_headers = null, degraded_at = null,
      proven_at = null, probe_at = null, account_error = null, account_error_from = null, account_error_at = null,
      blocked_until = '-infinity', limited_since = null, ask_after = '-infinity', next_poll_at = '-infinity', checked_at = '-infinity',
      question = '{}', refusals = '{}'
  where p.id;
  perform autotag.retry_features('infinity');
  delete from autotag.learned l where l.learned_at > '-infinity';
  perform pg_notify('autotag', 'realtime');
  perform pg_notify('autotag', 'batch');
end $$;

-- End of life of a model (p_model null: the one in use), from 90 days before: {level, message, fix, days, date, successor};
-- else null. level: warning, and error from 14 days before, because tagging is paused from that date on.
create or replace function autotag.describe_shutdown(p_model text default null) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := coalesce(p_model, (select s.model from autotag.settings s));
  m autotag.models := autotag.find_model(v_model);
  v_days integer := m.shutdown_date - (autotag.now() at time zone 'utc')::date;
begin
  if v_days is null or v_days > 90 then
    return null;
  end if;
  return jsonb_build_object(
    'level', case when v_days > 14 then 'warning' else 'error' end, 'days', v_days, 'date', m.shutdown_date,
    'successor', m.successor,
    'message', case
      when v_days > 0 then format('%s shuts down on %s, in %s%s', v_model, m.shutdown_date, case v_days when 1 then '1 day' else v_days || ' days' end,
        coalesce('; its successor is ' || m.successor, '') || '.')
      else format('%s was shut down on %s%s', v_model, m.shutdown_date, coalesce('; its successor is ' || m.successor, '') || '.') end,
    'fix', case when m.successor is not null then format(
        'autotag compare --model %1$s --workspace …   then: update autotag.settings set model = ''%1$s'';', m.successor)
      else 'Choose another model: update autotag.settings set model = ''…'';' end);
end $$;
