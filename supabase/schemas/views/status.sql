-- The state of the whole system for an operator (`autotag status`).

-- The model, how it is asked, what it uses, when it shuts down, and what the provider supports: {name, reasoning_effort,
-- service_tier, answer_format, cap_parameter, prompt_tokens, output_tokens (means), cap, reserved, priced, cost_per_1000
-- (dollars), proven, shutdown (describe_shutdown), provider: {base_url, batches, rate_headers, keep_files}}.
-- null in provider: not known yet.
create or replace function autotag.describe_model(p_provider autotag.provider_limits) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- The question from the next claim on; its model may differ from the last claim's.
  return (autotag.describe_question() - 'model' - 'max_tags' - 'tag_language') || jsonb_build_object(
    'name', (select s.model from autotag.settings s), 'prompt_tokens', p_provider.prompt_mean, 'output_tokens', p_provider.output_mean,
    'cap', p_provider.output_tokens, 'reserved', p_provider.tokens_per_image,
    'priced', autotag.expected_cost() is not null, 'cost_per_1000', round(1000 * autotag.expected_cost(), 4),
    'proven', p_provider.proven_at is not null and p_provider.question = autotag.describe_question(), 'shutdown', autotag.describe_shutdown(),
    'provider', jsonb_build_object('base_url', p_provider.base_url, 'batches', p_provider.has_batches,
      'rate_headers', p_provider.has_rate_headers, 'keep_files', p_provider.keep_files));
end $$;

-- Errors of images that failed within the last day, at most p_max, most frequent first: [{code, message, images, last_at}].
create or replace function autotag.recent_errors(p_max integer, p_now timestamptz) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_agg(to_jsonb(x) order by x.images desc, x.code), '[]') from (
      select t.error_code as code, min(t.error) as message, count(*) as images, max(t.finished_at) as last_at
      from autotag.jobs j join autotag.tasks t on t.job_id = j.id
      where (j.finished_at is null or j.finished_at > p_now - interval '1 day') and t.stage = 'failed'
        and t.finished_at > p_now - interval '1 day'
      group by t.error_code order by count(*) desc limit p_max) x);
end $$;

-- What waits, and why, at most p_max of each kind: [{kind, workspace_id, id, images, reason, until}]. until null: without a time, so
-- the owner has to change something. kind: batch and upload (id: of the batch, of the upload in automatic mode), workspace (its
-- single calls), outcomes (tags that wait for the host's rows).
create or replace function autotag.list_waiting(p_max integer, p_now timestamptz) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_agg(jsonb_build_object('kind', x.kind, 'workspace_id', x.workspace_id::text, 'id', x.id, 'images', x.images,
      'reason', x.reason, 'until', nullif(x.until, 'infinity')) order by x.until desc, x.kind, x.workspace_id, x.id), '[]')
    from (
      (select 'batch' as kind, b.workspace_id, b.id::text as id, (b.image_count - b.express_count)::bigint as images, b.not_before as until,
        case when b.not_before = 'infinity' then 'It has more images than the workspace may send in an hour; it is split within a minute.'
          when b.admitted_at is null and b.state = 'planned' then 'The workspace has used up its batches or images of this hour.'
          else coalesce(b.error, 'It is tried again.') end as reason
      from autotag.batches b
      where b.state not in ('done', 'cancelled') and b.worker_id is null and b.not_before > p_now order by b.not_before desc, b.id limit p_max)
      union all
      (select 'workspace', w.workspace_id, null, w.queued, w.ready_at,
        case when w.ready_at = 'infinity' then format('One image reserves more than the workspace''s %s tokens a minute.', l.max_units)
          else 'The workspace has used up its limit of this minute, or its next chunk is not due.' end
      from autotag.workspaces w cross join lateral autotag.window_limits(w.workspace_id, 'realtime') l
      where w.queued > 0 and not w.ready and w.ready_at > p_now order by w.ready_at desc, w.workspace_id limit p_max)
      union all
      (select 'upload', u.workspace_id, u.id::text, (select count(*) from autotag.arrivals a where a.upload_id = u.id), u.seal_at,
        case when u.failures = 0 then 'A quota is used up, or the workspace has as many unfinished images as it may have.'
          else 'Its rows are held, or the database refuses to write them; the log of the workers says why.' end
      from autotag.uploads u where u.seal_at > p_now order by u.seal_at desc, u.id limit p_max)
      union all
      (select 'outcomes', u.workspace_id, null, count(*), min(u.next_at), 'Other transactions hold the rows of these images, or writing them takes too long.'
      from autotag.unstored u group by u.workspace_id order by 4 desc limit p_max)) x);
