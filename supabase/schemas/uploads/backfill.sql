-- Tags images that existed before autotag (`autotag enqueue`).

-- Previews tagging existing images: {images, seconds, cost (dollars; null: unknown), model}. p_untagged: only those without
-- tags; p_outdated: only those that were tagged with another version of the profile than the present one; p_after, p_limit: as in
-- backfill().
create or replace function autotag.preview_backfill(
  p_workspace_id autotag.workspace_id, p_untagged boolean, p_after autotag.asset_id, p_limit integer, p_outdated boolean default false
) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_images integer := cardinality(autotag.list_assets(p_workspace_id, p_untagged, p_after, p_limit,
    case when p_outdated then (autotag.profile_of(p_workspace_id)).version end));
  v_settings autotag.settings;
  v_batches integer := 0;
begin
  select * into v_settings from autotag.settings;
  if v_images = 0 then
    return jsonb_build_object('images', 0, 'seconds', 0, 'cost', 0, 'model', v_settings.model);
  end if;
  if autotag.choose_strategy(v_images) like 'batch%' then
    v_batches := autotag.plan_batches(v_images, v_settings.batch_batches_per_hour, v_settings.batch_images_per_hour);
  end if;
  return jsonb_build_object('images', v_images, 'seconds', autotag.estimate_seconds(v_images, v_batches),
    'cost', v_images * autotag.expected_cost(case when v_batches > 0 then 'batch' end, p_workspace_id => p_workspace_id),
    'model', v_settings.model);
end $$;

-- Makes one upload of the next p_limit existing images of a workspace (by id, after p_after): {job_id, images, last}. `last`
-- is p_after for the next call; null: no more images. Refuses what enqueue_tagging refuses. Locks: the workspace (advisory).
create or replace function autotag.backfill(
  p_workspace_id autotag.workspace_id, p_untagged boolean, p_after autotag.asset_id, p_limit integer, p_outdated boolean default false
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_assets autotag.asset_id[];
  v_job jsonb;
begin
  perform autotag.check_image_count(p_limit);
  perform autotag.lock_quotas(p_workspace_id, null);
  v_assets := autotag.list_assets(p_workspace_id, p_untagged, p_after, p_limit,
    case when p_outdated then (autotag.profile_of(p_workspace_id)).version end);
  if v_assets = '{}' then
    return jsonb_build_object('job_id', null, 'images', 0, 'last', null);
  end if;
  v_job := autotag.start_job(p_workspace_id, null, v_assets);
  return jsonb_build_object('job_id', v_job -> 'job_id', 'images', v_job -> 'image_count',
    'last', v_assets[cardinality(v_assets)]::text);
end $$;
