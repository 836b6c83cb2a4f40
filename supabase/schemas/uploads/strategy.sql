-- The strategy of an upload, the number of its batches, and its expected duration.

-- Number of batches for an upload. Splitting never makes it slower: as long as the window admits enough batches, each has at
-- most batch_split_images; if the window admits fewer, batches get larger. A batch is never larger than a file, the provider's
-- queue or the window's images allow, and there are no more batches than that size needs.
create or replace function autotag.plan_batches(p_images integer, p_batches_left integer, p_window_images integer)
returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select ceil(p_images / ceil(p_images::numeric / greatest(
    ceil(p_images::numeric / greatest(1, least(
      s.batch_max_requests, p_window_images, p.queued_batch_tokens / p.tokens_per_image))),
    case when p_images <= s.batch_max_images then 1
         else least(ceil(p_images::numeric / s.batch_split_images), greatest(p_batches_left, 1)) end
  )))::integer
  from autotag.settings s, autotag.provider_limits p
$$;

-- The strategy for an upload of p_images images. Without a Batch API at the provider, all are sent as single calls.
create or replace function autotag.choose_strategy(p_images integer) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select case
    when p_images <= s.realtime_max_images then 'realtime'
    when p_images <= s.chunk_max_images or p.has_batches is false then 'realtime-chunked'
    when p_images <= s.batch_max_images then 'batch'
    else 'batch-parallel' end
  from autotag.settings s, autotag.provider_limits p);
end $$;

-- Expected duration of an upload in seconds, if its workspace has no other work. Single calls may have to wait for the next day.
create or replace function autotag.estimate_seconds(p_images integer, p_batches integer) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
begin
  return (select case
    when p_batches > 0 then
      -- each full window delays the batches beyond it by one hour
      (autotag.predict_batch(ceil(p_images::numeric / p_batches)::integer, v_now, v_now, null, 0, null)).p50
      + 3600 * greatest((p_batches - 1) / s.batch_batches_per_hour, (p_images - 1) / s.batch_images_per_hour)
    else
      s.call_seconds + greatest(
        case when p_images > s.realtime_max_images then extract(epoch from s.chunk_delay) * ((p_images - 1) / s.chunk_size) end,
        case when p_images > s.realtime_max_images then 60 * ((p_images - 1) / s.realtime_requests_per_minute) end,
        extract(epoch from autotag.wait_for_day(autotag.refilled_provider(v_now), p_images)), 0) end
  from autotag.settings s);
exception when others then
  raise warning 'autotag could not estimate a duration: %', sqlerrm;
  return null;
end $$;

-- The single calls that wait to be released, in all workspaces.
create or replace function autotag.count_waiting(out workspaces bigint, out images bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select count(distinct q.workspace_id), coalesce(sum(q.queued), 0) into workspaces, images
  from autotag.queues q
  -- This is a look-up per queue. A join may read all uploads that ever finished.
  where q.queued > 0 and (select j.cancelled_at from autotag.jobs j where j.id = q.job_id) is null;
end $$;

-- How long the last of p_images more single calls of a workspace would wait for its window, for its fair share of the provider's
-- bucket and of the rest of the day's limit, and for the end of a block (retry-after). p_counted: use claim()'s count of calls that wait
-- in other workspaces if it is at most 2 s old, because counting takes longer with more workspaces.
create or replace function autotag.predict_wait(p_workspace_id autotag.workspace_id, p_images integer, p_counted boolean default false)
returns interval
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_provider autotag.provider_limits;
  v_settings autotag.settings;
  v_max_requests integer;
  v_max_units integer;
  v_queued bigint;
  v_own bigint;
  v_everybody bigint;
  v_each integer;              -- tokens that an image of this workspace reserves
begin
  v_provider := autotag.refilled_provider(v_now);
  v_each := coalesce((
    select br.tokens_per_image from autotag.jobs j join autotag.briefs br on br.id = j.brief_id
    where j.workspace_id = p_workspace_id and j.finished_at is null order by j.created_at desc limit 1), v_provider.tokens_per_image);
  v_queued := coalesce((select sum(q.queued) from autotag.queues q where q.workspace_id = p_workspace_id and q.queued > 0
      and (select j.cancelled_at from autotag.jobs j where j.id = q.job_id) is null), 0);
  v_own := v_queued + p_images;
  select * into v_settings from autotag.settings;
  if not p_counted or v_provider.waiting_at < v_now - interval '2 s' then
    select c.workspaces, c.images into v_provider.waiting_workspaces, v_provider.waiting_images
    from autotag.count_waiting() c;
  end if;
  -- Fair share: for each of its own calls, the workspace waits for one call of every other workspace that still has some.
  v_everybody := v_own + least(greatest(v_provider.waiting_images - v_queued, 0),
    v_own * greatest(v_provider.waiting_workspaces - (v_queued > 0)::integer, 0));
  select wn.max_requests, wn.max_units into v_max_requests, v_max_units
  from autotag.windows wn where wn.workspace_id = p_workspace_id and wn.request_type = 'realtime';
  v_max_requests := coalesce(v_max_requests, v_settings.realtime_requests_per_minute);
  v_max_units := coalesce(v_max_units, v_settings.realtime_tokens_per_minute);
  return greatest(autotag.wait_for_day(v_provider, v_everybody),
    case when v_provider.blocked_until > v_now then v_provider.blocked_until - v_now end, interval '1 min' * greatest(0,
    (v_own - v_max_requests)::double precision / v_max_requests,
    (v_own * v_each - v_max_units)::double precision / v_max_units,
    (v_everybody - v_provider.requests_left) / v_provider.requests_per_minute,
    (v_own * v_each + (v_everybody - v_own) * v_provider.tokens_per_image - v_provider.tokens_left) / v_provider.tokens_per_minute));
exception when others then
  raise warning 'autotag could not predict a wait: %', sqlerrm;
  return null;
end $$;
