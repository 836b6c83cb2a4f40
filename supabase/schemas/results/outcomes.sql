-- The outcome of an image after its call: tags, a failure, or a retry.

-- A plan that was cached while the tasks table was empty would scan all of it when it is full. So queries that join it are planned
-- each time: by `execute` in functions that run for every report, by `plan_cache_mode` in the others.

-- Requeues tasks as single calls: once their delay is over, the next claim puts them into their queues. Returns those that are not
-- requeued, because they reach max_failures or their job was cancelled; the caller fails them (finish, keep).
-- p_tries: [{task, failures (to add), delay (seconds; absent: none), code, message, output_tokens (lowest cap of the next answer;
-- absent: unchanged), suspect (its error paused tagging: the code is recorded, and the second such error counts as a failure)}].
-- Locks: tasks.
create or replace function autotag.requeue(p_tries jsonb) returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_max integer := (select s.max_failures from autotag.settings s);
  v_now timestamptz := autotag.now();
  v_ended autotag.finished[];
begin
  select coalesce(array_agg(row(t.id, t.job_id, t.asset_id, null,
      case when j.cancelled_at is null then r.code else 'cancelled' end,
      case when j.cancelled_at is null then r.message else 'Tagging was cancelled.' end, null)::autotag.finished order by t.id), '{}')
  into v_ended
  from jsonb_to_recordset(p_tries) r (task bigint, failures integer, code text, message text)
  join autotag.tasks t on t.id = r.task and t.finished_at is null
  join autotag.jobs j on j.id = t.job_id
  where j.cancelled_at is not null or t.failures + r.failures >= v_max;
  update autotag.tasks t
  set lane = 'realtime', worker_id = null, claim = null, batch_id = null,
      -- tagging_job() derives the stage of a batch's image; from here on, the task has it
      stage = coalesce((select autotag.batch_stage(b.state, b.running_at, b.submitted_at) from autotag.batches b where b.id = t.batch_id), t.stage),
      failures = t.failures + r.failures,
      min_output_tokens = coalesce(r.output_tokens, t.min_output_tokens),
      error_code = case when r.suspect then r.code else t.error_code end,
      retry_at = v_now + make_interval(secs => coalesce(r.delay, 0))
  from jsonb_to_recordset(p_tries)
    r (task bigint, failures integer, delay double precision, output_tokens integer, suspect boolean, code text)
  where t.id = r.task and t.finished_at is null and t.id not in (select e.task from unnest(v_ended) e);
  return v_ended;
end $$;

-- Applies answers to the tasks of one workspace: stores tags, fails or requeues images with an error. Each task has at most one
-- answer: a result, or an error (clean_error) whose kind decides (error_kinds). An error of kind image fails its image, unless
-- `retry` says that another answer may help. Such retries end after max_bad_answers, because every answer is billed. After an
-- answer that was cut off, the retry has four times the cap, up to max_cap(). p_marks[i]: the mark of the picture of p_answers[i].
-- p_store: false: only keeps what has ended, for store_waiting(). Returns sentences for the operator's log: [{event, notice}].
create or replace function autotag.apply_answers(p_workspace_id autotag.workspace_id, p_answers autotag.answer[], p_store boolean) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_ended autotag.finished[];
  v_failed record;
  v_notices jsonb := '[]'::jsonb;
begin
  v_ended := array(
    select row(a.task, a.job_id, a.asset_id, a.result, null, null, a.mark)::autotag.finished
    from unnest(p_answers) a where a.error is null order by a.task);
  if exists (select from unnest(p_answers) a where a.error is not null) then
    select * into v_settings from autotag.settings;
    v_failed := autotag.end_failed(p_answers);
    v_notices := v_failed.notices;
    v_ended := v_ended || v_failed.items || autotag.try_again(p_answers, v_settings);
  end if;
  if p_store then
    return v_notices || autotag.finish(p_workspace_id, v_ended, true);
  end if;
  perform autotag.keep(v_ended, false);
  return v_notices;
end $$;

