-- What users see: stage, progress and eta of each image, and the counts of each upload. The adapter's show_stage and store_tags
-- write the rows: queued, one or two stages in between (submitted, processing), and the end. Broadcasts and tagging_job() report
-- everything finer, because each write of a row fires the host's triggers, webhooks and Postgres Changes.

-- The order of the seven stages. A pass moves only forward and ends with completed or failed.
create or replace function autotag.stage_rank(stage text) returns integer
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case stage
    when 'queued' then 1 when 'preparing' then 2 when 'submitted' then 3 when 'processing' then 4
    when 'completing' then 5 when 'completed' then 6 when 'failed' then 6 end
$$;

-- Progress of an image when it enters a stage, in percent.
create or replace function autotag.stage_progress(p_stage text) returns integer
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case p_stage when 'queued' then 0 when 'preparing' then 10 when 'submitted' then 20
    when 'processing' then 30 when 'completing' then 90 when 'completed' then 100 end
$$;

-- Writes a stage to the host's rows of images of one workspace. A row that is held or that raises is left out, because the image's
-- outcome follows. It writes in parts and waits for locks as finish() does. While autotag.quiet is set, it writes nothing
-- (seal_uploads). p_own: the transaction is a worker's own, so constraints that the host has deferred are checked here, because an error
-- at the commit would undo everything. The caller does not hold the provider row. Locks: assets.
create or replace function autotag.show(
  p_workspace_id autotag.workspace_id, p_asset_ids autotag.asset_id[], p_stage text, p_progress integer, p_eta timestamptz,
  p_own boolean default false
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_parts autotag.parts := autotag.first_part(cardinality(p_asset_ids));
  v_waits interval := interval '150 ms';
  v_next integer := 1;
  v_part autotag.asset_id[];
  v_free autotag.asset_id[];   -- of v_part, the rows that nobody holds
  v_try record;
begin
  if current_setting('autotag.quiet', true) = 'true' then
    return;
  end if;
  while v_next <= cardinality(p_asset_ids) and v_waits > interval '0' loop
    v_part := p_asset_ids[v_next : v_next + v_parts.size - 1];
    v_try := autotag.try_stage(p_workspace_id, v_part, p_stage, p_progress, p_eta, p_own);
    v_parts := autotag.next_part(v_parts, cardinality(v_part), v_try.state is not null);
    if v_try.state is null or cardinality(v_part) = 1 then
      v_next := v_next + cardinality(v_part);
    elsif autotag.is_lock_error(v_try.state) then
      v_free := autotag.free_assets(v_part);
      if cardinality(v_free) < cardinality(v_part) then
        p_asset_ids := v_free || p_asset_ids[v_next + cardinality(v_part):];
        v_next := 1;
      end if;
    end if;
    if autotag.is_lock_error(v_try.state) then
      v_waits := v_waits - v_try.took;
    end if;
  end loop;
end $$;

-- Shows a stage on all these rows (show_stage). Its error is returned as in try_outcomes(), except this: at the isolation levels
-- repeatable read and serializable, a row that has changed since the caller's snapshot ends the call with 40001. The caller would not see
-- what has happened to the image meanwhile, and it would be tagged and paid twice.
create or replace function autotag.try_stage(
  p_workspace_id autotag.workspace_id, p_asset_ids autotag.asset_id[], p_stage text, p_progress integer, p_eta timestamptz, p_own boolean,
  out state text, out took interval
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_began timestamptz := clock_timestamp();
begin
  -- whole seconds: a prediction is no more exact, and clients fetch it for each image
  perform autotag.show_stage(p_asset_ids, p_workspace_id, p_stage, p_progress, date_trunc('second', p_eta));
  if p_own then
    set constraints all immediate;
  end if;
exception when others or assert_failure then
  get stacked diagnostics state = returned_sqlstate;
  if state = '40001' and current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise;
  end if;
  took := clock_timestamp() - v_began;
end $$;

-- The images among these whose rows no other transaction holds; none if another transaction holds the whole table.
create or replace function autotag.free_assets(p_asset_ids autotag.asset_id[]) returns autotag.asset_id[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_held autotag.asset_id[];
begin
  v_held := autotag.held_assets(p_asset_ids);
  return array(select a from unnest(p_asset_ids) a where a not in (select unnest(v_held)));
exception when others or assert_failure then
  return array[]::autotag.asset_id[];
end $$;

-- The stage of the images of a batch that have no outcome yet. A batch that is planned again stays where it was: stages move only
-- forward.
create or replace function autotag.batch_stage(p_state text, p_running_at timestamptz, p_submitted_at timestamptz) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case when p_state not in ('planned', 'preparing', 'uploading', 'creating', 'submitted') then 'completing'
    when p_running_at is not null then 'processing'
    when p_submitted_at is not null then 'submitted'
    when p_state = 'planned' then 'queued'
    else 'preparing' end
$$;

-- Progress of a job in percent: finished images count fully, those that OpenAI has done in its batches 90 %.
create or replace function autotag.measure_progress(p_job autotag.jobs) returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select greatest(p_job.progress, least(99, floor(100 * (
    p_job.completed + p_job.failed
    + 0.9 * coalesce((
        select sum(least(b.request_done, b.image_count - b.express_count)) from autotag.batches b
        where b.job_id = p_job.id and b.state in ('submitted', 'ended', 'harvesting') and not b.stored), 0)
  ) / p_job.image_count)::integer))
$$;

-- The images of a job whose rows have changed since its last message, each once or several times; null: more than a client should
-- request by id in one URL.
create or replace function autotag.add_changed(p_changed autotag.asset_id[], p_more autotag.asset_id[]) returns autotag.asset_id[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_all autotag.asset_id[] := case when cardinality(p_changed) <= 100 and cardinality(p_more) <= 100 then p_changed || p_more end;
begin
  if cardinality(v_all) > 100 or pg_column_size(v_all) > 8000 then  -- often the same images in their next stage
    v_all := array(select distinct i from unnest(v_all) i);
  end if;
  -- a key that is a text can have 2,700 bytes
  return case when cardinality(v_all) <= 100 and pg_column_size(v_all) <= 8000 then v_all end;
end $$;

-- Counts finished images of a job; the last one finishes the job. Broadcasts job-progress at most once per broadcast_interval, and
-- job-complete at the end. p_changed: the images whose rows this transaction has changed; null: many. The next message includes those
-- that no message has named yet (broadcast_held). p_eta: the job's eta, if it was just computed. Updates the job's row once. The caller
-- holds the job's lock.
create or replace function autotag.report_job(
  p_job_id uuid, p_completed integer, p_failed integer, p_changed autotag.asset_id[], p_eta timestamptz default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_job autotag.jobs;
  v_told autotag.asset_id[];
  v_due boolean;
  v_end record;
  v_status text;
  v_ids jsonb;
begin
  select * into v_job from autotag.jobs j where j.id = p_job_id and j.finished_at is null;
  if not found then
    return;
  end if;
  v_job.completed := v_job.completed + p_completed;
  v_job.failed := v_job.failed + p_failed;
  v_job.changed := autotag.add_changed(v_job.changed, p_changed);
  v_told := v_job.changed;
  v_due := v_job.broadcast_at <= v_now - (select s.broadcast_interval from autotag.settings s);
  if v_job.completed + v_job.failed = v_job.image_count then
    v_job.finished_at := v_now;
    v_job.progress := 100;
    v_job.eta := null;
    v_job.eta_p90 := null;
    v_job.changed := array[]::autotag.asset_id[];
  elsif v_due then
    v_job.broadcast_at := v_now;
    v_job.progress := autotag.measure_progress(v_job);
    if p_eta is null then
      v_end := autotag.predict_job(p_job_id, null);
      v_job.eta := v_end.p50;
      v_job.eta_p90 := v_end.p90;
    end if;
    v_job.changed := array[]::autotag.asset_id[];
  elsif p_completed + p_failed = 0 and p_changed = '{}' then
    return;
  end if;
  update autotag.jobs j
  set completed = v_job.completed, failed = v_job.failed, finished_at = v_job.finished_at, progress = v_job.progress,
      eta = v_job.eta, eta_p90 = v_job.eta_p90, broadcast_at = v_job.broadcast_at, changed = v_job.changed
  where j.id = p_job_id;
  if v_job.finished_at is not null then
    perform autotag.broadcast_end(v_job, v_told);
  elsif v_due then
    v_status := autotag.job_status(v_job);
    v_ids := autotag.unique_ids(v_told);
    perform autotag.broadcast_to_workspace(v_job.workspace_id, 'job-progress', jsonb_build_object(
      'job_id', v_job.id, 'status', v_status, 'completed', v_job.completed, 'failed', v_job.failed, 'image_count', v_job.image_count,
      'progress', v_job.progress, 'eta', v_job.eta, 'asset_ids', v_ids, 'many', v_told is null));
  end if;
end $$;

-- Broadcasts that a job has ended. p_told: the images whose rows changed since its last message. If no batch-complete follows, clients
-- that listen only to the public topic get one without a batch id (broadcast_single_calls).
create or replace function autotag.broadcast_end(p_job autotag.jobs, p_told autotag.asset_id[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_status text := autotag.job_status(p_job);
  v_ids jsonb := autotag.unique_ids(p_told);
begin
  perform autotag.broadcast_to_workspace(p_job.workspace_id, 'job-complete', jsonb_build_object(
    'job_id', p_job.id, 'status', v_status, 'completed', p_job.completed, 'failed', p_job.failed, 'image_count', p_job.image_count,
    'asset_ids', v_ids, 'many', p_told is null));
  if (select s.broadcast_single_calls from autotag.settings s) and not exists (
    select from autotag.batches b where b.job_id = p_job.id and b.openai_batch_id is not null and not b.stored) then
    perform autotag.broadcast('batch-updates', 'batch-complete', jsonb_build_object('batch_id', null), false);
  end if;
end $$;

-- An image that changed twice between two messages is told of once.
create or replace function autotag.unique_ids(p_ids autotag.asset_id[]) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return to_jsonb(case when p_ids is not null then array(select distinct i from unnest(p_ids) i) end);
end $$;

-- Broadcasts a job's progress, if no message was sent within broadcast_interval (report_job). The caller holds the job's lock.
create or replace function autotag.broadcast_progress(
  p_job_id uuid, p_eta timestamptz default null, p_changed autotag.asset_id[] default '{}'
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.report_job(p_job_id, 0, 0, p_changed, p_eta);
end $$;

-- Broadcasts changes that no message has named yet, because another message had just been sent: those of at most 100 uploads of a
-- workspace; null: of all workspaces. (A plan with seqscan may read all uploads that ever finished.) Locks: jobs (skip locked).
create or replace function autotag.broadcast_held(p_workspace_id autotag.workspace_id) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
  set plan_cache_mode = 'force_custom_plan' set enable_seqscan = off set jit = off
as $$
declare
  v_until timestamptz := autotag.now() - (select s.broadcast_interval from autotag.settings s);
begin
  perform autotag.broadcast_progress(h.id) from (
    select j.id from autotag.jobs j
    where j.finished_at is null and (j.workspace_id = p_workspace_id or p_workspace_id is null)
      and j.changed is distinct from '{}' and j.broadcast_at <= v_until
    limit 100 for no key update skip locked) h;
end $$;

-- tagging_job: one upload as the UI shows it (describe_upload).
create or replace function autotag.describe_job(p_job_id uuid) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.describe_upload(autotag.visible_job(p_job_id));
end $$;

-- tagging_jobs: the uploads of a workspace, the newest first, as tagging_job describes each; p_before: only older ones. Uploads that
-- began at the same moment come on one page, which is then longer than p_limit, so no page begins between them.
create or replace function autotag.list_jobs(p_workspace_id autotag.workspace_id, p_only_live boolean, p_before timestamptz, p_limit integer)
returns setof jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
begin
  perform autotag.check_member(p_workspace_id);
  p_limit := least(greatest(coalesce(p_limit, 20), 1), 100);
  return query
    select autotag.describe_upload(f.job) from (
      select j as job from autotag.jobs j
      -- the plan is made for these values, so it uses the index of live uploads for them
      where j.workspace_id = p_workspace_id and (j.finished_at is null or not coalesce(p_only_live, true))
        and j.created_at < coalesce(p_before, 'infinity')
      order by j.created_at desc fetch first p_limit rows with ties) f
    order by (f.job).created_at desc, (f.job).id;
end $$;

-- The status of an upload. A cancelled upload is `cancelling` until its last image has ended, and then `cancelled`.
create or replace function autotag.job_status(p_job autotag.jobs) returns text
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_job.finished_at is null then case when p_job.cancelled_at is null then 'running' else 'cancelling' end
    when p_job.cancelled_at is null then 'completed' else 'cancelled' end;
end $$;

-- One upload as the UI shows it. `stages` maps each of the seven stages to its number of images.
create or replace function autotag.describe_upload(p_job autotag.jobs) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_stages jsonb;
  v_error text;
  v_eta record := autotag.current_eta(p_job);
begin
  select jsonb_object_agg(st.stage, case st.stage when 'completed' then p_job.completed else coalesce(c.images, 0) end)
  into v_stages
  from unnest(array['queued', 'preparing', 'submitted', 'processing', 'completing', 'completed', 'failed']) st (stage)
  left join (
    select o.stage, count(*) as images
    from autotag.tasks t left join autotag.batches b on b.id = t.batch_id
    cross join lateral (select case when t.finished_at is not null then t.stage
      when t.retry_at = 'infinity' then 'completing'   -- its outcome waits for the host's row
      when b.id is not null then autotag.batch_stage(b.state, b.running_at, b.submitted_at)
      else t.stage end as stage) o
    where t.job_id = p_job.id group by o.stage) c using (stage);
  -- the most frequent error
  select t.error into v_error from autotag.tasks t
  where t.job_id = p_job.id and t.stage = 'failed' group by t.error order by count(*) desc, t.error limit 1;
  return jsonb_build_object(
    'job_id', p_job.id, 'status', autotag.job_status(p_job), 'strategy', p_job.strategy, 'image_count', p_job.image_count,
    'stages', v_stages, 'completed', p_job.completed, 'failed', p_job.failed,
    'progress', case when p_job.finished_at is null then autotag.measure_progress(p_job) else 100 end,
    'eta', v_eta.p50, 'eta_p90', v_eta.p90, 'error', v_error, 'fallback', p_job.fallback,
    'batches', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'batch_id', b.openai_batch_id, 'state', b.state, 'image_count', b.image_count) order by b.ordinal), '[]')
      from autotag.batches b where b.job_id = p_job.id),
    'created_at', p_job.created_at, 'finished_at', p_job.finished_at,
    'cancelled', p_job.cancelled_at is not null);
end $$;
