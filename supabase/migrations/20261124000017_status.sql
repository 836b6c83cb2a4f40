-- What an operator sees of the whole system (`autotag status`), and existing images brought in (`autotag enqueue`).

-- Everything that is going on, as one JSON object; lists are cut to p_most. See the README for how it is shown.
create function autotag.status(p_most integer default 20) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  v_now timestamptz := autotag.now();
  v_minutes double precision;
begin
  select extract(epoch from v_now - greatest(p.refilled_at, v_now - interval '1 day')) / 60 into v_minutes
  from autotag.provider_limits p;
  return jsonb_build_object(
    'at', v_now,
    'queue', (
      select jsonb_build_object(
        'workspaces', count(*) filter (where w.queued > 0), 'queued', coalesce(sum(w.queued), 0),
        'parked', (select count(*) from autotag.tasks t where t.retry_at is not null),
        'live', (select coalesce(sum(j.image_count - j.completed - j.failed), 0) from autotag.jobs j
                 where j.finished_at is null))
      from autotag.workspaces w),
    'jobs', (
      select coalesce(jsonb_agg(to_jsonb(x) order by x.created_at), '[]') from (
        select j.id as job_id, j.workspace_id, j.strategy, j.image_count, j.completed, j.failed,
          autotag.measure_progress(j) as progress, j.created_at, j.eta, j.eta_p90, j.fallback
        from autotag.jobs j where j.finished_at is null order by j.created_at limit p_most) x),
    'batches', (
      select coalesce(jsonb_agg(to_jsonb(x) order by x.created_at, x.ordinal), '[]') from (
        select b.id as batch, b.job_id, b.ordinal, b.openai_batch_id, b.state, b.openai_status,
          b.image_count - b.express_count as images, b.request_done as done, b.created_at, b.submitted_at,
          e.p50 as eta, e.p90 as eta_p90, b.failures, b.error
        from autotag.batches b cross join lateral autotag.batch_eta(b, v_now) e
        where b.state not in ('done', 'cancelled') order by b.created_at, b.ordinal limit p_most) x),
    'limits', (
      select jsonb_build_object(
        'requests_per_minute', p.requests_per_minute,
        'requests_left', floor(least(p.requests_per_minute, p.requests_left + v_minutes * p.requests_per_minute)),
        'tokens_per_minute', p.tokens_per_minute,
        'tokens_left', floor(least(p.tokens_per_minute, p.tokens_left + v_minutes * p.tokens_per_minute)),
        'requests_per_day', p.requests_per_day,
        'requests_left_today', case when p.requests_per_day is not null
          then floor(least(p.requests_per_day, p.day_left + v_minutes * p.requests_per_day / 1440)) end,
        'queued_batch_tokens', p.queued_batch_tokens,
        'queued_batch_tokens_used', (
          select coalesce(sum(b.reserved_tokens), 0) from autotag.batches b where b.state not in ('done', 'cancelled')),
        'blocked_until', case when p.blocked_until > v_now then p.blocked_until end,
        'account_error', p.account_error, 'account_error_at', p.account_error_at)
      from autotag.provider_limits p),
    'workers', (
      select coalesce(jsonb_agg(jsonb_build_object('worker', w.id, 'host', w.host, 'version', w.version,
        'listening', w.listening, 'started_at', w.started_at, 'seen_at', w.seen_at, 'alive', w.lease_until > v_now,
        'in_hand', cardinality(autotag.held_tasks(w.id))) order by w.started_at), '[]')
      from autotag.workers w),
    'errors', (
      select coalesce(jsonb_agg(to_jsonb(x) order by x.images desc, x.code), '[]') from (
        select t.error_code as code, min(t.error) as message, count(*) as images, max(t.finished_at) as last_at
        from autotag.jobs j join autotag.tasks t on t.job_id = j.id
        where coalesce(j.finished_at, v_now) > v_now - interval '1 day' and t.stage = 'failed'
          and t.finished_at > v_now - interval '1 day'
        group by t.error_code order by count(*) desc limit p_most) x),
    'today', (
      select jsonb_build_object('images', coalesce(sum(u.images), 0), 'requests', coalesce(sum(u.requests), 0),
        'input_tokens', coalesce(sum(u.input_tokens), 0), 'output_tokens', coalesce(sum(u.output_tokens), 0),
        'cost', coalesce(sum(u.cost), 0))
      from autotag.usage u where u.day = (v_now at time zone 'utc')::date));
end $$;

-- What bringing in existing images would mean: {images, seconds, cost}. p_untagged: only those without tags.
create function autotag.preview_backfill(p_workspace_id uuid, p_untagged boolean, p_after uuid, p_limit integer)
returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  v_images integer := cardinality(autotag.list_assets(p_workspace_id, p_untagged, p_after, p_limit));
  v_settings autotag.settings;
  v_batches integer := 0;
begin
  select * into v_settings from autotag.settings;
  if v_images = 0 then
    return jsonb_build_object('images', 0, 'seconds', 0, 'cost', 0);
  end if;
  if v_images > v_settings.chunk_max_images then
    v_batches := autotag.plan_batches(v_images, v_settings.batch_batches_per_hour, v_settings.batch_images_per_hour);
  end if;
  return jsonb_build_object('images', v_images, 'seconds', autotag.estimate_seconds(v_images, v_batches),
    'cost', v_images * autotag.expected_cost() * case when v_batches > 0 then v_settings.batch_discount else 1 end);
end $$;

-- Brings in the next p_limit existing images of a workspace as one upload: {job_id, images, last}; `last` is the
-- cursor for the next call, null at the end. Refuses as enqueue_tagging does. Locks: the workspace.
create function autotag.backfill(p_workspace_id uuid, p_untagged boolean, p_after uuid, p_limit integer) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  v_assets uuid[];
  v_job jsonb;
begin
  perform autotag.check_image_count(p_limit);
  perform autotag.lock_workspace(p_workspace_id);
  v_assets := autotag.list_assets(p_workspace_id, p_untagged, p_after, p_limit);
  if v_assets = '{}' then
    return jsonb_build_object('job_id', null, 'images', 0, 'last', null);
  end if;
  v_job := autotag.start_job(p_workspace_id, null, v_assets);
  return jsonb_build_object('job_id', v_job -> 'job_id', 'images', v_job -> 'image_count',
    'last', v_assets[cardinality(v_assets)]);
end $$;
