-- What becomes of an image after its call: tags, a failure, or another try.

-- An answer about one image, or why there is none (error), with what is known of its task.
create type autotag.answer as (
  task bigint,
  attempt integer,
  job_id uuid,
  workspace_id uuid,
  reserved_at timestamptz,     -- single calls: what settle() needs to correct the reservation
  reserved_tokens integer,
  result jsonb,                -- {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model}
  error jsonb,
  usage jsonb,                 -- {input, cached, output}, whenever the provider answered
  called boolean               -- whether it was asked at all
);

-- The table of tasks is empty at one moment and full at the next, and a plan kept from the one reads all of the other. So
-- what joins with it is planned every time: by `execute` where a worker's every report passes, and where few do by
-- `plan_cache_mode`.

-- Ends tasks as failed; the sentence is what the user reads. Arrays run in parallel.
-- The caller holds the locks of jobs and tasks, and counts them with count_finished().
create function autotag.fail_tasks(p_tasks bigint[], p_codes text[], p_messages text[]) returns void
language plpgsql security definer set search_path = '' set plan_cache_mode = 'force_custom_plan'
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
-- p_tries: [{task, failures (to add), delay (seconds; absent: at once), code, message}].
-- The caller holds the locks of workspaces, jobs and tasks.
create function autotag.requeue(p_tries jsonb) returns void
language plpgsql security definer set search_path = '' set plan_cache_mode = 'force_custom_plan'
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
          retry_at = v_now + make_interval(secs => r.delay)
      from jsonb_to_recordset(p_tries) r (task bigint, failures integer, delay double precision)
      where t.id = r.task and t.finished_at is null
      returning t.workspace_id, t.job_id, t.id, t.retry_at
    )
    select b.workspace_id, b.job_id, count(*)::integer as tasks, min(b.id) as first_task
    from back b where b.retry_at is null group by b.workspace_id, b.job_id order by 1, 2
  loop
    perform autotag.add_queued(v_queue.workspace_id, v_queue.job_id, v_queue.tasks, v_queue.first_task);
  end loop;
end $$;

-- Applies answers to tasks whose jobs the caller has locked (and their workspaces where an error may requeue): tags
-- are stored, failures end or requeue their image, counts follow. Each task has one answer at most: a result, or else
-- an error, which is {kind, code, message, retry}:
--   transient   it was nobody's fault: again after a growing, jittered delay; a failure counted
--   rate_limit  again as soon as the provider's block is over; nothing counted
--   account     again when the account works; nothing counted
--   image       this image cannot be tagged; again at once where `retry` says that may help, but every such
--               answer was paid for, so only max_bad_answers times
create function autotag.apply_answers(p_answers autotag.answer[]) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  v_settings autotag.settings;
  v_done record;
  v_failed record;
  v_tries jsonb;
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
    return;
  end if;
  select coalesce(array_agg(t.id), '{}') as tasks, array_agg(a.error ->> 'code') as codes,
         array_agg(a.error ->> 'message') as messages
  into v_failed
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  where a.error ->> 'kind' = 'image'
    and not (coalesce((a.error ->> 'retry')::boolean, false) and t.failures + 1 < v_settings.max_bad_answers);
  if cardinality(v_failed.tasks) > 0 then
    perform autotag.fail_tasks(v_failed.tasks, v_failed.codes, v_failed.messages);
    perform autotag.count_finished(t.job_id, 0, count(*)::integer)
    from autotag.tasks t where t.id = any (v_failed.tasks) group by t.job_id order by t.job_id;
  end if;

  select jsonb_agg(jsonb_build_object(
      'task', a.task, 'code', a.error ->> 'code', 'message', a.error ->> 'message',
      'failures', case when a.error ->> 'kind' in ('transient', 'image') then 1 else 0 end,
      'delay', case when a.error ->> 'kind' = 'transient' then
        (0.5 + random() / 2) * least(extract(epoch from v_settings.retry_delay_max),
          extract(epoch from v_settings.retry_delay) * power(2, t.failures)) end))
  into v_tries
  from unnest(p_answers) a
  join autotag.tasks t on t.id = a.task
  where a.error is not null and t.finished_at is null;
  if v_tries is not null then
    perform autotag.requeue(v_tries);
    perform pg_notify('autotag', 'realtime');
  end if;
