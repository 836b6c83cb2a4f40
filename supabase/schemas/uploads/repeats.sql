-- Nothing twice: a call that is repeated, because its reply was lost, does not pay for its images again.

-- Those of these pictures that were tagged a moment ago: they have their tags, and belong to a job of the workspace that still runs or
-- has finished within repeat_window, with the location that they had then.
create or replace function autotag.find_repeats(p_workspace_id uuid, p_pictures autotag.picture[]) returns autotag.repeated[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_tagged autotag.picture[] := array(select p from unnest(p_pictures) p where p.tagged);
begin
  if v_tagged = '{}' then
    return array[]::autotag.repeated[];   -- almost always: nothing is read for new images
  end if;
  return array(
    with recent as materialized (
      select j.id, unnest(p.marks) as mark
      from (
        select n.id from autotag.jobs n where n.workspace_id = p_workspace_id and n.finished_at is null
        union all
        select n.id from autotag.jobs n
        where n.finished_at > autotag.now() - (select s.repeat_window from autotag.settings s) and n.workspace_id = p_workspace_id) j
      join autotag.pictures p on p.job_id = j.id
    )
    select row(a.asset_id, r.job_id)::autotag.repeated
    from unnest(v_tagged) a
    join (select c.mark, (array_agg(c.id))[1] as job_id from recent c group by c.mark) r on r.mark = a.mark);
end $$;

-- Makes a job of an upload without the images that were tagged a moment ago. Returns what start_job() does; the repeated images are
-- skipped, too. If nothing is left, the reply names the job that tagged them, or null if they belong to several.
-- p_pictures: of all images. The caller has locked the workspace.
create or replace function autotag.start_once(
  p_workspace_id uuid, p_asset_ids uuid[], p_seen uuid[], p_pictures autotag.picture[]
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_repeated autotag.repeated[] := autotag.find_repeats(p_workspace_id, p_pictures);
  v_skipped integer := cardinality(v_repeated);
  v_jobs uuid[];
  v_job autotag.jobs;
  v_reply jsonb;
begin
  if v_skipped > 0 then
    select array_agg(a.id order by a.i), array_agg(a.seen order by a.i) into p_asset_ids, p_seen
    from unnest(p_asset_ids, p_seen) with ordinality a (id, seen, i)
    where a.id <> all (array(select r.asset_id from unnest(v_repeated) r));
  end if;
  if p_asset_ids is null then
    v_jobs := array(select distinct r.job_id from unnest(v_repeated) r);
    select * into v_job from autotag.jobs j where cardinality(v_jobs) = 1 and j.id = v_jobs[1];
    return autotag.describe_repeat(v_job, v_skipped);
  end if;
  v_reply := autotag.start_job(p_workspace_id, (select auth.uid()), p_asset_ids, p_seen);
  v_reply := v_reply || jsonb_build_object('skipped', (v_reply ->> 'skipped')::integer + v_skipped);
  perform autotag.record_pictures(v_reply, p_pictures);
  return v_reply;
end $$;

-- Records the pictures of a new job. p_reply: of start_job(); p_pictures: those of its call.
create or replace function autotag.record_pictures(p_reply jsonb, p_pictures autotag.picture[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_job_id uuid := (p_reply ->> 'job_id')::uuid;
begin
  if (p_reply ->> 'image_count')::integer = 0 then
    return;
  end if;
  if (p_reply ->> 'skipped')::integer > 0 then   -- those belong to other jobs
    p_pictures := array(
      select p from unnest(p_pictures) p join autotag.tasks t on t.asset_id = p.asset_id and t.job_id = v_job_id);
  end if;
  insert into autotag.pictures (job_id, marks) select v_job_id, array(select p.mark from unnest(p_pictures) p);
end $$;

-- The reply to a call that was made before: its job, with all images skipped.
create or replace function autotag.describe_repeat(p_job autotag.jobs, p_skipped integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_build_object('job_id', p_job.id, 'strategy', p_job.strategy, 'image_count', 0, 'skipped', p_skipped,
    'batches', 0, 'eta', p_job.eta);
end $$;
