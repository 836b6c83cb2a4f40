-- Workers: registration, heartbeats and leases.

-- Registers a worker and returns worker_settings(). p_base_url: the provider's address; p_fingerprint: hash of address and key.
-- A fingerprint other than the present one has to be proven; another address may be a provider with other features. Refuses
-- an id of another login, and more than 1,000 workers of one login. Locks: provider.
create or replace function autotag.register_worker(
  p_worker uuid, p_host text, p_version text, p_listening boolean, p_base_url text default null, p_fingerprint text default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_login name;
begin
  perform autotag.check_version(p_version);
  if p_worker is null then
    perform autotag.refuse(400, 'no_worker', 'A worker needs an id.', 'Pass a new uuid.');
  end if;
  v_login := (select wk.login from autotag.workers wk where wk.id = p_worker);
  if v_login <> session_user then
    perform autotag.refuse(403, 'not_your_worker', 'This worker belongs to another login.', 'Register with a new id.');
  elsif v_login is null and (select count(*) from autotag.workers wk where wk.login = session_user) >= 1000 then
    perform autotag.refuse(429, 'too_many_workers', 'This login already has 1,000 workers.',
      'Wait until the leases of stopped workers end.', jsonb_build_object('retry_after', 60));
  end if;
  p_base_url := autotag.printable(p_base_url, 300);
  p_fingerprint := autotag.printable(p_fingerprint, 100);
  if autotag.switch_provider(p_base_url, p_fingerprint) then
    update autotag.provider_limits
    set proven_at = null, probe_at = null, account_error = null, account_error_from = null, account_error_at = null
    where id;
  end if;
  insert into autotag.workers (id, host, version, listening, started_at, last_heartbeat_at, lease_until, resumed_at, base_url, fingerprint)
  select p_worker, coalesce(autotag.printable(p_host, 100), ''), autotag.printable(p_version, 50), coalesce(p_listening, false),
    v_now, v_now, v_now + s.lease, case when autotag.is_silent(v_now) then v_now else '-infinity' end, p_base_url, p_fingerprint
  from autotag.settings s
  on conflict (id) do update set version = excluded.version, listening = excluded.listening, last_heartbeat_at = excluded.last_heartbeat_at,
    lease_until = excluded.lease_until, resumed_at = greatest(autotag.workers.resumed_at, excluded.resumed_at), unsent = 0, unsent_extra = 0, base_url = excluded.base_url,
    fingerprint = excluded.fingerprint
  where autotag.workers.login = session_user;
  return autotag.worker_settings();
end $$;

-- The settings that a worker needs, as JSON.
create or replace function autotag.worker_settings() returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object(
    'batch_max_bytes', s.batch_max_bytes, 'lease_seconds', autotag.real_seconds(s.lease))
  from autotag.settings s
$$;

-- Whether a worker never received the reply of this claim: its list lacks the claim. A claim with a higher number than the last one in
-- the list does not count, because the worker made the list before it. An empty list lacks every claim.
create or replace function autotag.is_lost(p_claim integer, p_claims integer[]) returns boolean
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select p_claim <> all (p_claims) and p_claim <= coalesce((select max(c) from unnest(p_claims) c), p_claim)
$$;

-- Extends the worker's lease. alive: false if the lease had ended and what the worker held has been released, so it has to
-- register again. lost: the worker holds images of a claim that it does not list in p_claims, or batches of one that it does not list
-- in p_batch_claims, because the reply was lost; it calls release_lost() next. tick_due: the worker calls tick_if_due() next, in a
-- transaction of its own, because a tick takes many locks. settings: the present worker_settings(). The worker follows them, so each
-- heartbeat sets a lease_until that matches the lease that the worker knows.
create or replace function autotag.heartbeat(
  p_worker uuid, p_claims integer[], p_batch_claims integer[], out alive boolean, out lost boolean, out tick_due boolean,
  out settings jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_version text;
begin
  update autotag.workers wk
  set last_heartbeat_at = v_now, lease_until = v_now + (select s.lease from autotag.settings s),
      resumed_at = case when autotag.is_silent(v_now) then v_now else wk.resumed_at end
  where wk.id = p_worker and wk.login = session_user returning wk.version into v_version;
  alive := found;
  if alive then
    perform autotag.check_version(v_version);
  end if;
  lost := exists (select from autotag.tasks t where t.id = any (autotag.leased_tasks(p_worker)) and autotag.is_lost(t.claim, p_claims))
    or exists (select from autotag.batches b where b.worker_id = p_worker and autotag.is_lost(b.claim, p_batch_claims));
  tick_due := autotag.is_tick_due(v_now);
  settings := autotag.worker_settings();
end $$;

-- Whether there are workers and none has sent a heartbeat for half a lease. Workers send three heartbeats in a lease, so the database was
-- unreachable.
create or replace function autotag.is_silent(p_now timestamptz) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select max(wk.last_heartbeat_at) < p_now - (select s.lease from autotag.settings s) / 2 from autotag.workers wk);
end $$;

-- Whether the lease of a worker has ended and expire_worker() may release its work. Workers that could not reach the database may still
-- hold answers that were paid for. So no worker expires while none sends heartbeats, nor for one lease after the first heartbeat that
-- follows. (While none sends heartbeats, no other worker could take the work.) After a day the work is released in any case.
create or replace function autotag.can_expire(p_now timestamptz) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select min(wk.lease_until) < p_now and (min(wk.lease_until) < p_now - interval '1 day'
      or max(wk.last_heartbeat_at) >= p_now - s.lease and max(wk.resumed_at) <= p_now - s.lease)
    from autotag.settings s, autotag.workers wk group by s.lease);