end $$;

-- The state of the system as one JSON object; lists are cut to p_max (at most 200). The README shows how it is printed.
-- It contains ids of workspaces, uploads, batches and workers, and no image. To know an id gives no right to anything.
create or replace function autotag.status(p_max integer default 20) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_provider autotag.provider_limits := autotag.refilled_provider(v_now);
  v_counts jsonb := autotag.metrics();
begin
  p_max := least(greatest(coalesce(p_max, 20), 0), 200);
  return jsonb_build_object(
    'at', v_now,
    'queue', jsonb_build_object('workspaces', v_counts -> 'queued_workspaces', 'queued', v_counts -> 'queued',
      'delayed', v_counts -> 'delayed', 'live', v_counts -> 'live'),
    'jobs', (
      select coalesce(jsonb_agg(to_jsonb(x) order by x.created_at), '[]') from (
        select j.id as job_id, j.workspace_id::text, j.strategy, j.image_count, j.completed, j.failed,
          autotag.measure_progress(j) as progress, j.created_at, j.eta, j.eta_p90, j.fallback
        from autotag.jobs j where j.finished_at is null order by j.created_at limit p_max) x),
    'batches', (
      select coalesce(jsonb_agg(to_jsonb(x) order by x.created_at, x.ordinal), '[]') from (
        select b.id as batch, b.job_id, b.ordinal, b.openai_batch_id, b.state, b.openai_status,
          b.image_count - b.express_count as images, b.request_done as done, b.created_at, b.submitted_at,
          e.p50 as eta, e.p90 as eta_p90, b.failures, b.error
        from (select * from autotag.batches l where l.state not in ('done', 'cancelled')
              order by l.created_at, l.ordinal limit p_max) b
        cross join lateral autotag.batch_eta(b::autotag.batches, v_now) e) x),
    'limits', jsonb_build_object(
      'requests_per_minute', v_provider.requests_per_minute,
      'requests_left', floor(greatest(v_provider.requests_left, 0)),
      'tokens_per_minute', v_provider.tokens_per_minute,
      'tokens_left', floor(greatest(v_provider.tokens_left, 0)),
      'requests_per_day', v_provider.requests_per_day,
      'requests_left_today', case when v_provider.requests_per_day is not null then floor(greatest(v_provider.day_left, 0)) end,
      'queued_batch_tokens', v_provider.queued_batch_tokens,
      'queued_batch_tokens_used', (
        select coalesce(sum(b.reserved_tokens), 0) from autotag.batches b where b.reserved_tokens > 0),
      'blocked_until', case when v_provider.blocked_until > v_now then v_provider.blocked_until end,
      'account_error', v_provider.account_error, 'account_error_from', v_provider.account_error_from,
      'account_error_at', v_provider.account_error_at),
    'model', autotag.describe_model(v_provider),
    'workers', (
      select coalesce(jsonb_agg(jsonb_build_object('worker', w.id, 'host', w.host, 'version', w.version,
        'listening', w.listening, 'started_at', w.started_at, 'last_heartbeat_at', w.last_heartbeat_at, 'alive', w.lease_until > v_now,
        'held', cardinality(autotag.leased_tasks(w.id))) order by w.started_at), '[]')
      from autotag.workers w),
    'errors', autotag.recent_errors(p_max, v_now),
    'waiting', autotag.list_waiting(p_max, v_now),
    'today', (
      select jsonb_build_object('images', coalesce(sum(u.images), 0), 'requests', coalesce(sum(u.requests), 0),
        'input_tokens', coalesce(sum(u.input_tokens), 0), 'output_tokens', coalesce(sum(u.output_tokens), 0),
        'cost', coalesce(sum(u.cost), 0),
        -- requests to models without a price, whose cost is not included
        'unpriced_requests', coalesce(sum(u.requests) filter (where u.cost is null), 0),
        'unpriced_models', coalesce(jsonb_agg(distinct u.model) filter (where u.cost is null), '[]'))
      from autotag.usage u where u.day = (v_now at time zone 'utc')::date));
end $$;
