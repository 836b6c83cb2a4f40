-- Asks another model about images that already have tags (`autotag compare`). Its calls respect all limits and quotas and give
-- way to live uploads, and their usage is recorded. It creates no jobs or tasks and writes nothing to the host's tables.
--
--   preview_comparison   the cost, and whether the quotas allow it
--   comparison_sample    the images, with their stored tags
--   admit_comparison     admits one call, or returns when to ask again
--   settle_comparison    settles one call, and returns what to do next about its image

-- The provider's row with its token estimates (reserved and mean) replaced by those of another question, with what a workspace's images
-- are asked beside it.
create or replace function autotag.estimate_question(p_provider autotag.provider_limits, p_question jsonb, p_workspace_id autotag.workspace_id)
returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  p_provider.question := p_question;
  return autotag.estimate_tokens(p_provider, autotag.compose_brief(p_workspace_id));
end $$;

-- Previews asking p_model about p_sample tagged images of a workspace: {images (at most p_sample), cost (dollars; null:
-- unknown), reserved (tokens of one image), question, brief (what the workspace's profile asks beside it; null: nothing),
-- shutdown_date, current_model, current_effort, current_cost_per_1000 (dollars, as single calls of the model in use; null: unknown),
-- current_answers (number of answers behind that figure)}.
-- p_effort null: the one in the model's row. Refuses an invalid model or effort, a workspace without tagged images, and more
-- than a quota allows.
create or replace function autotag.preview_comparison(p_workspace_id autotag.workspace_id, p_model text, p_effort text, p_sample integer)
returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.refilled_provider(autotag.now());
  v_current autotag.provider_limits := autotag.estimate_question(v_provider, autotag.describe_question(), p_workspace_id);
  v_question jsonb := autotag.question_for(p_model, p_effort);
  v_brief autotag.briefs := autotag.compose_brief(p_workspace_id);
  v_images integer;
begin
  if coalesce(length(p_model), 0) not between 1 and 100 then
    perform autotag.refuse(400, 'unknown_model', 'This is not a model name.', 'Pass the name that the provider uses for the model.');
  elsif p_effort not in ('none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max') then
    perform autotag.refuse(400, 'unknown_effort', format('%L is not a reasoning effort.', p_effort),
      'Pass none, minimal, low, medium, high, xhigh or max.');
  elsif p_effort is not null and v_question ->> 'reasoning_effort' is null then
    perform autotag.refuse(400, 'unknown_effort', format('%s does not accept a reasoning effort.', p_model),
      'Leave it out (autotag.models.sends_effort is false for this model).');
  end if;
  v_images := (select count(*) from autotag.tagged_assets(p_workspace_id, least(greatest(p_sample, 0), 1000)));
  if v_images = 0 then
    perform autotag.refuse(404, 'no_tagged_images', 'This workspace has no tagged images.',
      'Tag some images first: autotag enqueue.');
  end if;
  v_provider := autotag.estimate_question(v_provider, v_question, p_workspace_id);
  -- Without a price next to nothing is reserved, as for uploads; a price of zero is a price.
  perform autotag.check_quotas(p_workspace_id, null, v_images, coalesce(autotag.question_cost(v_provider, true), 0.0000001));
  return jsonb_build_object(
    'images', v_images, 'cost', v_images * autotag.question_cost(v_provider, false),
    'reserved', v_provider.tokens_per_image, 'question', v_question, 'brief', autotag.spell_brief(v_brief),
    'shutdown_date', (autotag.find_model(p_model)).shutdown_date,
    'current_model', v_current.question -> 'model', 'current_effort', v_current.question -> 'reasoning_effort',
    'current_cost_per_1000', round(1000 * autotag.question_cost(v_current, false), 4),
    'current_answers', coalesce((
      select l.answers from autotag.learned l
      where l.brief_id = coalesce(v_brief.id, 0) and l.model = v_current.question ->> 'model' and l.image_detail = v_current.question ->> 'image_detail'
        and l.image_side = coalesce((v_current.question ->> 'image_side')::integer, 0)
        and l.reasoning_effort = coalesce(v_current.question ->> 'reasoning_effort', '')
        and l.max_tags = (v_current.question ->> 'max_tags')::integer
        and l.tag_language = v_current.question ->> 'tag_language'), 0));
end $$;

-- The images to compare: [{asset_id, bucket, path, url, tags: [tag, …], caption, confidence: {tag: 0 to 1}, model}].
create or replace function autotag.comparison_sample(p_workspace_id autotag.workspace_id, p_sample integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_assets autotag.asset_id[];
  v_sample jsonb;
begin
  select array_agg(t.asset_id),
    jsonb_object_agg(t.asset_id, jsonb_build_object(
      'tags', jsonb_path_query_array(t.tags, 'strict $[*] ? (@.type() == "string")'),
      'caption', t.result ->> 'caption', 'confidence', t.result -> 'confidence', 'model', t.result ->> 'model'))
  into v_assets, v_sample
  from autotag.tagged_assets(p_workspace_id, least(greatest(p_sample, 0), 1000)) t;
  return (
    select coalesce(jsonb_agg(jsonb_build_object('asset_id', d.asset_id::text, 'bucket', d.bucket, 'path', d.path, 'url', d.url)
      || (v_sample -> d.asset_id::text) order by d.asset_id), '[]')
    from autotag.describe_assets(coalesce(v_assets, '{}')) d where d.refused is null);
end $$;

-- Admits one call with this question: {admitted, reserved (tokens), reserved_at, cap (of the answer, in tokens)}, or
-- {admitted: false, wait (seconds), reason}. The call takes from the provider's bucket and from the workspace's window like
-- any single call, but only while no live image waits for one. p_cap: lowest cap, after an answer was cut off.
-- reason: `account` (with the error as `message`), `retry_after`, `live`, `provider` or `window`.
-- Refuses more than a quota allows, and an image that reserves more than the window's limit.
-- Locks: provider, window (skip locked).
create or replace function autotag.admit_comparison(p_workspace_id autotag.workspace_id, p_question jsonb, p_cap integer default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits := autotag.estimate_question(autotag.refilled_provider(autotag.now()), p_question, p_workspace_id);
  v_now timestamptz;
  v_cap integer;
  v_reserved integer;
  v_next timestamptz;
  v_window record;
begin
  perform autotag.check_quotas(p_workspace_id, null, 1, coalesce(autotag.question_cost(v_provider, true), 0.0000001));
  v_provider := autotag.estimate_question(autotag.lock_provider(), p_question, p_workspace_id);
  v_now := v_provider.refilled_at;
  -- Limit the cap to what one minute's token limit can hold; a larger one would never be admitted.
  v_cap := greatest(v_provider.output_tokens, least(coalesce(p_cap, 0),
    (0.9 * v_provider.tokens_per_minute)::integer - (v_provider.tokens_per_image - v_provider.output_tokens)));
  v_reserved := v_provider.tokens_per_image - v_provider.output_tokens + v_cap;
  -- An error of the model in use (it may have shut down) is a reason to compare, so it does not hold back other models. If
  -- the error affects those too, their own calls show it.
  if v_provider.account_error is not null
    and (v_provider.account_error_from = 'storage' or p_question ->> 'model' = (select s.model from autotag.settings s)) then
    return autotag.retry_later('account', v_now, v_now + (select s.account_probe_interval from autotag.settings s))
      || jsonb_build_object('message', v_provider.account_error);
  elsif v_provider.blocked_until > v_now then
    return autotag.retry_later('retry_after', v_now, v_provider.blocked_until);
  -- A workspace whose next image never fits its window (ready_at is infinite) does not hold others back. Queues that no claim has
  -- counted yet (not joined) wait, too.
  elsif v_provider.account_error is null
    and (exists (select from autotag.workspaces ws where ws.queued > 0 and (ws.ready or ws.ready_at < 'infinity'))
      or exists (select from autotag.queues q where not q.joined and q.queued > 0)) then
    return autotag.retry_later('live', v_now, v_now + autotag.clock_interval(1));
  end if;
  v_next := v_now + interval '1 min' * greatest(0,
    (1 - v_provider.requests_left) / v_provider.requests_per_minute,
    (1 - v_provider.day_left) / (v_provider.requests_per_day / 1440.0),
    (v_reserved - v_provider.tokens_left) / v_provider.tokens_per_minute);
  if v_next > v_now then
    return autotag.retry_later('provider', v_now, v_next);
  end if;
  if not autotag.try_window(p_workspace_id, 'realtime') then
    return autotag.retry_later('window', v_now, v_now + autotag.clock_interval(1));
  end if;
  v_window := autotag.admit(p_workspace_id, 'realtime', 1, v_reserved, false);
  if v_window.admitted = 0 and v_window.retry_at is null then
    perform autotag.refuse(429, 'exceeds_limit',
      format('One image with %s reserves %s tokens, more than this workspace may use in a minute.',
        p_question ->> 'model', v_reserved),
      'Raise its limit (max_units in public.workspace_rate_limits), or choose a lower effort.');
  elsif v_window.admitted = 0 then
    return autotag.retry_later('window', v_window.at, v_window.retry_at);
  end if;
  update autotag.provider_limits
  set requests_left = v_provider.requests_left - 1, tokens_left = v_provider.tokens_left - v_reserved,
      day_left = v_provider.day_left - 1, refilled_at = v_now
  where id;
  return jsonb_build_object('admitted', true, 'reserved', v_reserved, 'reserved_at', v_window.at, 'cap', v_cap);
end $$;

-- admit_comparison()'s reply when the call has to wait until p_until.
create or replace function autotag.retry_later(p_reason text, p_now timestamptz, p_until timestamptz) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_build_object('admitted', false, 'reason', p_reason, 'wait', autotag.real_seconds(p_until - p_now));
end $$;

-- The question to ask after the provider refused a parameter of p_question: the model's row moves to its next form, unless
-- another call has done that already. Null: there is no other form. Locks: the model's row (skip locked).
create or replace function autotag.next_request_form(p_question jsonb, p_parameter text) returns jsonb
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
  -- Here the effort may be one that the comparison tries out; the refusal says nothing about the one in the model's row.
  if p_parameter = 'reasoning_effort' and v_effort is distinct from (autotag.find_model(v_model)).reasoning_effort then
    return null;
  end if;
  if autotag.downgrade_request_form(v_model, p_parameter) then
    v_question := autotag.question_for(v_model, v_effort);
  end if;
  return case when v_question <> p_question then v_question end;
end $$;

-- What to do next about an image: {next: done | again | failed | stop}. again: with `question` and `cap` where given, after
-- `wait` seconds; stop: no call can succeed, `message` says why. p_report as in settle_comparison().
create or replace function autotag.next_action(p_question jsonb, p_report jsonb, p_answer autotag.answer) returns jsonb
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
  -- A reply that is not JSON counts as the provider's lack of a format only until one answer of this comparison was usable.
  if v_error ->> 'parameter' is not null and (v_error ->> 'kind' <> 'image' or not v_proven) then
    v_question := autotag.next_request_form(p_question, v_error ->> 'parameter');
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
      -- admit_comparison() returns the time, except for a host of images
      return jsonb_build_object('next', 'again',
        'wait', case when v_error ->> 'origin' = 'host' then (v_error ->> 'retry_after')::double precision end);
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

-- Settles one call: next_action()'s reply, and `cost` (dollars; null: unknown, or the provider billed nothing). p_report:
-- {reserved, reserved_at, cap (from admit_comparison; absent: nothing was admitted), called, usage, error (as in settle()),
-- failures (transient failures of this image so far), cut_off (an answer about it was cut off before), proven (this
-- comparison has had a usable answer)}. p_observed: limits from the reply's headers (update_provider_limits). Corrects bucket and
-- window as settle() does, records the usage, and learns the token use of this question. An error of kind account stops
-- only this comparison: live calls meet it themselves.
-- Locks: window, usage, provider.
create or replace function autotag.settle_comparison(
  p_workspace_id autotag.workspace_id, p_question jsonb, p_report jsonb, p_observed jsonb default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer autotag.answer;
  v_used integer;              -- tokens of the prompt; null: the provider gave no figures
  v_free boolean;              -- the call took nothing from the provider's bucket
  v_brief autotag.briefs := autotag.compose_brief(p_workspace_id);
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
  perform from autotag.provider_limits for update;
  if v_answer.reserved_tokens is not null then
    perform autotag.refund_provider(v_free::integer, case when v_free then v_answer.reserved_tokens
      else coalesce(v_answer.reserved_tokens - v_used - v_answer.output_tokens, 0) end);
  end if;
  if p_observed is not null then
    perform autotag.update_provider_limits(p_observed);
  end if;
  if v_used > 0 and (v_brief.id is null) = (v_brief.profile_id is null) then   -- nothing is learned for a brief that no upload has used
    -- A cut-off answer needs an unknown number of tokens: at least the cap of the next try.
    perform autotag.learn(array[v_used], array[case when v_answer.error ->> 'code' = 'answer_too_long'
      then coalesce(autotag.next_cap(v_answer), 1) else greatest((v_answer.usage -> 'output')::integer, 1) end],
      p_question, array[v_brief.id]);
  end if;
  return autotag.next_action(p_question, p_report, v_answer) || jsonb_build_object('cost', autotag.price_tokens(
    coalesce(v_answer.usage ->> 'model', p_question ->> 'model'), coalesce(v_answer.usage ->> 'tier', 'default'), v_used,
    least((v_answer.usage -> 'cached')::integer, v_used), (v_answer.usage -> 'cache_write')::integer,
    (v_answer.usage -> 'output')::integer));
end $$;
