-- What becomes of an image after its call: tags, a failure, or another try.

-- The table of tasks is empty at one moment and full at the next, and a plan kept from the one reads all of the other. So
-- what joins with it is planned every time: by `execute` where a worker's every report passes, and where few do by
-- `plan_cache_mode`.

-- Ends tasks as failed; the sentence is what the user reads. Arrays run in parallel.
-- The caller holds the locks of jobs and tasks, and counts them with count_finished().
create or replace function autotag.fail_tasks(p_tasks bigint[], p_codes text[], p_messages text[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_failed record;
begin
  with failed as (
    update autotag.tasks t
    set stage = 'failed', error_code = f.code, error = f.message, finished_at = autotag.now(),
        worker_id = null, retry_at = null
    from unnest(p_tasks, p_codes, p_messages) f (id, code, message)
    where t.id = f.id and t.finished_at is null
    returning t.asset_id, t.workspace_id, t.error
  )
  select array_agg(f.asset_id) as assets, array_agg(f.workspace_id) as workspaces, array_agg(f.error) as errors
  into v_failed from failed f;
  perform autotag.show_stage(v_failed.assets, v_failed.workspaces, 'failed', 0, null, v_failed.errors);
end $$;

-- Gives tasks another try as single calls, or fails those that had enough, or whose job was cancelled.
-- p_tries: [{task, failures (to add), delay (seconds; absent: at once), code, message, output_tokens (the least cap of the
-- next answer; absent: as ever), suspect (it stopped the lanes: the code is noted, and a second time counts)}].
-- The caller holds the locks of workspaces, jobs and tasks.
create or replace function autotag.requeue(p_tries jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_max integer := (select s.max_failures from autotag.settings s);
  v_now timestamptz := autotag.now();
  v_end record;
  v_queue record;
begin
  select coalesce(array_agg(t.id), '{}') as ids,
         array_agg(case when j.cancelled_at is null then r.code else 'cancelled' end) as codes,
         array_agg(case when j.cancelled_at is null then r.message else 'Tagging was cancelled.' end) as messages
  into v_end
  from jsonb_to_recordset(p_tries) r (task bigint, failures integer, code text, message text)
  join autotag.tasks t on t.id = r.task and t.finished_at is null
  join autotag.jobs j on j.id = t.job_id
  where j.cancelled_at is not null or t.failures + r.failures >= v_max;
  perform autotag.fail_tasks(v_end.ids, v_end.codes, v_end.messages);
  perform autotag.count_finished(t.job_id, 0, count(*)::integer)
  from autotag.tasks t where t.id = any (v_end.ids) group by t.job_id order by t.job_id;

  for v_queue in
    with back as (
      update autotag.tasks t
      set lane = 'realtime', worker_id = null, batch_id = null,
          failures = t.failures + r.failures,
          min_output_tokens = coalesce(r.output_tokens, t.min_output_tokens),
          error_code = case when r.suspect then r.code else t.error_code end,
          retry_at = v_now + make_interval(secs => r.delay)
      from jsonb_to_recordset(p_tries)
        r (task bigint, failures integer, delay double precision, output_tokens integer, suspect boolean, code text)
      where t.id = r.task and t.finished_at is null
      returning t.workspace_id, t.job_id, t.id, t.retry_at, t.min_output_tokens
    )
    select b.workspace_id, b.job_id, (count(*) filter (where b.retry_at is null))::integer as tasks,
      min(b.id) filter (where b.retry_at is null) as first_task, max(b.min_output_tokens) as output_tokens
    from back b group by b.workspace_id, b.job_id order by 1, 2
  loop
    update autotag.queues q set output_tokens = greatest(q.output_tokens, v_queue.output_tokens)
    where q.job_id = v_queue.job_id and v_queue.output_tokens is not null;
    perform autotag.add_queued(v_queue.workspace_id, v_queue.job_id, v_queue.tasks, v_queue.first_task);
  end loop;
end $$;

-- Applies answers to tasks whose jobs the caller has locked (and their workspaces where an error may requeue): tags
-- are stored, failures end or requeue their image, counts follow. Each task has one answer at most: a result, or else
-- an error (clean_error) whose kind decides (error_kinds). One of kind image ends its image, unless `retry` says that
-- another answer may help: every such answer was paid for, so only max_bad_answers times. One that was cut off gets four
-- times the cap, until max_output_tokens was not enough. Returns sentences for the operator's log: [{event, notice}].
create or replace function autotag.apply_answers(p_answers autotag.answer[]) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_notices jsonb;
begin
  perform autotag.store_results(p_answers);
  if not exists (select from unnest(p_answers) a where a.error is not null) then
    return '[]'::jsonb;
  end if;
  select * into v_settings from autotag.settings;
  v_notices := autotag.end_failed(p_answers);
  perform autotag.try_again(p_answers, v_settings);
  return v_notices;
end $$;

-- Stores the tags of answers without an error, ends their tasks and counts them. The caller: as in apply_answers.
create or replace function autotag.store_results(p_answers autotag.answer[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_done record;
begin
  -- Planned every time, like the reading of reports (read_reports).
  execute $q$
    with completed as (
      delete from autotag.tasks t using unnest($1) a
      where t.id = a.task and a.error is null and t.finished_at is null
      returning t.asset_id, t.workspace_id, a.result, t.job_id
    )
    select coalesce(array_agg(c.asset_id), '{}') as assets, array_agg(c.workspace_id) as workspaces,
      array_agg(c.result) as results, array_agg(c.job_id) as jobs
    from completed c $q$
  into v_done using p_answers;
  if cardinality(v_done.assets) > 0 then
    perform autotag.store_tags(v_done.assets, v_done.workspaces, v_done.results);
    perform autotag.count_finished(j.id, count(*)::integer, 0)
    from unnest(v_done.jobs) j (id) group by j.id order by j.id;
  end if;
end $$;

-- Whether no other try can mend an error of an image that failed p_failures times before.
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

-- Ends images whose error no other try can mend, and counts them. Returns sentences for the operator's log. The caller: as in
-- apply_answers.
create or replace function autotag.end_failed(p_answers autotag.answer[]) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_failed record;
begin
  select coalesce(array_agg(t.id), '{}') as tasks, array_agg(a.error ->> 'code') as codes,
         array_agg(a.error ->> 'message') as messages,
         coalesce(jsonb_agg(jsonb_build_object('event', 'answer_cut_off', 'notice', format(
             'The answer for image %s was cut off at %s tokens, the most that settings.max_output_tokens allows within the limits.',
             t.asset_id, a.output_tokens))) filter (where a.error ->> 'code' = 'answer_too_long'), '[]') as notices
  into v_failed
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  where a.error is not null and autotag.is_final(a, t.failures);
  if cardinality(v_failed.tasks) > 0 then
    perform autotag.fail_tasks(v_failed.tasks, v_failed.codes, v_failed.messages);
    perform autotag.count_finished(t.job_id, 0, count(*)::integer)
    from autotag.tasks t where t.id = any (v_failed.tasks) group by t.job_id order by t.job_id;
  end if;
  return v_failed.notices;
end $$;

-- Gives the other images with an error another try, each after the delay of its kind. The caller: as in apply_answers.
create or replace function autotag.try_again(p_answers autotag.answer[], p_settings autotag.settings) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tries jsonb;
begin
  select jsonb_agg(jsonb_build_object(
      'task', a.task, 'code', a.error ->> 'code', 'message', a.error ->> 'message',
      'failures', (k.counts or a.error ? 'counts')::integer, 'suspect', k.pauses, 'output_tokens', autotag.next_cap(a),
      'delay', case
        -- after the probe: another image has to show whether the trouble is over, not the same again
        when k.pauses then extract(epoch from p_settings.account_probe_interval) + 1
        when k.delays then greatest((a.error ->> 'retry_after')::double precision,
          (0.8 + random() / 5) * least(extract(epoch from p_settings.retry_delay_max),
            extract(epoch from p_settings.retry_delay) * power(2, t.failures))) end))
  into v_tries
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  join autotag.error_kinds k on k.kind = a.error ->> 'kind'
  where a.error is not null and t.finished_at is null;
  if v_tries is not null then
    perform autotag.requeue(v_tries);
    perform pg_notify('autotag', 'realtime');
  end if;
end $$;

-- The highest cap that an answer of a workspace may have: what the settings say, and what fits into its window and into the
-- provider's limit beside the prompt. An image that needs more would wait for ever. (Nobody has told the planner that its
-- tables have one row: for a product of them it would compile.)
create or replace function autotag.max_cap(p_workspace_id uuid) returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off
as $$
  select greatest(s.min_output_tokens, least(s.max_output_tokens,
    l.max_units - (p.tokens_per_image - p.output_tokens),
    (0.9 * p.tokens_per_minute)::integer - (p.tokens_per_image - p.output_tokens)))
  from autotag.settings s, autotag.provider_limits p, autotag.window_limits(p_workspace_id, 'realtime') l
$$;

-- The least cap of the next answer about an image: four times that of one that was cut off; null where none was.
create or replace function autotag.next_cap(p_answer autotag.answer) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_answer.error ->> 'code' = 'answer_too_long'
    then least(4 * p_answer.output_tokens, autotag.max_cap(p_answer.workspace_id)) end;
end $$;

-- Two kinds of error are not the image's: a refused parameter (the model's row takes its next form, and the image is tried
-- again at once), and any error of the provider, or answer that cannot be read, while nothing has worked with this question
-- (treated as a mistake in the configuration). The second error of kind account of one image counts as its failure
-- where others have succeeded meanwhile: one image alone must not stop everybody for ever. Returns the answers with their errors made into that. Locks: the provider row (which the caller holds), the model's row without waiting.
create or replace function autotag.judge_errors(p_answers autotag.answer[], p_asked_at timestamptz default null) returns autotag.answer[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_answers autotag.answer[] := array[]::autotag.answer[];
  v_answer autotag.answer;
  v_asked_at timestamptz;
  v_settled text[] := array[]::text[];    -- parameters that have their next form since this call
  v_suspects text[] := (select k.suspects from autotag.error_kinds k where k.kind = 'account');
begin
  select * into v_provider from autotag.provider_limits;
  foreach v_answer in array p_answers loop
    if v_answer.error is not null and (v_answer.error ->> 'kind' <> 'image'
      -- words instead of JSON before anything has worked: the provider ignores the format that it was asked for
      or v_answer.error ->> 'parameter' is not null and v_provider.proven_at is null) then
      v_asked_at := coalesce(p_asked_at, v_answer.reserved_at);
      if v_answer.error ->> 'parameter' is not null and (
          v_asked_at < v_provider.question_since
          or v_answer.error ->> 'parameter' = any (v_settled)
          or autotag.degrade_model(v_provider.question ->> 'model', v_answer.error ->> 'parameter')) then
        v_settled := v_settled || (v_answer.error ->> 'parameter');
        v_answer.error := v_answer.error || '{"kind": "rate_limit", "code": "asked_differently"}';
      elsif v_provider.proven_at is null and v_answer.error ->> 'kind' = 'transient'
        and v_answer.error ->> 'origin' = 'provider' and v_asked_at >= v_provider.question_since then
        v_answer.error := v_answer.error || '{"kind": "account"}';
      elsif v_answer.error ->> 'kind' = 'account' and (
          -- too large for this provider: a smaller picture may pass, so it may well be this one
          v_answer.error ->> 'code' = any (v_suspects)
          or v_provider.proven_at is not null
            and exists (select from autotag.tasks t where t.id = v_answer.task and t.error_code is not null)) then
        v_answer.error := v_answer.error || '{"counts": true}';
      end if;
    elsif v_provider.proven_at is null and v_answer.error ->> 'code' = 'bad_answer' then
      -- a model that cannot answer would cost every image its tries: it stops the lanes, and its image counts
      v_answer.error := v_answer.error || '{"kind": "account", "counts": true, "message": "The model''s answers cannot be read."}';
    end if;
    v_answers := v_answers || v_answer;
  end loop;
  if cardinality(v_settled) > 0 then
    -- From now on this is another question: what is still under way in the old form is no word about the new one. The new
    -- form is tried at once.
    perform autotag.sync_question(v_provider);
    update autotag.provider_limits p set probe_at = null where p.proven_at is null;
  end if;
  return v_answers;
end $$;

-- What answers say of the account, and of what to expect: an error of kind account stops the lanes, an answer of use
-- starts them; what answers to the present question used is learned. The caller holds the provider row.
create or replace function autotag.note_outcomes(p_answers autotag.answer[], p_asked_at timestamptz default null) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_error jsonb;
  v_inputs integer[];
  v_outputs integer[];
  v_good boolean;
  v_works boolean;             -- one of them shows that it works now: it was asked after whatever made us doubt it
begin
  select * into v_provider from autotag.provider_limits;
  select array_agg((a.usage -> 'input')::integer) filter (where (a.usage -> 'input')::integer > 0),
    -- what a cut-off answer would have needed nobody knows: at least what the next try may have
    array_agg(case when a.error ->> 'code' = 'answer_too_long' then coalesce(autotag.next_cap(a), 1)
      else greatest((a.usage -> 'output')::integer, 1) end) filter (where (a.usage -> 'input')::integer > 0),
    coalesce(bool_or(a.error is null), false),
    coalesce(bool_or(a.error is null and coalesce(p_asked_at, a.reserved_at) >=
      greatest(v_provider.account_error_at, v_provider.fingerprint_since)), false)
  into v_inputs, v_outputs, v_good, v_works
  from unnest(p_answers) a
  where coalesce(p_asked_at, a.reserved_at) >= v_provider.question_since and (a.usage is not null or a.error is null);
  perform autotag.learn(coalesce(v_inputs, '{}'), coalesce(v_outputs, '{}'));
  if v_good then
    update autotag.provider_limits p set has_rate_headers = false where p.has_rate_headers is null;
  end if;
  -- What was asked before the question or the address changed says nothing of the present one.
  select a.error into v_error from unnest(p_answers) a
  where a.error ->> 'kind' = 'account' and coalesce(p_asked_at, a.reserved_at) >=
    greatest(v_provider.question_since, v_provider.fingerprint_since, case when p_asked_at is null then v_provider.proven_at end)
  limit 1;
  if found then
    perform autotag.stop_account(autotag.explain_account(v_error), coalesce(v_error ->> 'origin', 'provider'));
    perform autotag.offer_switch(array(
      select t.worker_id from unnest(p_answers) a join autotag.tasks t on t.id = a.task where a.error ->> 'kind' = 'account'));
  elsif v_works and (v_provider.account_error is not null or v_provider.proven_at is null) then
    perform autotag.resume_account();
    -- Whoever has shown that it works is asked from now on.
    perform autotag.switch_provider(w.base_url, w.fingerprint)
    from autotag.workers w
    where w.fingerprint is not null and w.id = (
      select t.worker_id from unnest(p_answers) a join autotag.tasks t on t.id = a.task
      where a.error is null and t.worker_id is not null limit 1);
    perform pg_notify('autotag', 'realtime');
    perform pg_notify('autotag', 'batch');
  elsif v_provider.proven_at is null and exists (
    select from unnest(p_answers) a where a.error ->> 'kind' = 'image' or not a.called) then
    -- This image has shown nothing: the next one tries at once.
    update autotag.provider_limits p set probe_at = null where p.account_error is null;
    perform pg_notify('autotag', 'realtime');
  end if;
end $$;

-- The sentence for the operator about an error of kind account that a model (null: the present one) met; one that has shut
-- down is named with its successor.
create or replace function autotag.explain_account(p_error jsonb, p_model text default null) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_end jsonb := autotag.describe_shutdown(coalesce(p_model, (select p.question ->> 'model' from autotag.provider_limits p)));
begin
  return concat_ws(' ', p_error ->> 'message', case when p_error ->> 'origin' = 'provider' and (v_end ->> 'days')::integer <= 0 then
    concat_ws(' ', v_end ->> 'message', 'update autotag.settings set model = ' || quote_literal(v_end ->> 'successor') || ';') end);
end $$;
