-- Starts the job of an upload: its strategy, batches and tasks.

-- Makes a job of the images among these that are not being tagged already. All belong to p_workspace_id.
-- p_visible_marks: as in enqueue(). Returns {job_id, strategy, image_count, skipped, batches, eta}.
-- Locks: workspace, user (lock_quotas), assets (show); all rows of autotag are new.
create or replace function autotag.start_job(
  p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_asset_ids autotag.asset_id[], p_visible_marks uuid[] default null
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set random_page_cost = 1.1
as $$
declare
  v_now timestamptz := autotag.now();
  v_asked integer := (select count(distinct id) from unnest(p_asset_ids) id);
  v_live autotag.asset_id[];               -- those of p_asset_ids that are being tagged already
  v_new autotag.asset_id[];
  v_new_marks uuid[];           -- p_visible_marks of each of them
  v_count integer;
  v_plan autotag.upload_plan;
  v_job autotag.jobs;
  v_first_task bigint;
begin
  perform autotag.lock_quotas(p_workspace_id, p_user_id);
  -- The new images, each once, in the order of the upload.
  v_live := array(select x.asset_id from autotag.live_tasks(p_asset_ids) x);
  if v_live = '{}' and v_asked = cardinality(p_asset_ids) and array_lower(p_asset_ids, 1) = 1 then   -- nothing to leave out
    v_new := p_asset_ids;
    v_new_marks := p_visible_marks;
  else
    select coalesce(array_agg(a.id order by a.i), '{}'), array_agg(a.visible_mark order by a.i) into v_new, v_new_marks
    from (select distinct on (u.id) u.* from unnest(p_asset_ids, p_visible_marks) with ordinality u (id, visible_mark, i) order by u.id, u.i) a
    where a.id not in (select unnest(v_live));   -- hashed, where `<> all` compares each with each in a generic plan
  end if;
  v_count := cardinality(v_new);
  if v_count = 0 then
    return autotag.describe_live(p_workspace_id, v_live, v_asked);
  end if;
  perform autotag.check_live_capacity(p_workspace_id, v_count);
  perform autotag.check_quotas(p_workspace_id, p_user_id, v_count);

  v_plan := autotag.plan_upload(p_workspace_id, v_count);
  insert into autotag.jobs (workspace_id, user_id, strategy, fallback, image_count, created_at, traceparent, brief_id, changed)
  values (p_workspace_id, p_user_id, v_plan.strategy, v_plan.fallback, v_count, v_now, autotag.request_traceparent(),
    autotag.make_brief(p_workspace_id), autotag.add_changed('{}', v_new))
  returning * into v_job;
  v_first_task := autotag.add_tasks(v_job, v_plan, v_new, v_new_marks);
  insert into autotag.queues (job_id, workspace_id, queued, overdue_at, cursor, chunk)
  values (v_job.id, p_workspace_id, v_plan.express, autotag.patience_ends_at(v_plan.express, v_now), v_first_task - 1, v_plan.chunk);
  v_job.eta := autotag.refresh_eta(v_job.id, v_plan.wait);
  if v_plan.express > 0 and v_plan.batches > 0 then   -- express images do not wait for the batch
    perform autotag.show(p_workspace_id, v_new[:v_plan.express], 'queued', 0, autotag.predict_single_calls(v_job.id, null));
    v_new := v_new[v_plan.express + 1:];
  end if;
  perform autotag.show(p_workspace_id, v_new, 'queued', 0, v_job.eta);

  if v_plan.express > 0 then
    perform pg_notify('autotag', 'realtime');
  end if;
  if v_plan.batches > 0 then
    perform pg_notify('autotag', 'batch');
  end if;
  return jsonb_build_object('job_id', v_job.id, 'strategy', v_job.strategy, 'image_count', v_count,
    'skipped', v_asked - v_count, 'batches', v_plan.batches, 'eta', v_job.eta);
end $$;

-- The reply to an upload whose images are all being tagged already: their job, or null if they belong to several. It names only jobs of
-- this workspace. (If an image moves to this workspace while it is being tagged, its job belongs to the former workspace.)
create or replace function autotag.describe_live(p_workspace_id autotag.workspace_id, p_live autotag.asset_id[], p_asked integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_live_jobs uuid[];
  v_job autotag.jobs;
begin
  -- The call is probably a retry after its first reply was lost, so name the job.
  select array_agg(distinct x.job_id) into v_live_jobs from autotag.live_tasks(p_live) x where x.workspace_id = p_workspace_id;
  select * into v_job from autotag.jobs j
  where cardinality(v_live_jobs) = 1 and j.id = v_live_jobs[1];
  return jsonb_build_object('job_id', v_job.id, 'strategy', v_job.strategy, 'image_count', 0,
    'skipped', p_asked, 'batches', 0, 'eta', (autotag.current_eta(v_job)).p50);
end $$;

-- Plans an upload of p_images images. Reads only.
create or replace function autotag.plan_upload(p_workspace_id autotag.workspace_id, p_images integer) returns autotag.upload_plan
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_settings autotag.settings;
  v_plan autotag.upload_plan;
  v_left record;
begin
  select * into v_settings from autotag.settings;
  v_plan.strategy := autotag.choose_strategy(p_images);
  if v_plan.strategy in ('realtime', 'realtime-chunked') then
    v_plan.wait := autotag.predict_wait(p_workspace_id, p_images);
    if (select p.has_batches from autotag.provider_limits p) = false then
      v_plan.fallback := case when p_images > v_settings.chunk_max_images
        then 'The AI provider has no Batch API, so these images are sent as single calls.' end;
    -- A batch is no use if it has to wait for its workspace's window, or if it takes longer than the single calls would wait.
    elsif v_plan.wait > v_settings.realtime_max_wait
      and v_now + v_plan.wait > (autotag.predict_new_batch(p_workspace_id, p_images, v_now)).ends_at then
      v_plan.strategy := 'batch';
      v_plan.fallback := format('Single calls would have waited about %s min for the limits, so these images are sent in a batch.',
        ceil(extract(epoch from v_plan.wait) / 60));
    end if;
  end if;
  v_plan.batches := 0;
  if v_plan.strategy in ('batch', 'batch-parallel') then
    select * into v_left from autotag.batches_left(p_workspace_id);
    v_plan.batches := autotag.plan_batches(p_images, v_left.batches, v_left.window_images);
  end if;
  -- The express images are taken from the first batch, which keeps at least one image.
  v_plan.express := case when v_plan.batches = 0 then p_images
    when v_plan.fallback is not null then 0  -- the fallback avoids single calls
    when autotag.predict_wait(p_workspace_id, v_settings.express_images) > v_settings.realtime_max_wait then 0
    else least(v_settings.express_images, p_images / v_plan.batches - 1) end;
  v_plan.chunk := case when v_plan.strategy = 'realtime-chunked' then v_settings.chunk_size end;
  return v_plan;
end $$;

-- Inserts a job's batches and tasks, in upload order, and returns the id of the first task.
create or replace function autotag.add_tasks(p_job autotag.jobs, p_plan autotag.upload_plan, p_asset_ids autotag.asset_id[], p_visible_marks uuid[])
returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batches uuid[];       -- by their ordinal
  v_first_task bigint;
  v_extra bigint := autotag.extra_tokens(p_job.brief_id);
begin
  -- Ordinal 1 is the priority batch, which has the express images.
  if p_plan.batches > 0 then
    with planned as (
      insert into autotag.batches (job_id, workspace_id, ordinal, image_count, express_count, extra_tokens, created_at)
      select p_job.id, p_job.workspace_id, b, n.images, n.express, (n.images - n.express) * v_extra, p_job.created_at
      from generate_series(1, p_plan.batches) b
      cross join lateral (
        select (b::bigint * p_job.image_count / p_plan.batches - (b - 1)::bigint * p_job.image_count / p_plan.batches)::integer as images,
          case when b = 1 then p_plan.express else 0 end as express) n
      returning id, ordinal
    )
    select array_agg(x.id order by x.ordinal) into v_batches from planned x;
  end if;

  with placed as (
    insert into autotag.tasks (job_id, workspace_id, asset_id, visible_mark, lane, batch_id)
    select p_job.id, p_job.workspace_id, a.id, a.visible_mark,
      case when a.i <= p_plan.express then 'realtime' else 'batch' end,
      case when a.i > p_plan.express then v_batches[((a.i * p_plan.batches + p_job.image_count - 1) / p_job.image_count)::integer] end
    from unnest(p_asset_ids, p_visible_marks) with ordinality a (id, visible_mark, i)
    order by a.i
    returning id
  )
  select min(x.id) into v_first_task from placed x;
  return v_first_task;
end $$;
