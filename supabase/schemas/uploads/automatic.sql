-- Automatic mode: new rows become uploads without a call (tables/uploads.sql has a diagram).
--
-- Nothing here notifies a worker from the host's transaction. A NOTIFY would make its commit wait for other commits (one global
-- lock), forbid PREPARE TRANSACTION, and fail it while the queue of notifications is full. It is not needed either: an upload is not
-- sealed before upload_quiet has passed, and a worker that looks that often sees each upload in time (seal_uploads: wait).

-- The uploader in the host's transaction: the signed-in user (caller), or nobody() for the project's own server, which has no user. Null:
-- a token that names no user, such as that of anon. Rows of such a caller are not collected, because they may not tag images, unless the
-- owner allows it (automatic_for_anyone). The claims of a direct connection can contain anything: that is the server, not an error.
create or replace function autotag.find_uploader() returns autotag.user_id
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id;
begin
  begin
    v_user := autotag.caller();
  exception when others or assert_failure then
    null;
  end;
  if v_user is null and (autotag.is_service() or (select s.automatic_for_anyone from autotag.settings s)) then
    return autotag.nobody();
  end if;
  return v_user;
exception when invalid_text_representation then   -- the claims are not JSON
  return autotag.nobody();
end $$;

-- Collects the images that one statement inserted: their ids and workspaces. Images without a workspace, and those of a token that names
-- no user (find_uploader), are left out. seal_uploads() looks later whether an image has a file or URL. Called by the host's
-- transaction, so it only inserts. It locks no row, and waits only for a lock of the whole table (an upgrade of autotag), for 50 ms at
-- most. The trigger catches errors.
create or replace function autotag.collect(p_asset_ids autotag.asset_id[], p_workspace_ids autotag.workspace_id[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_uploader autotag.user_id := autotag.find_uploader();
  v_now timestamptz := autotag.now();
begin
  insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at)
  select n.asset_id, n.workspace_id, v_uploader, v_now
  from unnest(p_asset_ids, p_workspace_ids) n (asset_id, workspace_id)
  where n.asset_id is not null and n.workspace_id is not null and v_uploader is not null;
end $$;

-- At most p_limit uploads that may still grow, by workspace and uploader, with their first and last arrival. Only workspaces from
-- p_from (null: the first) to before p_before (null: all). It jumps from one upload to the next in the index, so its cost does not depend
-- on their numbers of images: 10 µs for each upload.
create or replace function autotag.list_arriving(p_from autotag.workspace_id, p_before autotag.workspace_id, p_limit integer)
returns table (workspace_id autotag.workspace_id, uploader autotag.user_id, first_at timestamptz, last_at timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set enable_bitmapscan = off set jit = off
as $$
begin
  p_from := coalesce(p_from, (
    select ar.workspace_id from autotag.arrivals ar where ar.upload_id is null order by ar.workspace_id, ar.uploader, ar.arrived_at limit 1));
  return query
    with recursive found as (
      (select ar.workspace_id, ar.uploader, ar.arrived_at from autotag.arrivals ar
       where ar.upload_id is null and ar.workspace_id >= p_from
       order by ar.workspace_id, ar.uploader, ar.arrived_at limit 1)
      union all
      select n.* from found f
      cross join lateral (
        select ar.workspace_id, ar.uploader, ar.arrived_at from autotag.arrivals ar
        where ar.upload_id is null and (ar.workspace_id, ar.uploader) > (f.workspace_id, f.uploader)
        order by ar.workspace_id, ar.uploader, ar.arrived_at limit 1) n
      where p_before is null or f.workspace_id < p_before
    )
    select f.workspace_id, f.uploader, f.arrived_at, (
      select max(ar.arrived_at) from autotag.arrivals ar
      where ar.upload_id is null and ar.workspace_id = f.workspace_id and ar.uploader = f.uploader)
    from found f where p_before is null or f.workspace_id < p_before limit p_limit;
end $$;

-- Uploads, and when each is due. An upload that may still grow is complete when no image has come for upload_quiet, or when its first
-- image is upload_longest old. A postponed upload has a time. An image that becomes visible late, because its transaction was long, is as
-- old as its row. An image from the future was inserted before the clock was set back, and is complete at once.
-- At most 2,000 growing uploads, beginning with the workspace of a random arrival, and 1,000 postponed ones. If there are more, each has
-- a chance in every call.
create or replace function autotag.list_uploads(p_now timestamptz)
returns table (workspace_id autotag.workspace_id, uploader autotag.user_id, due_at timestamptz, arriving boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_quiet interval;
  v_longest interval;
  v_from autotag.workspace_id := (
    select ar.workspace_id from autotag.arrivals ar
    where exists (select from autotag.arrivals growing where growing.upload_id is null)   -- otherwise nothing is read
      and ar.id >= (select f.id + floor(random() * (l.id - f.id + 1))::bigint
      from (select edge.id from autotag.arrivals edge order by edge.id limit 1) f,
        (select edge.id from autotag.arrivals edge order by edge.id desc limit 1) l)
    order by ar.id limit 1);
begin
  select s.upload_quiet, s.upload_longest into v_quiet, v_longest from autotag.settings s;
  return query
    select l.workspace_id, l.uploader,
      case when l.last_at > p_now + v_quiet then p_now else least(l.last_at + v_quiet, l.first_at + v_longest) end, true
    from (
      select * from autotag.list_arriving(v_from, null, 1000)
      union all
      select * from autotag.list_arriving(null, v_from, 1000)) l;
  return query
    select up.workspace_id, up.uploader, up.seal_at, false from autotag.uploads up where up.seal_at <= p_now order by up.seal_at limit 1000;
  return query
    select up.workspace_id, up.uploader, up.seal_at, false from autotag.uploads up where up.seal_at > p_now order by up.seal_at limit 1;
end $$;

-- Makes a job of one upload that is due, in a transaction of its own: it writes the host's rows, so it holds nothing that other
-- tenants need. It waits for nobody, and skips an upload whose quotas are locked. The oldest upload of each user and of each workspace is
-- eligible, and users with fewer uploads are more probable. So many uploads of one user, or many users of one workspace, do not keep
-- others waiting, and do not wait for ever either. A workspace in which an upload has failed (its triggers may be slow) comes after all
-- others. A worker calls it again at once while `more` is true.
--   sealed: how many jobs were made.   more: another upload is due.
--   wait: seconds until the next call; null: automatic mode is off, and nothing waits.
--   notices: [{event, notice}] for the log.
-- p_quiet: earlier calls ended their session, probably because writing some row ends it. So `queued` is not written to the rows (show).
-- Locks: quotas (without waiting), one user's uploads and arrivals (skip locked), then as in start_job().
create or replace function autotag.seal_uploads(
  p_worker uuid, p_quiet boolean default false, out sealed integer, out more boolean, out wait double precision, out notices jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_nobody autotag.user_id := autotag.nobody();
  v_next timestamptz;
  v_upload record;
  v_result record;
  v_done boolean := false;
begin
  perform set_config('request.jwt.claims', '', true),   -- triggers on the host's tables trust these claims
    set_config('autotag.quiet', p_quiet::text, true);
  sealed := 0;
  more := false;
  notices := '[]';
  wait := 1;
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  for v_upload in
    select x.workspace_id, x.uploader, x.due_at
    from (
      select l.workspace_id, l.uploader, l.due_at, l.due_at > v_now as later, row_number() over (users order by l.due_at) as of_user,
        count(*) over users as uploads
      from autotag.list_uploads(v_now) l
      window users as (partition by l.uploader, case when l.uploader = v_nobody then l.workspace_id end, l.due_at > v_now)) x
    left join (select distinct up.workspace_id from autotag.uploads up where up.failures > 0) failed on failed.workspace_id = x.workspace_id
    order by x.later, failed.workspace_id is not null,
      greatest(x.of_user, row_number() over (partition by x.workspace_id, x.later order by x.of_user, x.due_at)) > 1, random() * x.uploads
  loop
    if v_upload.due_at > v_now then
      v_next := least(v_next, v_upload.due_at);
    elsif v_done then
      more := true;
      exit;
    elsif autotag.try_lock_quotas(v_upload.workspace_id, nullif(v_upload.uploader, v_nobody)) then
      v_result := autotag.seal_upload(v_upload.workspace_id, v_upload.uploader, v_now);
      sealed := v_result.sealed;
      notices := v_result.notices;
      more := v_result.rest;
      v_done := true;
    else
      v_next := least(v_next, v_now + autotag.clock_interval(0.25));   -- until its quotas are free
    end if;
  end loop;
  if v_next is not null or v_done or autotag.is_automatic() then
    v_next := least(v_next, v_now + (select least(greatest(s.upload_quiet, '0.2 s'), '10 s') from autotag.settings s));
  end if;
  wait := case when v_next is not null then greatest(autotag.real_seconds(v_next - v_now), 0) end;
end $$;

-- Whether automatic mode is on.
create or replace function autotag.is_automatic() returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from pg_trigger t where t.tgname = 'autotag_collect' and not t.tgisinternal and t.tgenabled <> 'D');
end $$;

-- Makes a job of the arrivals of one workspace and uploader, and of their postponed uploads that are due. Takes at most as many images as
-- one job, the limit of live images and the quotas allow; if that is none, the upload is postponed. rest: more of its images are due.
-- If an earlier attempt raised or took too long, a quarter of its images is tried. The caller holds the quotas.
create or replace function autotag.seal_upload(
  p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_now timestamptz, out sealed integer, out rest boolean, out notices jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id := nullif(p_uploader, autotag.nobody());
  v_room integer;
  v_waiting bigint;            -- the postponed upload of this uploader that still waits for room
  v_due bigint[];              -- those that are due
  v_failures integer;
  v_arrivals bigint[];
  v_assets autotag.asset_id[];
  v_try record;
begin
  sealed := 0;
  rest := false;
  notices := '[]';
  select min(u.id) filter (where u.seal_at > p_now and u.failures = 0), coalesce(array_agg(u.id) filter (where u.seal_at <= p_now), '{}'),
    coalesce(max(u.failures) filter (where u.seal_at <= p_now), 0)
  into v_waiting, v_due, v_failures
  from (
    select * from autotag.uploads up where up.workspace_id = p_workspace_id and up.uploader = p_uploader for update skip locked) u;
  if v_waiting is not null then
    perform autotag.join_upload(v_waiting, p_workspace_id, p_uploader);
    update autotag.arrivals ar set upload_id = v_waiting where ar.upload_id = any (v_due);
    delete from autotag.uploads up where up.id = any (v_due);
    return;
  end if;
  v_room := autotag.room_for_upload(p_workspace_id, v_user);
  if v_room < 1 then
    perform autotag.postpone_upload(p_workspace_id, p_uploader, v_due, p_now);
    return;
  end if;
  v_room := least(v_room, greatest(50000 >> least(2 * v_failures, 30), 1));
  select array_agg(t.id), array_agg(t.asset_id) into v_arrivals, v_assets
  from autotag.take_arrivals(p_workspace_id, p_uploader, v_due, v_room) t;
  if v_arrivals is not null then
    v_try := autotag.try_upload(p_workspace_id, v_user, v_assets, true);
    if v_try.state = 'PT429' then   -- the quotas changed meanwhile
      perform autotag.postpone_upload(p_workspace_id, p_uploader, v_due, p_now);
      return;
    elsif v_try.state is not null then
      v_try := autotag.seal_apart(p_workspace_id, p_uploader, v_arrivals, v_assets, v_failures, v_try.state, v_try.error);
      notices := v_try.notices;
      v_arrivals := v_try.ended;
    end if;
    sealed := v_try.jobs;
    delete from autotag.arrivals ar where ar.id = any (v_arrivals);
  end if;
  delete from autotag.uploads up where up.id = any (v_due) and not exists (select from autotag.arrivals ar where ar.upload_id = up.id);
  rest := exists (select from autotag.take_arrivals(p_workspace_id, p_uploader, v_due, 1));
end $$;

-- The first p_limit images of one workspace and uploader that may still grow or belong to these postponed uploads.
create or replace function autotag.take_arrivals(p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_uploads bigint[], p_limit integer)
returns table (id bigint, asset_id autotag.asset_id)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  return query
    select x.id, x.asset_id from (
      select ar.id, ar.asset_id from autotag.arrivals ar
      where ar.upload_id is null and ar.workspace_id = p_workspace_id and ar.uploader = p_uploader
      union all
      select ar.id, ar.asset_id from autotag.arrivals ar where ar.upload_id = any (p_uploads)) x
    order by x.id limit p_limit;
end $$;

-- Tries to make a job of these images. Errors are returned, not raised: state is the SQLSTATE; null: no error. p_keep false: the try is
-- undone in any case. It waits 50 ms at most for each row of the host that another transaction holds. Constraints that the host has
-- deferred are checked here, because an error at the commit would undo everything. jobs: how many were made, 0 or 1.
-- The host may raise autotag's SQLSTATEs, too. So PT429 is returned only if there is not enough room; otherwise it becomes P0001.
create or replace function autotag.try_upload(
  p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_asset_ids autotag.asset_id[], p_keep boolean, out jobs integer, out state text, out error text
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_started boolean := false;
  v_undone boolean := false;
begin
  jobs := autotag.start_upload(p_workspace_id, p_user_id, p_asset_ids);
  v_started := true;
  set constraints all immediate;
  if not p_keep then
    v_undone := true;
    raise exception 'undone';
  end if;
exception when others or assert_failure or query_canceled then
  jobs := 0;
  if v_undone then
    return;
  end if;
  get stacked diagnostics state = returned_sqlstate, error = message_text;
  if left(state, 2) in ('AT', 'PT') and (state <> 'PT429' or v_started
    or autotag.room_for_upload(p_workspace_id, p_user_id) >= cardinality(p_asset_ids)) then
    state := 'P0001';
  end if;
end $$;

-- How many images of automatic mode one more job of a workspace and uploader may have.
create or replace function autotag.room_for_upload(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return least(autotag.live_capacity(p_workspace_id), (select s.job_max_images from autotag.settings s),
    (select min(q.images_left) from autotag.quotas_left(p_workspace_id, p_user_id) q));
end $$;

-- Makes a job of these images of an upload, and returns how many jobs were made: 0 or 1. It leaves out images that are gone, that the row
-- filter leaves out, that have no file or URL, and that are being tagged (start_job). It also leaves out images whose rows are
-- `completed` or `failed` already: enqueue_tagging was called for them, or the row was copied with its tags. If an image has moved to
-- another workspace, it becomes an arrival of that workspace.
create or replace function autotag.start_upload(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_asset_ids autotag.asset_id[]) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_assets autotag.asset_id[];
  v_marks bigint[];            -- of their pictures
  v_moved autotag.asset_id[];
  v_job jsonb;
begin
  select array_agg(d.asset_id order by p.i) filter (where d.workspace_id = p_workspace_id),
    array_agg(hash_record_extended(row(d.asset_id, d.place), 0) order by p.i) filter (where d.workspace_id = p_workspace_id),
    array_agg(d.asset_id) filter (where d.workspace_id <> p_workspace_id)
  into v_assets, v_marks, v_moved
  from unnest(p_asset_ids) with ordinality p (id, i)
  join autotag.describe_assets(p_asset_ids, false) d on d.asset_id = p.id
  -- a row whose location is refused becomes a task, which fails with the reason
  where (d.path is not null or d.url is not null or d.refused is not null)
    and d.refused is distinct from 'filtered' and (d.stage is null or d.stage not in ('completed', 'failed'));
  if v_moved is not null then
    insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at)
    select d.asset_id, d.workspace_id, coalesce(p_user_id, autotag.nobody()), autotag.now()
    from autotag.describe_assets(v_moved, false) d where d.workspace_id is not null;
  end if;
  if v_assets is null then
    return 0;
  end if;
  v_job := autotag.start_job(p_workspace_id, p_user_id, v_assets);
  perform autotag.record_pictures(p_workspace_id, v_job, v_assets, v_marks);
  return least((v_job ->> 'image_count')::integer, 1);
end $$;
