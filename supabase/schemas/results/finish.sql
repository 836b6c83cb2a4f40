-- Writing outcomes to the host's rows. The host's triggers, constraints and transactions can refuse or hold up any row, so: the
-- bulk first; if it raises, halves of it, down to the single row. A row that is held is kept for later (unstored), and so is one
-- whose error may pass, for a while. Otherwise a row that raises fails with the code not_stored. So one row costs its own image,
-- nobody waits, and every image ends.

-- Stores the outcomes of images of one workspace: tags or failures, the counts, progress and broadcasts. Outcomes of tasks that
-- have ended meanwhile are dropped. p_own: the transaction is autotag's own, so constraints that the host has deferred are checked
-- here, where an error costs one image. Returns sentences for the operator's log: [{event, notice}].
-- p_waits: how long its parts may wait for locks in vain; then the rest is kept without another try. 150 ms are three parts, and a
-- second finds one image in 500 whose trigger waits for a lock.
-- The caller does not hold the provider row. Locks: tasks, jobs by id, assets; it waits for none longer than lock_timeout.
create or replace function autotag.finish(
  p_workspace_id uuid, p_items autotag.finished[], p_own boolean, p_waits interval default interval '150 ms'
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
begin
  if cardinality(p_items) = 0 then
    return '[]'::jsonb;
  end if;
  return (autotag.finish_apart(p_workspace_id, p_items, p_own, p_waits)).notices;
end $$;

-- The same, in halves where they cannot be stored together. waits_left: of p_waits.
create or replace function autotag.finish_apart(
  p_workspace_id uuid, p_items autotag.finished[], p_own boolean, p_waits interval, out notices jsonb, out waits_left interval
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_began timestamptz := clock_timestamp();
  v_half integer := cardinality(p_items) / 2;
  v_state text;
  v_error text;
  v_part record;
  v_held uuid[];
begin
  notices := '[]';
  waits_left := p_waits;
  if cardinality(p_items) = 0 then
    return;
  end if;
  if waits_left <= interval '0' then
    perform autotag.keep(p_items);
    return;
  end if;
  begin
    perform autotag.write_outcomes(p_workspace_id, p_items, p_own);
    return;
  exception when others or assert_failure then
    get stacked diagnostics v_state = returned_sqlstate, v_error = message_text;
  end;
  if autotag.is_lock_error(v_state) then
    waits_left := waits_left - (clock_timestamp() - v_began);
  end if;
  if v_half = 0 and v_state = 'AT001' then   -- raised by judge_unwritten()
    perform autotag.tag_again(p_items[1].task);
    return;
  elsif v_half = 0 then
    notices := coalesce(autotag.keep_error(p_items, v_state, v_error), autotag.refuse_row(p_workspace_id, p_items, p_own, v_error));
    return;
  elsif autotag.is_lock_error(v_state) then
    -- Keep the images whose rows are held, and try the others at once.
    v_held := autotag.try_held(p_items);
    perform autotag.keep(array(select i from unnest(p_items) i where i.asset_id in (select unnest(v_held))));
    p_items := array(select i from unnest(p_items) i where i.asset_id not in (select unnest(v_held)));
    v_half := cardinality(p_items) / 2;
  end if;
  v_part := autotag.finish_apart(p_workspace_id, p_items[:v_half], p_own, waits_left);
  notices := v_part.notices;
  v_part := autotag.finish_apart(p_workspace_id, p_items[v_half + 1:], p_own, v_part.waits_left);
  notices := notices || v_part.notices;
  waits_left := v_part.waits_left;
end $$;

-- Whether an error says that a lock was not free: lock_not_available, deadlock_detected, serialization_failure.
create or replace function autotag.is_lock_error(p_state text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return p_state in ('55P03', '40P01', '40001');
end $$;

-- The picture of an image was replaced after the model saw it: the image is queued again, and its answer is dropped, also where it was
-- kept. After max_failures the image fails. Locks: the task.
create or replace function autotag.tag_again(p_task bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_ended autotag.finished[] := autotag.requeue(jsonb_build_array(jsonb_build_object('task', p_task, 'failures', 1,
    'code', 'picture_replaced', 'message', 'The picture was replaced again and again while it was being tagged.')));
begin
  if v_ended = '{}' then
    delete from autotag.unstored u where u.task_id = p_task;
    perform pg_notify('autotag', 'realtime');
  else
    perform autotag.keep(v_ended, false);
  end if;
end $$;

-- Writing the row of one image raised this error: keeps its outcome if the error may pass. Null: it does not, or has not passed.
-- Otherwise sentences for the operator's log: [{event, notice}].
--   * A row that another transaction holds is waited for as long as it takes.
--   * Other errors use up patience: a lock's error of a row that is free comes from a trigger, which waits for something else or
--     raises it itself. It is tried 64 times, an hour.
--   * Lack of resources and failures of the server: twenty tries, a quarter of an hour.
--   * Missing columns, tables or privileges are mistakes in the adapter or in a trigger, which somebody may be mending: eight
--     tries, a minute.
--   * All others are the row's own.
create or replace function autotag.keep_error(p_items autotag.finished[], p_state text, p_error text) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_costs numeric := case when autotag.is_lock_error(p_state) then 1.0 / 64 when left(p_state, 2) in ('53', '58', 'XX') then 1.0 / 20
    when left(p_state, 2) = '42' then 1.0 / 8 end;
begin
  if autotag.is_lock_error(p_state) and autotag.try_held(p_items) <> '{}' then
    perform autotag.keep(p_items);
    return '[]'::jsonb;
  elsif v_costs is null or exists (select from autotag.unstored u where u.task_id = p_items[1].task and u.patience_used >= 1) then
    return null;
  end if;
  perform autotag.keep(p_items, true, v_costs);
  return jsonb_build_array(jsonb_build_object('event', 'store_failed', 'notice', format(
    'The outcome of image %s could not be stored yet: %s', p_items[1].asset_id, autotag.printable(p_error, 500))));
end $$;

-- The images of these whose rows or jobs another transaction holds; all of them if even the table is held; none if it cannot be
-- found out.
create or replace function autotag.try_held(p_items autotag.finished[]) returns uuid[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_jobs uuid[];
begin
  v_jobs := array(
    select j.id from autotag.jobs j where j.id in (select i.job_id from unnest(p_items) i) for no key update skip locked);
  return autotag.held_assets(array(select i.asset_id from unnest(p_items) i))
    || array(select i.asset_id from unnest(p_items) i where i.job_id not in (select unnest(v_jobs)));
exception when others then
  return array(select i.asset_id from unnest(p_items) i where autotag.is_lock_error(sqlstate));
end $$;

-- The host refuses to store the outcome of one image, with this error: the image fails with the code not_stored, and its row shows
-- that if the host lets it.
create or replace function autotag.refuse_row(p_workspace_id uuid, p_items autotag.finished[], p_own boolean, p_error text) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_item autotag.finished := p_items[1];
  v_notices jsonb;
begin
  if v_item.result is not null then
    v_item.result := null;
    v_item.code := 'not_stored';
    v_item.message := 'The database refused to store the tags of this image.';
  end if;
  begin
    perform autotag.write_outcomes(p_workspace_id, array[v_item], p_own);
  exception when others or assert_failure then
    if autotag.is_lock_error(sqlstate) then
      v_notices := autotag.keep_error(p_items, sqlstate, sqlerrm);   -- its row is held now, so all is tried again
    end if;
    if v_notices is not null then
      return v_notices;
    end if;
    perform autotag.write_outcomes(p_workspace_id, array[v_item], p_own, false);
  end;
  return jsonb_build_array(jsonb_build_object('event', 'not_stored', 'notice',
    format('The database refused to store the outcome of image %s: %s', v_item.asset_id, autotag.printable(p_error, 500))));
end $$;

-- Stores these outcomes together, or raises. An image whose row is gone or has moved counts as completed. One whose picture was
-- replaced is tagged again. p_show: write the host's rows. Outcomes of tasks that have ended meanwhile are dropped.
create or replace function autotag.write_outcomes(
  p_workspace_id uuid, p_items autotag.finished[], p_own boolean, p_show boolean default true
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tagged autotag.finished[];
  v_failed autotag.finished[] := array(select i from unnest(p_items) i where i.result is null);
  v_written uuid[];
  v_job record;
begin
  perform from autotag.jobs j
  where j.id = any (array(select distinct i.job_id from unnest(p_items) i)) order by j.id for no key update;
  if cardinality(v_failed) < cardinality(p_items) then
    v_tagged := autotag.end_tagged(array(select i from unnest(p_items) i where i.result is not null));
    if p_show and v_tagged <> '{}' then
      v_written := autotag.store_tags(array(select i.asset_id from unnest(v_tagged) i), p_workspace_id,
        array(select i.result from unnest(v_tagged) i), array(select i.mark from unnest(v_tagged) i));
      if coalesce(cardinality(v_written), 0) < cardinality(v_tagged) then
        perform autotag.judge_unwritten(p_workspace_id, v_tagged, v_written);
      end if;
    end if;
  end if;
  if v_failed <> '{}' then
    v_failed := autotag.fail_tasks(p_workspace_id, v_failed, p_show);
  end if;
  if p_own and p_show then
    set constraints all immediate;
  end if;
  for v_job in
    select i.job_id as id, count(i.result)::integer as completed, count(i.code)::integer as failed
    from unnest(v_tagged || v_failed) i group by i.job_id order by i.job_id
  loop
    perform autotag.count_finished(v_job.id, v_job.completed, v_job.failed);
  end loop;
end $$;

-- Deletes the tasks of tagged images, and returns the images whose tasks had not ended. The caller holds their jobs. (The plan is
-- kept, as in read_reports().)
create or replace function autotag.end_tagged(p_items autotag.finished[]) returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_deleted bigint[];
begin
  with deleted as (
    -- coalesce: the plan may not use the index of live tasks, and read all of it
    delete from autotag.tasks t
    where t.id = any (array(select i.task from unnest(p_items) i)) and coalesce(t.finished_at, 'infinity') = 'infinity'
    returning t.id
  )
  select coalesce(array_agg(d.id), '{}') into v_deleted from deleted d;
  if cardinality(v_deleted) = cardinality(p_items) then
    return p_items;
  end if;
  return array(select i from unnest(p_items) i join unnest(v_deleted) d on d = i.task);
end $$;

-- Looks at tagged images whose rows were not written. Returns if all of them are gone or have moved. Raises AT001 if a picture was
-- replaced after the model saw it: its task is queued again (finish_apart). Raises if a row is there but did not change: a trigger
-- of the host has refused it silently.
create or replace function autotag.judge_unwritten(p_workspace_id uuid, p_items autotag.finished[], p_written uuid[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_row record;
begin
  select i.asset_id, i.mark is not null and d.mark is distinct from i.mark as replaced into v_row
  from unnest(p_items) i
  join autotag.describe_assets(array(select m.asset_id from unnest(p_items) m where m.asset_id not in (select unnest(p_written)))) d
    on d.asset_id = i.asset_id
  where d.workspace_id = p_workspace_id limit 1;
  if v_row.replaced then
    raise exception 'the picture of image % was replaced', v_row.asset_id using errcode = 'AT001';
  elsif found then
    raise exception 'the row of image % did not change', v_row.asset_id using errcode = 'triggered_data_change_violation';
  end if;
end $$;

-- Fails tasks and shows that on the host's rows (p_show). Returns those that had not ended. The caller holds their jobs and counts
-- them.
create or replace function autotag.fail_tasks(p_workspace_id uuid, p_items autotag.finished[], p_show boolean)
returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_failed autotag.finished[];
begin
  with failed as (
    update autotag.tasks t
    set stage = 'failed', error_code = i.code, error = i.message, finished_at = autotag.now(),
        worker_id = null, claim = null, retry_at = null
    from unnest(p_items) i
    where t.id = i.task and t.finished_at is null
    returning i as item
  )
  select array(select f.item from failed f) into v_failed;
  delete from autotag.unstored u where u.task_id in (select i.task from unnest(v_failed) i);
  if p_show and v_failed <> '{}' then
    perform autotag.show_stage(array(select i.asset_id from unnest(v_failed) i), p_workspace_id, 'failed', 0, null,
      array(select i.message from unnest(v_failed) i));
  end if;
  return v_failed;
end $$;