end $$;

-- Whether a worker has a row and belongs to the caller. A worker without a row must get no work, because nothing would release it again.
-- Locks the row, so that expire_worker() cannot delete it before the transaction ends. (lease_until may have passed: can_expire()
-- decides.) It waits for the worker's own heartbeat, but not for expire_worker(), which takes long if a worker held much.
create or replace function autotag.lock_worker(p_worker uuid) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform from autotag.workers wk where wk.id = p_worker and wk.login = session_user for no key update skip locked;
  if not found and exists (select from autotag.workers wk where wk.id = p_worker and wk.lease_until > autotag.now()) then
    perform from autotag.workers wk where wk.id = p_worker and wk.login = session_user for no key update;
  end if;
  return found;
end $$;

-- Whether the worker must get no work, because its address or key is not the one in use, and a live worker has the one in use. Only one
-- fingerprint is in use at a time: that of the worker that registered last, until it fails and a worker with another one is alive.
-- Otherwise a worker with a wrong address, which fails fast, would get most images, and each of them would have a failure.
create or replace function autotag.asks_another_provider(p_worker uuid, p_provider autotag.provider_limits) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.workers wk where wk.id = p_worker and wk.fingerprint <> p_provider.fingerprint)
    and exists (select from autotag.workers wk where wk.fingerprint = p_provider.fingerprint and wk.lease_until > autotag.now());
end $$;

