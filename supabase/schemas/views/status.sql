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

-- The work that waits, and why, at most p_max of each kind: [{kind, workspace_id, id, images, reason, until}]. until null: it waits
-- until the owner changes something. kind: batch, upload (of automatic mode), workspace (its single calls), or outcomes (tags that wait
-- for the host's rows). Only batch and upload have an id.
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
      (select 'workspace', ws.workspace_id, null, ws.queued, ws.ready_at,
        case when ws.ready_at = 'infinity' then format('One image reserves more than the workspace''s %s tokens a minute.', l.max_units)
          else 'The workspace has used up its limit of this minute, or its next chunk is not due.' end
      from autotag.workspaces ws cross join lateral autotag.window_limits(ws.workspace_id, 'realtime') l
      where ws.queued > 0 and not ws.ready and ws.ready_at > p_now order by ws.ready_at desc, ws.workspace_id limit p_max)
      union all
      (select 'upload', up.workspace_id, up.id::text, (select count(*) from autotag.arrivals ar where ar.upload_id = up.id), up.seal_at,
        case when up.failures = 0 then 'A quota is used up, or the workspace has as many unfinished images as it may have.'
          else 'Its rows are held, or the database refuses to write them; the log of the workers says why.' end
      from autotag.uploads up where up.seal_at > p_now order by up.seal_at desc, up.id limit p_max)
      union all
      (select 'outcomes', un.workspace_id, null, count(*), min(un.next_at), 'Other transactions hold the rows of these images, or writing them takes too long.'
      from autotag.unstored un group by un.workspace_id order by 4 desc limit p_max)) x);
end $$;

-- The state of the system as one JSON object; lists are cut to p_max (at most 200). The README shows how it is printed.
-- It contains ids of workspaces, uploads, batches and workers, and no image. Knowing an id gives no rights.
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
        select live.id as batch, live.job_id, live.ordinal, live.openai_batch_id, live.state, live.openai_status,
          live.image_count - live.express_count as images, live.request_done as done, live.created_at, live.submitted_at,
          e.p50 as eta, e.p90 as eta_p90, live.failures, live.error
        from (select * from autotag.batches b where b.state not in ('done', 'cancelled')
              order by b.created_at, b.ordinal limit p_max) live
        cross join lateral autotag.batch_eta(live::autotag.batches, v_now) e) x),
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
      select coalesce(jsonb_agg(jsonb_build_object('worker', wk.id, 'host', wk.host, 'version', wk.version,
        'listening', wk.listening, 'started_at', wk.started_at, 'last_heartbeat_at', wk.last_heartbeat_at, 'alive', wk.lease_until > v_now,
        'held', cardinality(autotag.leased_tasks(wk.id))) order by wk.started_at), '[]')
      from autotag.workers wk),
    'errors', autotag.recent_errors(p_max, v_now),
    'waiting', autotag.list_waiting(p_max, v_now),
    'today', (
      select jsonb_build_object('images', coalesce(sum(us.images), 0), 'requests', coalesce(sum(us.requests), 0),
        'input_tokens', coalesce(sum(us.input_tokens), 0), 'output_tokens', coalesce(sum(us.output_tokens), 0),
        'cost', coalesce(sum(us.cost), 0),
        -- requests to models without a price, whose cost is not included
        'unpriced_requests', coalesce(sum(us.requests) filter (where us.cost is null), 0),
        'unpriced_models', coalesce(jsonb_agg(distinct us.model) filter (where us.cost is null), '[]'))
      from autotag.usage us where us.day = (v_now at time zone 'utc')::date));
end $$;
