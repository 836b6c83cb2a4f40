-- Writes outcomes to the host's rows. The host's triggers, constraints and transactions can refuse or hold up any row. So all rows are
-- written together first. If that raises an error, smaller parts are written (next_part), down to single rows. An outcome is kept for
-- later (unstored) while another transaction has locked its row, and for a limited time if the error may pass. After any other error, the
-- image fails with the code not_stored. So a bad row affects only its own image, nothing waits for it, and every image ends.

-- Stores the outcomes of images of one workspace: tags or failures, the counts, progress and broadcasts. Outcomes of tasks that
-- have ended meanwhile are dropped. p_own: the transaction is autotag's own, so constraints that the host has deferred are checked
-- here, where an error costs one image. Returns sentences for the operator's log: [{event, notice}].
-- p_waits: how long its parts may wait for locks; then the rest is kept without another try. 150 ms is enough for three parts,
-- and a second finds one image in 500 whose trigger waits for a lock.
-- The caller does not hold the provider row. Locks: tasks, jobs by id, assets; it waits for none longer than lock_timeout.
create or replace function autotag.finish(
  p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_own boolean, p_waits interval default interval '150 ms'
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_parts autotag.parts := autotag.first_part(cardinality(p_items));
  v_next integer := 1;                     -- of p_items, the first one after v_items
  v_items autotag.finished[] := array[]::autotag.finished[];   -- to be stored next: at most 1,000 at a time, because each part copies them
  v_part autotag.finished[];
  v_unshown autotag.finished[] := array[]::autotag.finished[];   -- outcomes that the host's rows refuse to show
  v_try record;
  v_odd record;
  v_ended autotag.ended[] := array[]::autotag.ended[];
  v_notices jsonb := '[]'::jsonb;
begin
  loop
    if v_items = '{}' then
      v_items := p_items[v_next : v_next + greatest(v_parts.size, 1000) - 1];
      v_next := v_next + cardinality(v_items);
      exit when v_items = '{}';
    end if;
    if p_waits <= interval '0' then
      perform autotag.keep(v_items || p_items[v_next:]);
      exit;
    end if;
    v_part := v_items[:v_parts.size];
    v_items := v_items[v_parts.size + 1:];
    v_try := autotag.try_outcomes(p_workspace_id, v_part, p_own);
    v_parts := autotag.next_part(v_parts, cardinality(v_part), v_try.state is not null);
    if autotag.is_lock_error(v_try.state) then
      p_waits := p_waits - v_try.took;
    end if;
    if v_try.state is null then
      v_ended := v_ended || v_try.ended;
      continue;
    elsif cardinality(v_part) = 1 then
      v_odd := autotag.end_odd(p_workspace_id, v_part[1], p_own, v_try.state, v_try.error);
      v_ended := v_ended || v_odd.ended;
      v_unshown := v_unshown || v_odd.unshown;
      v_notices := v_notices || v_odd.notices;
      continue;
    elsif autotag.is_lock_error(v_try.state) then
      v_part := autotag.keep_held(v_part);
    end if;
    if cardinality(v_part) > 1000 then     -- the first try, of all
      p_items := v_part;
      v_next := 1;
    else
      v_items := v_part || v_items;
    end if;
  end loop;
  if v_unshown <> '{}' then
    v_ended := v_ended || autotag.write_outcomes(p_workspace_id, v_unshown, p_own, false);
  end if;
  -- Once for all parts: each update of a job's row makes the next one slower, as long as this transaction runs.
  perform autotag.count_ended(v_ended);
  return v_notices;
end $$;

-- The first part of p_count rows: all of them.
create or replace function autotag.first_part(p_count integer) returns autotag.parts
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return row(greatest(p_count, 1), 0, 64, 0)::autotag.parts;
end $$;

-- The next part, after a part of p_size rows was written or raised (p_raised). A part that raised is halved, down to the row that raises.
-- If one of N rows has raised so far, the next part has N / 2 rows. So each row is tried about twice, however many raise. (To halve the
-- whole each time would try all rows again: 50,000 with 1 % that raise took 60 s.)
create or replace function autotag.next_part(p_parts autotag.parts, p_size integer, p_raised boolean) returns autotag.parts
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  if p_raised and p_size > 1 then
    p_parts.odd := p_size;
  elsif p_raised then
    p_parts.odd := 0;
    p_parts.raised := p_parts.raised + 1;
  else
    p_parts.odd := greatest(p_parts.odd - p_size, 0);
    p_parts.written := p_parts.written + p_size;
  end if;
  p_parts.size := greatest(least(1000, p_parts.written / (2 * (p_parts.raised + 1)),
    case when p_parts.odd > 0 then p_parts.odd / 2 end), 1);
  return p_parts;
end $$;

-- Stores outcomes together (write_outcomes). Its error is returned, not raised: state is its SQLSTATE, null: none. took: how long.
create or replace function autotag.try_outcomes(
  p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_own boolean,
  out ended autotag.ended[], out state text, out error text, out took interval
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_began timestamptz := clock_timestamp();
begin
  ended := autotag.write_outcomes(p_workspace_id, p_items, p_own);
exception when others or assert_failure then
  get stacked diagnostics state = returned_sqlstate, error = message_text;
  took := clock_timestamp() - v_began;
end $$;

-- Decides about one image whose outcome raised this error: it is tagged again (its picture was replaced), kept (keep_error), or refused.
-- unshown: the outcome, if the row did not accept it in any form; the caller stores it without the row.
create or replace function autotag.end_odd(
  p_workspace_id autotag.workspace_id, p_item autotag.finished, p_own boolean, p_state text, p_error text,
  out ended autotag.ended[], out unshown autotag.finished[], out notices jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_try record;
begin
  ended := array[]::autotag.ended[];
  unshown := array[]::autotag.finished[];
  notices := '[]';
  -- Whoever raised AT001: judge_unwritten(), or the host.
  if p_state = 'AT001' and autotag.is_replaced(p_workspace_id, p_item) then
    perform autotag.tag_again(p_item.task);
    return;
  end if;
  notices := autotag.keep_error(array[p_item], p_state, p_error);
  if notices is not null then
    return;
  end if;
  unshown := array[p_item];
  if p_item.result is not null then
    unshown[1].result := null;
    unshown[1].code := 'not_stored';
    unshown[1].message := 'The database refused to store the tags of this image.';
    v_try := autotag.try_outcomes(p_workspace_id, unshown, p_own);
    if v_try.state is null then
      ended := v_try.ended;
      unshown := array[]::autotag.finished[];
    elsif autotag.is_lock_error(v_try.state) then
      notices := autotag.keep_error(array[p_item], v_try.state, v_try.error);   -- another transaction holds its row: keep it for a later try
      if notices is not null then
        unshown := array[]::autotag.finished[];
        return;
      end if;
    end if;
  end if;
  notices := jsonb_build_array(jsonb_build_object('event', 'not_stored', 'notice',
    format('The database refused to store the outcome of image %s: %s', p_item.asset_id, autotag.printable(p_error, 500))));
end $$;

-- Whether the row of an image names another picture than the one that the model saw.
create or replace function autotag.is_replaced(p_workspace_id autotag.workspace_id, p_item autotag.finished) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return p_item.result is not null and p_item.mark is not null and exists (
    select from autotag.describe_assets(array[p_item.asset_id]) d
    where d.workspace_id = p_workspace_id and d.mark is distinct from p_item.mark);
exception when others or assert_failure then
  return false;
end $$;

-- Keeps those of these images whose rows are held, and returns the others.
create or replace function autotag.keep_held(p_items autotag.finished[]) returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_held autotag.asset_id[] := autotag.try_held(p_items);
begin
  perform autotag.keep(array(select i from unnest(p_items) i where i.asset_id in (select unnest(v_held))));
  return array(select i from unnest(p_items) i where i.asset_id not in (select unnest(v_held)));
end $$;

-- Whether an error says that a lock was not free: lock_not_available, deadlock_detected, serialization_failure.
create or replace function autotag.is_lock_error(p_state text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return p_state in ('55P03', '40P01', '40001');
end $$;

-- Queues an image again, because its picture was replaced after the model saw it, and drops its answer, even if that was kept. After
-- max_failures the image fails. Locks: the task.
create or replace function autotag.tag_again(p_task bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_ended autotag.finished[] := autotag.requeue(jsonb_build_array(jsonb_build_object('task', p_task, 'failures', 1,
    'code', 'picture_replaced', 'message', 'The picture was replaced again and again while it was being tagged.')));
begin
  if v_ended = '{}' then
    delete from autotag.unstored un where un.task_id = p_task;
    perform pg_notify('autotag', 'realtime');
  else
    perform autotag.keep(v_ended, false);
  end if;
end $$;

-- Keeps the outcome of one image whose row raised this error, if the error may pass. Null: it cannot pass, or the patience is used up.
-- Otherwise sentences for the operator's log: [{event, notice}].
--   * A row that another transaction holds is tried until it is free.
--   * Other errors use up patience. If the row is free, a lock's error comes from a trigger, which waits for something else or raises
--     the error itself: 64 tries, an hour.
--   * Lack of resources and failures of the server: twenty tries, a quarter of an hour.
--   * Missing columns, tables or privileges are mistakes in the adapter or in a trigger, and a rule on the table (0A) prevents every
--     update (diagnose_rules). Somebody may be fixing that: eight tries, a minute.
--   * All other errors are about the row itself and do not pass.
create or replace function autotag.keep_error(p_items autotag.finished[], p_state text, p_error text) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_costs numeric := case when autotag.is_lock_error(p_state) then 1.0 / 64 when left(p_state, 2) in ('53', '58', 'XX') then 1.0 / 20
    when left(p_state, 2) in ('42', '0A') then 1.0 / 8 end;
begin
  if autotag.is_lock_error(p_state) and autotag.try_held(p_items) <> '{}' then
    perform autotag.keep(p_items);
    return '[]'::jsonb;
  elsif v_costs is null or exists (select from autotag.unstored un where un.task_id = p_items[1].task and un.patience_used >= 1) then
    return null;
  end if;
  perform autotag.keep(p_items, true, v_costs);
  return jsonb_build_array(jsonb_build_object('event', 'store_failed', 'notice', format(
    'The outcome of image %s could not be stored yet: %s', p_items[1].asset_id, autotag.printable(p_error, 500))));
end $$;

-- The images among these whose rows or jobs another transaction holds; all of them if another transaction holds the whole table; none if
-- the look-up fails.
create or replace function autotag.try_held(p_items autotag.finished[]) returns autotag.asset_id[]
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

-- Stores these outcomes together, or raises. An image whose row is gone or has moved counts as completed. One whose picture was
-- replaced is tagged again. p_show: write the host's rows. Outcomes of tasks that have ended meanwhile are dropped. Returns what the
-- caller has to count (count_ended).
create or replace function autotag.write_outcomes(
  p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_own boolean, p_show boolean default true
) returns autotag.ended[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tagged autotag.finished[];
  v_failed autotag.finished[] := array(select i from unnest(p_items) i where i.result is null);
  v_written autotag.asset_id[];
begin
  perform from autotag.jobs j
  where j.id = any (array(select distinct i.job_id from unnest(p_items) i)) order by j.id for no key update;
  if cardinality(v_failed) < cardinality(p_items) then
    v_tagged := autotag.end_tagged(array(select i from unnest(p_items) i where i.result is not null));
    if p_show and v_tagged <> '{}' then
      v_written := autotag.store_tags(array(select i.asset_id from unnest(v_tagged) i), p_workspace_id,
        autotag.match_results(p_workspace_id, array(select i.result from unnest(v_tagged) i)), array(select i.mark from unnest(v_tagged) i));
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
  return array(
    select row(i.job_id, count(i.result), count(i.code), case when count(*) <= 100 then array_agg(i.asset_id) end)::autotag.ended
    from unnest(v_tagged || v_failed) i group by i.job_id);
end $$;

-- Counts the images that have ended in their jobs. The caller holds the jobs.
create or replace function autotag.count_ended(p_ended autotag.ended[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_part autotag.ended;
  v_job autotag.ended;   -- the sum of its parts
begin
  for v_part in select e.* from unnest(p_ended) e order by e.job_id loop
    if v_part.job_id = v_job.job_id then
      v_job.completed := v_job.completed + v_part.completed;
      v_job.failed := v_job.failed + v_part.failed;
      v_job.assets := autotag.add_changed(v_job.assets, v_part.assets);
      continue;
    end if;
    perform autotag.report_job(v_job.job_id, v_job.completed, v_job.failed, v_job.assets) where v_job.job_id is not null;
    v_job := v_part;
  end loop;
  perform autotag.report_job(v_job.job_id, v_job.completed, v_job.failed, v_job.assets) where v_job.job_id is not null;
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
    -- coalesce keeps the plan from using the index of live tasks, all of which it might read
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
-- replaced after the model saw it: its task is queued again (end_odd). Raises if a row is there but did not change: a trigger
-- of the host has refused it silently.
create or replace function autotag.judge_unwritten(p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_written autotag.asset_id[]) returns void
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
-- them. (The plan is kept, as in read_reports(). Planning takes 0.2 ms, and 2 ms after a part of 10,000 rows has raised, because the
-- planner then searches dead entries for the ends of the index.)
create or replace function autotag.fail_tasks(p_workspace_id autotag.workspace_id, p_items autotag.finished[], p_show boolean)
returns autotag.finished[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_now timestamptz := autotag.now();   -- called once: a call per row would take a tenth of the time
  v_failed autotag.finished[];
begin
  with failed as (
    update autotag.tasks t
    set stage = 'failed', error_code = i.code, error = i.message, finished_at = v_now,
        worker_id = null, claim = null, retry_at = null
    from unnest(p_items) i
    where t.id = i.task and t.finished_at is null
    returning i as item
  )
  select array(select f.item from failed f) into v_failed;
  delete from autotag.unstored un where un.task_id in (select i.task from unnest(v_failed) i);
  if p_show and v_failed <> '{}' then
    perform autotag.show_stage(array(select i.asset_id from unnest(v_failed) i), p_workspace_id, 'failed', 0, null,
      array(select i.message from unnest(v_failed) i));
  end if;
  return v_failed;
end $$;
