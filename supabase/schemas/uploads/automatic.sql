-- Automatic mode: new rows become uploads by themselves (tables/uploads.sql has the picture).

-- Takes in what one statement inserted. Wakes a worker only when an upload begins: later rows only move its
-- sealing, and the worker that wakes for that learns the new moment. An image without a place is left alone.
-- Whatever goes wrong here must not take the host's insert with it: it is a warning, and those images wait
-- for enqueue_tagging. Locks: uploads by workspace.
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
    where d.workspace_id is not null and (d.path is not null or d.url is not null or d.foreign_file)  -- the last end as failed
  ), upload as (
    insert into autotag.uploads as u (workspace_id, user_id, first_at, seal_at)
    select distinct f.workspace_id, v_user, v_now, v_now + v_settings.upload_quiet from found f order by 1
    on conflict (workspace_id, user_id) do update
      set seal_at = least(v_now + v_settings.upload_quiet, u.first_at + v_settings.upload_longest)
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

-- Makes a job of one upload that is complete by now; false when there is none. The upload stays as long as
-- it holds more images than one job may have, than the workspace may have live at once, or than its quotas allow
-- (the rest waits until they renew). One at a time,
-- because a job's locks come before those of the next workspace. Called by claim().
-- Locks: the upload, its workspace.
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
  perform autotag.lock_workspace(v_upload.workspace_id);
  v_room := least(autotag.live_room(v_upload.workspace_id), (select s.job_max_images from autotag.settings s),
    (select min(q.images_left) from autotag.quotas_left(v_upload.workspace_id, v_upload.user_id) q));
  if v_room < 1 then
    update autotag.uploads u set seal_at = p_now + interval '1 min' where u.id = v_upload.id;
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
