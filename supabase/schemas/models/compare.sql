-- What another model would say about images that have their tags (`autotag compare`). It is asked within every limit and
-- quota, and behind live uploads; what it used is recorded. Nothing of the host is written, and there is no job and no task.
--
--   preview_comparison   what it would cost, and whether the quotas allow it
--   comparison_sample    the images, with what is stored about them
--   admit_comparison     whether one call may be made now, or when to ask again
--   settle_comparison    what came of it, and what to do next about that image

-- The provider's row as it would be with another question: what an answer reserves, and what it uses on average.
create or replace function autotag.estimate_question(p_provider autotag.provider_limits, p_question jsonb)
returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  p_provider.question := p_question;
  return autotag.estimate_tokens(p_provider);
end $$;

-- What asking p_model about p_sample tagged images of a workspace would mean: {images (there may be fewer), cost (null:
-- unknown), reserved (tokens of one image), question, shutdown_date, current_model, current_effort, current_cost_per_1000
-- (of the model in use, one by one; null: unknown), current_answers (that this figure was learned from)}. p_effort null:
-- that of the model's row. Refuses a model or an effort that cannot be asked for, a workspace without tagged images, and
-- what a quota does not allow.
create or replace function autotag.preview_comparison(p_workspace_id uuid, p_model text, p_effort text, p_sample integer)
returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.refilled_provider(autotag.now());
  v_current autotag.provider_limits := autotag.estimate_question(v_provider, autotag.describe_question());
  v_question jsonb := autotag.question_for(p_model, p_effort);
  v_images integer;
begin
  if coalesce(length(p_model), 0) not between 1 and 100 then
    perform autotag.refuse(400, 'unknown_model', 'This is no name of a model.', 'Pass the name that the provider has for it.');
  elsif p_effort not in ('none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max') then
    perform autotag.refuse(400, 'unknown_effort', format('%L is no reasoning effort.', p_effort),
      'Pass none, minimal, low, medium, high, xhigh or max.');
  elsif p_effort is not null and v_question ->> 'reasoning_effort' is null then
    perform autotag.refuse(400, 'unknown_effort', format('%s takes no reasoning effort.', p_model),
      'Leave it out (autotag.models.sends_effort is false for this model).');
  end if;
  v_images := (select count(*) from autotag.tagged_assets(p_workspace_id, greatest(p_sample, 0)));
  if v_images = 0 then
    perform autotag.refuse(404, 'no_tagged_images', 'This workspace has no image with tags.',
      'Tag some first: autotag enqueue.');
  end if;
  v_provider := autotag.estimate_question(v_provider, v_question);
  -- As for uploads, dollars cannot be reserved without a price.
  perform autotag.check_quotas(p_workspace_id, null, v_images, coalesce(autotag.question_cost(v_provider, true), 0));
  return jsonb_build_object(
    'images', v_images, 'cost', v_images * autotag.question_cost(v_provider, false),
    'reserved', v_provider.tokens_per_image, 'question', v_question,
    'shutdown_date', (autotag.find_model(p_model)).shutdown_date,
    'current_model', v_current.question -> 'model', 'current_effort', v_current.question -> 'reasoning_effort',
    'current_cost_per_1000', round(1000 * autotag.question_cost(v_current, false), 4),
    'current_answers', coalesce((
      select l.answers from autotag.learned l
      where l.model = v_current.question ->> 'model' and l.image_detail = v_current.question ->> 'image_detail'
        and l.reasoning_effort = coalesce(v_current.question ->> 'reasoning_effort', '')
        and l.max_tags = (v_current.question ->> 'max_tags')::integer
        and l.tag_language = v_current.question ->> 'tag_language'), 0));
end $$;

