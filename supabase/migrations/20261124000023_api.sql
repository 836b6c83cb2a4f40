-- The public RPCs: thin wrappers with clean names, and the one list of who may call what.
-- Errors are documented where they are raised; all of them carry {code} in their detail.

create function public.enqueue_tagging(asset_ids uuid[]) returns jsonb
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select autotag.enqueue(asset_ids, autotag.hidden_files(asset_ids)) $$;

create function public.cancel_tagging(job_id uuid) returns jsonb
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select autotag.cancel(job_id) $$;

create function public.retry_tagging(job_id uuid) returns jsonb
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select autotag.retry(job_id, autotag.hidden_files(autotag.failed_assets(job_id))) $$;

create function public.tagging_job(job_id uuid) returns jsonb
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select autotag.describe_job(job_id) $$;

-- What would happen with an upload of so many images, before it is made. chunks counts the releases of single
-- calls (1 when all go at once, 0 for batches), delay_ms the pause between them.
create function autotag.describe_strategy(p_images integer) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_type text;
  v_batches integer := 0;
begin
  perform autotag.check_image_count(p_images);
  select * into v_settings from autotag.settings;
  v_type := autotag.choose_strategy(p_images);
  if v_type in ('batch', 'batch-parallel') then
    v_batches := autotag.plan_batches(p_images, v_settings.batch_batches_per_hour, v_settings.batch_images_per_hour);
  end if;
  return jsonb_build_object(
    'type', v_type,
    'chunks', case v_type when 'realtime' then 1
      when 'realtime-chunked' then ceil(p_images::numeric / v_settings.chunk_size) else 0 end,
    'delay_ms', case v_type when 'realtime-chunked' then (extract(epoch from v_settings.chunk_delay) * 1000)::integer else 0 end,
    'batches', v_batches,
    'estimate_seconds', autotag.estimate_seconds(p_images, v_batches))
    -- why so many images do not go by batch
    || case when v_type = 'realtime-chunked' and p_images > v_settings.chunk_max_images
      then jsonb_build_object('note', 'The AI provider has no Batch API, so these images go as single calls.')
      else '{}' end;
end $$;

create function public.tagging_strategy(image_count integer) returns jsonb
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select autotag.describe_strategy(image_count) $$;

