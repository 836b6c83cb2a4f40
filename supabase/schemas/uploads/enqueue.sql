-- enqueue_tagging: checks an upload and makes it a job.

-- How many more unfinished images a workspace may have (live_images_max).
create or replace function autotag.live_capacity(p_workspace_id autotag.workspace_id) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select s.live_images_max from autotag.settings s) - coalesce((
    select sum(j.image_count - j.completed - j.failed)::integer
    from autotag.jobs j where j.workspace_id = p_workspace_id and j.finished_at is null), 0);
end $$;

-- Refuses an upload with which the workspace would have more than live_images_max unfinished images. retry_after: seconds until
-- enough of them are expected to be done; null: this upload alone is too large.
create or replace function autotag.check_live_capacity(p_workspace_id autotag.workspace_id, p_images integer) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_room integer := autotag.live_capacity(p_workspace_id);
  v_max_allowed integer := (select s.live_images_max from autotag.settings s);
  v_free_at timestamptz;
begin
  if p_images <= v_room then
    return;
  end if;
  select min(d.eta) into v_free_at from (
    select j.eta, sum(j.image_count - j.completed - j.failed) over (order by j.eta, j.id) as freed
    from autotag.jobs j where j.workspace_id = p_workspace_id and j.finished_at is null) d
  where v_room + d.freed >= p_images;
  perform autotag.refuse(429, 'too_many_live_images',
    format('Only %s more images of this workspace can be tagged at the moment.', greatest(v_room, 0)),
    'Wait until earlier uploads are done, or make the upload smaller.',
    jsonb_build_object('max_images', v_max_allowed, 'images_left', greatest(v_room, 0), 'retry_after',
      case when p_images <= v_max_allowed then greatest(extract(epoch from v_free_at - autotag.now()), 1) end));
end $$;

-- The images of a workspace that are being tagged. (An image that has moved here since is not among them.)
create or replace function autotag.live_in_workspace(p_workspace_id autotag.workspace_id) returns table (asset_id autotag.asset_id)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  return query
    select t.asset_id from autotag.jobs j join autotag.tasks t on t.job_id = j.id
    where j.workspace_id = p_workspace_id and j.finished_at is null and t.finished_at is null;
end $$;

-- The images among these that are being tagged, and where. (The plan is kept, and must use the index. A plan from when nothing was being
-- tagged would compare each image with each task: 14 s for 50,000 of them.)
create or replace function autotag.live_tasks(p_asset_ids autotag.asset_id[])
returns table (asset_id autotag.asset_id, workspace_id autotag.workspace_id, job_id uuid)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  return query
    select t.asset_id, t.workspace_id, t.job_id from autotag.tasks t where t.asset_id = any (p_asset_ids) and t.finished_at is null;
end $$;

-- The images among these that are being tagged for a workspace of the caller.
create or replace function autotag.own_live_assets(p_asset_ids autotag.asset_id[]) returns autotag.asset_id[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    with live as materialized (select x.asset_id, x.workspace_id from autotag.live_tasks(p_asset_ids) x)
    select l.asset_id from live l where l.workspace_id in (
      -- offset 0: call is_member once per workspace, not once per image
      select w.id from (select distinct l.workspace_id as id from live l offset 0) w where autotag.is_member(w.id)));
end $$;

-- Refuses an upload if not all of its images exist for the caller. p_visible: the images of p_asset_ids whose rows the caller can read.
-- p_found: how many of these are in the caller's workspaces p_workspaces; null: none.
create or replace function autotag.check_known(
  p_asset_ids autotag.asset_id[], p_visible autotag.asset_id[], p_workspaces autotag.workspace_id[], p_found integer
) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_asked integer := (select count(distinct id) from unnest(p_asset_ids) id);
begin
  if p_found >= v_asked then
    return;   -- none is missing: p_asset_ids names some images twice
  end if;
  perform autotag.check_caller() where p_workspaces is null;
  perform autotag.refuse(404, 'unknown_asset',
    format('%s of the %s images do not exist.', v_asked - p_found, v_asked),
    'Insert the assets before you enqueue them.', jsonb_build_object('asset_ids', array(
      select unnest(p_asset_ids) except
      select d.asset_id from autotag.describe_assets(p_visible, false) d where d.workspace_id = any (p_workspaces)
      order by 1 limit 5)));
end $$;

