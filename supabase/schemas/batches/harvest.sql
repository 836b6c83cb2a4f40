-- What becomes of a batch that OpenAI has: it moves, ends, is harvested; its images are tagged or tried again.

-- The batch is over, whatever it brought: everybody is told, once, because this is the only place that sends
-- batch-complete. What it leaves without an answer is for requeue_batch(). The caller holds it and its job.
create or replace function autotag.end_batch(p_batch autotag.batches, p_error text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.batches b
  set state = 'done', worker_id = null, stored = true, finished_at = autotag.now(), reserved_tokens = 0,
      error = coalesce(p_error, b.error)
  where b.id = p_batch.id;
  if p_batch.openai_batch_id is not null then
    perform autotag.broadcast('batch-updates', 'batch-complete',
      jsonb_build_object('batch_id', p_batch.openai_batch_id), false);
    perform autotag.broadcast_to_workspace(p_batch.workspace_id, 'batch-complete', jsonb_build_object(
      'batch_id', p_batch.openai_batch_id, 'job_id', p_batch.job_id,
      'image_count', p_batch.image_count, 'status', p_batch.openai_status));
  end if;
end $$;

-- Puts tasks of a job (in order) into new batches of it, which wait their turn. The caller holds job and tasks.
create or replace function autotag.place_in_batches(p_job autotag.jobs, p_tasks bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_count integer := cardinality(p_tasks);
  v_left record;
  v_batches integer;
begin
  if v_count = 0 then
    return;
  end if;
  select * into v_left from autotag.batches_left(p_job.workspace_id);
  v_batches := autotag.plan_batches(v_count, v_left.batches, v_left.window_images);
  with made as (
    insert into autotag.batches (job_id, workspace_id, ordinal, image_count, extra_tokens, created_at)
    select p_job.id, p_job.workspace_id,
      (select coalesce(max(b.ordinal), 0) from autotag.batches b where b.job_id = p_job.id) + n,
      (n::bigint * v_count / v_batches - (n - 1)::bigint * v_count / v_batches)::integer, (
        select coalesce(sum(greatest(t.min_output_tokens - p.output_tokens, 0)), 0)
        from autotag.provider_limits p, unnest(p_tasks) with ordinality u (id, i) join autotag.tasks t on t.id = u.id
        where u.i > (n - 1) * v_count / v_batches and u.i <= n * v_count / v_batches), autotag.now()
    from generate_series(1, v_batches) n
    returning id, ordinal
  ), numbered as (
    select m.id, row_number() over (order by m.ordinal) as n from made m
  )
  update autotag.tasks t set lane = 'batch', batch_id = b.id, error_code = null, error = null
  from unnest(p_tasks) with ordinality u (id, i)
  join numbered b on u.i > (b.n - 1) * v_count / v_batches and u.i <= b.n * v_count / v_batches
  where t.id = u.id;
  perform autotag.refresh_eta(p_job.id);
  perform pg_notify('autotag', 'batch');
end $$;

-- What a worker that was handed a look has seen: [{id, status, output_file_id, error_file_id, total, done, error_code,
-- error, error_kind}], with status `gone` for one that OpenAI does not know (any more, or with this key). A batch that ended
-- waits for a worker to harvest it. OpenAI's queue being full is no failure: the batch is planned again. One that
-- stays gone is over. One that is stuck is cancelled, where the limits let its images go as single calls. Batches
-- that are not in flight are ignored, and rows that do not change are not touched. A worker that has seen many tells them a
-- few at a time, because meanwhile nothing else happens to their uploads. What the provider's words are worth is looked at
-- one by one: one that makes no sense is left out, like what another worker says.
-- Locks: provider (when the account was stopped), workspaces by id, jobs by id, batches by id, tasks by id.
create or replace function autotag.batches_seen(p_worker uuid, p_seen jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_look timestamptz := autotag.was_handed_look(p_worker);
  v_settings autotag.settings;
  v_before autotag.batches;
  v_batch autotag.batches;
  v_seen record;
  v_trouble text;
  v_proven boolean := (select p.proven_at is not null from autotag.provider_limits p);  -- single calls work
  v_progress integer;
  v_eta timestamptz;
  v_jobs uuid[] := array[]::uuid[];
  v_job uuid;
begin
  perform autotag.check_list(p_seen);
  if v_look is null then
    return;
  end if;
  -- Numbers of lines: a file has 50,000 at most.
  select coalesce(jsonb_agg(jsonb_build_object(
    'id', i.id, 'status', i.status, 'output_file_id', autotag.clean_id(s ->> 'output_file_id'),
    'error_file_id', autotag.clean_id(s ->> 'error_file_id'),
    'total', coalesce(autotag.clean_number(s, 'total', 0, 50000), 0)::integer,
    'done', coalesce(autotag.clean_number(s, 'done', 0, 50000), 0)::integer,
    'error_code', autotag.printable(s ->> 'error_code', 100), 'error', autotag.printable(s ->> 'error', 1000),
    'error_kind', autotag.printable(s ->> 'error_kind', 20))), '[]')
  into p_seen
  from jsonb_array_elements(p_seen) s
  cross join lateral (select autotag.clean_id(s ->> 'id') as id, autotag.clean_status(s ->> 'status') as status) i
  where i.id is not null and i.status is not null;
  if exists (select from autotag.provider_limits p where p.account_error_from = 'poll') then
    perform autotag.resume_account('poll');
    perform pg_notify('autotag', 'realtime');
  end if;
  -- Of the account's trouble (no credit) the batch is no more guilty than a single call.
  select s.error into v_trouble from jsonb_to_recordset(p_seen) s (id text, status text, error text, error_kind text)
  join autotag.batches b on b.openai_batch_id = s.id and b.state = 'submitted'
  where s.status = 'failed' and s.error_kind = 'account' limit 1;
  if found then
    perform autotag.stop_account(v_trouble, 'batch');
  end if;
  select * into v_settings from autotag.settings;
  perform from autotag.workspaces w where w.workspace_id in (
    select b.workspace_id from autotag.batches b
    join jsonb_to_recordset(p_seen) s (id text, status text) on s.id = b.openai_batch_id and s.status = 'gone')
  order by w.workspace_id for update;
  perform from autotag.jobs j where j.id in (
    select b.job_id from autotag.batches b
    join jsonb_to_recordset(p_seen) s (id text) on s.id = b.openai_batch_id where b.state = 'submitted')
  order by j.id for update;
  perform from autotag.batches b
  where b.openai_batch_id in (select s.id from jsonb_to_recordset(p_seen) s (id text)) order by b.id for update;

  for v_seen in
    select s.* from jsonb_to_recordset(p_seen) s (id text, status text, output_file_id text, error_file_id text,
      total integer, done integer, error_code text, error text, error_kind text)
    join autotag.batches b on b.openai_batch_id = s.id and b.state = 'submitted'
    order by b.id
  loop
    select * into v_before from autotag.batches b where b.openai_batch_id = v_seen.id and b.state = 'submitted';
    v_batch := v_before;
    if v_seen.status = 'gone' then
      continue when v_batch.vain_look_at = v_look;
      update autotag.batches b set looks_in_vain = b.looks_in_vain + 1, vain_look_at = v_look where b.id = v_batch.id;
      if v_batch.looks_in_vain + 1 >= v_settings.batch_looks_in_vain then
        perform autotag.end_batch(v_batch, 'OpenAI does not know this batch any more (or not with this key).');
        perform autotag.requeue_batch(v_batch, true, 1, 'batch_gone', 'OpenAI lost the batch of this image.');
      end if;
    elsif v_seen.status = 'failed' and (v_seen.error_code = 'token_limit_exceeded'
      -- … unless single calls work all the while: then batches are what this account or deployment cannot do
      or v_seen.error_kind = 'account' and (not v_proven or v_batch.failures + 1 < v_settings.max_bad_answers)) then
      update autotag.batches b
      set state = 'planned', openai_batch_id = null, openai_status = null, reserved_tokens = 0, error = v_seen.error,
          not_before = v_now + v_settings.batch_poll_interval,
          failures = b.failures + (v_seen.error_kind = 'account' and v_proven)::integer
      where b.id = v_batch.id;
    elsif v_batch.openai_status is distinct from v_seen.status or v_batch.request_done < v_seen.done or v_batch.looks_in_vain > 0 then
      update autotag.batches b
      set openai_status = v_seen.status, request_total = greatest(b.request_total, v_seen.total),
          request_done = greatest(b.request_done, v_seen.done), progress_at = v_now, looks_in_vain = 0,
          running_at = coalesce(b.running_at, case when v_seen.status = 'in_progress' then v_now end),
          output_file_id = v_seen.output_file_id, error_file_id = v_seen.error_file_id, error = v_seen.error
      where b.id = v_before.id returning * into v_batch;
      v_progress := autotag.batch_progress(v_batch.request_done, v_batch.request_total);
      v_jobs := array_append(v_jobs, v_batch.job_id);
      if v_seen.status in ('completed', 'failed', 'expired', 'cancelled') then
        update autotag.batches b set state = 'ended', ended_at = v_now, reserved_tokens = 0 where b.id = v_batch.id;
        if v_seen.status = 'completed' then
          perform autotag.note_duration(v_batch, v_now);
        end if;
        perform autotag.advance(autotag.lock_batch_tasks(v_batch.id), 'completing');
        perform pg_notify('autotag', 'batch');
      elsif v_seen.status in ('in_progress', 'finalizing', 'cancelling')
        and (v_before.openai_status is distinct from v_seen.status
          or autotag.batch_progress(v_before.request_done, v_before.request_total) < v_progress) then
        v_eta := (autotag.batch_eta(v_batch, v_now)).p50;
        if v_before.running_at is null then
          perform autotag.advance(autotag.lock_batch_tasks(v_batch.id), 'processing', v_eta);
        end if;
        perform autotag.show_batch_progress(v_batch.id, v_progress, v_eta);
      end if;
    elsif not v_batch.cancel_requested and v_seen.status in ('validating', 'in_progress', 'finalizing')
      and (v_batch.progress_at <= v_now - v_settings.batch_stuck_after
        or v_batch.submitted_at <= v_now - v_settings.batch_give_up_after)
      and autotag.predict_wait(v_batch.workspace_id, v_batch.image_count - v_batch.express_count - v_batch.request_done)
        <= v_settings.realtime_max_wait
    then
      update autotag.batches b set cancel_requested = true, stuck = true where b.id = v_batch.id;
      update autotag.jobs j
      set fallback = 'A batch made no progress, so the rest of its images go as single calls.'
      where j.id = v_batch.job_id;
    end if;
  end loop;
  -- Once an upload, however many of its batches have moved.
  for v_job in select distinct j from unnest(v_jobs) j order by j loop
    perform autotag.tell_progress(v_job, autotag.refresh_eta(v_job));
  end loop;
end $$;

-- Answers of a batch's lines, or images that could not become lines: [{task, result | error, usage}]. A task
-- that is not this batch's any more, or has its answer, is ignored, so that harvesting twice changes nothing. Images that
-- may be tried again are left to batch_finish(), which knows how many there are: why is noted at the task, once, with what
-- it counts. Returns {accepted, notices}: how many ended, and sentences for the log.
-- Locks: provider (first where an error is about everybody; else last and only if it is free), workspace, job, batch, tasks.
create or replace function autotag.batch_answers(p_worker uuid, p_batch uuid, p_attempt integer, p_answers jsonb) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set random_page_cost = 1.1
as $$
declare
  v_workspace uuid := (select b.workspace_id from autotag.batches b where b.id = p_batch);
  v_batch autotag.batches;
  v_settings autotag.settings;
  v_general boolean;           -- an answer is about more than its own image
  v_answers autotag.answer[];
  v_again autotag.answer[];    -- of these, those that are left to batch_finish
  v_notices jsonb;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers of the host's tables believe what stands there
  perform autotag.check_list(p_answers);
  v_general := jsonb_path_exists(p_answers, '$[*].error ? (@.kind == "account" || @.parameter != null)');
  select * into v_settings from autotag.settings;
  if v_general then
    perform autotag.lock_provider();
  end if;
  perform from autotag.workspaces w where w.workspace_id = v_workspace for update;
  v_batch := autotag.hold_batch(p_worker, p_batch, p_attempt);
  v_answers := array(
    select row(x.id, x.attempt, x.job_id, x.workspace_id, null, null, x.output_tokens,
      x.result, autotag.clean_error(x.error, x.result), autotag.clean_usage(x.usage), true)::autotag.answer
    from (
      select distinct on (t.id) t.id, t.attempt, t.job_id, t.workspace_id,
        greatest(t.min_output_tokens, v_batch.output_tokens) as output_tokens,
        autotag.clean_result(a.result) as result, a.error, a.usage
      from (
        select case when e -> 'task' between '1' and '9223372036854775807' then (e -> 'task')::bigint end as task,
          e -> 'result' as result, e -> 'error' as error, e -> 'usage' as usage, i
        from jsonb_array_elements(p_answers) with ordinality u (e, i)) a
      -- of one that is noted already the error was counted before
      join autotag.tasks t on t.id = a.task and t.batch_id = p_batch and t.finished_at is null
        and (t.error_code is null or jsonb_typeof(a.result) = 'object')
      order by t.id, a.i) x);
  if v_general then
    v_answers := autotag.judge_errors(v_answers, v_batch.asked_at);
    perform autotag.note_outcomes(v_answers, v_batch.asked_at);
  end if;
  perform autotag.add_usage(v_answers, true);

  if exists (select from unnest(v_answers) a where a.error is not null) then
    v_again := array(
      select a from unnest(v_answers) a
      join autotag.tasks t on t.id = a.task
      join autotag.error_kinds k on k.kind = a.error ->> 'kind'
      where not k.ends or (a.error ->> 'retry')::boolean
        and case when a.error ->> 'code' = 'answer_too_long' then a.output_tokens < autotag.max_cap(a.workspace_id)
          else t.failures + 1 < v_settings.max_bad_answers end);
    update autotag.tasks t
    set error_code = a.error ->> 'code', error = a.error ->> 'message', failures = t.failures + (k.counts or a.error ? 'counts')::integer,
        min_output_tokens = coalesce(autotag.next_cap(a), t.min_output_tokens)
    from unnest(v_again) a join autotag.error_kinds k on k.kind = a.error ->> 'kind'
    where t.id = a.task;
    v_answers := array(select a from unnest(v_answers) a where a.task <> all (array(select g.task from unnest(v_again) g)));
  end if;
  v_notices := autotag.apply_answers(v_answers);
  if not v_general then
    perform from autotag.provider_limits for update skip locked;
    if found then
      perform autotag.note_outcomes(v_answers || v_again, v_batch.asked_at);
    end if;
  end if;
  return jsonb_build_object('accepted', cardinality(v_answers), 'notices', v_notices);
end $$;

-- Every answer of the batch is stored. Images without one get another try (those of a cancelled job end).
-- Locks: workspace, job, batch, tasks.
create or replace function autotag.batch_finish(p_worker uuid, p_batch uuid, p_attempt integer) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_workspace uuid := (select b.workspace_id from autotag.batches b where b.id = p_batch);
  v_batch autotag.batches;
begin
  perform from autotag.workspaces w where w.workspace_id = v_workspace for update;
  v_batch := autotag.hold_batch(p_worker, p_batch, p_attempt);
  perform autotag.end_batch(v_batch, null);
  perform autotag.requeue_batch(v_batch, v_batch.openai_status is distinct from 'failed', 1,
    'no_answer', 'OpenAI gave no answer for this image.');
end $$;
