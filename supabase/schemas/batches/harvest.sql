-- Harvests a batch that has ended: stores its answers, and retries its images without an answer.

-- Ends a batch, however it went. Broadcasts batch-complete if OpenAI had the batch and no outcome waits for the host; otherwise
-- announce_stored() broadcasts it after the last outcome. requeue_batch() deals with images without an answer. p_error: null keeps
-- the row's error. The caller holds the batch and its job.
create or replace function autotag.end_batch(p_batch autotag.batches, p_error text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.batches b
  set state = 'done', worker_id = null, finished_at = autotag.now(), reserved_tokens = 0, error = coalesce(p_error, b.error)
  where b.id = p_batch.id;
  perform autotag.announce_stored(array[p_batch.id]);
end $$;

-- Broadcasts that all answers of a batch are stored. Only announce_stored() calls it, once per batch.
create or replace function autotag.broadcast_stored(p_batch autotag.batches) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_batch.openai_batch_id is not null then
    perform autotag.broadcast('batch-updates', 'batch-complete',
      jsonb_build_object('batch_id', p_batch.openai_batch_id), false);
    perform autotag.broadcast_to_workspace(p_batch.workspace_id, 'batch-complete', jsonb_build_object(
      'batch_id', p_batch.openai_batch_id, 'job_id', p_batch.job_id,
      'image_count', p_batch.image_count, 'status', p_batch.openai_status));
  end if;
end $$;

-- Puts tasks of a job, in this order, into new planned batches of the job. p_not_before: when the batches may start. p_from: the
-- batch that the tasks come from, if OpenAI never had it; the first new batch takes over its admission to the workspace's window.
-- The caller holds job and tasks. Locks: window (skip locked).
create or replace function autotag.place_in_batches(
  p_job autotag.jobs, p_tasks bigint[], p_not_before timestamptz default '-infinity', p_from autotag.batches default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_count integer := cardinality(p_tasks);
  v_last integer := (select coalesce(max(b.ordinal), 0) from autotag.batches b where b.job_id = p_job.id);
  v_left record;
  v_batches integer;
begin
  if v_count = 0 then
    return;
  end if;
  select * into v_left from autotag.batches_left(p_job.workspace_id);
  v_batches := autotag.plan_batches(v_count, v_left.batches, v_left.window_images);
  with placed as materialized (
    -- The sizes of the batches differ by one at most. A join by ranges would compare each task with each batch.
    select u.id, v_last + (u.i * v_batches + v_count - 1) / v_count as ordinal from unnest(p_tasks) with ordinality u (id, i)
  ), made as (
    insert into autotag.batches (job_id, workspace_id, ordinal, image_count, extra_tokens, created_at, not_before, admitted_at)
    select p_job.id, p_job.workspace_id, x.ordinal, count(*),
      sum(greatest(t.min_output_tokens - p.output_tokens, 0)) + count(*) * autotag.extra_tokens(p_job.brief_id), autotag.now(),
      p_not_before, case when x.ordinal = v_last + 1 then p_from.admitted_at end
    from placed x join autotag.tasks t on t.id = x.id cross join autotag.provider_limits p group by x.ordinal
    returning id, ordinal
  )
  update autotag.tasks t set lane = 'batch', batch_id = m.id, error_code = null, error = null
  from placed x join made m on m.ordinal = x.ordinal where t.id = x.id;
  perform autotag.give_back_images(p_from, p_from.image_count - p_from.express_count - v_count / v_batches);
  perform autotag.refresh_eta(p_job.id);
  perform pg_notify('autotag', 'batch');
end $$;

-- Stores answers of a batch, and errors of images that could not become lines of its file: [{task, result | error, usage, mark}].
-- Ignores tasks that are not in this batch any more or have their answer, so a second harvest changes nothing. An error that
-- allows a retry is only recorded on its task, once, with its failure; batch_finish() retries these images, because only then
-- their number is known. p_keep: as in settle(). Returns {accepted, notices: [{event, notice}]}: how many tasks ended, and
-- sentences for the log.
-- Locks: job, batch, tasks, assets (finish), usage, provider (skip locked).
create or replace function autotag.batch_answers(
  p_worker uuid, p_batch uuid, p_attempt integer, p_answers jsonb, p_keep boolean default false
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set random_page_cost = 1.1
as $$
declare
  v_batch autotag.batches;
  v_report autotag.provider_report;
  v_judged record;
  v_answers autotag.answer[];
  v_again autotag.answer[];    -- of these, the errors that allow a retry
  v_notices jsonb;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  perform autotag.check_list(p_answers);
  v_batch := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  v_answers := autotag.read_batch_answers(v_batch, p_answers);
  v_report := autotag.summarize_calls(p_worker, '{}', null);
  v_report.asked_at := v_batch.asked_at;
  if exists (select from unnest(v_answers) a where a.error is not null) then
    v_judged := autotag.reclassify_errors(v_answers, v_batch.asked_at);
    v_answers := v_judged.answers;
    v_report.form_changed := v_judged.form_changed;
  end if;
  v_report.answers := v_answers;
  if exists (select from unnest(v_answers) a where a.error is not null) then
    v_answers := autotag.judge_retries(v_answers, true, v_batch.asked_at);
    v_again := autotag.leave_to_finish(v_batch.id, v_answers);
    v_answers := array(select a from unnest(v_answers) a where a.task not in (select g.task from unnest(v_again) g));
  end if;
  v_notices := autotag.apply_answers(v_batch.workspace_id, v_answers, not p_keep);
  perform autotag.add_usage(v_report.answers, true, null, v_batch.asked_at);
  return jsonb_build_object('accepted', cardinality(v_answers), 'notices', v_notices || autotag.report_provider(v_report));
end $$;

-- Validates answers and returns those for images of this batch that still need one, at most one per image. The plan is kept, as in
-- read_reports().
create or replace function autotag.read_batch_answers(p_batch autotag.batches, p_answers jsonb) returns autotag.answer[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_max_allowed record := autotag.believable_usage();
  v_brief bigint := (select j.brief_id from autotag.jobs j where j.id = p_batch.job_id);   -- as its lines asked
begin
  return array(
    with reported as materialized (
      select * from autotag.read_answers(p_answers, v_max_allowed.input)
    ), held as materialized (
      select t.id, t.attempt, t.job_id, t.asset_id, greatest(t.min_output_tokens, p_batch.output_tokens) as output_tokens,
        t.error_code is not null as failed, t.image_notes, t.batch_id, t.finished_at
      from autotag.tasks t
      -- By id alone: the index of batches would lead to all of this batch's images, for every page of answers.
      where t.id = any (array(select r.task from reported r))
    )
    select row(x.id, x.attempt, x.job_id, p_batch.workspace_id, null, null, x.output_tokens, x.result,
      case when x.error is not null or x.result is null then autotag.clean_error(x.error, x.result) end,
      case when x.valid_usage then x.usage else autotag.clean_usage(x.usage, v_max_allowed.input,
        greatest(coalesce(4 * x.output_tokens + 4000, 100000), v_max_allowed.uncapped)) end,
      true, x.mark, x.asset_id, v_brief)::autotag.answer
    from (
      select distinct on (h.id) h.*, case when v_brief is null then r.result else autotag.fit_result(r.result, r.fields, v_brief) end
          || case when h.image_notes is null then '{}' else autotag.image_part(h.image_notes) end as result, r.error, r.usage, r.valid_usage, r.mark
      -- a task with a recorded error accepts only a result, so that no error counts twice
      from reported r join held h on h.id = r.task and (not h.failed or r.result is not null)
      where h.batch_id = p_batch.id and h.finished_at is null
      order by h.id, r.place) x);
end $$;

-- Records the errors that allow a retry on their tasks, and returns those answers: batch_finish() retries all images without an
-- answer together, and not before the time that an error asks for. The caller holds the batch and its job. Locks: tasks.
create or replace function autotag.leave_to_finish(p_batch uuid, p_answers autotag.answer[]) returns autotag.answer[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_again autotag.answer[];
begin
  v_again := array(
    select a from unnest(p_answers) a
    join autotag.tasks t on t.id = a.task
    where a.error is not null and not autotag.is_final(a, t.failures));
  update autotag.tasks t
  set error_code = a.error ->> 'code', error = a.error ->> 'message', failures = t.failures + (k.counts or a.error ? 'counts')::integer,
      min_output_tokens = coalesce(autotag.next_cap(a), t.min_output_tokens)
  from unnest(v_again) a join autotag.error_kinds k on k.kind = a.error ->> 'kind'
  where t.id = a.task;
  update autotag.batches b set not_before = greatest(b.not_before, a.until)
  from (
    select autotag.now() + make_interval(secs => max((x.error ->> 'retry_after')::double precision)) as until from unnest(v_again) x) a
  where b.id = p_batch and a.until is not null;
  return v_again;
end $$;

-- All answers of the batch are stored or kept: ends it, and retries the images without an answer (those of a cancelled job fail).
-- Locks: job, batch, tasks.
create or replace function autotag.batch_finish(p_worker uuid, p_batch uuid, p_attempt integer) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
begin
  perform autotag.requeue_batch(v_batch, v_batch.openai_status is distinct from 'failed', 1,
    'no_answer', 'OpenAI gave no answer for this image.');
  perform autotag.end_batch(v_batch, null);
end $$;