-- Whether so many images fit the workspace's window, all or nothing; with p_take they are counted. retry_after:
-- seconds, exactly; 0 when allowed; null when the limit can never allow that many at once. reason: null,
-- `window_full` (wait) or `exceeds_limit` (never).
create function autotag.take_allowance(
  p_workspace_id uuid, p_request_type text, p_images integer, p_take boolean,
  out allowed boolean, out retry_after double precision, out reason text
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_admission record;
begin
  -- Asked before every call by those who ask at all, so check_member() is called for what it refuses only.
  if not autotag.is_service() or p_workspace_id is null then
    perform autotag.check_member(p_workspace_id);
  end if;
  if p_request_type is null or p_request_type not in ('realtime', 'batch') then
    perform autotag.refuse(400, 'unknown_request_type', format('%L is no request type.', p_request_type),
      'Pass realtime or batch.');
  end if;
  perform autotag.check_image_count(p_images);
  -- Ten calls of a member would use up the workspace's batches of an hour.
  if p_take and not (autotag.is_service() or (select s.members_may_take from autotag.settings s)) then
    perform autotag.refuse(403, 'service_only', 'Only your server may take from the limit.',
      'Call peek_rate_limit, or check_rate_limit with the secret key.');
  end if;
  if p_request_type = 'realtime' then
    v_admission := autotag.admit(p_workspace_id, 'realtime', p_images, null, false, p_take);
  else
    v_admission := autotag.admit(p_workspace_id, 'batch', 1, p_images, false, p_take);
  end if;
  allowed := v_admission.admitted > 0;
  retry_after := case when allowed then 0 else extract(epoch from v_admission.retry_at - v_admission.at) end;
  reason := case when not allowed then case when retry_after is null then 'exceeds_limit' else 'window_full' end end;
end $$;

create function public.check_rate_limit(
  workspace_id uuid, request_type text, image_count integer,
  out allowed boolean, out retry_after double precision, out reason text
)
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer record := autotag.take_allowance(workspace_id, request_type, image_count, true);
begin
  allowed := v_answer.allowed;
  retry_after := v_answer.retry_after;
  reason := v_answer.reason;
end $$;

-- The same without taking anything, for UIs.
create function public.peek_rate_limit(
  workspace_id uuid, request_type text, image_count integer,
  out allowed boolean, out retry_after double precision, out reason text
)
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer record := autotag.take_allowance(workspace_id, request_type, image_count, false);
begin
  allowed := v_answer.allowed;
  retry_after := v_answer.retry_after;
  reason := v_answer.reason;
end $$;

create function public.tagging_usage(workspace_id uuid, since date default '-infinity', until date default 'infinity')
returns table (user_id uuid, day date, model text, service_tier text, images integer, requests integer, input_tokens bigint,
  cached_tokens bigint, cache_write_tokens bigint, output_tokens bigint, reasoning_tokens bigint, cost numeric)
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select * from autotag.list_usage(workspace_id, since, until) $$;

-- For the edge function that stands in for a worker without a public address: a delivery of OpenAI's webhook
-- that it has verified. Not for users.
create function public.openai_webhook(webhook_id text, event_type text, batch_id text) returns jsonb
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_build_object('result', autotag.receive_webhook(webhook_id, event_type, batch_id)) $$;

-- Who may call what. Functions are executable by everybody when they are made (and by anon through the
-- default privileges of Supabase projects), so everything is taken back first.
revoke all on all functions in schema autotag from public, anon, authenticated, service_role;
revoke all on all tables in schema autotag from public, anon, authenticated, service_role;
revoke all on public.workspace_rate_limits from anon, authenticated;
grant select on public.workspace_rate_limits to authenticated;
grant all on public.workspace_rate_limits to service_role;
revoke all on function
  public.enqueue_tagging, public.cancel_tagging, public.retry_tagging, public.tagging_job,
  public.tagging_strategy, public.check_rate_limit, public.peek_rate_limit, public.tagging_usage
  from public, anon;
revoke all on function public.openai_webhook from public, anon, authenticated;

-- users: the RPCs, what stands right behind them, and what row level security asks
grant execute on function
  public.enqueue_tagging, public.cancel_tagging, public.retry_tagging, public.tagging_job,
  public.tagging_strategy, public.check_rate_limit, public.peek_rate_limit, public.tagging_usage,
  autotag.enqueue, autotag.hidden_files, autotag.private_files, autotag.failed_assets, autotag.cancel, autotag.retry,
  autotag.describe_job,
  autotag.describe_strategy, autotag.take_allowance, autotag.list_usage
  to authenticated, service_role;
grant execute on function autotag.is_member, autotag.may_listen to authenticated;

-- the project's own server side
grant execute on function public.openai_webhook, autotag.receive_webhook to service_role;

-- workers: everything they report is made sure of, and they act only on what they hold (schema)
grant execute on function
  autotag.register_worker, autotag.worker_settings, autotag.heartbeat,
  autotag.release_worker, autotag.release_unheld, autotag.claim, autotag.report_stages, autotag.settle,
  autotag.claim_batches, autotag.batch_images, autotag.batch_step, autotag.batch_split, autotag.batch_submitted,
  autotag.batch_trouble, autotag.poll_trouble, autotag.files_deleted, autotag.provider_checked, autotag.batches_seen, autotag.batch_answers, autotag.batch_finish,
  autotag.take_outbox, autotag.receive_webhook, autotag.diagnose, autotag.send_probe, autotag.status, autotag.metrics
  to autotag_worker;

-- operators: what a worker has no need of. They see the images, the tags and the usage of every workspace.
grant execute on function
  autotag.diagnose, autotag.send_probe, autotag.status, autotag.metrics,
  autotag.preview_backfill, autotag.backfill, autotag.list_usage,
  autotag.preview_comparison, autotag.comparison_sample, autotag.admit_comparison, autotag.settle_comparison
  to autotag_operator;
