-- The steps from a planned batch to a batch at OpenAI.

-- One page of a batch's images that still need an answer: the next p_limit (at most 1,000) after task p_after, as
-- [{task, asset_id, bucket, path, url, refused, mark, cap}]. Empty if the worker does not hold the batch.
create or replace function autotag.batch_images(
  p_worker uuid, p_batch uuid, p_attempt integer, p_after bigint, p_limit integer
) returns jsonb
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  with page as (
    select t.id, t.asset_id, t.workspace_id, t.visible_mark, j.user_id, greatest(t.min_output_tokens, b.output_tokens) as cap
    from autotag.tasks t join autotag.batches b on b.id = t.batch_id join autotag.jobs j on j.id = b.job_id
    where t.batch_id = p_batch and t.id > p_after and t.finished_at is null
      and b.worker_id = p_worker and b.attempt = p_attempt and autotag.is_own_worker(p_worker)
    order by t.id limit greatest(least(p_limit, 1000), 0)
  )
  select coalesce(jsonb_agg(jsonb_build_object('task', i.id, 'asset_id', i.asset_id::text,
    'bucket', d.bucket, 'path', d.path, 'url', d.url, 'refused', d.refused, 'mark', d.mark, 'cap', i.cap) order by i.id), '[]')
  from page i
  left join autotag.locate(array(select asset_id from page order by id),
    array(select workspace_id from page order by id), array(select visible_mark from page order by id),
    array(select user_id from page order by id)) d
    on d.asset_id = i.asset_id
$$;