-- enqueue_tagging: makes one upload one job. Idempotent: it skips images that are being tagged, images that have just been tagged
-- (find_repeats), and images that the row filter leaves out. It may run in a tenant's long transaction, so it locks no row that a worker
-- needs: it takes advisory locks (lock_quotas) and inserts new rows.
--
-- p_visible_marks[i]: the mark of the file of p_asset_ids[i] that the caller may see (`visible_file_marks`), which matches no file if the
-- caller may not see it; null: not checked. If the image's file has another mark when a worker claims it, the image fails as if
-- the file did not exist.
-- p_visible: the images whose rows the caller can read (`visible_assets`); null: not checked. The others do not exist for the caller.
create or replace function autotag.enqueue(
  p_asset_ids autotag.asset_id[], p_visible_marks uuid[] default null, p_visible autotag.asset_id[] default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_found integer;
  v_foreign autotag.asset_id[];            -- images that name a file of another workspace, at most 5
  v_long autotag.asset_id[];               -- images whose URL, path or bucket name is too long, at most 5
  v_workspaces autotag.workspace_id[];         -- workspaces of the images that the caller may act for
  v_images autotag.asset_id[];             -- the images, each once,
  v_marks bigint[];            -- the marks of their pictures,
  v_suspects autotag.asset_id[];           -- and those that may have been enqueued before
begin
  if array_ndims(p_asset_ids) > 1 or array_position(p_asset_ids, null) is not null then
    perform autotag.refuse(400, 'bad_asset_ids', 'asset_ids must be a plain list of ids.', 'Pass an array of ids without nulls.');
  end if;
  perform autotag.check_image_count(cardinality(p_asset_ids));

  if p_visible <> p_asset_ids then
    p_visible := array(select unnest(p_visible) intersect select unnest(p_asset_ids));
  end if;
  -- An image of another workspace, or with a hidden row, is reported like one that does not exist: nobody can find out which ids exist.
  -- All images of a workspace make one row: is_member() is called once for it, and each image is looked at once.
  with there as materialized (
    select d.workspace_id, count(*) as images,
      array_agg(d.asset_id) filter (where d.refused = 'foreign_file') as foreign_ids,
      array_agg(d.asset_id) filter (where d.refused = 'location_too_long') as long_ids,
      array_agg(d.asset_id) filter (where d.refused is null) as ids,
      array_agg(hash_record_extended(row(d.asset_id, d.place), 0)) filter (where d.refused is null) as marks,
      array_agg(d.asset_id) filter (where d.stage <> 'failed' and d.refused is null) as suspects
    from autotag.describe_assets(coalesce(p_visible, p_asset_ids), false) d where d.workspace_id is not null group by d.workspace_id
  ), theirs as materialized (
    select x.* from there x where autotag.is_service() or autotag.is_member(x.workspace_id)
  )
  select (select array_agg(w.workspace_id order by w.workspace_id) from theirs w), (select sum(w.images) from theirs w),
    array(select unnest(x.foreign_ids) order by 1 limit 5), array(select unnest(x.long_ids) order by 1 limit 5),
    coalesce(x.ids, '{}'), coalesce(x.marks, '{}'), coalesce(x.suspects, '{}')
  into v_workspaces, v_found, v_foreign, v_long, v_images, v_marks, v_suspects
  from theirs x limit 1;   -- several workspaces are refused below
  if coalesce(v_found, 0) < cardinality(p_asset_ids) then
    perform autotag.check_known(p_asset_ids, coalesce(p_visible, p_asset_ids), v_workspaces, coalesce(v_found, 0));
  end if;
  if cardinality(v_workspaces) > 1 then
    perform autotag.refuse(400, 'several_workspaces',
      format('The images belong to %s workspaces: %s.', cardinality(v_workspaces), autotag.name_some(v_workspaces::text[])),
      'Make one upload for each workspace.', jsonb_build_object('workspace_ids', v_workspaces[:5]));
  end if;
  if v_foreign <> '{}' then
    perform autotag.refuse(403, 'foreign_file', 'An image names a file that does not belong to its workspace.',
      format('Name a file of its own workspace (rule %s).', autotag.file_rule()), jsonb_build_object('asset_ids', v_foreign));
  end if;
  if v_long <> '{}' then
    perform autotag.refuse(400, 'location_too_long', 'The URL, path or bucket name of an image, or the id of its workspace, is too long.',
      'A URL may have 8,192 bytes, a path or an id 1,024 and a bucket name 100.', jsonb_build_object('asset_ids', v_long));
  end if;
  return autotag.start_once(v_workspaces[1], p_asset_ids, p_visible_marks, v_images, v_marks, v_suspects);
end $$;
