-- Nothing twice: a call that is repeated, because its reply was lost, does not pay for its images again.

-- Those of these images that are being tagged, or were tagged a moment ago: they belong to a job of the workspace that still runs or has
-- finished within repeat_window, with the location that they had then and the present brief, and did not fail there. It reads only tables of autotag, in
-- one snapshot, so that it knows of every image that was tagged until now, whatever the image's row showed earlier.
create or replace function autotag.find_repeats(p_workspace_id autotag.workspace_id, p_pictures autotag.picture[]) returns autotag.repeated[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
  set enable_nestloop = off
as $$
declare
  v_live autotag.repeated[];
  v_brief autotag.briefs;
begin
  if p_pictures = '{}' then
    return array[]::autotag.repeated[];   -- almost always: nothing is read for new images
  end if;
  v_live := array(
    -- one that moved here while it is tagged belongs to a job of another workspace
    select row(t.asset_id, case when t.workspace_id = p_workspace_id then t.job_id end)::autotag.repeated
    from autotag.tasks t where t.asset_id = any (array(select p.asset_id from unnest(p_pictures) p)) and t.finished_at is null);
  p_pictures := array(select p from unnest(p_pictures) p where p.asset_id not in (select l.asset_id from unnest(v_live) l));
  if p_pictures = '{}' then
    return v_live;
  end if;
  -- The answer to another question is not what this call asks for. (0: no job has been asked this yet.)
  v_brief := autotag.compose_brief(p_workspace_id);
  return v_live || array(
    with recent as materialized (
      select p.job_id, unnest(p.marks) as mark from autotag.pictures p
      where p.job_id = any (array(
        select j.id from autotag.jobs j
        where j.workspace_id = p_workspace_id and j.finished_at is null and j.brief_id is not distinct from coalesce(v_brief.id, v_brief.profile_id * 0)
        union all
        select j.id from autotag.jobs j
        where j.finished_at > autotag.now() - (select s.repeat_window from autotag.settings s) and j.workspace_id = p_workspace_id
          and j.brief_id is not distinct from coalesce(v_brief.id, v_brief.profile_id * 0)))
    ), met as materialized (
      select a.asset_id, r.job_id from unnest(p_pictures) a join recent r on r.mark = a.mark
    ), failed as materialized (
      select t.job_id, t.asset_id from autotag.tasks t
      where t.job_id = any (array(select distinct m.job_id from met m)) and t.finished_at is not null
    )
    select row(m.asset_id, (array_agg(m.job_id))[1])::autotag.repeated from met m
    where (m.job_id, m.asset_id) not in (select f.job_id, f.asset_id from failed f)
    group by m.asset_id);
end $$;

-- Makes a job of an upload without the repeated images (find_repeats) and without those that the row filter leaves out. Returns what
-- start_job() does; the images left out are skipped, too. If nothing is left, the reply names the job of the repeated images, or null
-- if they belong to several, or to none.
-- p_images, p_marks: all images that the filter lets pass, each once, and the marks of their pictures. p_suspects: those that may have been enqueued before.
-- Locks: as in start_job().
create or replace function autotag.start_once(
  p_workspace_id autotag.workspace_id, p_asset_ids autotag.asset_id[], p_visible_marks uuid[], p_images autotag.asset_id[], p_marks bigint[], p_suspects autotag.picture[]
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id := autotag.caller();
  v_repeated autotag.repeated[];
  v_skipped integer;
  v_jobs uuid[];
  v_job autotag.jobs;
  v_reply jsonb;
begin
  if not autotag.lock_quotas(p_workspace_id, v_user, false) then
    perform autotag.lock_quotas(p_workspace_id, v_user);
    -- Meanwhile others may have enqueued any of these images, and some may have got their tags.
    p_suspects := array(select row(i.id, i.mark)::autotag.picture from unnest(p_images, p_marks) i (id, mark));
  end if;
  v_repeated := autotag.find_repeats(p_workspace_id, p_suspects);
  v_skipped := cardinality(v_repeated);
  if cardinality(p_images) < cardinality(p_asset_ids) then   -- filtered, or named twice
    v_skipped := v_skipped + (select count(distinct id)::integer from unnest(p_asset_ids) id) - cardinality(p_images);
  end if;
  if v_skipped > 0 then
    select array_agg(a.id order by a.i), array_agg(a.visible_mark order by a.i) into p_asset_ids, p_visible_marks
    from unnest(p_asset_ids, p_visible_marks) with ordinality a (id, visible_mark, i)
    where a.id in (select unnest(p_images)) and a.id not in (select r.asset_id from unnest(v_repeated) r);
  end if;
  if p_asset_ids is null then
    v_jobs := array(select distinct r.job_id from unnest(v_repeated) r where r.job_id is not null);
    select * into v_job from autotag.jobs j where cardinality(v_jobs) = 1 and j.id = v_jobs[1];
    return autotag.describe_repeat(v_job, v_skipped);
  end if;
  v_reply := autotag.start_job(p_workspace_id, v_user, p_asset_ids, p_visible_marks);
  v_reply := v_reply || jsonb_build_object('skipped', (v_reply ->> 'skipped')::integer + v_skipped);
  perform autotag.record_pictures(p_workspace_id, v_reply, p_images, p_marks);
  return v_reply;
end $$;

-- Records the pictures of a new job. p_reply: of start_job(); p_images, p_marks: the images of its call, and the marks of their pictures.
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
