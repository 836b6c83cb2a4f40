-- Cancelling an upload.

-- cancel_tagging: {job_id, cancelled (images)}. Images that have not been sent to OpenAI fail with the code `cancelled`. What
-- has been sent is billed: a worker cancels the batch at OpenAI, and the answers that come are stored.
-- Locks: workspace, job, batches, tasks.
create or replace function autotag.cancel(p_job_id uuid) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs := autotag.visible_job(p_job_id);
  v_now timestamptz;
  v_tasks bigint[] := array[]::bigint[];
  v_queued integer;
begin
  perform from autotag.workspaces w where w.workspace_id = v_job.workspace_id for update;
  select * into v_job from autotag.jobs j where j.id = p_job_id for update;
  v_now := autotag.now();
  if v_job.finished_at is null and v_job.cancelled_at is null then
    update autotag.jobs set cancelled_at = v_now where id = p_job_id;
    perform from autotag.batches b where b.job_id = p_job_id order by b.id for update;
    perform from autotag.tasks t where t.job_id = p_job_id and t.finished_at is null order by t.id for update;

    select coalesce(array_agg(t.id order by t.id), '{}'),
           count(*) filter (where t.lane = 'realtime' and t.retry_at is null)
    into v_tasks, v_queued
    from autotag.tasks t
    left join autotag.batches b on b.id = t.batch_id
    where t.job_id = p_job_id and t.finished_at is null
      and t.worker_id is null and (b.id is null or b.state in ('planned', 'preparing', 'uploading'));

    update autotag.queues set queued = 0 where job_id = p_job_id;
    update autotag.workspaces w set queued = w.queued - v_queued where w.workspace_id = v_job.workspace_id;
    update autotag.batches b set state = 'cancelled', worker_id = null, reserved_tokens = 0, finished_at = v_now
    where b.job_id = p_job_id and b.state in ('planned', 'preparing', 'uploading');
    update autotag.batches b set cancel_requested = true
    where b.job_id = p_job_id and b.state in ('creating', 'submitted');
    perform autotag.fail_tasks(v_tasks, array_fill('cancelled'::text, array[cardinality(v_tasks)]),
      array_fill('Tagging was cancelled.'::text, array[cardinality(v_tasks)]));
    perform autotag.count_finished(p_job_id, 0, cardinality(v_tasks));
    perform pg_notify('autotag', 'batch');
  end if;
  return jsonb_build_object('job_id', p_job_id, 'cancelled', cardinality(v_tasks));
end $$;
