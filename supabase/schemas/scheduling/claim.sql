-- The one function that releases single calls, within every limit and in fair order.

-- Puts parked tasks whose time has come back into their queues. The caller holds the provider row.
-- Locks: workspaces, tasks.
create or replace function autotag.unpark(p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_due bigint[] := array(select t.id from autotag.tasks t where t.retry_at <= p_now);
  v_queue record;
begin
  if v_due = '{}' then
    return;
  end if;
  perform from autotag.workspaces w
  where w.workspace_id in (select t.workspace_id from autotag.tasks t where t.id = any (v_due))
  order by w.workspace_id for update;
  for v_queue in
    with due as (
      select t.id from autotag.tasks t where t.id = any (v_due) and t.retry_at is not null order by t.id for update
    ), freed as (
      update autotag.tasks t set retry_at = null from due where t.id = due.id
      returning t.workspace_id, t.job_id, t.id
    )
    select f.workspace_id, f.job_id, count(*)::integer as tasks, min(f.id) as first_task
    from freed f group by f.workspace_id, f.job_id
  loop
    perform autotag.add_queued(v_queue.workspace_id, v_queue.job_id, v_queue.tasks, v_queue.first_task);
  end loop;
end $$;

-- claim: up to p_slots images for single calls, of all workspaces, under the provider's bucket and every
-- workspace's window, in fair order (the workspace whose virtual clock is lowest goes first, a few images
-- at a time; within it the job that got least). Says when to ask again if nothing else wakes the worker.
--
-- tasks: [{task, attempt, job, traceparent, waited (seconds since the upload), asset_id, bucket, path, url, cap (of the
-- answer, in tokens)}]; wait: seconds, null when nothing is queued; bound: what kept it from releasing more (null: there is
-- no more). An asset that is gone has neither path nor url. question: what to ask about these images
-- (describe_question, with its `version`), null where the worker has that version (p_question) already.
--
-- While nobody knows whether the question works (it is new, or the account is in trouble) one image tries, and another
-- when that has shown nothing for account_probe_interval: a mistake in the configuration costs a call and no image.
--
-- Its plans are made once, because planning them for every release costs a third of the claim, and by the indexes however
-- small the tables were then: what is kept from an idle hour must serve a million images. (A scan of the one row of settings
-- costs much on paper then; without jit it costs nothing else.)
-- Locks: provider, workspaces by id, windows, then queued tasks (nobody else holds those).
create or replace function autotag.claim(
  p_worker uuid, p_slots integer, out tasks json, out wait double precision, out bound text,
  p_question bigint default null, out question jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan' set random_page_cost = 1.1
  set enable_seqscan = off set jit = off
as $$
declare
  v_provider autotag.provider_limits;
  v_now timestamptz;
  v_room integer;              -- images that may still be released
  v_quantum integer;           -- images of one workspace before the next one's turn
  v_workspaces uuid[];
  v_workspace autotag.workspaces;
  v_next timestamptz;
  v_ids bigint[] := array[]::bigint[];
  v_got bigint[];
  v_tokens bigint := 0;        -- that they reserve
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers of the host's tables believe what stands there
  tasks := '[]';
  p_slots := least(p_slots, 10000);
  if p_slots is null or p_slots < 1 then
    return;
  end if;
  v_provider := autotag.sync_question(autotag.lock_provider());
  v_now := v_provider.refilled_at;
  if v_provider.question_version is distinct from p_question then
    question := v_provider.question || jsonb_build_object('version', v_provider.question_version);
  end if;
  if not autotag.hold_lease(p_worker) then
    wait := 1;  -- its next heartbeat registers it again
    bound := 'lease';
    return;
  end if;
  if autotag.asks_another_provider(p_worker, v_provider) then
    wait := autotag.real_seconds((select s.account_probe_interval from autotag.settings s));
    bound := 'outdone';
    return;
  end if;
  -- Automatic mode: an upload that is complete becomes a job, and the next claim releases from it. This one
  -- releases nothing, because the new job's workspace is locked out of turn.
  if autotag.seal_upload(v_now) then
    wait := 0;
    return;
  end if;
  -- So does what has waited too long while 429s kept coming: it becomes a batch.
  if v_provider.limited_since <= v_now - (select s.realtime_max_wait from autotag.settings s)
     and v_provider.limited_at > v_now - interval '1 min' and v_provider.has_batches is distinct from false
     and autotag.fall_back(v_now) then
    wait := 0;
    return;
  end if;
  -- Nor does a provider without a Batch API get batches that were planned before that was known.
  if v_provider.has_batches is false and autotag.leave_batches(v_now) then
    wait := 0;
    return;
  end if;
  -- Only batches wait, and nobody knows whether the question works: one of their images tries it as a single call.
  if v_provider.proven_at is null and coalesce(v_provider.probe_at, v_now) <= v_now and autotag.send_ahead() then
    wait := 0;
    return;
  end if;
  perform autotag.unpark(v_now);
  update autotag.workspaces w set ready = true where not w.ready and w.queued > 0 and w.ready_at <= v_now;

  v_room := case
    when v_provider.blocked_until > v_now then 0
    when v_provider.proven_at is null and v_provider.probe_at > v_now then 0
    else least(p_slots, case when v_provider.proven_at is null then 1 end, floor(v_provider.requests_left),
      floor(v_provider.day_left), floor(v_provider.tokens_left / v_provider.tokens_per_image))
  end;

  if v_room > 0 then
    -- A turn is a chunk, or what the provider takes in a twentieth of a second where that is more: nobody notices
    -- who was first then.
    v_quantum := (select s.chunk_size from autotag.settings s);
    v_quantum := greatest(v_quantum, least(1000, v_provider.requests_per_minute / 1200,
      v_provider.tokens_per_minute / v_provider.tokens_per_image / 1200));
    -- As many workspaces as it takes to fill the room.
    v_workspaces := array(
      select x.workspace_id from (
        select w.workspace_id, sum(least(w.queued, v_quantum)) over turns - least(w.queued, v_quantum) as before
        from (
          select r.workspace_id, r.queued, r.virtual_time from autotag.workspaces r where r.ready and r.queued > 0
          order by r.virtual_time, r.workspace_id limit v_room) w
        window turns as (order by w.virtual_time, w.workspace_id)) x
      where x.before < v_room);
    perform from autotag.workspaces w
    where w.workspace_id = any (v_workspaces) order by w.workspace_id for update;
  end if;

  while v_room > 0 loop
    select * into v_workspace from autotag.workspaces w
    where w.ready and w.queued > 0 and w.workspace_id = any (v_workspaces)
    order by w.virtual_time, w.workspace_id limit 1;
    exit when not found;
    select r.ids, v_tokens + r.tokens into v_got, v_tokens
    from autotag.release_tasks(v_workspace, p_worker, v_room, v_quantum, v_provider, v_provider.tokens_left - v_tokens, v_now) r;
    v_provider.virtual_time := greatest(v_provider.virtual_time, v_workspace.virtual_time);
    v_ids := v_ids || v_got;
    v_room := least(v_room - cardinality(v_got), floor((v_provider.tokens_left - v_tokens) / v_provider.tokens_per_image));
  end loop;

  if v_provider.waiting_at < v_now - interval '1 s' then
    select c.workspaces, c.images, v_now
    into v_provider.waiting_workspaces, v_provider.waiting_images, v_provider.waiting_at
    from autotag.count_waiting() c;
  end if;
  update autotag.provider_limits p
  set requests_left = v_provider.requests_left - cardinality(v_ids),
      tokens_left = v_provider.tokens_left - v_tokens,
      day_left = v_provider.day_left - cardinality(v_ids),
      refilled_at = v_provider.refilled_at,
      virtual_time = v_provider.virtual_time,
      waiting_workspaces = v_provider.waiting_workspaces,
      waiting_images = v_provider.waiting_images,
      waiting_at = v_provider.waiting_at,
      probe_at = case when p.proven_at is null and cardinality(v_ids) > 0
        then v_now + (select s.account_probe_interval from autotag.settings s) else p.probe_at end;

  if cardinality(v_ids) > 0 then
    update autotag.workers w set unsent = w.unsent + cardinality(v_ids) where w.id = p_worker;
    with released as materialized (
      select t.id, t.attempt, t.asset_id, t.workspace_id, t.seen, t.job_id, t.output_tokens from autotag.tasks t where t.id = any (v_ids)
    ), uploads as materialized (
      select j.id, j.traceparent, round(autotag.real_seconds(v_now - j.created_at)::numeric, 3) as waited
      from autotag.jobs j where j.id = any (array(select r.job_id from released r))
    )
    select json_agg(i order by i.task) into tasks
    from (
      select r.id as task, r.attempt, u.id as job, u.traceparent, u.waited, r.asset_id, r.output_tokens as cap,
        d.bucket, d.path, d.url, d.refused
      from released r join uploads u on u.id = r.job_id
      left join autotag.locate(array(select asset_id from released order by id),
        array(select workspace_id from released order by id), array(select seen from released order by id)) d
        on d.asset_id = r.asset_id) i;
  end if;

  bound := case
    when cardinality(v_ids) = p_slots then 'slots'
    when not exists (select from autotag.workspaces w where w.queued > 0) then null
    when v_provider.blocked_until > v_now then 'retry_after'
    when v_provider.account_error is not null then 'account'
    when v_provider.proven_at is null then 'unproven'
    when not exists (select from autotag.workspaces w where w.ready and w.queued > 0) then 'workspaces'
    when v_provider.tokens_left < v_tokens + v_provider.tokens_per_image then 'provider_tokens'
    when v_provider.requests_left < cardinality(v_ids) + 1 then 'provider_requests'
    else 'provider_day' end;

  -- When to come back: when the bucket holds one more, when a workspace may go on, when a parked task is due.
  select min(moment) into v_next from (
    select greatest(v_now, v_provider.blocked_until, case when v_provider.proven_at is null then case
        when cardinality(v_ids) > 0 then v_now + (select s.account_probe_interval from autotag.settings s)
        else v_provider.probe_at end end,
      v_now + interval '1 min' * greatest(
        (cardinality(v_ids) + 1 - v_provider.requests_left) / v_provider.requests_per_minute,
        (cardinality(v_ids) + 1 - v_provider.day_left) / (v_provider.requests_per_day / 1440.0),
        (v_tokens + v_provider.tokens_per_image - v_provider.tokens_left) / v_provider.tokens_per_minute))
    where exists (select from autotag.workspaces w where w.ready and w.queued > 0)
    union all
    select greatest(v_provider.blocked_until, w.ready_at)
    from (select n.ready_at from autotag.workspaces n where not n.ready and n.queued > 0 order by n.ready_at limit 1) w
    where w.ready_at < 'infinity'
    union all
    select min(t.retry_at) from autotag.tasks t where t.retry_at is not null
    union all
    select min(u.seal_at) from autotag.uploads u
  ) as moments (moment);
  wait := autotag.real_seconds(v_next - v_now);
end $$;

-- The next few images of one workspace: of its ready queue that got least so far, at most a turn, and no
-- more than its window admits. Nothing to release makes the workspace not ready until its next moment.
-- Called by claim(), which holds the locks. Where an answer of its job was cut off, each reserves the larger cap that one
-- needs: p_tokens_left is what the provider's bucket holds. tokens: what all of them reserve.
create or replace function autotag.release_tasks(
  p_workspace autotag.workspaces, p_worker uuid, p_room integer, p_turn integer, p_provider autotag.provider_limits,
  p_tokens_left double precision, p_now timestamptz, out ids bigint[], out tokens bigint
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_settings autotag.settings;
  v_queue autotag.queues;
  v_admitted record;
  v_each integer;              -- tokens of one
  v_room integer := p_room;
  v_gone integer;
  v_ready_at timestamptz;
begin
  ids := '{}';
  tokens := 0;
  select * into v_settings from autotag.settings;
  select * into v_queue from autotag.queues q
  where q.workspace_id = p_workspace.workspace_id and q.queued > 0 and q.ready_at <= p_now
  order by q.released, q.job_id limit 1;
  if not found then
    select min(q.ready_at) into v_ready_at from autotag.queues q
    where q.workspace_id = p_workspace.workspace_id and q.queued > 0;
    update autotag.workspaces w set ready = false, ready_at = v_ready_at
    where w.workspace_id = p_workspace.workspace_id;
    return;
  end if;

  v_each := p_provider.tokens_per_image;
  if v_queue.output_tokens > p_provider.output_tokens then
    v_each := v_each + v_queue.output_tokens - p_provider.output_tokens;
    v_room := floor(p_tokens_left / v_each);
    if v_room < 1 then  -- it waits until the bucket holds so many, or is as full as it gets
      v_ready_at := p_now + interval '1 min' * (v_each - p_tokens_left) / p_provider.tokens_per_minute;
      if v_each < 0.9 * p_provider.tokens_per_minute then
        update autotag.workspaces w set ready = false, ready_at = v_ready_at
        where w.workspace_id = p_workspace.workspace_id;
        return;
      end if;
      v_room := 1;
    end if;
    v_room := least(v_room, p_room);
  end if;
  select * into v_admitted from autotag.admit(p_workspace.workspace_id, 'realtime',
    least(v_room, v_queue.queued, p_turn, v_queue.chunk), v_each, true);
  if v_admitted.admitted = 0 then
    -- An image that can never fit its workspace's window waits until the limit is changed.
    update autotag.workspaces w set ready = false, ready_at = coalesce(v_admitted.retry_at, 'infinity')
    where w.workspace_id = p_workspace.workspace_id;
    return;
  end if;

  with taken as (
    update autotag.tasks t
    set worker_id = p_worker, attempt = t.attempt + 1, reserved_at = v_admitted.at, reserved_tokens = v_each,
        output_tokens = greatest(t.min_output_tokens, p_provider.output_tokens)
    where t.id = any (array(
      select n.id from autotag.tasks n
      where n.job_id = v_queue.job_id and n.id > v_queue.cursor
        and n.lane = 'realtime' and n.worker_id is null and n.retry_at is null and n.finished_at is null
      order by n.id limit v_admitted.admitted))
    returning t.id
  )
  select coalesce(array_agg(t.id order by t.id), '{}') into ids from taken t;
  tokens := cardinality(ids)::bigint * v_each;

  -- Fewer than there should be: the count was wrong. It is put right rather than asked for again for ever.
  v_gone := case when cardinality(ids) < v_admitted.admitted then v_queue.queued else cardinality(ids) end;
  update autotag.queues q
  set queued = q.queued - v_gone, released = q.released + cardinality(ids),
      cursor = coalesce(ids[cardinality(ids)], q.cursor),
      reached = greatest(q.reached, ids[cardinality(ids)]),
      output_tokens = case when q.queued > v_gone then q.output_tokens end,
      ready_at = case when q.chunk is null then q.ready_at else p_now + v_settings.chunk_delay end
  where q.job_id = v_queue.job_id;
  update autotag.workspaces w
  set queued = w.queued - v_gone, virtual_time = w.virtual_time + cardinality(ids)
  where w.workspace_id = p_workspace.workspace_id;
end $$;
