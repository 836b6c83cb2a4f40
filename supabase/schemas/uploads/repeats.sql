-- Nothing twice: a call that is repeated, because its reply was lost, does not pay for its images again.

-- The images among these that are being tagged, or were tagged a moment ago: a job of the workspace that still runs, or finished within
-- repeat_window, has them with their present location and brief, and they did not fail there. It reads only tables of autotag, in one
-- snapshot. So it finds every image that was tagged until now, whatever the image's row showed earlier.
-- p_suspects: the images; p_images, p_marks: these and maybe others, each once, and the marks of their pictures. jobs[i]: the job of assets[i].
create or replace function autotag.find_repeats(
  p_workspace_id autotag.workspace_id, p_suspects autotag.asset_id[], p_images autotag.asset_id[], p_marks bigint[],
  out assets autotag.asset_id[], out jobs uuid[]
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
  set enable_nestloop = off
as $$
declare
  v_brief autotag.briefs;
  v_recent record;
begin
  assets := '{}';
  jobs := '{}';
  if p_suspects = '{}' then
    return;   -- almost always: nothing is read for new images
  end if;
  -- An image that moved here while it is being tagged belongs to a job of another workspace.
  select coalesce(array_agg(x.asset_id), '{}'), coalesce(array_agg(case when x.workspace_id = p_workspace_id then x.job_id end), '{}')
  into assets, jobs
  from autotag.live_tasks(p_suspects) x;
  if cardinality(assets) = cardinality(p_suspects) then
    return;
  end if;
  -- Tags of another brief are not what this call asks for. (0: no job has been asked this yet.)
  v_brief := autotag.compose_brief(p_workspace_id);
  with recent as materialized (
    select pi.job_id, unnest(pi.marks) as mark from autotag.pictures pi
    where pi.job_id = any (array(
      select j.id from autotag.jobs j
      where j.workspace_id = p_workspace_id and j.finished_at is null and j.brief_id is not distinct from coalesce(v_brief.id, v_brief.profile_id * 0)
      union all
      select j.id from autotag.jobs j
      where j.finished_at > autotag.now() - (select s.repeat_window from autotag.settings s) and j.workspace_id = p_workspace_id
        and j.brief_id is not distinct from coalesce(v_brief.id, v_brief.profile_id * 0)))
  ), met as materialized (
    select i.id as asset_id, r.job_id from unnest(p_images, p_marks) i (id, mark) join recent r on r.mark = i.mark
    where i.id in (select unnest(p_suspects)) and i.id not in (select unnest(assets))
  ), failed as materialized (
    select t.job_id, t.asset_id from autotag.tasks t
    where t.job_id = any (array(select distinct m.job_id from met m)) and t.finished_at is not null
  ), repeated as (
    select m.asset_id, (array_agg(m.job_id))[1] as job_id from met m
    where (m.job_id, m.asset_id) not in (select f.job_id, f.asset_id from failed f)
    group by m.asset_id
  )
  select array_agg(r.asset_id) as assets, array_agg(r.job_id) as jobs into v_recent from repeated r;
  assets := assets || v_recent.assets;
  jobs := jobs || v_recent.jobs;
end $$;

-- Makes a job of an upload without the repeated images (find_repeats) and without those that the row filter leaves out. Returns what
-- start_job() does; the images left out are skipped, too. If nothing is left, the reply names the job of the repeated images, or null
-- if they belong to several, or to none.
-- p_images, p_marks: all images that the row filter does not leave out, each once, and the marks of their pictures. p_suspects: those
-- that may have been enqueued before. Locks: as in start_job().
create or replace function autotag.start_once(
  p_workspace_id autotag.workspace_id, p_asset_ids autotag.asset_id[], p_visible_marks uuid[], p_images autotag.asset_id[], p_marks bigint[],
  p_suspects autotag.asset_id[]
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id := autotag.caller();
  v_repeated record;
  v_skipped integer;
  v_jobs uuid[];
  v_job autotag.jobs;
  v_reply jsonb;
begin
  if not autotag.lock_quotas(p_workspace_id, v_user, false) then
    perform autotag.lock_quotas(p_workspace_id, v_user);
    -- Meanwhile others may have enqueued any of these images, and some may have got their tags.
    p_suspects := p_images;
  end if;
  v_repeated := autotag.find_repeats(p_workspace_id, p_suspects, p_images, p_marks);
  v_skipped := cardinality(v_repeated.assets);
  if cardinality(p_images) < cardinality(p_asset_ids) then   -- filtered, or named twice
    v_skipped := v_skipped + (select count(distinct id)::integer from unnest(p_asset_ids) id) - cardinality(p_images);
  end if;
  if cardinality(v_repeated.assets) = cardinality(p_images) then
    p_asset_ids := null;
  elsif v_skipped > 0 then
    select array_agg(a.id order by a.i), array_agg(a.visible_mark order by a.i) into p_asset_ids, p_visible_marks
    from unnest(p_asset_ids, p_visible_marks) with ordinality a (id, visible_mark, i)
    where a.id in (select unnest(p_images)) and a.id not in (select unnest(v_repeated.assets));
  end if;
  if p_asset_ids is null then
    v_jobs := array(select distinct id from unnest(v_repeated.jobs) id where id is not null);
    select * into v_job from autotag.jobs j where cardinality(v_jobs) = 1 and j.id = v_jobs[1];
    return autotag.describe_repeat(v_job, v_skipped);
  end if;
  v_reply := autotag.start_job(p_workspace_id, v_user, p_asset_ids, p_visible_marks);
  v_reply := v_reply || jsonb_build_object('skipped', (v_reply ->> 'skipped')::integer + v_skipped);
  perform autotag.record_pictures(p_workspace_id, v_reply, p_images, p_marks);
  return v_reply;
end $$;

-- Records the pictures of a new job. p_reply: the reply of start_job(); p_images, p_marks: the images of the call, and the marks of
-- their pictures.
create or replace function autotag.record_pictures(p_workspace_id autotag.workspace_id, p_reply jsonb, p_images autotag.asset_id[], p_marks bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_job_id uuid := (p_reply ->> 'job_id')::uuid;
begin
  if (p_reply ->> 'image_count')::integer = 0 then
    return;
  end if;
  if (p_reply ->> 'skipped')::integer > 0 then   -- those belong to other jobs
    p_marks := array(
      select i.mark from unnest(p_images, p_marks) i (id, mark)
      where i.id in (select t.asset_id from autotag.tasks t where t.job_id = v_job_id));
  end if;
  insert into autotag.pictures (job_id, workspace_id, marks) values (v_job_id, p_workspace_id, p_marks);
end $$;

-- The reply to a call that was made before: its job, with all images skipped.
create or replace function autotag.describe_repeat(p_job autotag.jobs, p_skipped integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_build_object('job_id', p_job.id, 'strategy', p_job.strategy, 'image_count', 0, 'skipped', p_skipped,
    'batches', 0, 'eta', (autotag.current_eta(p_job)).p50);
end $$;