end $$;

-- settle: a worker reports what became of its single calls, in bulk.
-- p_reports: [{task, attempt, result | error, usage: {input, cached, output}, called}]; usage is there whenever
-- the provider answered, also when the answer was of no use, and `called` when it was asked at all.
-- p_seen: the newest limits seen in answers' headers (observe_provider), and {sent, sent_age} (note_sent).
-- A report for a task that is not the worker's any more, or with an older attempt, is refused and changes
-- nothing. Returns {accepted, notice}: how many, and a sentence for the log when the provider's limits changed.
-- Locks: provider (where it changes), workspaces (of errors), windows, jobs, tasks; each by id.
create function autotag.settle(p_worker uuid, p_reports jsonb, p_seen jsonb default null) returns jsonb
language plpgsql security definer set search_path = '' set plan_cache_mode = 'force_generic_plan' set random_page_cost = 1.1
as $$
declare
  v_answers autotag.answer[];
  v_failed boolean;            -- whether any of them is an error
  v_account_error text;
  v_window record;
  v_notice text;
  v_refund record;
  v_output integer := (select s.max_output_tokens from autotag.settings s);
begin
  perform from autotag.provider_limits for update;
  execute $q$ select array(
    select distinct on (t.id) row(t.id, t.attempt, t.job_id, t.workspace_id, t.reserved_at, t.reserved_tokens,
      r.result, r.error, r.usage, coalesce(r.called, true))::autotag.answer
    from jsonb_to_recordset($1) r
      (task bigint, attempt integer, result jsonb, error jsonb, usage jsonb, called boolean)
    join autotag.tasks t on t.id = r.task and t.attempt = r.attempt and t.worker_id = $2
    order by t.id) $q$
  into v_answers using p_reports, p_worker;
  v_failed := exists (select from unnest(v_answers) a where a.error is not null);

  -- What the reservations were too much: nothing was asked, or a 429 took nothing; else the provider counts the
  -- prompt and the most that the answer might have had.
  select coalesce(sum(u.requests), 0)::integer as requests, coalesce(sum(u.tokens), 0)::bigint as tokens into v_refund
  from unnest(v_answers) a
  cross join lateral (
    select case when not a.called or a.error ->> 'kind' = 'rate_limit' then 1 else 0 end as requests,
      case when not a.called or a.error ->> 'kind' = 'rate_limit' then a.reserved_tokens
        when a.usage is not null then a.reserved_tokens - (a.usage ->> 'input')::integer - v_output else 0 end as tokens) u
  where a.reserved_tokens is not null;
  if p_seen ? 'sent' then
    perform autotag.note_sent(p_worker, (p_seen ->> 'sent')::integer, (p_seen ->> 'sent_age')::double precision);
  end if;
  -- In this order: what the headers say holds whatever is given back.
  if v_refund.requests <> 0 or v_refund.tokens <> 0 then
    perform autotag.refund_provider(v_refund.requests, v_refund.tokens);
  end if;
  if p_seen is not null then
    v_notice := autotag.observe_provider(p_seen);
  end if;
  -- What is no longer this worker's may still tell that the account is in trouble.
  v_account_error := jsonb_path_query_first(p_reports, '$[*].error ? (@.kind == "account").message') #>> '{}';
  if v_account_error is not null then
    perform autotag.stop_account(v_account_error);
  elsif exists (select from autotag.provider_limits p where p.account_error is not null)
    and exists (select from jsonb_to_recordset(p_reports) r (error jsonb) where r.error is null) then
    perform autotag.resume_account();
    perform pg_notify('autotag', 'realtime');
    perform pg_notify('autotag', 'batch');
  end if;

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
      sum(case when a.usage is not null
            then (a.usage ->> 'input')::integer + (a.usage ->> 'output')::integer - a.reserved_tokens
          when a.error ->> 'code' = 'provider_unreachable' then 0
          else -a.reserved_tokens end)::integer as units
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
  perform autotag.apply_answers(v_answers);
  return jsonb_build_object('accepted', cardinality(v_answers), 'notice', v_notice);
end $$;
