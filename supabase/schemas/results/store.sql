-- Outcomes that wait for the host's rows: kept now, stored later.

-- Keeps outcomes for store_waiting(). Their tasks end for workers and queues, and stay live until they are stored. p_tried: their
-- rows were just tried without success, so the next try is delayed: by a quarter of a second, twice as long each time, at most a minute.
-- p_costs: the part of an image's patience that its error used up (keep_error).
-- Locks: tasks by id. It waits for them (another transaction may be reporting the image's stage), because an outcome that is not kept is
-- lost. In finish() it waits no longer than lock_timeout, and raises; then the worker settles again.
create or replace function autotag.keep(p_items autotag.finished[], p_tried boolean default true, p_costs numeric default 0) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_now timestamptz := autotag.now();
begin
  if coalesce(cardinality(p_items), 0) = 0 then
    return;
  end if;
  with live as (
    select t.id, t.workspace_id, t.batch_id, i.result, i.code, i.message, i.mark
    from autotag.tasks t join unnest(p_items) i on i.task = t.id
    where t.finished_at is null order by t.id for update of t
  ), kept as (
    insert into autotag.unstored as un
      (task_id, workspace_id, batch_id, result, error_code, error, mark, tries, patience_used, next_at, kept_at)
    select l.id, l.workspace_id, l.batch_id, l.result, l.code, l.message, l.mark, p_tried::integer, p_costs,
      v_now + case when p_tried then interval '0.25 s' else interval '0' end, v_now
    from live l
    on conflict (task_id) do update
    set tries = un.tries + 1, patience_used = un.patience_used + p_costs, result = excluded.result,
        error_code = excluded.error_code, error = excluded.error,
        next_at = v_now + least(interval '1 min', interval '0.25 s' * power(2, least(un.tries, 10)))
    returning un.task_id
  )
  update autotag.tasks t set worker_id = null, claim = null, batch_id = null, lane = 'realtime', retry_at = 'infinity'
  from kept k where t.id = k.task_id and t.retry_at is distinct from 'infinity';
  perform pg_notify('autotag', 'store');
end $$;

-- workspaces: those with due outcomes. wait: seconds until the next outcome is due; null: there is none. All workers call this whenever
-- an outcome is kept, so it has to be fast: it jumps through the index from workspace to workspace. (The plan is kept, as in
-- read_reports().)
create or replace function autotag.list_unstored(p_worker uuid, out workspaces autotag.workspace_id[], out wait double precision)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
declare
  v_now timestamptz := autotag.now();
begin
  workspaces := '{}';
  if autotag.is_own_worker(p_worker) then
    with recursive found as (
      (select un.workspace_id, un.next_at from autotag.unstored un order by un.workspace_id, un.next_at limit 1)
      union all
      select n.* from found f
      cross join lateral (
        select un.workspace_id, un.next_at from autotag.unstored un where un.workspace_id > f.workspace_id
        order by un.workspace_id, un.next_at limit 1) n
    )
    select coalesce((array_agg(f.workspace_id order by f.next_at) filter (where f.next_at <= v_now))[:1000], '{}') into workspaces from found f;
    wait := autotag.real_seconds((select min(un.next_at) from autotag.unstored un where un.next_at > v_now) - v_now);
  end if;
end $$;

-- The tasks of at most p_limit outcomes of a workspace that are due, for store_waiting(). Skips outcomes that another worker is storing.
-- This is a separate call, so that the worker knows what it tried even if store_waiting() fails (postpone_stores).
create or replace function autotag.pick_unstored(p_worker uuid, p_workspace_id autotag.workspace_id, p_limit integer) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_now timestamptz := autotag.now();
begin
  return array(
    select un.task_id from autotag.unstored un
    where un.workspace_id = p_workspace_id and un.next_at <= v_now and autotag.is_own_worker(p_worker)
    order by un.next_at, un.task_id limit greatest(least(p_limit, 1000), 0) for update skip locked);
end $$;

-- Stores these outcomes of a workspace (pick_unstored) if they are still due. Those whose rows are still held wait longer. Ends the
-- batches whose last answer is stored. Returns {stored, more (whether others are due), notices: [{event, notice}]}.
-- Locks: unstored (skip locked), then as in finish(), batches.
create or replace function autotag.store_waiting(p_worker uuid, p_workspace_id autotag.workspace_id, p_tasks bigint[]) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_now timestamptz := autotag.now();
  v_due bigint[];
  v_items autotag.finished[];
  v_batches uuid[];
  v_notices jsonb;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  perform autotag.check_ids(cardinality(p_tasks));
  if not autotag.is_own_worker(p_worker) then
    return jsonb_build_object('stored', 0, 'more', false, 'notices', '[]'::jsonb);
  end if;
  v_due := array(
    select un.task_id from autotag.unstored un
    where un.task_id = any (p_tasks) and un.workspace_id = p_workspace_id and un.next_at <= v_now limit 1000 for update skip locked);
  select coalesce(array_agg(row(t.id, t.job_id, t.asset_id, un.result, un.error_code, un.error, un.mark)::autotag.finished order by t.id), '{}'),
    array_agg(distinct un.batch_id) filter (where un.batch_id is not null)
  into v_items, v_batches
  from autotag.unstored un join autotag.tasks t on t.id = un.task_id and t.finished_at is null
  where un.task_id = any (v_due);
  v_notices := autotag.finish(p_workspace_id, v_items, true, interval '1 s');
  delete from autotag.unstored un
  where un.task_id = any (v_due) and not exists (select from autotag.tasks t where t.id = un.task_id and t.finished_at is null);
  perform autotag.announce_stored(v_batches);
  return jsonb_build_object('stored', (select count(*) from unnest(v_due) d where not exists (
      select from autotag.unstored un where un.task_id = d)),
    'more', exists (select from autotag.unstored un where un.workspace_id = p_workspace_id and un.next_at <= v_now),
    'notices', v_notices);
end $$;

-- Postpones these outcomes, because store_waiting() took too long for them and was cancelled. For a single outcome, the image's own row
-- is to blame: after max_failures such timeouts it fails with the code not_stored, and its row is not touched again. p_lost: the
-- connection broke several times. That counts as three timeouts, because a row that crashes the server process must not do so for long.
-- Returns sentences for the operator's log: [{event, notice}]. Locks: unstored (skip locked), then as in finish().
create or replace function autotag.postpone_stores(p_worker uuid, p_workspace_id autotag.workspace_id, p_tasks bigint[], p_lost boolean default false)
returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_now timestamptz := autotag.now();
  v_max integer := (select s.max_failures from autotag.settings s);
  v_alone boolean := cardinality(p_tasks) = 1;
  v_timeouts integer := case when v_alone then 1 + 2 * p_lost::integer else 0 end;
  v_row autotag.unstored;
  v_task autotag.tasks;
begin
  perform autotag.check_ids(cardinality(p_tasks));
  if not autotag.is_own_worker(p_worker) then
    return '[]'::jsonb;
  end if;
  for v_row in
    select un.* from autotag.unstored un
    where un.task_id = any (p_tasks) and un.workspace_id = p_workspace_id and un.next_at <= v_now
    limit 1000 for update skip locked
  loop
    if v_alone and v_row.timeouts + v_timeouts >= v_max then
      select * into v_task from autotag.tasks t where t.id = v_row.task_id;
      perform autotag.count_ended(autotag.write_outcomes(p_workspace_id, array[row(v_task.id, v_task.job_id, v_task.asset_id, null,
        'not_stored', case when p_lost then 'The database could not store the tags of this image.'
          else 'The database took too long to store the tags of this image.' end, null)::autotag.finished], true, false));
      return jsonb_build_array(jsonb_build_object('event', 'not_stored', 'notice', format(case when p_lost
        then 'Writing the row of image %s ended the session each time. A trigger on the table does that, or the row is damaged.'
        else 'Writing the row of image %s took too long %s times. A trigger on the table is probably slow.' end, v_task.asset_id, v_max)));
    end if;
    update autotag.unstored un
    set tries = un.tries + 1, timeouts = un.timeouts + v_timeouts,
        next_at = v_now + case when v_alone then least(interval '1 min', interval '0.25 s' * power(2, least(un.tries, 10)))
          else interval '0' end
    where un.task_id = v_row.task_id;
  end loop;
  return '[]'::jsonb;
end $$;

-- Broadcasts batch-complete for each of these batches that has ended, if its last answer is stored. Locks: batches by id.
create or replace function autotag.announce_stored(p_batches uuid[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
begin
  for v_batch in
    select b.* from autotag.batches b
    where b.id = any (p_batches) and b.state = 'done' and not b.stored
      and not exists (select from autotag.unstored un where un.batch_id = b.id)
    order by b.id for no key update skip locked
  loop
    update autotag.batches b set stored = true where b.id = v_batch.id;
    perform autotag.broadcast_stored(v_batch);
  end loop;
end $$;
