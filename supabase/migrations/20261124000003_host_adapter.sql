-- The host adapter: everything that autotag believes about the host's tables stands in this file.
-- A project with other tables replaces these three functions, and nothing else.

-- What the host app reads to show where an image is. Adding a nullable column does not rewrite the table;
-- the checks go in NOT VALID because every existing row satisfies them by being null.
alter table public.assets
  add column if not exists tagging_stage text,
  add column if not exists tagging_progress integer,
  add column if not exists tagging_eta timestamptz,
  add column if not exists tagging_error text;
alter table public.assets
  add constraint assets_tagging_stage_check check (tagging_stage in
    ('queued', 'preparing', 'submitted', 'processing', 'completing', 'completed', 'failed')) not valid,
  add constraint assets_tagging_progress_check check (tagging_progress between 0 and 100) not valid;

-- Whether the caller may act for a workspace. Called by every RPC and by the policies of Realtime topics.
create function autotag.is_member(p_workspace_id uuid) returns boolean
language sql stable security definer set search_path = ''
as $$
  select exists (
    select from public.workspace_members m
    where m.workspace_id = p_workspace_id and m.user_id = (select auth.uid()))
$$;

-- Whose these images are and where they lie: a Storage bucket and path, or an https URL. An id that is not
-- in the answer is an image that does not exist (any more).
create function autotag.describe_assets(p_asset_ids uuid[])
returns table (asset_id uuid, workspace_id uuid, bucket text, path text, url text)
language sql stable security definer set search_path = ''
as $$
  select a.id, a.workspace_id,
         case when a.storage_path is not null then coalesce(a.storage_bucket, 'assets') end,
         a.storage_path,
         a.image_url
  from public.assets a
  where a.id = any (p_asset_ids)
$$;

-- Stores tags and everything else about a finished image in one update of its row. p_results[i] belongs to
-- p_asset_ids[i] and is {tags: [{tag, confidence}], caption, model}; its tags are already normalised.
create function autotag.store_tags(p_asset_ids uuid[], p_results jsonb[]) returns void
language sql security definer set search_path = ''
as $$
  update public.assets a
  set tags = array(select t ->> 'tag' from jsonb_array_elements(r.result -> 'tags') with ordinality x (t, i) order by i),
      tagging_result = r.result,
      tagging_stage = 'completed', tagging_progress = 100, tagging_eta = null, tagging_error = null
  from unnest(p_asset_ids, p_results) as r (asset_id, result)
  where a.id = r.asset_id
$$;
