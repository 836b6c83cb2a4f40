-- The public RPCs: thin wrappers with clean parameter names. grants.sql says who may call them. Errors are documented where
-- they are raised; each has a `code` in its detail. Ids have the base types of the domains (autotag.keys). Results are rows of the
-- views in api_types.sql, which generated client types name; jsonb_populate_record() makes them from the jsonb of autotag's functions.
create or replace function public.enqueue_tagging(asset_ids autotag.keys.asset_ids%type) returns public.tagging_upload_result
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_visible asset_ids%type;
begin
  perform autotag.check_image_count(cardinality(asset_ids));   -- before any function reads that many
  v_visible := autotag.visible_assets(asset_ids);
  return jsonb_populate_record(null::public.tagging_upload_result,
    -- Rows are checked before files. If a row is not visible, enqueue() refuses the call, so no file is looked up or counts as seen.
    autotag.enqueue(asset_ids, case when v_visible = asset_ids then autotag.visible_file_marks(asset_ids)
      else array_fill('00000000-0000-0000-0000-000000000000'::uuid, array[cardinality(asset_ids)]) end, v_visible));
end $$;

create or replace function public.cancel_tagging(job_id uuid) returns public.tagging_cancel_result
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_cancel_result, autotag.cancel(job_id)) $$;

create or replace function public.retry_tagging(job_id uuid) returns public.tagging_upload_result
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_asset_ids autotag.asset_id[] := autotag.visible_assets(autotag.failed_assets(job_id));
begin
  perform autotag.check_image_count(greatest(cardinality(v_asset_ids), 1));   -- retry() refuses an upload without failed images
  return jsonb_populate_record(null::public.tagging_upload_result,
    autotag.retry(job_id, v_asset_ids, autotag.visible_file_marks(v_asset_ids)));
end $$;

create or replace function public.tagging_job(job_id uuid) returns public.tagging_job_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_job_result, autotag.describe_job(job_id)) $$;

-- The uploads of a workspace, the newest first. The next page: `before` is created_at of the last one.
create or replace function public.tagging_jobs(
  workspace_id autotag.keys.workspace_id%type, only_live boolean default true, before timestamptz default null, "limit" integer default 20
) returns setof public.tagging_job_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$
  select jsonb_populate_record(null::public.tagging_job_result, j)
  from autotag.list_jobs(workspace_id, only_live, before, "limit") with ordinality l (j, i) order by i
$$;

-- tagging_strategy: previews an upload of p_images images. chunks: releases of single calls (1: all at once; 0: batches);
-- delay_ms: time between two chunks.
create or replace function autotag.describe_strategy(p_images integer) returns jsonb
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
    'delay_ms', case v_type when 'realtime-chunked' then (extract(epoch from v_settings.chunk_delay) * 1000)::bigint else 0 end,
    'batches', v_batches,
    'estimate_seconds', autotag.estimate_seconds(p_images, v_batches))
    -- the reason why that many images are not sent in a batch
    || case when v_type = 'realtime-chunked' and p_images > v_settings.chunk_max_images
      then jsonb_build_object('note', 'The AI provider has no Batch API, so these images are sent as single calls.')
      else '{}' end;
end $$;

create or replace function public.tagging_strategy(image_count integer) returns public.tagging_strategy_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_strategy_result, autotag.describe_strategy(image_count)) $$;

create or replace function public.check_rate_limit(
  workspace_id autotag.keys.workspace_id%type, request_type public.tagging_request_type, image_count integer
) returns public.tagging_limit_result
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer public.tagging_limit_result;
begin
  v_answer := autotag.take_allowance(workspace_id, request_type::text, image_count, true);
  return v_answer;
end $$;

-- The same without counting against the limit, for UIs.
create or replace function public.peek_rate_limit(
  workspace_id autotag.keys.workspace_id%type, request_type public.tagging_request_type, image_count integer
) returns public.tagging_limit_result
language plpgsql security invoker set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer public.tagging_limit_result;
begin
  v_answer := autotag.take_allowance(workspace_id, request_type::text, image_count, false);
  return v_answer;
end $$;

create or replace function public.tagging_usage(workspace_id autotag.keys.workspace_id%type, since date default '-infinity', until date default 'infinity')
returns setof public.tagging_usage_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select * from autotag.list_usage(workspace_id, since, until) $$;

-- The vocabulary in force for a workspace.
create or replace function public.tagging_vocabulary(workspace_id autotag.keys.workspace_id%type) returns public.tagging_vocabulary_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_vocabulary_result, autotag.describe_vocabulary(workspace_id)) $$;

-- Replaces a workspace's own vocabulary.
create or replace function public.set_tagging_vocabulary(workspace_id autotag.keys.workspace_id%type, entries jsonb) returns public.tagging_vocabulary_change
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_vocabulary_change, autotag.edit_vocabulary(workspace_id, entries, '{}', true)) $$;

-- Changes some of its entries, so that two people who edit it do not overwrite each other's.
create or replace function public.edit_tagging_vocabulary(
  workspace_id autotag.keys.workspace_id%type, entries jsonb default '[]', removed text[] default '{}'
) returns public.tagging_vocabulary_change
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_vocabulary_change, autotag.edit_vocabulary(workspace_id, entries, removed, false)) $$;

-- The profile in force for a workspace: {version, own, instructions, language, tag_count, min_confidence, vocabulary_mode, add_parents,
-- fields, created_at}. For its members.
create or replace function public.tagging_profile(workspace_id autotag.keys.workspace_id%type) returns public.tagging_profile_result
language sql stable security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_profile_result, autotag.read_profile(workspace_id)) $$;

-- Changes it, by the same names; what is not named stays. For editors (autotag.is_editor) and services.
create or replace function public.set_tagging_profile(workspace_id autotag.keys.workspace_id%type, profile jsonb) returns public.tagging_profile_result
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_profile_result, autotag.edit_profile(workspace_id, profile)) $$;

-- For the Edge Function that receives OpenAI's webhook where no worker has a public address: passes on a delivery that it has
-- verified. Not for users.
create or replace function public.openai_webhook(webhook_id text, event_type text, batch_id text) returns public.tagging_webhook_result
language sql security invoker set search_path = pg_catalog, pg_temp
as $$ select jsonb_populate_record(null::public.tagging_webhook_result, jsonb_build_object('result', autotag.receive_webhook(webhook_id, event_type, batch_id))) $$;
