-- An upload begins: its images become tasks of one job.

-- Adds to what waits for single calls in one queue, and wakes the workspace. A workspace that had nothing
-- queued starts at the clock of the one served last: it neither waits for the others nor banks credit.
-- The caller holds the workspace's lock.
create or replace function autotag.add_queued(p_workspace_id uuid, p_job_id uuid, p_count integer, p_before_task bigint)
returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_count = 0 then
    return;
  end if;
  update autotag.queues q
  set queued = q.queued + p_count, cursor = least(q.cursor, p_before_task - 1)
  where q.job_id = p_job_id;
  update autotag.workspaces w
  set queued = w.queued + p_count,
      virtual_time = case when w.queued > 0 then w.virtual_time
        else greatest(w.virtual_time, (select p.virtual_time from autotag.provider_limits p)) end,
      ready = true
  where w.workspace_id = p_workspace_id;
end $$;

-- Takes the workspace's lock; its row is made when this is its first work, or again when housekeeping forgot it while we
-- waited for its lock.
create or replace function autotag.lock_workspace(p_workspace_id uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  loop
    insert into autotag.workspaces (workspace_id) values (p_workspace_id) on conflict do nothing;
    perform from autotag.workspaces w where w.workspace_id = p_workspace_id for update;
    exit when found;
  end loop;
end $$;

-- How many more images of a workspace may be live at the same time.
create or replace function autotag.live_room(p_workspace_id uuid) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select s.live_images_max from autotag.settings s) - coalesce((
    select sum(j.image_count - j.completed - j.failed)::integer
    from autotag.jobs j where j.workspace_id = p_workspace_id and j.finished_at is null), 0);
end $$;

-- Refuses an upload that would make too many images of its workspace live at the same time; retry_after is
-- when enough of them are expected to be done. The caller holds the workspace.
create or replace function autotag.check_live_room(p_workspace_id uuid, p_images integer) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_room integer := autotag.live_room(p_workspace_id);
  v_most integer := (select s.live_images_max from autotag.settings s);
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
    jsonb_build_object('max_images', v_most, 'images_left', greatest(v_room, 0), 'retry_after',
      case when p_images <= v_most then greatest(extract(epoch from v_free_at - autotag.now()), 1) end));
end $$;