-- The images of a comparison: [{asset_id, bucket, path, url, tags: [tag, …], caption, confidence: {tag: 0 to 1}, model}].
create or replace function autotag.comparison_sample(p_workspace_id uuid, p_sample integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_assets uuid[];
  v_sample jsonb;
begin
  select array_agg(t.asset_id),
    jsonb_object_agg(t.asset_id, jsonb_build_object(
      'tags', jsonb_path_query_array(t.tags, 'strict $[*] ? (@.type() == "string")'),
      'caption', t.result ->> 'caption', 'confidence', t.result -> 'confidence', 'model', t.result ->> 'model'))
  into v_assets, v_sample
  from autotag.tagged_assets(p_workspace_id, greatest(p_sample, 0)) t;
  return (
    select coalesce(jsonb_agg(jsonb_build_object('asset_id', d.asset_id, 'bucket', d.bucket, 'path', d.path, 'url', d.url)
      || (v_sample -> d.asset_id::text) order by d.asset_id), '[]')
    from autotag.describe_assets(coalesce(v_assets, '{}')) d where not d.foreign_file);
end $$;

-- Whether one call with this question may be made now: {admitted, reserved, reserved_at, cap (of the answer, in tokens)}, or
-- else {admitted: false, wait (seconds), reason}. p_cap: the least cap, where an answer was cut off. It takes its place in
-- the provider's bucket and in the workspace's window like any single call, but only while no live image waits for one.
-- reason: `account` (with its sentence as `message`), `retry_after`, `live`, `provider` or `window`.
-- Refuses what a quota does not allow (any more), and an image that no limit can ever hold.
-- Locks: provider, window.
create or replace function autotag.admit_comparison(p_workspace_id uuid, p_question jsonb, p_cap integer default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.estimate_question(autotag.refilled_provider(autotag.now()), p_question);
  v_now timestamptz;
  v_cap integer;
  v_reserved integer;
  v_next timestamptz;
  v_window record;
begin
  perform autotag.check_quotas(p_workspace_id, null, 1, coalesce(autotag.question_cost(v_provider, true), 0));
  v_provider := autotag.estimate_question(autotag.lock_provider(), p_question);
  v_now := v_provider.refilled_at;
  -- A cap that the limit a minute could never hold would wait for ever.
  v_cap := greatest(v_provider.output_tokens, least(coalesce(p_cap, 0),
    (0.9 * v_provider.tokens_per_minute)::integer - (v_provider.tokens_per_image - v_provider.output_tokens)));
  v_reserved := v_provider.tokens_per_image - v_provider.output_tokens + v_cap;
  -- Trouble of the model in use (it may have shut down) is the reason to compare; whatever else is wrong shows by itself.
  if v_provider.account_error is not null
    and (v_provider.account_error_from = 'storage' or p_question ->> 'model' = (select s.model from autotag.settings s)) then
    return autotag.put_off('account', v_now, v_now + (select s.account_probe_interval from autotag.settings s))
      || jsonb_build_object('message', v_provider.account_error);
  elsif v_provider.blocked_until > v_now then
    return autotag.put_off('retry_after', v_now, v_provider.blocked_until);
  -- An image that never fits its workspace's window (ready_at is infinite) keeps nobody else waiting.
  elsif v_provider.account_error is null
    and exists (select from autotag.workspaces w where w.queued > 0 and (w.ready or w.ready_at < 'infinity')) then
    return autotag.put_off('live', v_now, v_now + autotag.clock_interval(1));
  end if;
  v_next := v_now + interval '1 min' * greatest(0,
    (1 - v_provider.requests_left) / v_provider.requests_per_minute,
    (1 - v_provider.day_left) / (v_provider.requests_per_day / 1440.0),
    (v_reserved - v_provider.tokens_left) / v_provider.tokens_per_minute);
  if v_next > v_now then
    return autotag.put_off('provider', v_now, v_next);
  end if;
  v_window := autotag.admit(p_workspace_id, 'realtime', 1, v_reserved, false);
  if v_window.admitted = 0 and v_window.retry_at is null then
    perform autotag.refuse(429, 'exceeds_limit',
      format('One image of %s reserves %s tokens, more than this workspace may use in a minute.',
        p_question ->> 'model', v_reserved),
      'Raise its limit (max_units in public.workspace_rate_limits), or choose a lower effort.');
  elsif v_window.admitted = 0 then
    return autotag.put_off('window', v_window.at, v_window.retry_at);
  end if;
  update autotag.provider_limits
  set requests_left = v_provider.requests_left - 1, tokens_left = v_provider.tokens_left - v_reserved,
      day_left = v_provider.day_left - 1, refilled_at = v_now;
  return jsonb_build_object('admitted', true, 'reserved', v_reserved, 'reserved_at', v_window.at, 'cap', v_cap);
end $$;

-- The answer of admit_comparison() while a call has to wait.
create or replace function autotag.put_off(p_reason text, p_now timestamptz, p_until timestamptz) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_build_object('admitted', false, 'reason', p_reason, 'wait', autotag.real_seconds(p_until - p_now));
end $$;

-- The question after the provider has refused a parameter of p_question: the model's row has its next form, or had it
-- already, because other calls met the same. Null: there is none. Locks: the model's row without waiting.
create or replace function autotag.ask_differently(p_question jsonb, p_parameter text) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := p_question ->> 'model';
  v_effort text := p_question ->> 'reasoning_effort';
  v_question jsonb := autotag.question_for(v_model, v_effort);
begin
  if v_question <> p_question then
    return v_question;
  end if;
  -- That the model does not take an effort which was tried out here says nothing about the one in its row.
  if p_parameter = 'reasoning_effort' and v_effort is distinct from (autotag.find_model(v_model)).reasoning_effort then
    return null;
  end if;
  if autotag.degrade_model(v_model, p_parameter) then
    v_question := autotag.question_for(v_model, v_effort);
  end if;
  return case when v_question <> p_question then v_question end;
end $$;

-- What to do next about an image: {next: done | again | failed | stop}. again: with the `question`, the `cap` and after the
-- `wait` (seconds) that it names; stop: no call can work, for the reason in `message`. p_report as in settle_comparison().
create or replace function autotag.next_step(p_question jsonb, p_report jsonb, p_answer autotag.answer) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_error jsonb := p_answer.error;
  v_failures integer := coalesce((p_report ->> 'failures')::integer, 0) + 1;
  v_proven boolean := coalesce((p_report ->> 'proven')::boolean, false);
  v_question jsonb;
begin
  if v_error is null then
    return jsonb_build_object('next', 'done');
  end if;
  select * into v_settings from autotag.settings;
  -- Words instead of JSON are the provider's doing only as long as it has not shown that it can do better.
  if v_error ->> 'parameter' is not null and (v_error ->> 'kind' <> 'image' or not v_proven) then
    v_question := autotag.ask_differently(p_question, v_error ->> 'parameter');
    if v_question is not null then
      return jsonb_build_object('next', 'again', 'question', v_question);
    end if;
  end if;
  if v_error ->> 'code' = 'answer_too_long' and p_answer.output_tokens < v_settings.max_output_tokens
     and not coalesce((p_report ->> 'cut_off')::boolean, false) then
    return jsonb_build_object('next', 'again', 'cap', autotag.next_cap(p_answer));
  end if;
  case v_error ->> 'kind'
    when 'rate_limit' then
      return jsonb_build_object('next', 'again');  -- admit_comparison() knows when
    when 'account' then
      return jsonb_build_object('next', 'stop', 'message', autotag.explain_account(v_error, p_question ->> 'model'));
    when 'transient' then
      if v_failures < v_settings.max_bad_answers then
        return jsonb_build_object('next', 'again', 'wait', greatest((v_error ->> 'retry_after')::double precision,
          autotag.real_seconds(v_settings.retry_delay * power(2, v_failures - 1))));
      elsif not v_proven then
        return jsonb_build_object('next', 'stop', 'message', v_error ->> 'message');
      end if;
    else
      null;
  end case;
  return jsonb_build_object('next', 'failed');
end $$;

-- What came of one try: next_step(), and `cost` (dollars; null: unknown, or the provider billed nothing). p_report:
-- {reserved, reserved_at, cap (as admit_comparison gave them; absent where nothing was admitted), called, usage, error (as in
-- settle()), failures (transient ones of this image so far), cut_off (an answer about it was cut off already), proven (an
-- answer of this comparison was of use)}. p_seen: what the answer's headers say (observe_provider). Corrects the bucket and
-- the window as settle() does, records the usage, and learns what answers to this question use. An error of the account is
-- this comparison's alone: the live lanes find out by themselves.
-- Locks: provider, window.
create or replace function autotag.settle_comparison(
  p_workspace_id uuid, p_question jsonb, p_report jsonb, p_seen jsonb default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer autotag.answer;
  v_used integer;              -- tokens of the prompt; null: the provider gave no figures
  v_free boolean;              -- the call took nothing of the provider's bucket
begin
  v_answer.workspace_id := p_workspace_id;
  v_answer.reserved_at := (p_report ->> 'reserved_at')::timestamptz;
  v_answer.reserved_tokens := (p_report ->> 'reserved')::integer;
  v_answer.output_tokens := (p_report ->> 'cap')::integer;
  v_answer.error := autotag.clean_error(p_report -> 'error');
  v_answer.usage := autotag.clean_usage(p_report -> 'usage');
  v_answer.called := p_report -> 'called' is distinct from 'false';
  v_used := (v_answer.usage -> 'input')::integer;
  v_free := not v_answer.called or coalesce(v_answer.error ->> 'code' = 'rate_limited', false);

  perform from autotag.provider_limits for update;
  if v_answer.reserved_tokens is not null then
    perform autotag.refund_provider(v_free::integer, case when v_free then v_answer.reserved_tokens
      else coalesce(v_answer.reserved_tokens - v_used - v_answer.output_tokens, 0) end);
  end if;
  if p_seen is not null then
    perform autotag.observe_provider(p_seen);
  end if;
  if v_used > 0 then
    -- what a cut-off answer would have needed nobody knows: at least what the next try may have
    perform autotag.learn(array[v_used], array[case when v_answer.error ->> 'code' = 'answer_too_long'
      then coalesce(autotag.next_cap(v_answer), 1) else greatest((v_answer.usage -> 'output')::integer, 1) end],
      p_question);
  end if;
  if v_answer.reserved_at is not null then
    perform autotag.correct_window(p_workspace_id, 'realtime', v_answer.reserved_at,
      case when v_answer.called then 0 else -1 end,
      case when v_used is not null then v_used + (v_answer.usage -> 'output')::integer - v_answer.reserved_tokens
        when v_answer.error ->> 'code' = 'provider_unreachable' then 0
        else -v_answer.reserved_tokens end);
  end if;
  if v_answer.called then
    perform autotag.add_usage(array[v_answer], false, p_question);
  end if;
  return autotag.next_step(p_question, p_report, v_answer) || jsonb_build_object('cost', autotag.price_tokens(
    coalesce(v_answer.usage ->> 'model', p_question ->> 'model'), coalesce(v_answer.usage ->> 'tier', 'default'), v_used,
    least((v_answer.usage -> 'cached')::integer, v_used), (v_answer.usage -> 'cache_write')::integer,
    (v_answer.usage -> 'output')::integer));
end $$;