-- Whether no retry can fix an error of an image that has failed p_failures times.
create or replace function autotag.is_final(p_answer autotag.answer, p_failures integer) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.error_kinds k where k.kind = p_answer.error ->> 'kind' and k.ends)
    and (not (p_answer.error ->> 'retry')::boolean
      or case when p_answer.error ->> 'code' = 'answer_too_long'
        then p_answer.output_tokens >= autotag.max_cap(p_answer.workspace_id)
        else p_failures + 1 >= (select s.max_bad_answers from autotag.settings s) end);
end $$;

-- The images whose error no retry can fix, for finish(), and sentences about them for the operator's log.
create or replace function autotag.end_failed(p_answers autotag.answer[], out items autotag.finished[], out notices jsonb)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select coalesce(array_agg(row(t.id, t.job_id, t.asset_id, null, a.error ->> 'code', a.error ->> 'message', null)::autotag.finished
           order by t.id), '{}'),
         coalesce(jsonb_agg(jsonb_build_object('event', 'answer_cut_off', 'notice', format(
             'The answer for image %s was cut off at %s tokens, the most that settings.max_output_tokens allows within the limits.',
             t.asset_id, a.output_tokens))) filter (where a.error ->> 'code' = 'answer_too_long'), '[]')
  into items, notices
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  where a.error is not null and autotag.is_final(a, t.failures);
end $$;

-- Requeues the other images with an error, each after the delay of its kind. Returns those that are not requeued (requeue).
create or replace function autotag.try_again(p_answers autotag.answer[], p_settings autotag.settings) returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tries jsonb;
begin
  select jsonb_agg(jsonb_build_object(
      'task', a.task, 'code', a.error ->> 'code', 'message', a.error ->> 'message',
      'failures', (k.counts or a.error ? 'counts')::integer, 'suspect', k.pauses, 'output_tokens', autotag.next_cap(a),
      'delay', case
        -- longer than the probe interval, so that the next probe is another image
        when k.pauses then extract(epoch from p_settings.account_probe_interval) + 1
        -- a host of images asks to wait, which has nothing to do with the provider's limits
        when k.delays or a.error ->> 'origin' = 'host' then greatest((a.error ->> 'retry_after')::double precision, autotag.growing_delay(t.failures, p_settings)) end))
  into v_tries
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  join autotag.error_kinds k on k.kind = a.error ->> 'kind'
  where a.error is not null and t.finished_at is null and not autotag.is_final(a, t.failures);
  if v_tries is null then
    return array[]::autotag.finished[];
  end if;
  perform pg_notify('autotag', 'realtime');
  return autotag.requeue(v_tries);
end $$;

-- Seconds until the next try of an image that had failed p_failures times before its last failure; null: it has not failed.
create or replace function autotag.growing_delay(p_failures integer, p_settings autotag.settings) returns double precision
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_failures >= 0 then (0.8 + random() / 5) * least(extract(epoch from p_settings.retry_delay_max),
    extract(epoch from p_settings.retry_delay) * power(2, least(p_failures, 20))) end;
end $$;

-- The highest cap that an answer of a workspace may have: max_output_tokens, or less if less fits into its window and into the
-- provider's limit beside the prompt. An image with a higher cap would wait forever. (jit is off because the planner does not
-- know that these tables have one row each, and would compile for their product.)
create or replace function autotag.max_cap(p_workspace_id autotag.workspace_id) returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off
as $$
  select greatest(s.min_output_tokens, least(s.max_output_tokens,
    w.max_units - (p.tokens_per_image - p.output_tokens),
    (0.9 * p.tokens_per_minute)::integer - (p.tokens_per_image - p.output_tokens)))
  from autotag.settings s, autotag.provider_limits p, autotag.window_limits(p_workspace_id, 'realtime') w
$$;

-- The lowest cap of the next answer about an image: four times the cap of an answer that was cut off, up to max_cap(); null: the
-- answer was not cut off.
create or replace function autotag.next_cap(p_answer autotag.answer) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_answer.error ->> 'code' = 'answer_too_long'
    then least(4 * p_answer.output_tokens, autotag.max_cap(p_answer.workspace_id)) end;
end $$;

