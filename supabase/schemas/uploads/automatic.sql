-- Automatic mode: new rows become uploads without a call (tables/uploads.sql has a diagram).

-- Collects the images that one statement inserted; images without a file or URL are left out. It wakes a worker only when an
-- upload begins: later rows only postpone its sealing, and the worker woken for that learns the new time. An error must not
-- abort the host's insert: it becomes a warning, and those images wait for enqueue_tagging. Locks: uploads by workspace.
create or replace function autotag.collect(p_asset_ids uuid[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_user uuid := (select auth.uid());
  v_now timestamptz := autotag.now();
  v_begun boolean;
begin
  select * into v_settings from autotag.settings;
  with found as (
    select d.asset_id, d.workspace_id from autotag.describe_assets(p_asset_ids) d
    -- a row whose location is refused is collected too: its task fails with the reason
    where d.workspace_id is not null and (d.path is not null or d.url is not null or d.refused is not null)
  ), upload as (
    insert into autotag.uploads as u (workspace_id, user_id, first_at, seal_at)
    select distinct f.workspace_id, v_user, v_now, v_now + v_settings.upload_quiet from found f order by 1
    on conflict (workspace_id, user_id) do update
      -- one that waits for its quotas goes on waiting
      set seal_at = case when u.postponed and u.seal_at > v_now then u.seal_at
        else least(v_now + v_settings.upload_quiet, u.first_at + v_settings.upload_longest) end,
        postponed = u.postponed and u.seal_at > v_now
    returning u.id, u.workspace_id, u.first_at
  ), arrived as (
    insert into autotag.arrivals (upload_id, asset_id)
    select u.id, f.asset_id
    from unnest(p_asset_ids) with ordinality p (id, i)
    join found f on f.asset_id = p.id
    join upload u on u.workspace_id = f.workspace_id
    order by p.i
  )
  select coalesce(bool_or(u.first_at = v_now), false) into v_begun from upload u;
  if v_begun then
    perform pg_notify('autotag', 'realtime');
  end if;
exception when others then
  raise warning 'autotag could not collect % new images: %', cardinality(p_asset_ids), sqlerrm;
end $$;

-- Makes a job of one upload that is complete at p_now; false: there is none. Images beyond what one job, the live images of the
-- workspace or its quotas allow stay in the upload, which is postponed when there is no room. One upload per call, because a job's locks
-- come before the next workspace's in the order of locks. Called by claim(), which must not wait for a tenant's transaction: while
-- one holds the quotas, the upload waits another second.
-- Locks: the upload, its workspace, its quotas (advisory, without waiting).
create or replace function autotag.seal_upload(p_now timestamptz) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_upload autotag.uploads;
  v_assets uuid[];
  v_room integer;
begin
  select * into v_upload from autotag.uploads u
  where u.seal_at <= p_now order by u.seal_at limit 1 for update skip locked;
  if not found then
    return false;
  end if;
  if not autotag.lock_quotas(v_upload.workspace_id, v_upload.user_id, false) then
    update autotag.uploads u set seal_at = p_now + interval '1 s' where u.id = v_upload.id;
    return true;
  end if;
  v_room := least(autotag.live_capacity(v_upload.workspace_id), (select s.job_max_images from autotag.settings s),
    (select min(q.images_left) from autotag.quotas_left(v_upload.workspace_id, v_upload.user_id) q));
  if v_room < 1 then
    perform autotag.postpone_upload(v_upload, p_now);
    return true;
  end if;

  with taken as (
    delete from autotag.arrivals r
    where r.id in (select a.id from autotag.arrivals a where a.upload_id = v_upload.id order by a.id limit v_room)
    returning r.id, r.asset_id
  )
  select array_agg(d.asset_id order by t.id) into v_assets
  from taken t join autotag.describe_assets(array(select asset_id from taken)) d on d.asset_id = t.asset_id
  where d.workspace_id = v_upload.workspace_id;
  delete from autotag.uploads u
  where u.id = v_upload.id and not exists (select from autotag.arrivals a where a.upload_id = u.id);
  if v_assets is not null then
    perform autotag.start_job(v_upload.workspace_id, v_upload.user_id, v_assets);
  end if;
  return true;
end $$;

-- Postpones an upload without room: until its quota renews, where all of it is billed; else until some of what is being tagged is
-- expected to be done (1 min to 1 h). Where the quota is its user's in all workspaces, the user's other uploads wait as long, at
-- most 1,000 per call: a user may be a member of any number of workspaces. Locks: uploads (skip locked).
create or replace function autotag.postpone_upload(p_upload autotag.uploads, p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_prices autotag.reservation_prices := autotag.price_reservations();
  v_until timestamptz;
  v_scope text;
begin
  select u.renews_at, u.scope into v_until, v_scope
  from autotag.quota_use(p_upload.workspace_id, p_upload.user_id, v_prices) u
  where u.maximum - u.billed < case u.kind when 'images' then 1 else greatest(v_prices.single, 0.0000001) end
    and not (u.kind = 'cost' and v_prices.free)
  order by u.renews_at desc, u.scope limit 1;
  v_until := coalesce(v_until, least(greatest(p_now + interval '1 min', (
    select min(j.eta) from autotag.jobs j
    where j.finished_at is null and (j.workspace_id = p_upload.workspace_id or j.user_id = p_upload.user_id))), p_now + interval '1 h'));
  update autotag.uploads u set seal_at = v_until, postponed = true where u.id = p_upload.id;
  if v_scope = 'user' and not exists (select from autotag.quotas q where q.scope = 'user' and q.workspace_id is not null) then
    update autotag.uploads u set seal_at = v_until, postponed = true
    where u.id in (
      select o.id from autotag.uploads o where o.user_id = p_upload.user_id and o.seal_at <= p_now
      order by o.id limit 1000 for update skip locked);
  end if;
end $$;

-- Quotas have changed: what waits for them is looked at again.
create or replace function autotag.resume_uploads() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.uploads u set seal_at = autotag.now() where u.postponed and u.seal_at > autotag.now();
  perform pg_notify('autotag', 'realtime');
  return null;
end $$;

create or replace trigger autotag_resume_uploads after insert or update or delete on autotag.quotas
  for each statement execute function autotag.resume_uploads();
