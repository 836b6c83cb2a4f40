-- Retrying the failed images of an upload.

-- The failed images of a job, in order.
create or replace function autotag.failed_assets(p_job_id uuid) returns autotag.asset_id[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs := autotag.visible_job(p_job_id);
begin
  return array(select t.asset_id from autotag.tasks t where t.job_id = v_job.id and t.stage = 'failed' order by t.id);
end $$;

-- retry_tagging: enqueues the failed images of a job as a new job, except those that no longer exist, moved to another workspace
-- (which the caller may not know of), whose location is refused (describe_assets), or that a later job has tagged.
-- A call that is repeated while that job runs, or within repeat_window of its end, returns that job again. After the job was cancelled, a
-- call makes another one.
-- p_asset_ids: the failed_assets() whose files the caller's rights were checked for; p_visible_marks: as in enqueue, for these images.
-- Locks: the job (advisory: calls for one job run one after the other), then as in enqueue().
create or replace function autotag.retry(p_job_id uuid, p_asset_ids autotag.asset_id[], p_visible_marks uuid[] default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs := autotag.visible_job(p_job_id);
  v_retry autotag.jobs;
  v_images autotag.asset_id[];    -- those that can be tagged now,
  v_marks bigint[];               -- the marks of their pictures,
  v_suspects autotag.asset_id[];  -- and those that may have been enqueued again
  v_failed autotag.asset_id[];
  v_assets autotag.asset_id[];
  v_visible_marks uuid[];
  v_reply jsonb;
begin
  perform pg_advisory_xact_lock(hashtextextended('autotag.retry ' || v_job.id, 0));
  select * into v_retry from autotag.jobs j where j.retry_of = v_job.id order by j.created_at desc limit 1;
  if v_retry.cancelled_at is null
    and (v_retry.finished_at is null or v_retry.finished_at > autotag.now() - (select s.repeat_window from autotag.settings s))
    and v_retry.id is not null then
    return autotag.describe_repeat(v_retry, v_retry.image_count);
  end if;
  v_failed := autotag.failed_assets(v_job.id);
  if p_asset_ids is distinct from v_failed then
    v_failed := array(select unnest(p_asset_ids) intersect select unnest(v_failed));
  end if;
  select coalesce(array_agg(d.asset_id), '{}'), array_agg(hash_record_extended(row(d.asset_id, d.place), 0)),
    coalesce(array_agg(d.asset_id) filter (where d.stage <> 'failed'), '{}')
  into v_images, v_marks, v_suspects
  from autotag.describe_assets(v_failed, false) d
  where d.workspace_id = v_job.workspace_id and d.refused is null and d.stage is distinct from 'completed';
  if cardinality(v_images) = cardinality(p_asset_ids) then
    v_assets := p_asset_ids;
    v_visible_marks := p_visible_marks;
  else
    select array_agg(a.id order by a.i), array_agg(a.visible_mark order by a.i) into v_assets, v_visible_marks
    from unnest(p_asset_ids, p_visible_marks) with ordinality a (id, visible_mark, i)
    where a.id in (select unnest(v_images));
  end if;
  if v_assets is null or v_images = '{}' then
    perform autotag.refuse(409, 'nothing_to_retry', 'This upload has no failed image that can be tagged now.',
      'Check tagging_job() before you retry.');
  end if;
  v_reply := autotag.start_once(v_job.workspace_id, v_assets, v_visible_marks, v_images, v_marks, v_suspects);
  update autotag.jobs j set retry_of = v_job.id
  where j.id = (v_reply ->> 'job_id')::uuid and (v_reply ->> 'image_count')::integer > 0;
  return v_reply;
end $$;