-- Moves the images after p_last_task to a new planned batch, because the input file is full. Does nothing if the old or the new
-- batch would have no image, or if the file is not being built. Locks: job, batches, tasks.
create or replace function autotag.batch_split(p_worker uuid, p_batch uuid, p_attempt integer, p_last_task bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  v_rest bigint[];
  v_new uuid;
begin
  v_rest := array(select id from unnest(autotag.lock_batch_tasks(p_batch)) id where id > p_last_task);
  if v_rest = '{}' or v_batch.state <> 'preparing' or cardinality(v_rest) >= v_batch.image_count - v_batch.express_count then
    return;
  end if;
  insert into autotag.batches (job_id, workspace_id, ordinal, image_count, extra_tokens, created_at)
  select v_batch.job_id, v_batch.workspace_id, max(b.ordinal) + 1, cardinality(v_rest),
    cardinality(v_rest) * autotag.extra_tokens((select j.brief_id from autotag.jobs j where j.id = v_batch.job_id)), v_batch.created_at
  from autotag.batches b where b.job_id = v_batch.job_id
  returning id into v_new;
  update autotag.batches b set image_count = b.image_count - cardinality(v_rest) where b.id = p_batch;
  update autotag.tasks t set batch_id = v_new where t.id = any (v_rest);
  perform pg_notify('autotag', 'batch');
end $$;

-- Locks the unfinished tasks of a batch by id, and returns their ids.
create or replace function autotag.lock_batch_tasks(p_batch uuid) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tasks bigint[];
begin
  with live as (
    select t.id from autotag.tasks t where t.batch_id = p_batch and t.finished_at is null order by t.id for update
  )
  select coalesce(array_agg(id), '{}') into v_tasks from live;
  return v_tasks;
end $$;

-- The worker that holds a batch reports its next step: preparing (also again, until the batch is being created), uploading, then
-- creating with the id of the input file. Locks: job, batch, tasks.
create or replace function autotag.batch_step(
  p_worker uuid, p_batch uuid, p_attempt integer, p_state text, p_input_file_id text default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
begin
  p_input_file_id := autotag.clean_id(p_input_file_id);
  if not coalesce(case p_state
      when 'preparing' then v_batch.state in ('preparing', 'uploading')
      when 'uploading' then v_batch.state in ('preparing', 'uploading')
      when 'creating' then v_batch.state in ('uploading', 'creating') and p_input_file_id is not null end, false) then
    perform autotag.refuse(400, 'step_out_of_order',
      format('A batch that is %s cannot be %s next.', v_batch.state, coalesce(autotag.printable(p_state, 20), 'nothing')),
      'The order is preparing, uploading, creating; creating needs the id of the input file.', jsonb_build_object('batch', p_batch));
  end if;
  update autotag.batches b
  set state = p_state, input_file_id = coalesce(p_input_file_id, b.input_file_id),
      unrecorded_files = b.unrecorded_files
        + case when p_state = 'uploading' then 1 when p_state = 'creating' and b.state = 'uploading' then -1 else 0 end
  where b.id = p_batch;
  if p_state = 'preparing' then
    -- Errors that an earlier worker recorded while it built the file are void, because the images are prepared again.
    update autotag.tasks t set error_code = null, error = null, image_notes = null
    where t.batch_id = p_batch and (t.error_code is not null or t.image_notes is not null);
    perform autotag.broadcast_progress(v_batch.job_id);
  end if;
end $$;

-- Records what the worker did to images of the file that it builds: [{task, image}], image as in clean_image_notes(). The notes are
-- stored with the answers. Locks: job, batch, tasks.
create or replace function autotag.note_images(p_worker uuid, p_batch uuid, p_attempt integer, p_notes jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_list(p_notes);
  perform autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  with noted as materialized (
    select case when e -> 'task' between '1' and '9223372036854775807' then (e -> 'task')::bigint end as task,
      autotag.clean_image_notes(e -> 'image') as notes
    from jsonb_array_elements(p_notes) e
  ), locked as materialized (
    select t.id from autotag.tasks t
    where t.id = any (array(select n.task from noted n)) and t.batch_id = p_batch and t.finished_at is null order by t.id for update
  )
  update autotag.tasks t set image_notes = n.notes from noted n join locked l on l.id = n.task where t.id = l.id;
end $$;

-- Records that OpenAI has created the batch. The worker no longer holds it, and the next poll covers it. Then the worker calls
-- show_batch().
-- Locks: job, batch, provider.
create or replace function autotag.batch_submitted(
  p_worker uuid, p_batch uuid, p_attempt integer, p_openai_batch_id text, p_status text, p_input_file_id text
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz;
  v_batch autotag.batches;
begin
  v_batch := autotag.lock_held_batch(p_worker, p_batch, p_attempt);
  v_now := autotag.now();
  p_openai_batch_id := autotag.clean_id(p_openai_batch_id);
  if v_batch.state <> 'creating' or p_openai_batch_id is null
    or exists (select from autotag.batches b where b.openai_batch_id = p_openai_batch_id) then
    perform autotag.refuse(400, 'step_out_of_order', 'This batch is not being created.',
      'Create it at the provider first, and pass the id that the provider returned.', jsonb_build_object('batch', p_batch));
  end if;
  update autotag.batches b
  set state = 'submitted', worker_id = null, openai_batch_id = p_openai_batch_id,
      openai_status = coalesce(autotag.clean_status(p_status), 'validating'),
      input_file_id = coalesce(autotag.clean_id(p_input_file_id), b.input_file_id), submitted_at = v_now, progress_at = v_now,
      not_before = v_now, missing_polls = 0, running_at = null, request_total = default, request_done = default,
      predicted_seconds = (autotag.predict_batch(b.image_count - b.express_count, v_now, v_now, null, 0, b.id)).p50
  where b.id = p_batch;
  perform autotag.broadcast_progress(v_batch.job_id, autotag.refresh_eta(v_batch.job_id));
  perform autotag.lock_provider();
  -- This ends a pause that a batch began. It does not prove the question, because only an answer does.
  perform autotag.resume_tagging('batch');
  update autotag.provider_limits p
  set next_poll_at = case
    -- its webhook arrived before its id was stored
    when exists (select from autotag.webhooks wh where wh.openai_batch_id = p_openai_batch_id) then '-infinity'
    when p.next_poll_at < v_now then v_now + s.batch_poll_interval
    else least(p.next_poll_at, v_now + s.batch_poll_interval) end
  from autotag.settings s where p.id;
  perform pg_notify('autotag', 'batch');
end $$;

-- Writes stage and ETA to the host's rows of a batch's images: OpenAI has the batch (submitted) or works on it (processing). At most
-- p_limit images after task p_after. Returns the last task shown; null: there are no more, or the batch is in another state. Refuses as
-- `busy` if another transaction holds the upload's row, so that no row changes without a message that names it; the worker calls again
-- later. An image's row that another transaction holds, or that raises, is left out. Locks: job (skip locked), assets (show).
create or replace function autotag.show_batch(p_worker uuid, p_batch uuid, p_after bigint, p_limit integer) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
  v_page record;
  v_has_job boolean;
  v_stage text;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  -- First, so that the batch stays in this state until its rows are written.
  perform from autotag.jobs j
  where j.id = (select b.job_id from autotag.batches b where b.id = p_batch and b.state = 'submitted') for no key update skip locked;
  v_has_job := found;
  select * into v_batch from autotag.batches b where b.id = p_batch and b.state = 'submitted';
  if not found or not autotag.is_own_worker(p_worker) then
    return null;
  end if;
  select array_agg(page.asset_id) as assets, max(page.id) as last into v_page
  from (
    select t.id, t.asset_id from autotag.tasks t where t.batch_id = p_batch and t.id > p_after and t.finished_at is null
    order by t.id limit greatest(least(p_limit, 10000), 0)) page;
  if v_page.last is null then
    return null;
  elsif not v_has_job then
    perform autotag.refuse(503, 'busy', 'Another transaction holds this upload.', 'Call again in a moment.',
      jsonb_build_object('batch', p_batch, 'retry_after', 1));
  end if;
  v_stage := case when v_batch.running_at is null then 'submitted' else 'processing' end;
  perform autotag.show(v_batch.workspace_id, v_page.assets, v_stage, autotag.stage_progress(v_stage),
    (autotag.batch_eta(v_batch, autotag.now())).p50, true);
  perform autotag.broadcast_progress(v_batch.job_id, null, v_page.assets);
  return v_page.last;
end $$;
