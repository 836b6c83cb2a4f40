-- Retrying the failed images of an upload.

-- The failed images of a job, in order, except those that no longer exist, moved to another workspace (which the caller may not
-- know of), or whose location is refused (describe_assets).
create or replace function autotag.failed_assets(p_job_id uuid) returns uuid[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_job autotag.jobs := autotag.visible_job(p_job_id);
  v_failed uuid[] := array(
    select t.asset_id from autotag.tasks t where t.job_id = v_job.id and t.stage = 'failed' order by t.id);
begin
  return array(
    select f.id from unnest(v_failed) with ordinality f (id, i) join autotag.describe_assets(v_failed) d on d.asset_id = f.id
    where d.workspace_id = v_job.workspace_id and d.refused is null order by f.i);
end $$;

-- retry_tagging: enqueues the failed images of a job as a new job. p_seen: as in enqueue, for failed_assets().
create or replace function autotag.retry(p_job_id uuid, p_seen uuid[] default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_assets uuid[] := autotag.failed_assets(p_job_id);
begin
  if v_assets = '{}' then
    perform autotag.refuse(409, 'nothing_to_retry', 'This upload has no failed image that can be tagged now.',
      'Check tagging_job() before you retry.');
  end if;
  return autotag.enqueue(v_assets, p_seen);
end $$;