-- Handles an account error of these workers. If one of them uses the fingerprint in use, and a live worker has another one, that other
-- fingerprint comes into use, so the next probe goes to its workers. The caller holds the provider row.
create or replace function autotag.offer_switch(p_workers uuid[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_fingerprint text := (select p.fingerprint from autotag.provider_limits p);
  v_next autotag.workers;
begin
  if not exists (select from autotag.workers wk where wk.id = any (p_workers) and wk.fingerprint = v_fingerprint) then
    return;
  end if;
  select * into v_next from autotag.workers wk
  where wk.fingerprint <> v_fingerprint and wk.lease_until > autotag.now()
  order by wk.fingerprint > v_fingerprint desc, wk.fingerprint limit 1;
  if found then
    perform autotag.switch_provider(v_next.base_url, v_next.fingerprint);
  end if;
end $$;

-- Makes this address and key the present ones. What was learned about another address is reset. False: they were already, or
-- there is no fingerprint. Locks the provider row.
create or replace function autotag.switch_provider(p_base_url text, p_fingerprint text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.provider_limits p
  set fingerprint = p_fingerprint, base_url = p_base_url, fingerprint_since = autotag.now(), checked_at = '-infinity',
      has_batches = case when p.base_url = p_base_url then p.has_batches end,
      batches_refused = coalesce(p.base_url = p_base_url, false) and p.batches_refused,
      has_rate_headers = case when p.base_url = p_base_url then p.has_rate_headers end,
      keep_files = case when p.base_url = p_base_url then p.keep_files else 604800 end
  where p_fingerprint is not null and p.fingerprint is distinct from p_fingerprint;
  return found;
end $$;

-- The single calls that a worker holds: released, unfinished tasks of unfinished jobs.
create or replace function autotag.leased_tasks(p_worker uuid) returns bigint[]
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select coalesce(array_agg(t.id), '{}')
  from autotag.queues q
  join autotag.tasks t on t.job_id = q.job_id and t.id <= q.reached and t.lane = 'realtime'
    and t.retry_at is null and t.finished_at is null
  where q.reached > 0 and t.worker_id = p_worker
$$;

-- Releases the work of a worker, except that of the claims p_claims and p_batch_claims. p_cause: `stopped`; `lost` (the worker never
-- received it: a failure of each image is counted); or `crashed` (the lease has ended: see blame_crash()). Returns how many tasks and
-- batches it released, and whether there are more: it skips rows that another transaction holds (the worker's last report, a
-- cancellation).
-- Locks: batches, tasks (both skip locked); job (skip locked), its batch's tasks; the worker.
create or replace function autotag.release_held(
  p_worker uuid, p_claims integer[], p_batch_claims integer[], p_cause text, out released integer, out more boolean
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_tasks bigint[] := array(
    select t.id from autotag.tasks t where t.id = any (autotag.leased_tasks(p_worker)) and autotag.is_lost(t.claim, p_claims)
    order by t.id for update skip locked);
  v_batches uuid[] := array(
    select b.id from autotag.batches b where b.worker_id = p_worker and autotag.is_lost(b.claim, p_batch_claims)
    order by b.id for update skip locked);
begin
  -- Wait until OpenAI shows what the worker's last request may have created, before another worker looks for it.
  update autotag.batches b
  set worker_id = null, crashes = b.crashes + (p_cause = 'crashed' and b.state in ('preparing', 'uploading'))::integer,
      not_before = case when b.state <> 'creating' then b.not_before
        else autotag.now() + (select s.batch_create_grace from autotag.settings s) end
  where b.id = any (v_batches);
  if p_cause = 'crashed' then
    perform autotag.take_apart(v_batches);
  end if;
  perform autotag.keep(autotag.requeue(case when p_cause = 'crashed' then autotag.blame_crash(v_tasks)
    else (select jsonb_agg(jsonb_build_object('task', id, 'failures', (p_cause = 'lost')::integer,
      'code', 'worker_lost', 'message', 'Tagging this image was interrupted too often.')) from unnest(v_tasks) id) end), false)
  where v_tasks <> '{}';
  perform pg_notify('autotag', 'realtime') where v_tasks <> '{}';
  perform pg_notify('autotag', 'batch') where v_batches <> '{}';
  -- A lost call was never sent, so it no longer counts as unsent. (The row of a worker that ends is deleted.)
  update autotag.workers wk
  set unsent = greatest(0, wk.unsent - cardinality(v_tasks)),
      unsent_extra = wk.unsent_extra * greatest(0, wk.unsent - cardinality(v_tasks)) / greatest(wk.unsent, 1)
  where wk.id = p_worker and v_tasks <> '{}';
  released := cardinality(v_tasks) + cardinality(v_batches);
  more := exists (select from autotag.batches b where b.worker_id = p_worker and autotag.is_lost(b.claim, p_batch_claims))
    or exists (select from autotag.tasks t where t.id = any (autotag.leased_tasks(p_worker)) and autotag.is_lost(t.claim, p_claims));
end $$;

-- Counts a crash for each of the images that a dead worker held, because any of them may be the cause. Returns their tries for
-- requeue(). A failure is counted only for the image with the most crashes, and only if no other image has as many. (An image that kills
-- its worker is in every crash; other images are in a crash only by chance.) To tell them apart, images with two crashes are released one
-- at a time (hold_suspects), and images with more crashes later than others. After 3 * max_failures crashes an image fails in any case.
-- The caller holds the tasks.
create or replace function autotag.blame_crash(p_tasks bigint[]) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_settings autotag.settings;
  v_tries jsonb;
begin
  select * into v_settings from autotag.settings;
  update autotag.tasks t set crashes = coalesce(t.crashes, 0) + 1 where t.id = any (p_tasks);
  with held as (
    select t.id, t.crashes, rank() over (order by t.crashes desc) as place, count(*) over (partition by t.crashes) as equals
    from autotag.tasks t where t.id = any (p_tasks)
  )
  select jsonb_agg(jsonb_build_object(
    'task', h.id, 'code', 'worker_lost', 'message', 'Tagging this image was interrupted too often.',
    'failures', case when h.crashes >= 3 * v_settings.max_failures then v_settings.max_failures
      else (h.place = 1 and h.equals = 1)::integer end,
    'delay', coalesce(autotag.growing_delay(h.crashes - 2, v_settings), 0)))
  into v_tries from held h;
  return v_tries;
end $$;

-- Sends the images of a batch as single calls if three workers died while they built its file: failures of single calls show which
-- image is the cause. A batch whose upload another transaction holds is built once more. The caller holds the batches and the provider row.
-- Locks: job (skip locked), tasks.
create or replace function autotag.take_apart(p_batches uuid[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
  v_reason constant text := 'Workers stopped while they prepared a batch of these images, so they are sent as single calls.';
begin
  for v_batch in
    select b.* from autotag.batches b where b.id = any (p_batches) and b.state in ('preparing', 'uploading') and b.crashes >= 3 order by b.id
  loop
    perform from autotag.jobs j where j.id = v_batch.job_id for no key update skip locked;
    continue when not found;
    perform autotag.requeue_batch(v_batch, false, 0, 'worker_lost', 'Tagging this image was interrupted too often.');
    perform autotag.end_batch(v_batch, v_reason);
    update autotag.jobs j set fallback = v_reason where j.id = v_batch.job_id;
  end loop;
end $$;

-- Releases everything that a worker holds, and deletes the worker, because it stops. Returns how many tasks and batches it released. If
-- another transaction holds some of them, the worker's lease ends now instead, and tick() releases the rest.
create or replace function autotag.release_worker(p_worker uuid) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_release record;
begin
  if not autotag.is_own_worker(p_worker) then
    return 0;
  end if;
  perform from autotag.workers wk where wk.id = p_worker for update;
  v_release := autotag.release_held(p_worker, '{}', '{}', 'stopped');
  if v_release.more then
    update autotag.workers wk set lease_until = autotag.now() where wk.id = p_worker;
  else
    delete from autotag.workers wk where wk.id = p_worker;
  end if;
  return v_release.released;
end $$;

-- Releases the work of a worker except that of these claims. A worker calls it after heartbeat() said that replies of claims were lost.
-- A failure of each image is counted, so that an image whose report the worker cannot deliver is not requested for ever.
create or replace function autotag.release_lost(p_worker uuid, p_claims integer[], p_batch_claims integer[]) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_ids(greatest(cardinality(p_claims), cardinality(p_batch_claims)));
  if not autotag.is_own_worker(p_worker) then
    return 0;
  end if;
  return (autotag.release_held(p_worker, coalesce(p_claims, '{}'), coalesce(p_batch_claims, '{}'), 'lost')).released;
end $$;

-- Releases the work of one worker whose lease has ended, if can_expire() allows it, and deletes the worker. If another transaction holds
-- some of the work, the next tick goes on. One worker per transaction. Returns whether work was released. Called by tick().
-- Locks: provider (first, because a transaction that holds it may wait for a worker's row, as record_sent() does); the worker's row,
-- for which the worker itself does not wait (lock_worker); release_held.
create or replace function autotag.expire_worker() returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_worker uuid;
begin
  if not coalesce(autotag.can_expire(autotag.now()), false) then
    return false;
  end if;
  perform from autotag.provider_limits for update;
  select wk.id into v_worker from autotag.workers wk
  where wk.lease_until < autotag.now() order by wk.lease_until, wk.id limit 1 for update skip locked;
  if not found then
    return false;
  end if;
  if (autotag.release_held(v_worker, '{}', '{}', 'crashed')).more then
    update autotag.workers wk set lease_until = autotag.now() where wk.id = v_worker;   -- so others with ended leases come first
    return false;
  end if;
  delete from autotag.workers wk where wk.id = v_worker;
  return true;
end $$;
