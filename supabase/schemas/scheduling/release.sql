-- The order of single calls: fair among workspaces, and within each of them.

-- Counts new queues in their workspaces. A workspace with nothing queued starts at the virtual time of the one served last, so its
-- idle time gives it no credit and no penalty. The caller holds the provider row.
create or replace function autotag.join_queues(p_virtual_time double precision) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  with new as (
    update autotag.queues q set joined = true where not q.joined returning q.workspace_id, q.queued
  )
  insert into autotag.workspaces as ws (workspace_id, queued, virtual_time)
  -- A queue can be empty (a batch without express images). Its workspace gets a row, too, because requeue_due() adds to it.
  select n.workspace_id, sum(n.queued), p_virtual_time from new n group by n.workspace_id
  on conflict (workspace_id) do update
  set queued = ws.queued + excluded.queued, ready = true,
      virtual_time = case when ws.queued > 0 then ws.virtual_time else greatest(ws.virtual_time, p_virtual_time) end;
end $$;

-- Makes sure that images that were in two crashes of workers (blame_crash) are released one at a time in each workspace, so that the next
-- crash shows which of them is the cause. While one is queued or in flight, the others wait for another second. Called by requeue_due().
-- Locks: tasks (skip locked).
create or replace function autotag.hold_suspects(p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
begin
  with suspects as (
    select t.id, t.retry_at, row_number() over (partition by t.workspace_id order by t.retry_at nulls first, t.id) as turn
    from autotag.tasks t where t.crashes >= 2 and t.finished_at is null and t.retry_at is distinct from 'infinity'
  ), early as (
    select t.id from autotag.tasks t
    where t.id = any (array(select x.id from suspects x where x.turn > 1 and x.retry_at <= p_now)) order by t.id for update skip locked
  )
  update autotag.tasks t set retry_at = p_now + interval '1 s' from early e where t.id = e.id;
end $$;

-- Puts requeued tasks that are due into their queues. Tasks whose upload was cancelled meanwhile end instead. The caller holds the
-- provider row. Locks: tasks (skip locked: those of an upload that is being cancelled).
create or replace function autotag.requeue_due(p_now timestamptz, p_virtual_time double precision) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_queue record;
begin
  if not exists (select from autotag.tasks t where t.retry_at <= p_now) then
    return;
  end if;
  perform autotag.keep(array(
    select row(t.id, t.job_id, t.asset_id, null, 'cancelled', 'Tagging was cancelled.', null)::autotag.finished
    from autotag.tasks t join autotag.jobs j on j.id = t.job_id where t.retry_at <= p_now and j.cancelled_at is not null
    order by t.id for update of t skip locked), false);   -- keep() would wait
  perform autotag.hold_suspects(p_now);
  for v_queue in
    with due as (
      select t.id from autotag.tasks t where t.retry_at <= p_now order by t.id limit 10000 for update skip locked
    ), freed as (
      update autotag.tasks t set retry_at = null from due where t.id = due.id
      returning t.workspace_id, t.job_id, t.id, t.min_output_tokens
    )
    select f.workspace_id, f.job_id, count(*)::integer as tasks, min(f.id) as first_task, max(f.min_output_tokens) as output_tokens
    from freed f group by f.workspace_id, f.job_id
  loop
    insert into autotag.queues as q (job_id, workspace_id, joined, queued, overdue_at, cursor, output_tokens)
    values (v_queue.job_id, v_queue.workspace_id, false, v_queue.tasks, autotag.patience_ends_at(v_queue.tasks, p_now),
      v_queue.first_task - 1, v_queue.output_tokens)
    on conflict (job_id) do update
    set queued = q.queued + v_queue.tasks,
        overdue_at = case when q.queued = 0 then excluded.overdue_at else q.overdue_at end, cursor = least(q.cursor, v_queue.first_task - 1),
        output_tokens = greatest(q.output_tokens, v_queue.output_tokens);
    -- the workspace has no row yet if all its images were in batches
    insert into autotag.workspaces as ws (workspace_id, queued, virtual_time)
    select q.workspace_id, v_queue.tasks, p_virtual_time from autotag.queues q where q.job_id = v_queue.job_id and q.joined
    on conflict (workspace_id) do update
    set queued = ws.queued + excluded.queued, ready = true,
        virtual_time = case when ws.queued > 0 then ws.virtual_time else greatest(ws.virtual_time, p_virtual_time) end;
  end loop;
  perform autotag.join_queues(p_virtual_time);
end $$;

-- Checks the counts of queues and workspaces, and corrects those that are wrong; deletes the queues of finished uploads. Retries
-- workspaces whose next image exceeds the window's limit: the limit may have been raised. Called by tick(). Locks: provider.
create or replace function autotag.repair_queues() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
begin
  perform autotag.lock_provider();
  -- This is one look-up per queue. A join may read all jobs that ever finished.
  delete from autotag.queues q where (select j.finished_at from autotag.jobs j where j.id = q.job_id) is not null;
  -- A queue that is empty by its count, although tasks wait in it.
  update autotag.queues q set queued = c.waiting, cursor = c.first_task - 1
  from (
    select empty.job_id, n.* from autotag.queues empty
    cross join lateral (
      select count(*)::integer as waiting, min(t.id) as first_task from autotag.tasks t
      where t.job_id = empty.job_id and t.lane = 'realtime' and t.worker_id is null and t.retry_at is null and t.finished_at is null) n
    where empty.queued = 0) c
  where q.job_id = c.job_id and c.waiting > 0;
  insert into autotag.workspaces (workspace_id, virtual_time)
  select q.workspace_id, p.virtual_time from autotag.queues q, autotag.provider_limits p where q.joined and q.queued > 0
  on conflict do nothing;
  update autotag.workspaces ws set queued = c.queued
  from (
    select counted.workspace_id, coalesce(sum(q.queued) filter (where q.joined), 0)::integer as queued
    from autotag.workspaces counted left join autotag.queues q on q.workspace_id = counted.workspace_id and q.queued > 0
    group by counted.workspace_id) c
  where ws.workspace_id = c.workspace_id and ws.queued <> c.queued;
  if found then
    perform pg_notify('autotag', 'realtime');
  end if;
  update autotag.workspaces ws set ready = true where not ws.ready and ws.queued > 0 and ws.ready_at = 'infinity';
end $$;

-- Releases up to p_slots images while the provider's bucket has room. The workspace with the lowest virtual time is served first,
-- one turn at a time. tokens: the sum of what the images reserve; virtual_time: that of the workspace served last.
-- Called by claim(), which holds the provider row. Locks: windows by workspace (skip locked), queued tasks.
create or replace function autotag.release_in_turn(
  p_worker uuid, p_slots integer, p_provider autotag.provider_limits,
  out ids bigint[], out tokens bigint, out virtual_time double precision
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := p_provider.refilled_at;
  v_room integer := autotag.room_left(p_provider, p_slots);   -- images that may still be released
  v_turn integer;              -- images of one workspace before the next one is served
  v_workspaces autotag.workspace_id[];
  v_workspace autotag.workspaces;
  v_released record;
begin
  ids := array[]::bigint[];
  tokens := 0;
  virtual_time := p_provider.virtual_time;
  if v_room < 1 then
    return;
  end if;
  -- A turn is chunk_size images or 50 ms (a minute / 1200) of the provider's throughput, at most 1,000, whichever is larger.
  -- Within 50 ms, users do not notice the order.
  v_turn := (select s.chunk_size from autotag.settings s);
  v_turn := greatest(v_turn, least(1000, p_provider.requests_per_minute / 1200,
    p_provider.tokens_per_minute / p_provider.tokens_per_image / 1200));
  -- The first workspaces that fill the room together.
  v_workspaces := array(
    select x.workspace_id from (
      select w.workspace_id, sum(least(w.queued, v_turn)) over turns - least(w.queued, v_turn) as before
      from (
        select ws.workspace_id, ws.queued, ws.virtual_time from autotag.workspaces ws where ws.ready and ws.queued > 0
        order by ws.virtual_time, ws.workspace_id limit v_room) w
      window turns as (order by w.virtual_time, w.workspace_id)) x
    where x.before < v_room);
  v_workspaces := autotag.lock_windows(v_workspaces, v_now);

  while v_room > 0 loop
    select * into v_workspace from autotag.workspaces ws
    where ws.ready and ws.queued > 0 and ws.workspace_id = any (v_workspaces)
    order by ws.virtual_time, ws.workspace_id limit 1;
    exit when not found;
    v_released := autotag.release_tasks(v_workspace, p_worker, v_room, v_turn, p_provider, p_provider.tokens_left - tokens, v_now);
    ids := ids || v_released.ids;
    tokens := tokens + v_released.tokens;
    virtual_time := greatest(virtual_time, v_workspace.virtual_time);
    v_room := least(v_room - cardinality(v_released.ids), floor((p_provider.tokens_left - tokens) / p_provider.tokens_per_image));
  end loop;
end $$;

-- Locks the windows of these workspaces, and returns the workspaces that can be served now. If another transaction holds a window (a
-- tenant's, which called check_rate_limit), its workspace is not ready for a second. The caller holds the provider row.
-- Locks: windows by workspace (skip locked); for a workspace without one, the right to insert it (advisory).
create or replace function autotag.lock_windows(p_workspaces autotag.workspace_id[], p_now timestamptz) returns autotag.workspace_id[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_free autotag.workspace_id[] := array(
    select wn.workspace_id from autotag.windows wn
    where wn.workspace_id = any (p_workspaces) and wn.request_type = 'realtime' order by wn.workspace_id for no key update skip locked);
begin
  if cardinality(v_free) < cardinality(p_workspaces) then
    v_free := v_free || array(
      select w from unnest(p_workspaces) w
      where w <> all (v_free)
        and not exists (select from autotag.windows wn where wn.workspace_id = w and wn.request_type = 'realtime')
        and pg_try_advisory_xact_lock(autotag.window_key(w, 'realtime')));
    update autotag.workspaces ws set ready = false, ready_at = p_now + interval '1 s'
    where ws.workspace_id = any (p_workspaces) and ws.workspace_id <> all (v_free);
  end if;
  return v_free;
end $$;

-- How many images the provider's bucket has room for, at most p_slots. While the question is not proven: one (the probe),
-- and none before probe_at.
create or replace function autotag.room_left(p_provider autotag.provider_limits, p_slots integer) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when p_provider.blocked_until > p_provider.refilled_at then 0
    when p_provider.proven_at is null and p_provider.probe_at > p_provider.refilled_at then 0
    else least(p_slots, case when p_provider.proven_at is null then 1 end, floor(p_provider.requests_left),
      floor(p_provider.day_left), floor(p_provider.tokens_left / p_provider.tokens_per_image)) end;
end $$;

-- The tokens that each image of an upload reserves, and how many of them are for its answer (the cap).
create or replace function autotag.reserve_for(p_queue autotag.queues, p_provider autotag.provider_limits, out each integer, out cap integer)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_brief autotag.briefs := autotag.job_brief(p_queue.job_id, p_provider);
begin
  cap := coalesce(v_brief.output_tokens, p_provider.output_tokens);
  each := coalesce(v_brief.tokens_per_image, p_provider.tokens_per_image) + greatest(p_queue.output_tokens - cap, 0);
  if v_brief.id is not null then
    each := autotag.fit_window(each, p_queue.workspace_id);
  end if;
end $$;

-- Releases the next images of one workspace: from its ready queue with the fewest released, at most one turn, and no more than
-- its window admits. If it can release none, the workspace is not ready until the time when it can.
-- An image reserves what its brief needs. If an answer of the job was cut off, each image reserves the larger cap of that retry.
-- p_tokens_left: the tokens in the provider's bucket. tokens: the sum of what the images reserve.
-- Called by release_in_turn(), which holds the locks.
create or replace function autotag.release_tasks(
  p_workspace autotag.workspaces, p_worker uuid, p_room integer, p_turn integer, p_provider autotag.provider_limits,
  p_tokens_left double precision, p_now timestamptz, out ids bigint[], out tokens bigint
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_queue autotag.queues := autotag.next_queue(p_workspace.workspace_id, p_now);
  v_admitted record;
  v_each integer;              -- tokens that each image reserves
  v_cap integer;               -- the cap on its answer
  v_ready_at timestamptz;      -- when the workspace becomes ready; null: now
begin
  ids := '{}';
  tokens := 0;
  if v_queue.job_id is null then
    v_ready_at := (
      select min(q.ready_at) from autotag.queues q where q.workspace_id = p_workspace.workspace_id and q.joined and q.queued > 0);
    if v_ready_at is null then   -- its last queue was deleted with its job
      update autotag.workspaces ws set queued = 0 where ws.workspace_id = p_workspace.workspace_id;
      return;
    end if;
  else
    select r.each, r.cap into v_each, v_cap from autotag.reserve_for(v_queue, p_provider) r;
    if v_each > p_provider.tokens_per_image then
      -- Wait until the bucket holds this many tokens. An image that needs 90% of a minute's limit or more does not wait, because
      -- the bucket may never hold so much.
      if floor(p_tokens_left / v_each) < 1 and v_each < 0.9 * p_provider.tokens_per_minute then
        v_ready_at := p_now + interval '1 min' * (v_each - p_tokens_left) / p_provider.tokens_per_minute;
      end if;
      p_room := least(p_room, greatest(floor(p_tokens_left / v_each), 1));
    end if;
    if v_ready_at is null then
      v_admitted := autotag.admit(p_workspace.workspace_id, 'realtime',
        least(p_room, v_queue.queued, p_turn, v_queue.chunk), v_each, true);
      if v_admitted.admitted = 0 then
        -- An image that can never fit its workspace's window waits until the limit is changed.
        v_ready_at := coalesce(v_admitted.retry_at, 'infinity');
      end if;
    end if;
  end if;
  if v_queue.job_id is null or v_ready_at is not null then
    update autotag.workspaces ws set ready = false, ready_at = v_ready_at
    where ws.workspace_id = p_workspace.workspace_id;
    return;
  end if;

  ids := autotag.take_tasks(v_queue, p_worker, v_admitted.admitted, v_admitted.at, v_each, v_cap, p_now);
  tokens := cardinality(ids)::bigint * v_each;
  if cardinality(ids) < v_admitted.admitted then   -- the upload was cancelled
    perform autotag.correct_window(p_workspace.workspace_id, 'realtime', v_admitted.at,
      cardinality(ids) - v_admitted.admitted, (cardinality(ids) - v_admitted.admitted) * v_each);
  end if;
end $$;

-- When an upload becomes overdue, that is when newer uploads may no longer pass it. p_images of its single calls have waited since
-- p_since. It is overdue upload_patience later; with more than chunk_max_images images, longer in proportion. Without a Batch API an
-- upload can be 50,000 single calls. If it went first after two minutes, other users would wait hours for one image.
create or replace function autotag.patience_ends_at(p_images integer, p_since timestamptz) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select p_since + s.upload_patience * greatest(1, p_images::double precision / greatest(s.chunk_max_images, 1)) from autotag.settings s);
end $$;

-- The next queue of a workspace: of its ready queues the one that has been overdue longest, or if none is overdue, the one with the
-- fewest released images. So small uploads pass large ones. Still, every upload ends, because only uploads that became overdue earlier
-- pass an overdue upload. Null: no queue is ready. A queue that was committed after join_queues() is left to the next claim, because its
-- workspace does not count it yet. A queue whose upload is being cancelled in an open transaction is not ready for a second.
-- Locks: its job (advisory, shared).
create or replace function autotag.next_queue(p_workspace_id autotag.workspace_id, p_now timestamptz) returns autotag.queues
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_queue autotag.queues;
begin
  loop
    select * into v_queue from autotag.queues q
    where q.workspace_id = p_workspace_id and q.joined and q.queued > 0 and q.overdue_at <= p_now and q.ready_at <= p_now
    order by q.overdue_at, q.job_id limit 1;
    if not found then
      select * into v_queue from autotag.queues q
      where q.workspace_id = p_workspace_id and q.joined and q.queued > 0 and q.ready_at <= p_now
      order by q.released, q.job_id limit 1;
    end if;
    exit when not found or pg_try_advisory_xact_lock_shared(autotag.job_key(v_queue.job_id));
    update autotag.queues q set ready_at = p_now + interval '1 s' where q.job_id = v_queue.job_id;
  end loop;
  return v_queue;
end $$;

-- Assigns the next p_count tasks of a queue to a worker, in upload order, counts them and returns their ids. p_at: when the
-- workspace's window admitted them; p_tokens: the tokens that each reserves there; p_output_tokens: the cap of their answers.
-- Called by release_tasks(). Locks: tasks.
create or replace function autotag.take_tasks(
  p_queue autotag.queues, p_worker uuid, p_count integer, p_at timestamptz, p_tokens integer, p_output_tokens integer, p_now timestamptz
) returns bigint[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
  v_gone integer;
begin
  with taken as (
    update autotag.tasks t
    set worker_id = p_worker, claim = (select wk.claim from autotag.workers wk where wk.id = p_worker), attempt = t.attempt + 1,
        reserved_at = p_at, reserved_tokens = p_tokens, output_tokens = greatest(t.min_output_tokens, p_output_tokens)
    where t.id = any (array(
      select waiting.id from autotag.tasks waiting
      where waiting.job_id = p_queue.job_id and waiting.id > p_queue.cursor
        and waiting.lane = 'realtime' and waiting.worker_id is null and waiting.retry_at is null and waiting.finished_at is null
      order by waiting.id limit p_count))
    returning t.id
  )
  select coalesce(array_agg(x.id order by x.id), '{}') into v_ids from taken x;

  -- Fewer tasks than counted: the queue's count is wrong. Set it to 0, or every claim would try again.
  v_gone := case when cardinality(v_ids) < p_count then p_queue.queued else cardinality(v_ids) end;
  update autotag.queues q
  set queued = q.queued - v_gone, released = q.released + cardinality(v_ids),
      cursor = coalesce(v_ids[cardinality(v_ids)], q.cursor),
      reached = greatest(q.reached, v_ids[cardinality(v_ids)]),
      output_tokens = case when q.queued > v_gone then q.output_tokens end,
      -- no delay for an overdue upload, or newer ones would pass it meanwhile
      ready_at = case when q.chunk is null or q.overdue_at <= p_now then q.ready_at
        else p_now + (select s.chunk_delay from autotag.settings s) end
  where q.job_id = p_queue.job_id;
  update autotag.workspaces ws
  set queued = ws.queued - v_gone, virtual_time = ws.virtual_time + cardinality(v_ids)
  where ws.workspace_id = p_queue.workspace_id;
  return v_ids;
end $$;
