-- The order of batches, and which of them have room in their workspace's window and in the provider's queue.

-- How full the provider's queue of batch tokens is, and whether all waiting batches fit into it together.
create or replace function autotag.measure_batch_queue(p_provider autotag.provider_limits, p_now timestamptz) returns autotag.batch_queue
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_queue autotag.batch_queue;
begin
  v_queue.tokens := (select coalesce(sum(b.reserved_tokens), 0) from autotag.batches b where b.reserved_tokens > 0);
  v_queue.short := v_queue.tokens + (
    select coalesce(sum((b.image_count - b.express_count)::bigint * p_provider.tokens_per_image + b.extra_tokens), 0) from autotag.batches b
    where b.state = 'planned' and b.worker_id is null and b.not_before <= p_now) > p_provider.queued_batch_tokens;
  v_queue.patient_since := case when v_queue.short
    then p_now - (select s.batch_patience from autotag.settings s) else '-infinity' end;
  return v_queue;
end $$;

-- Whether batches must wait: the question is not proven, and an image can try it as a single call.
create or replace function autotag.must_prove_first(p_provider autotag.provider_limits) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return p_provider.proven_at is null and (autotag.has_single_calls() or exists (
    select from autotag.batches b where b.state = 'planned' and b.image_count - b.express_count > 1));
end $$;