-- enqueue_tagging: one upload becomes one job. Idempotent for images that are being tagged already: they are
-- skipped. Locks the workspace (so that two calls for the same images follow each other), then writes.
--
-- p_seen[i]: what the caller may see of p_asset_ids[i] (`seen_files`); null: whoever calls sees everything. An image whose file is
-- another one when a worker asks, or which they do not see, ends as if there were no such file.
create or replace function autotag.enqueue(p_asset_ids uuid[], p_seen uuid[] default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_found integer;
  v_asked integer;
  v_missing uuid[];            -- some of those that are not there
  v_foreign uuid[];            -- some of those that name somebody else's file
  v_workspaces uuid[];         -- theirs that the caller may act for
begin
  if array_ndims(p_asset_ids) > 1 or array_position(p_asset_ids, null) is not null then
    perform autotag.refuse(400, 'bad_asset_ids', 'asset_ids must be a plain list of ids.',
      'Pass an array of uuids without nulls.');
  end if;
  perform autotag.check_image_count(cardinality(p_asset_ids));

  -- Somebody else's image is as unknown as one that never was: what exists where is no secret worth telling.
  with there as materialized (
    select d.asset_id, d.workspace_id, d.foreign_file from autotag.describe_assets(p_asset_ids) d where d.workspace_id is not null
  ), theirs as materialized (
    -- offset 0: is_member is asked once for each workspace, not for each image
    select w.id from (select distinct t.workspace_id as id from there t offset 0) w
    where autotag.is_service() or autotag.is_member(w.id)
  ), found as materialized (
    select t.asset_id, t.foreign_file from there t where t.workspace_id in (select w.id from theirs w)
  )
  select (select array_agg(w.id) from theirs w), (select count(*) from found), (select count(distinct id) from unnest(p_asset_ids) id),
    array(select distinct id from unnest(p_asset_ids) id except select f.asset_id from found f order by 1 limit 5),
    array(select f.asset_id from found f where f.foreign_file order by 1 limit 5)
  into v_workspaces, v_found, v_asked, v_missing, v_foreign;
  if v_found < v_asked then
    perform autotag.refuse(404, 'unknown_asset',
      format('%s of the %s images do not exist.', v_asked - v_found, v_asked),
      'Insert the assets before you enqueue them.', jsonb_build_object('asset_ids', v_missing));
  end if;
  if cardinality(v_workspaces) > 1 then
    perform autotag.refuse(400, 'several_workspaces', 'The images belong to more than one workspace.',
      'Make one upload for each workspace.', jsonb_build_object('workspace_ids', v_workspaces));
  end if;
  if v_foreign <> '{}' then
    perform autotag.refuse(403, 'foreign_file', 'An image names a file that does not belong to its workspace.',
      format('Name a file of its own workspace (rule %s).', autotag.file_rule()), jsonb_build_object('asset_ids', v_foreign));
  end if;
  perform autotag.lock_workspace(v_workspaces[1]);
  return autotag.start_job(v_workspaces[1], (select auth.uid()), p_asset_ids, p_seen);
end $$;

-- Makes a job of those of these images that are not live already. All of them are of this workspace, which the
-- caller has locked. p_seen: as in enqueue. Locks: tasks and batches are new, assets.
create or replace function autotag.start_job(
  p_workspace_id uuid, p_user_id uuid, p_asset_ids uuid[], p_seen uuid[] default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set random_page_cost = 1.1
as $$
declare
  v_settings autotag.settings;
  v_now timestamptz := autotag.now();
  v_asked integer := (select count(distinct id) from unnest(p_asset_ids) id);
  v_live uuid[];               -- of these images, those that are being tagged already
  v_new uuid[];
  v_new_seen uuid[];           -- p_seen of each of them
  v_live_jobs uuid[];
  v_count integer;
  v_job autotag.jobs;
  v_batches integer := 0;
  v_express integer;
  v_first_task bigint;
  v_left record;
  v_wait interval;
begin
  select * into v_settings from autotag.settings;

  -- The new images, each once, in the order of the upload.
  v_live := array(select t.asset_id from autotag.tasks t where t.asset_id = any (p_asset_ids) and t.finished_at is null);
  select coalesce(array_agg(a.id order by a.i), '{}'), array_agg(a.seen order by a.i) into v_new, v_new_seen
  from (select distinct on (u.id) u.* from unnest(p_asset_ids, p_seen) with ordinality u (id, seen, i) order by u.id, u.i) a
  where a.id <> all (v_live);
  v_count := cardinality(v_new);

  if v_count = 0 then
    -- The same call again, after its answer got lost: say where the images are.
    select array_agg(distinct t.job_id) into v_live_jobs
    from autotag.tasks t where t.asset_id = any (v_live) and t.finished_at is null;
    select * into v_job from autotag.jobs j
    where cardinality(v_live_jobs) = 1 and j.id = v_live_jobs[1];
    return jsonb_build_object('job_id', v_job.id, 'strategy', v_job.strategy, 'image_count', 0,
      'skipped', v_asked, 'batches', 0, 'eta', v_job.eta);
  end if;
  perform autotag.check_live_room(p_workspace_id, v_count);
  perform autotag.check_quotas(p_workspace_id, p_user_id, v_count);

  v_job.strategy := autotag.choose_strategy(v_count);
  if v_job.strategy in ('realtime', 'realtime-chunked') then
    v_wait := autotag.predict_wait(p_workspace_id, v_count);
    if (select p.has_batches from autotag.provider_limits p) = false then
      v_job.fallback := case when v_count > v_settings.chunk_max_images
        then 'The AI provider has no Batch API, so these images go as single calls.' end;
    elsif v_wait > v_settings.realtime_max_wait then
      v_job.strategy := 'batch';
      v_job.fallback := format('Single calls would have waited about %s min for the limits, so these images go by batch.',
        ceil(extract(epoch from v_wait) / 60));
    end if;
  end if;
  if v_job.strategy in ('batch', 'batch-parallel') then
    select * into v_left from autotag.batches_left(p_workspace_id);
    v_batches := autotag.plan_batches(v_count, v_left.batches, v_left.window_images);
  end if;
  -- The express images come out of the first batch, which keeps at least one line.
  v_express := case when v_batches = 0 then v_count
    when v_job.fallback is not null then 0  -- single calls are what has to wait
    else least(v_settings.express_images, v_count / v_batches - 1) end;

  insert into autotag.jobs (workspace_id, user_id, strategy, fallback, image_count, created_at, traceparent)
  values (p_workspace_id, p_user_id, v_job.strategy, v_job.fallback, v_count, v_now, autotag.request_traceparent())
  returning * into v_job;

  -- The first batch is the priority one.
  if v_batches > 0 then
    insert into autotag.batches (job_id, workspace_id, ordinal, image_count, express_count, created_at)
    select v_job.id, p_workspace_id, b,
      (b::bigint * v_count / v_batches - (b - 1)::bigint * v_count / v_batches)::integer,
      case when b = 1 then v_express else 0 end, v_now
    from generate_series(1, v_batches) b;
  end if;

  with placed as (
    insert into autotag.tasks (job_id, workspace_id, asset_id, seen, lane, batch_id)
    select v_job.id, p_workspace_id, a.id, a.seen,
      case when a.i <= v_express then 'realtime' else 'batch' end,
      case when a.i > v_express then b.id end
    from unnest(v_new, v_new_seen) with ordinality a (id, seen, i)
    left join autotag.batches b on b.job_id = v_job.id
      and a.i > (b.ordinal - 1)::bigint * v_count / v_batches and a.i <= b.ordinal::bigint * v_count / v_batches
    order by a.i
    returning id
  )
  select min(id) into v_first_task from placed;

  insert into autotag.queues (job_id, workspace_id, cursor, chunk)
  values (v_job.id, p_workspace_id, v_first_task - 1,
    case when v_job.strategy = 'realtime-chunked' then v_settings.chunk_size end);
  perform autotag.add_queued(p_workspace_id, v_job.id, v_express, v_first_task);
  v_job.eta := autotag.refresh_eta(v_job.id, v_wait);
  perform autotag.show_stage(v_new, 'queued', 0, v_job.eta);

  if v_express > 0 then
    perform pg_notify('autotag', 'realtime');
  end if;
  if v_batches > 0 then
    perform pg_notify('autotag', 'batch');
  end if;
  return jsonb_build_object('job_id', v_job.id, 'strategy', v_job.strategy, 'image_count', v_count,
    'skipped', v_asked - v_count, 'batches', v_batches, 'eta', v_job.eta);
end $$;
