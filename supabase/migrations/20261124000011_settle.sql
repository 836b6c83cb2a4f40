-- What becomes of an image after its call: tags, a failure, or another try.

-- An answer about one image, or why there is none (error), with what is known of its task.
create type autotag.answer as (
  task bigint,
  attempt integer,
  job_id uuid,
  workspace_id uuid,
  reserved_at timestamptz,     -- single calls: what settle() needs to correct the reservation
  reserved_tokens integer,
  output_tokens integer,       -- the cap of the answer that was asked for
  result jsonb,                -- {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model}
  error jsonb,                 -- {kind, code, message, retry, retry_after, origin, parameter}
  usage jsonb,                 -- as check_usage() makes it, whenever the provider answered
  called boolean               -- whether it was asked at all
);

-- A result as a worker reports it, made sure of: {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model} and nothing else,
-- at most 50 tags of 50 characters, a caption of 300. Tags that are none (empty, no text, a sentence) are left out, like
-- confidences of none of them. Null: there is no list of tags, or none of it is a tag.
create function autotag.check_result(p_result jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_tags jsonb := p_result -> 'tags';
  v_kept text[];
  v_sure jsonb;
begin
  if v_tags is null or jsonb_typeof(p_result) <> 'object' or jsonb_typeof(v_tags) <> 'array' then
    return null;
  end if;
  -- Nearly every result is as it should be, and is only looked at.
  if autotag.is_tidy(p_result) then
    return p_result;
  end if;
  v_kept := array(
    select k.tag from (
      select distinct on (x.tag) x.tag, x.i from (
        select autotag.printable(e #>> '{}', 51) as tag, i from jsonb_array_elements(v_tags) with ordinality u (e, i)
        where jsonb_typeof(e) = 'string' limit 1000) x
      where length(x.tag) between 1 and 50 order by x.tag, x.i) k
    order by k.i limit 50);
  if v_kept = '{}' and v_tags <> '[]' then
    return null;
  end if;
  if jsonb_typeof(p_result -> 'confidence') = 'object' then
    select jsonb_object_agg(t, autotag.check_number(p_result -> 'confidence', t, 0, 1)) into v_sure
    from unnest(v_kept) t where jsonb_typeof(p_result -> 'confidence' -> t) = 'number';
  end if;
  return jsonb_build_object('tags', to_jsonb(v_kept), 'confidence', coalesce(v_sure, '{}'),
    'caption', coalesce(autotag.printable(case when jsonb_typeof(p_result -> 'caption') = 'string' then p_result ->> 'caption' end, 300), ''),
    'model', coalesce(autotag.printable(case when jsonb_typeof(p_result -> 'model') = 'string' then p_result ->> 'model' end, 100), ''));
end $$;

-- Whether nothing of a result (an object with a list of tags) has to be made sure of. It is looked at as text, which costs
-- a fifth of taking it apart.
create function autotag.is_tidy(p_result jsonb) returns boolean
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_tags text := p_result -> 'tags';
  v_sure text := p_result -> 'confidence';
  v_caption text := p_result ->> 'caption';
  v_model text := coalesce(p_result ->> 'model', '');
begin
  return pg_column_size(p_result) < 8000 and jsonb_array_length(p_result -> 'tags') <= 50
    and p_result - '{tags,confidence,caption,model}'::text[] = '{}'
    and jsonb_typeof(p_result -> 'caption') = 'string' and length(v_caption) <= 300 and length(v_model) <= 100
    and jsonb_typeof(p_result -> 'confidence') = 'object' and coalesce(jsonb_typeof(p_result -> 'model') = 'string', true)
    and autotag.is_plain(v_tags || v_sure || v_caption || v_model) and strpos(v_tags || v_sure, '\') = 0
    -- an element that is no text, a tag or label that is too long or empty, a number that is none from 0 to 1
    and v_tags !~ '\[[^"\]]|, [^"]|[^"]{51}|""' and v_sure !~ ': (1[^,}]|0[^.,}]|[^01])|[^"]{51}|""';
end $$;

-- An error as a worker reports it, made sure of: its kind is one of error_kinds, texts are short and printable, waits make
-- sense. What has no error has to have a result that can be stored (p_result, as check_result() makes it).
create function autotag.check_error(p_error jsonb, p_result jsonb default '{"tags": []}') returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_error is null or jsonb_typeof(p_error) = 'null' then
    if p_result is not null then
      return null;
    end if;
    p_error := '{"kind": "transient", "code": "no_result"}';
  end if;
  return jsonb_build_object(
    'kind', coalesce((select k.kind from autotag.error_kinds k where k.kind = p_error ->> 'kind'), 'transient'),
    'code', coalesce(nullif(autotag.printable(p_error ->> 'code', 100), ''), 'unknown'),
    'message', coalesce(nullif(autotag.printable(p_error ->> 'message', 1000), ''), 'Tagging this image did not work.'),
    'retry', coalesce(p_error ->> 'retry', '') = 'true',
    'retry_after', autotag.check_number(p_error, 'retry_after', 0, 3600),
    'origin', case when p_error ->> 'origin' in ('provider', 'storage', 'host', 'worker') then p_error ->> 'origin' end,
    'parameter', case when p_error ->> 'parameter' in
      ('token_cap', 'reasoning_effort', 'response_format', 'detail', 'service_tier', 'expires_after')
      then p_error ->> 'parameter' end);
end $$;

-- Figures of usage as a worker reports them, made sure of: {input, cached, cache_write, output, reasoning} tokens, none
-- negative or beyond what one answer can have, the model that answered and the service tier (null: it does not say). Null:
-- the provider gave no figures.
create function autotag.check_usage(p_usage jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := p_usage ->> 'model';
  v_tier text := p_usage ->> 'tier';
begin
  if p_usage is null or jsonb_typeof(p_usage) <> 'object' then
    return null;
  end if;
  -- Nearly all are as they should be, and are only looked at. (In jsonb's order nothing but numbers lies between two.)
  if p_usage -> 'input' between '0' and '10000000' and p_usage -> 'output' between '0' and '10000000'
    and p_usage -> 'cached' between '0' and '10000000' and p_usage -> 'cache_write' between '0' and '10000000'
    and p_usage -> 'reasoning' between '0' and '10000000'
    and length(v_model) between 1 and 100 and length(v_tier) between 1 and 20 and autotag.is_plain(v_model || v_tier) then
    return p_usage;
  end if;
  return jsonb_build_object(
    'input', coalesce(autotag.check_number(p_usage, 'input', 0, 10000000), 0)::integer,
    'cached', coalesce(autotag.check_number(p_usage, 'cached', 0, 10000000), 0)::integer,
    'cache_write', coalesce(autotag.check_number(p_usage, 'cache_write', 0, 10000000), 0)::integer,
    'output', coalesce(autotag.check_number(p_usage, 'output', 0, 10000000), 0)::integer,
    'reasoning', coalesce(autotag.check_number(p_usage, 'reasoning', 0, 10000000), 0)::integer,
    'model', nullif(autotag.printable(v_model, 100), ''), 'tier', nullif(autotag.printable(v_tier, 20), ''));
end $$;

-- The table of tasks is empty at one moment and full at the next, and a plan kept from the one reads all of the other. So
-- what joins with it is planned every time: by `execute` where a worker's every report passes, and where few do by
-- `plan_cache_mode`.

-- Ends tasks as failed; the sentence is what the user reads. Arrays run in parallel.
-- The caller holds the locks of jobs and tasks, and counts them with count_finished().
create function autotag.fail_tasks(p_tasks bigint[], p_codes text[], p_messages text[]) returns void
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
    returning t.asset_id, t.error
  )
  select array_agg(f.asset_id) as assets, array_agg(f.error) as errors into v_failed from failed f;
  perform autotag.show_stage(v_failed.assets, 'failed', 0, null, v_failed.errors);
end $$;

-- Gives tasks another try as single calls, or fails those that had enough, or whose job was cancelled.
-- p_tries: [{task, failures (to add), delay (seconds; absent: at once), code, message, output_tokens (the least cap of the
-- next answer; absent: as ever), suspect (it stopped the lanes: the code is noted, and a second time counts)}].
-- The caller holds the locks of workspaces, jobs and tasks.
create function autotag.requeue(p_tries jsonb) returns void
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
-- an error (check_error) whose kind decides (error_kinds). One of kind image ends its image, unless `retry` says that
-- another answer may help: every such answer was paid for, so only max_bad_answers times. One that was cut off gets four
-- times the cap, until max_output_tokens was not enough. Returns sentences for the operator's log: [{event, notice}].
create function autotag.apply_answers(p_answers autotag.answer[]) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_done record;
  v_failed record;
  v_tries jsonb;
  v_notices jsonb := '[]'::jsonb;
begin
  select * into v_settings from autotag.settings;

  -- Planned every time, like the reading of reports in settle().
  execute $q$
    with completed as (
      delete from autotag.tasks t using unnest($1) a
      where t.id = a.task and a.error is null and t.finished_at is null
      returning t.asset_id, a.result, t.job_id
    )
    select coalesce(array_agg(c.asset_id), '{}') as assets, array_agg(c.result) as results, array_agg(c.job_id) as jobs
    from completed c $q$
  into v_done using p_answers;
  if cardinality(v_done.assets) > 0 then
    perform autotag.store_tags(v_done.assets, v_done.results);
    perform autotag.count_finished(j.id, count(*)::integer, 0)
    from unnest(v_done.jobs) j (id) group by j.id order by j.id;
  end if;

  if not exists (select from unnest(p_answers) a where a.error is not null) then
    return v_notices;
  end if;
  select coalesce(array_agg(t.id), '{}') as tasks, array_agg(a.error ->> 'code') as codes,
         array_agg(a.error ->> 'message') as messages,
         coalesce(jsonb_agg(jsonb_build_object('event', 'answer_cut_off', 'notice', format(
             'The answer for image %s was cut off at %s tokens, the most that settings.max_output_tokens allows within the limits.',
             t.asset_id, a.output_tokens))) filter (where a.error ->> 'code' = 'answer_too_long'), '[]') as notices
  into v_failed
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  join autotag.error_kinds k on k.kind = a.error ->> 'kind' and k.ends
  where not (a.error ->> 'retry')::boolean
    or case when a.error ->> 'code' = 'answer_too_long' then a.output_tokens >= autotag.max_cap(a.workspace_id)
       else t.failures + 1 >= v_settings.max_bad_answers end;
  if cardinality(v_failed.tasks) > 0 then
    v_notices := v_failed.notices;
    perform autotag.fail_tasks(v_failed.tasks, v_failed.codes, v_failed.messages);
    perform autotag.count_finished(t.job_id, 0, count(*)::integer)
    from autotag.tasks t where t.id = any (v_failed.tasks) group by t.job_id order by t.job_id;
  end if;

  select jsonb_agg(jsonb_build_object(
      'task', a.task, 'code', a.error ->> 'code', 'message', a.error ->> 'message',
      'failures', (k.counts or a.error ? 'counts')::integer, 'suspect', k.pauses, 'output_tokens', autotag.next_cap(a),
      'delay', case
        -- after the probe: another image has to show whether the trouble is over, not the same again
        when k.pauses then extract(epoch from v_settings.account_probe_interval) + 1
        when k.delays then greatest((a.error ->> 'retry_after')::double precision,
          (0.8 + random() / 5) * least(extract(epoch from v_settings.retry_delay_max),
            extract(epoch from v_settings.retry_delay) * power(2, t.failures))) end))
  into v_tries
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  join autotag.error_kinds k on k.kind = a.error ->> 'kind'
  where a.error is not null and t.finished_at is null;
  if v_tries is not null then
    perform autotag.requeue(v_tries);
    perform pg_notify('autotag', 'realtime');
  end if;
  return v_notices;
end $$;

-- The highest cap that an answer of a workspace may have: what the settings say, and what fits into its window and into the
-- provider's limit beside the prompt. An image that needs more would wait for ever. (Nobody has told the planner that its
-- tables have one row: for a product of them it would compile.)
create function autotag.max_cap(p_workspace_id uuid) returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off
as $$
  select greatest(s.min_output_tokens, least(s.max_output_tokens,
    l.max_units - (p.tokens_per_image - p.output_tokens),
    (0.9 * p.tokens_per_minute)::integer - (p.tokens_per_image - p.output_tokens)))
  from autotag.settings s, autotag.provider_limits p, autotag.window_limits(p_workspace_id, 'realtime') l
$$;

-- The least cap of the next answer about an image: four times that of one that was cut off; null where none was.
create function autotag.next_cap(p_answer autotag.answer) returns integer
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
create function autotag.judge_errors(p_answers autotag.answer[], p_asked_at timestamptz default null) returns autotag.answer[]
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
create function autotag.note_outcomes(p_answers autotag.answer[], p_asked_at timestamptz default null) returns void
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
    perform autotag.pass_turn(array(
      select t.worker_id from unnest(p_answers) a join autotag.tasks t on t.id = a.task where a.error ->> 'kind' = 'account'));
  elsif v_works and (v_provider.account_error is not null or v_provider.proven_at is null) then
    perform autotag.resume_account();
    -- Whoever has shown that it works is asked from now on.
    perform autotag.turn_to(w)
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
create function autotag.explain_account(p_error jsonb, p_model text default null) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_end jsonb := autotag.describe_shutdown(coalesce(p_model, (select p.question ->> 'model' from autotag.provider_limits p)));
begin
  return concat_ws(' ', p_error ->> 'message', case when p_error ->> 'origin' = 'provider' and (v_end ->> 'days')::integer <= 0 then
    concat_ws(' ', v_end ->> 'message', 'update autotag.settings set model = ' || quote_literal(v_end ->> 'successor') || ';') end);
end $$;

-- settle: a worker reports what became of its single calls, in bulk.
-- p_reports: [{task, attempt, result | error, usage: {input, cached, cache_write, output, reasoning, model, tier}, called}];
-- usage is there whenever the provider answered, also when the answer was of no use, and `called` when it was asked at all.
-- p_seen: the newest limits seen in answers' headers (observe_provider), and {sent, sent_age} (note_sent).
-- A report for a task that is not the worker's any more, or with an older attempt, is refused and changes
-- nothing; so is what another login says of a worker. Returns {accepted, notices: [{event, notice}]}: how many, and sentences for the log.
-- Locks: provider, workspaces (of errors), windows, jobs, tasks; each by id.
create function autotag.settle(p_worker uuid, p_reports jsonb, p_seen jsonb default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan' set random_page_cost = 1.1
as $$
declare
  v_answers autotag.answer[];
  v_failed boolean;            -- whether any of them is an error
  v_window record;
  v_changed text;              -- the provider's limits have
  v_refund record;
begin
  perform autotag.check_list(p_reports);
  if not autotag.is_own_worker(p_worker) then
    return jsonb_build_object('accepted', 0, 'notices', '[]'::jsonb);
  end if;
  perform from autotag.provider_limits for update;
  execute $q$ select array(
    select row(x.id, x.attempt, x.job_id, x.workspace_id, x.reserved_at, x.reserved_tokens, x.output_tokens,
      x.result, autotag.check_error(x.error, x.result), autotag.check_usage(x.usage), x.called)::autotag.answer
    from (
      select distinct on (t.id) t.id, t.attempt, t.job_id, t.workspace_id, t.reserved_at, t.reserved_tokens, t.output_tokens,
        autotag.check_result(r.result) as result, r.error, r.usage, r.called
      from (
        select case when e -> 'task' between '1' and '9223372036854775807' then (e -> 'task')::bigint end as task,
          case when e -> 'attempt' between '1' and '2147483647' then (e -> 'attempt')::integer end as attempt,
          e -> 'result' as result, e -> 'error' as error, e -> 'usage' as usage,
          e -> 'called' is distinct from 'false' as called
        from jsonb_array_elements($1) e) r
      join autotag.tasks t on t.id = r.task and t.attempt = r.attempt and t.worker_id = $2
      order by t.id) x) $q$
  into v_answers using p_reports, p_worker;
  v_failed := exists (select from unnest(v_answers) a where a.error is not null);
  if v_failed then
    v_answers := autotag.judge_errors(v_answers);
  end if;

  -- Refund the over-reservation: everything if no call was made or it got a 429, otherwise all but the prompt and the cap.
  select coalesce(sum(u.requests), 0)::integer as requests, coalesce(sum(u.tokens), 0)::bigint as tokens into v_refund
  from unnest(v_answers) a
  cross join lateral (
    select case when not a.called or a.error ->> 'code' = 'rate_limited' then 1 else 0 end as requests,
      case when not a.called or a.error ->> 'code' = 'rate_limited' then a.reserved_tokens
        when a.usage is not null then a.reserved_tokens - (a.usage -> 'input')::integer - a.output_tokens
        else 0 end as tokens) u
  where a.reserved_tokens is not null;
  if p_seen ? 'sent' then
    perform autotag.note_sent(p_worker, autotag.check_number(p_seen, 'sent', 0, 100000)::integer,
      coalesce(autotag.check_number(p_seen, 'sent_age', 0, 3600), 0));
  end if;
  -- In this order: what the headers say holds whatever is given back.
  if v_refund.requests <> 0 or v_refund.tokens <> 0 then
    perform autotag.refund_provider(v_refund.requests, v_refund.tokens);
  end if;
  if p_seen is not null then
    v_changed := autotag.observe_provider(p_seen);
  end if;
  perform autotag.note_outcomes(v_answers);

  if v_failed then
    perform from autotag.workspaces w
    where w.workspace_id in (select a.workspace_id from unnest(v_answers) a where a.error is not null)
    order by w.workspace_id for update;
  end if;

  -- Reserved by estimate, corrected by what was used: nothing where nothing was asked; no tokens where the
  -- provider refused or failed; the estimate where nobody knows (the connection broke before the answer).
  for v_window in
    select a.workspace_id, a.reserved_at,
      -count(*) filter (where not a.called)::integer as requests,
      least(sum(case when a.usage is not null
            then (a.usage -> 'input')::integer + (a.usage -> 'output')::integer - a.reserved_tokens
          when a.error ->> 'code' = 'provider_unreachable' then 0
          else -a.reserved_tokens end), 1000000000)::integer as units
    from unnest(v_answers) a
    where a.reserved_at is not null
    group by a.workspace_id, a.reserved_at order by a.workspace_id, a.reserved_at
  loop
    perform autotag.correct_window(
      v_window.workspace_id, 'realtime', v_window.reserved_at, v_window.requests, v_window.units);
  end loop;

  perform from autotag.jobs j
  where j.id = any (array(select a.job_id from unnest(v_answers) a)) order by j.id for update;
  -- With their jobs locked nobody else touches the tasks; what was taken away until then is not this worker's.
  execute $q$ select array(
    select a from unnest($1) a join autotag.tasks t on t.id = a.task and t.attempt = a.attempt and t.worker_id = $2) $q$
  into v_answers using v_answers, p_worker;

  perform autotag.add_usage(v_answers, false);
  return jsonb_build_object('accepted', cardinality(v_answers), 'notices', case when v_changed is null then '[]'::jsonb
    else jsonb_build_array(jsonb_build_object('event', 'provider_limits_changed', 'notice', v_changed)) end
    || autotag.apply_answers(v_answers));
end $$;
