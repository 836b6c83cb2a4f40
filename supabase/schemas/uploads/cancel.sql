-- Cancelling an upload.

-- cancel_tagging: {job_id, cancelled (images)}. Images that have not been sent to OpenAI fail with the code `cancelled`. Images that
-- have been sent are billed, so their answers are stored. The notification wakes a worker, which cancels the batch at OpenAI at once
-- (take_cancellations).
-- It may run in a tenant's long transaction. Until that ends, claims skip the upload, because they do not get the job's advisory lock.
-- Nothing else waits for it. Locks: the job (advisory), job, batches, tasks, assets (finish).
create or replace function autotag.cancel(p_job_id uuid) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs := autotag.visible_job(p_job_id);
  v_now timestamptz;
  v_items autotag.finished[] := array[]::autotag.finished[];
begin
  perform pg_advisory_xact_lock(autotag.job_key(p_job_id));
  select * into v_job from autotag.jobs j where j.id = p_job_id for no key update;
  v_now := autotag.now();
  if v_job.finished_at is null and v_job.cancelled_at is null then
    update autotag.jobs set cancelled_at = v_now where id = p_job_id;
    perform from autotag.batches b
    where b.job_id = p_job_id and b.state in ('planned', 'preparing', 'uploading', 'creating', 'submitted') order by b.id for no key update;
    with waiting as (
      select t.id, t.asset_id
      from autotag.tasks t
      left join autotag.batches b on b.id = t.batch_id
      where t.job_id = p_job_id and t.finished_at is null and t.worker_id is null
        and t.retry_at is distinct from 'infinity'   -- its answer is there
        and (b.id is null or b.state in ('planned', 'preparing', 'uploading'))
      order by t.id for update of t
    )
    select coalesce(array_agg(row(w.id, p_job_id, w.asset_id, null, 'cancelled', 'Tagging was cancelled.', null)::autotag.finished), '{}')
    into v_items from waiting w;
    update autotag.batches b set state = 'cancelled', worker_id = null, reserved_tokens = 0, finished_at = v_now
    where b.job_id = p_job_id and b.state in ('planned', 'preparing', 'uploading');
    update autotag.batches b set cancel_requested = true
    where b.job_id = p_job_id and b.state in ('creating', 'submitted');
    perform autotag.finish(v_job.workspace_id, v_items, false);
    perform autotag.broadcast_progress(p_job_id);   -- that it is being cancelled
    perform pg_notify('autotag', 'batch');
  end if;
  return jsonb_build_object('job_id', p_job_id, 'cancelled', cardinality(v_items));
end $$;