-- Reclassifies errors that are not the image's fault, and returns all answers:
--   * A refused parameter: the model's row gets its next request form, and the image is retried at once.
--   * An error of the provider or an unreadable answer while the question is not proven: it becomes an account error, because the
--     configuration is probably wrong.
--   * A second account error of one image, although others had succeeded before it was asked: it counts as a failure of the image,
--     so that one image cannot pause tagging forever.
--   * A refusal because of a brief: blame_brief().
-- form_changed: the model's row got another form, which the caller reports (report_provider).
-- p_asked_at: when a batch's file was built; null: single calls, which have their own times. Locks: the model's row without waiting.
create or replace function autotag.reclassify_errors(
  p_answers autotag.answer[], p_asked_at timestamptz default null, out answers autotag.answer[], out form_changed boolean
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_answer autotag.answer;
  v_asked_at timestamptz;
  v_blamed jsonb;
  v_settled text[] := array[]::text[];    -- parameters whose next form this call has set
  v_suspects text[] := (select k.suspects from autotag.error_kinds k where k.kind = 'account');
begin
  answers := array[]::autotag.answer[];
  select * into v_provider from autotag.provider_limits;
  foreach v_answer in array p_answers loop
    if v_answer.error is not null and (v_answer.error ->> 'kind' <> 'image'
      -- text instead of JSON while the question is not proven: the provider ignores response_format
      or v_answer.error ->> 'parameter' is not null and v_provider.proven_at is null) then
      v_asked_at := coalesce(p_asked_at, v_answer.reserved_at);
      v_blamed := autotag.blame_brief(v_answer, v_provider, v_asked_at);
      if v_blamed is not null then
        v_answer.error := v_blamed;
      elsif v_answer.error ->> 'parameter' is not null and (
          v_asked_at < v_provider.question_since
          or v_answer.error ->> 'parameter' = any (v_settled)
          or autotag.downgrade_request_form(v_provider.question ->> 'model', v_answer.error ->> 'parameter')) then
        v_settled := v_settled || (v_answer.error ->> 'parameter');
        v_answer.error := v_answer.error || '{"kind": "rate_limit", "code": "request_form_changed"}';
      elsif v_provider.proven_at is null and v_answer.error ->> 'kind' = 'transient'
        and v_answer.error ->> 'origin' = 'provider' and v_asked_at >= v_provider.question_since then
        v_answer.error := v_answer.error || '{"kind": "account"}';
      elsif v_answer.error ->> 'kind' = 'account' and (
          -- too large for this provider: a smaller image may pass, so this image may be the cause
          v_answer.error ->> 'code' = any (v_suspects)
          or v_asked_at >= v_provider.proven_at
            and exists (select from autotag.tasks t where t.id = v_answer.task and t.error_code is not null)) then
        v_answer.error := v_answer.error || '{"counts": true}';
      end if;
    elsif v_provider.proven_at is null and v_answer.error ->> 'code' = 'bad_answer' then
      v_blamed := autotag.blame_brief(v_answer, v_provider, coalesce(p_asked_at, v_answer.reserved_at));
      -- A model whose answers cannot be read would fail every image, so it pauses tagging, and a failure of this image is counted.
      v_answer.error := coalesce(v_blamed,
        v_answer.error || '{"kind": "account", "counts": true, "message": "The model''s answers cannot be read."}');
    end if;
    answers := answers || v_answer;
  end loop;
  form_changed := cardinality(v_settled) > 0;
end $$;

-- Decides whether the brief of an image (what its workspace's profile asks) is the cause of an error. Returns the changed error if it is,
-- otherwise null. Once another workspace gets the same refusal and no call succeeds in between, the provider is the cause. The error
-- counts as the provider's, too, if it could harm no other workspace. While the question is proven, an image with such an error fails,
-- and the refusal of a second workspace counts only if its call was made at least a minute later, because a success in that minute would
-- contradict it. Otherwise the image is tried again, after the images of other workspaces. record_outcomes() remembers the error under
-- the name in its `refusal`.
create or replace function autotag.blame_brief(p_answer autotag.answer, p_provider autotag.provider_limits, p_asked_at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  e jsonb := p_answer.error;
  v_what text := coalesce(e ->> 'parameter', e ->> 'code');
  v_first jsonb := p_provider.refusals -> v_what;
  v_works boolean := p_provider.proven_at is not null;
  v_agrees boolean := coalesce(v_first ->> 'workspace' <> p_answer.workspace_id::text
    and (v_first ->> 'at')::timestamptz >= p_provider.question_since, false);
begin
  if p_answer.brief_id is null or not autotag.is_about_request(e) or p_asked_at < p_provider.question_since and e ->> 'parameter' is not null
    or e ->> 'kind' = 'transient' and v_works
    or v_agrees and (not v_works or p_asked_at >= (v_first ->> 'at')::timestamptz + interval '1 min')
    -- this very request has worked in this form, so the provider has changed
    or e ->> 'parameter' is not null and exists (
      select from autotag.learned l where l.model = p_provider.question ->> 'model' and l.brief_id = p_answer.brief_id
        and l.learned_at >= p_provider.question_since)
    or not exists (select from autotag.workspaces ws where ws.workspace_id <> p_answer.workspace_id)
    or not v_works and not exists (
      select from autotag.jobs j where j.finished_at is null and j.workspace_id <> p_answer.workspace_id) then
    return null;
  end if;
  e := e || jsonb_build_object('refusal', v_what, 'parameter', null);
  return case when e ->> 'kind' = 'image' then e
    else e || jsonb_build_object('kind', case when v_works and not v_agrees then 'image' else 'transient' end, 'retry', false,
      'code', 'profile_refused', 'message', 'The AI provider refuses what this workspace''s profile asks: '
        || regexp_replace(e ->> 'message', '^(The provider|The AI service) [^:]{1,60}: ', '')) end;
end $$;

-- Whether a provider's error can come from what one request asks: its length, its schema, a parameter. Key, credit and model cannot. (A
-- worker may not know the words of a provider, but a code that names the context is clear.)
create or replace function autotag.is_about_request(p_error jsonb) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce(p_error ->> 'origin', 'provider') not in ('storage', 'host') and (
    coalesce(p_error ->> 'parameter' <> 'expires_after', false) or coalesce((p_error ->> 'about_request')::boolean, false)
    or p_error ->> 'code' in ('bad_answer', 'request_refused', 'unsupported_parameter')
    or p_error ->> 'kind' = 'account' and (p_error ->> 'code' like '%context%'
      or p_error ->> 'code' = any ((select k.suspects from autotag.error_kinds k where k.kind = 'account')::text[])));
end $$;

-- Stores the first refusal of each parameter or code (blame_brief). Deletes refusals of calls that were made before a call that
-- succeeded. The caller holds the provider row.
create or replace function autotag.record_refusals(p_answers autotag.answer[], p_provider autotag.provider_limits, p_asked_at timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_success timestamptz;
  v_new jsonb;
begin
  select max(coalesce(p_asked_at, a.reserved_at)) filter (where a.error is null),
    coalesce(jsonb_object_agg(a.error ->> 'refusal', jsonb_build_object('workspace', a.workspace_id, 'at', coalesce(p_asked_at, a.reserved_at)))
      filter (where a.error ? 'refusal'), '{}')
  into v_success, v_new from unnest(p_answers) a;
  if v_new = '{}' and (p_provider.refusals = '{}' or v_success is null) then
    return;
  end if;
  update autotag.provider_limits p
  set refusals = coalesce((
    select jsonb_object_agg(r.key, r.value) from (
      select x.key, x.value from jsonb_each(v_new || p_provider.refusals) x
      where (x.value ->> 'at')::timestamptz >= p_provider.question_since
        and coalesce((x.value ->> 'at')::timestamptz > v_success, true)
      order by x.value ->> 'at' desc limit 20) r), '{}')   -- at most 20, because workers choose the names
  where p.id;
end $$;

-- The prompt and answer tokens of answers to the present question, for learn(). p_asked_at: as in reclassify_errors().
create or replace function autotag.tokens_to_learn(
  p_answers autotag.answer[], p_asked_at timestamptz default null, out inputs integer[], out outputs integer[], out briefs bigint[]
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select coalesce(array_agg((a.usage -> 'input')::integer), '{}'),
    -- the length of a cut-off answer is unknown: it is estimated by the cap of the retry
    coalesce(array_agg(case when a.error ->> 'code' = 'answer_too_long' then coalesce(autotag.next_cap(a), 1)
      else greatest((a.usage -> 'output')::integer, 1) end), '{}'),
    coalesce(array_agg(a.brief_id), '{}')
  into inputs, outputs, briefs
  from unnest(p_answers) a
  where (a.usage -> 'input')::integer > 0
    and coalesce(p_asked_at, a.reserved_at) >= (select p.question_since from autotag.provider_limits p);
end $$;

-- Applies answers to the account and the estimates: an account error pauses tagging, a usable answer resumes it, and the usage of
-- answers to the present question is learned. p_worker: whose answers they are. p_asked_at: as in reclassify_errors(). The caller
-- holds the provider row.
create or replace function autotag.record_outcomes(p_worker uuid, p_answers autotag.answer[], p_asked_at timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_error jsonb;
  v_learnt record;
  v_failed boolean;            -- one of them has an error
  v_good boolean;
  v_works boolean;             -- one of them was asked after the last account error or change of address, so tagging works now
begin
  select * into v_provider from autotag.provider_limits;
  v_learnt := autotag.tokens_to_learn(p_answers, p_asked_at);
  perform autotag.learn(v_learnt.inputs, v_learnt.outputs, null, v_learnt.briefs);
  select coalesce(bool_or(a.error is not null), false),
    coalesce(bool_or(a.error is null and coalesce(p_asked_at, a.reserved_at) >= v_provider.question_since), false),
    coalesce(bool_or(a.error is null and coalesce(p_asked_at, a.reserved_at) >=
      greatest(v_provider.account_error_at, v_provider.fingerprint_since, v_provider.question_since)), false)
  into v_failed, v_good, v_works
  from unnest(p_answers) a;
  if v_failed or v_provider.refusals <> '{}' then
    perform autotag.record_refusals(p_answers, v_provider, p_asked_at);
  end if;
  if v_good then
    update autotag.provider_limits p set has_rate_headers = false where p.has_rate_headers is null;
  end if;
  -- Errors of calls from before the question or the address changed do not count.
  select a.error into v_error from unnest(p_answers) a
  where v_failed and a.error ->> 'kind' = 'account' and coalesce(p_asked_at, a.reserved_at) >=
    greatest(v_provider.question_since, v_provider.fingerprint_since, case when p_asked_at is null then v_provider.proven_at end)
  limit 1;
  if found then
    perform autotag.pause_tagging(autotag.explain_account(v_error), coalesce(v_error ->> 'origin', 'provider'));
    perform autotag.offer_switch(array[p_worker]);
  elsif v_works and (v_provider.account_error is not null or v_provider.proven_at is null) then
    perform autotag.resume_tagging();
    -- The address and key of a worker that succeeded become the present ones.
    perform autotag.switch_provider(wk.base_url, wk.fingerprint)
    from autotag.workers wk where wk.fingerprint is not null and wk.id = p_worker and p_asked_at is null;
    perform pg_notify('autotag', 'realtime');
    perform pg_notify('autotag', 'batch');
  elsif v_provider.proven_at is null and exists (
    select from unnest(p_answers) a where a.error ->> 'kind' = 'image' or a.error ? 'refusal' or not a.called) then
    -- This image has proven nothing, so the next one tries at once.
    update autotag.provider_limits p set probe_at = null where p.account_error is null;
    perform pg_notify('autotag', 'realtime');
  end if;
end $$;

-- The sentence for the operator about an account error with p_model (null: the present model). If the model has been shut down,
-- it says so and names the successor.
create or replace function autotag.explain_account(p_error jsonb, p_model text default null) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_end jsonb := autotag.describe_shutdown(coalesce(p_model, (select p.question ->> 'model' from autotag.provider_limits p)));
begin
  return concat_ws(' ', p_error ->> 'message', case when p_error ->> 'origin' = 'provider' and (v_end ->> 'days')::integer <= 0 then
    concat_ws(' ', v_end ->> 'message', 'update autotag.settings set model = ' || quote_literal(v_end ->> 'successor') || ';') end);
end $$;