-- The next batches to work on, at most p_slots, in the order that claim_batches() describes. The planned batches of one workspace
-- leave one of the worker's slots free. A large upload keeps a worker busy for minutes, and other workspaces would wait for it.
create or replace function autotag.rank_batches(
  p_worker uuid, p_slots integer, p_provider autotag.provider_limits, p_queue autotag.batch_queue, p_now timestamptz
) returns uuid[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_unproven boolean := autotag.must_prove_first(p_provider);
  v_held autotag.workspace_id[] := array(select b.workspace_id from autotag.batches b where b.worker_id = p_worker);
  v_share integer := greatest(p_slots + cardinality(v_held) - 1, 1);
begin
  return array(
    with ready as (
      select b.id, b.workspace_id, b.state, b.ordinal, b.created_at, t.tokens, t.since,
        b.ordinal > 1 and t.since > p_queue.patient_since as later
      from autotag.batches b
      cross join lateral (
        select (b.image_count - b.express_count)::bigint * p_provider.tokens_per_image + b.extra_tokens as tokens,
               greatest(b.created_at, b.not_before) as since) t
      where b.worker_id is null and b.not_before <= p_now
        and (b.state in ('ended', 'harvesting', 'creating')
          or b.state in ('planned', 'preparing', 'uploading') and not v_unproven and p_provider.has_batches is distinct from false)
        and (b.state <> 'planned' or t.since <= p_queue.patient_since
          or p_queue.tokens = 0 or p_queue.tokens + t.tokens <= p_provider.queued_batch_tokens)
    ), ranked as (
      select r.id, r.workspace_id, r.state, row_number() over (
        order by r.state in ('ended', 'harvesting') desc, r.state = 'planned', r.later,
          -- the workspace's tokens in the queue, plus those of its batches ahead of this one
          case when p_queue.short and r.state = 'planned' then coalesce(q.tokens, 0) - r.tokens + r.tokens_until end,
          r.since, r.created_at, r.ordinal) as place
      from (
        select r.*, sum(r.tokens) over (
          partition by r.workspace_id, r.state = 'planned' order by r.later, r.since, r.created_at, r.ordinal) as tokens_until
        from ready r) r
      left join (
        select b.workspace_id, sum(b.reserved_tokens) as tokens
        from autotag.batches b where b.reserved_tokens > 0 group by b.workspace_id
      ) q on q.workspace_id = r.workspace_id
    )
    select x.id
    from (
      select r.id, r.state, r.place, row_number() over (partition by r.workspace_id order by r.place)
        + (select count(*) from unnest(v_held) h where h = r.workspace_id) as nth
      from ranked r) x
    where x.state <> 'planned' or x.nth <= v_share
    order by x.place limit p_slots);
end $$;

-- Assigns the candidates that can go now to a worker, in their order: a batch in progress continues, and a planned one starts if
-- its workspace's window and the provider's queue have room. again: a batch found no room in its window, so the worker should claim
-- again at once to get those behind it. A batch whose row or window another transaction holds is left out for a second. Called by
-- claim_batches(), which holds the provider row. Locks: windows by workspace, batches by id (both skip locked).
create or replace function autotag.take_batches(
  p_worker uuid, p_candidates uuid[], p_provider autotag.provider_limits, p_queue autotag.batch_queue, p_now timestamptz,
  out ids uuid[], out again boolean
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_free uuid[];
  v_batch autotag.batches;
  v_images integer;
  v_tokens bigint;
  v_held boolean := false;     -- the rest of the provider's queue is kept for a batch that others may no longer overtake
begin
  ids := array[]::uuid[];
  again := false;
  v_free := autotag.lock_candidates(p_candidates, p_now);
  for v_batch in
    select b.* from unnest(p_candidates) with ordinality c (id, i)
    join autotag.batches b on b.id = c.id
    where b.worker_id is null and b.id = any (v_free) order by c.i
  loop
    if v_batch.state = 'planned' then
      v_images := v_batch.image_count - v_batch.express_count;
      if v_batch.admitted_at is null and autotag.put_off(v_batch, p_now) then
        again := true;
        continue;
      end if;
      v_tokens := v_images::bigint * p_provider.tokens_per_image + v_batch.extra_tokens;
      -- An empty queue takes any batch, because waiting could not make more room.
      if v_held or p_queue.tokens > 0 and p_queue.tokens + v_tokens > p_provider.queued_batch_tokens then
        v_held := v_held or greatest(v_batch.created_at, v_batch.not_before) <= p_queue.patient_since;
        continue;
      end if;
      if v_batch.admitted_at is null then
        select a.at into v_batch.admitted_at
        from autotag.admit(v_batch.workspace_id, 'batch', 1, v_images, false) a where a.admitted > 0;
        if not found then  -- a concurrent check_rate_limit took the room
          again := true;
          continue;
        end if;
      end if;
      p_queue.tokens := p_queue.tokens + v_tokens;
      v_batch.reserved_tokens := v_tokens;
    end if;
    perform autotag.assign_batch(v_batch, p_worker, p_provider, p_now);
    ids := ids || v_batch.id;
  end loop;
end $$;

-- Locks these batches, and the windows of those that are not admitted yet. Returns the batches that can be assigned now. A batch whose
-- window another transaction holds is left out for a second. Locks: as in take_batches(); the right to insert a window (advisory).
create or replace function autotag.lock_candidates(p_candidates uuid[], p_now timestamptz) returns uuid[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_workspaces autotag.workspace_id[];
  v_free autotag.workspace_id[];
  v_batches uuid[] := array(
    select b.id from autotag.batches b where b.id = any (p_candidates) order by b.id for no key update skip locked);
begin
  v_workspaces := array(
    select distinct b.workspace_id from autotag.batches b
    where b.id = any (v_batches) and b.state = 'planned' and b.admitted_at is null);
  v_free := array(
    select wn.workspace_id from autotag.windows wn
    where wn.request_type = 'batch' and wn.workspace_id = any (v_workspaces)
    order by wn.workspace_id for no key update skip locked);
  v_free := v_free || array(
    select w from unnest(v_workspaces) w
    where w <> all (v_free)
      and not exists (select from autotag.windows wn where wn.workspace_id = w and wn.request_type = 'batch')
      and pg_try_advisory_xact_lock(autotag.window_key(w, 'batch')));
  with held as (
    update autotag.batches b set not_before = p_now + interval '1 s'
    where b.id = any (v_batches) and b.state = 'planned' and b.admitted_at is null and b.workspace_id <> all (v_free)
    returning b.id
  )
  select array(select unnest(v_batches) except select h.id from held h) into v_batches;
  return v_batches;
end $$;

-- Puts a planned batch off until its workspace's window has room for it, so that other workspaces do not wait. False: there is room.
-- not_before `infinity`: the window never has room with the present limits, and split_oversized() splits the batch. All batches of the
-- workspace that cannot have room either, because they are later or larger, are put off, too. (One by one, 3,000 batches took 751
-- claims.) The caller holds the provider row and the batch. Locks: batches (skip locked).
create or replace function autotag.put_off(p_batch autotag.batches, p_now timestamptz) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_images integer := p_batch.image_count - p_batch.express_count;
  v_max_requests integer := (select l.max_requests from autotag.window_limits(p_batch.workspace_id, 'batch') l);
  v_ahead integer;             -- planned batches of earlier uploads, which need room in the same window
  v_later_at timestamptz;      -- when the window has room for one more batch after those; null: now
  v_larger_at timestamptz;     -- when it has room for these images; null: now
begin
  -- The first batch of an upload goes before later batches of earlier uploads, but it must not take the room in the window that
  -- they were planned for.
  select count(*) into v_ahead from autotag.batches b
  where b.workspace_id = p_batch.workspace_id and b.state = 'planned' and b.admitted_at is null
    and b.created_at < p_batch.created_at;
  -- Ask for a whole window at most. More would never fit, and this batch would wait for ever.
  select coalesce(a.retry_at, 'infinity') into v_later_at
  from autotag.admit(p_batch.workspace_id, 'batch', least(v_ahead + 1, v_max_requests), 0, false, p_take => false) a where a.admitted = 0;
  select coalesce(a.retry_at, 'infinity') into v_larger_at
  from autotag.admit(p_batch.workspace_id, 'batch', 1, v_images, false, p_take => false) a where a.admitted = 0;
  if v_later_at is null and v_larger_at is null then
    return false;
  end if;
  update autotag.batches b
  set waits_for_window = true, not_before = greatest(case when b.created_at >= p_batch.created_at then v_later_at end,
    case when b.image_count - b.express_count >= v_images then v_larger_at end)
  where b.id in (
    select behind.id from autotag.batches behind
    where behind.workspace_id = p_batch.workspace_id and behind.state = 'planned' and behind.worker_id is null
      and behind.admitted_at is null and behind.not_before <= p_now
      and (v_later_at is not null and behind.created_at >= p_batch.created_at
        or v_larger_at is not null and behind.image_count - behind.express_count >= v_images)
    for no key update skip locked);
  return true;
end $$;

-- Assigns a batch to a worker and sets the state in which it continues. p_batch has its new admitted_at and reserved_tokens.
-- The caller holds its row.
create or replace function autotag.assign_batch(
  p_batch autotag.batches, p_worker uuid, p_provider autotag.provider_limits, p_now timestamptz
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  -- Its file asks an older question. In state `uploading` the worker finds the file by its name, deletes it and builds a new one.
  v_brief autotag.briefs := autotag.job_brief(p_batch.job_id, p_provider);
  v_stale boolean := p_batch.state = 'planned' and coalesce(p_batch.asked_at < p_provider.question_since, false);
begin
  update autotag.batches b
  set worker_id = p_worker, claim = (select wk.batch_claim from autotag.workers wk where wk.id = p_worker), attempt = b.attempt + 1,
      admitted_at = p_batch.admitted_at, reserved_tokens = p_batch.reserved_tokens,
      output_tokens = case when b.input_file_id is null or v_stale then coalesce(v_brief.output_tokens, p_provider.output_tokens) else b.output_tokens end,
      asked_at = case when b.input_file_id is null or v_stale then p_now else b.asked_at end,
      keep_files = p_provider.keep_files,
      input_file_id = case when v_stale then null else b.input_file_id end,
      state = case
        when b.state = 'planned' and b.input_file_id is null then 'preparing'
        when b.state = 'planned' and v_stale then 'uploading'
        when b.state = 'planned' then 'creating'
        when b.state = 'ended' then 'harvesting'
        else b.state end
  where b.id = p_batch.id;
end $$;
