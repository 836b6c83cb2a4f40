-- Where a worker finds the images it is about to read.

-- Location of each image, as describe_assets() returns it, if its file is still the one that the uploader was allowed to see.
-- refused: what describe_assets() refuses, or `hidden_file` (the uploader may not see it). A row that no longer exists or has
-- moved to another workspace is missing from the result. If the host's rows cannot be read together, each is read by itself, and
-- one that raises is refused as `unreadable_row`.
-- p_workspace_ids[i], p_seen[i]: tasks.workspace_id and tasks.seen of p_asset_ids[i].
create or replace function autotag.locate(p_asset_ids uuid[], p_workspace_ids uuid[], p_seen uuid[])
returns table (asset_id uuid, bucket text, path text, url text, refused text, mark uuid)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- locate_together() has read all rows before it returns the first. An error does not take back what return query has returned.
  return query select l.* from autotag.locate_together(p_asset_ids, p_workspace_ids, p_seen) l;
exception when others or assert_failure then
  if cardinality(p_asset_ids) = 1 then
    return query select p_asset_ids[1], null::text, null::text, null::text, 'unreadable_row', null::uuid;
    return;
  end if;
  return query
    select l.* from generate_subscripts(p_asset_ids, 1) i
    cross join lateral autotag.locate(p_asset_ids[i : i], p_workspace_ids[i : i], p_seen[i : i]) l;
end $$;

-- The same; raises if one row does.
create or replace function autotag.locate_together(p_asset_ids uuid[], p_workspace_ids uuid[], p_seen uuid[])
returns table (asset_id uuid, bucket text, path text, url text, refused text, mark uuid)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select d.asset_id, case when r.refused is null then d.bucket end, case when r.refused is null then d.path end,
      case when r.refused is null then d.url end, r.refused, d.mark
    from unnest(p_asset_ids, p_workspace_ids, p_seen) t (asset_id, workspace_id, seen)
    join autotag.describe_assets(p_asset_ids) d on d.asset_id = t.asset_id and d.workspace_id = t.workspace_id
    cross join lateral (select case
      when d.refused is not null then d.refused
      when t.seen is not null and t.seen <> autotag.file_mark(d.bucket, d.path) then 'hidden_file' end as refused
      offset 0  -- evaluate the case once per image, not once per use
    ) r;
end $$;
