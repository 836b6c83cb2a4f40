-- Where a worker finds the images it is about to read.

-- Whether a signed-in user may see a file of Storage, by the policies on storage.objects. The role authenticated owns it, so row level
-- security applies as it does to the user. The user's token is not available here: a policy sees only its `sub` and `role`, and a policy
-- that needs more refuses.
create or replace function autotag.may_see_file(p_user_id autotag.user_id, p_bucket text, p_path text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_visible boolean := false;
begin
  if current_user <> 'authenticated' or p_user_id is null or p_path is null then
    return false;
  end if;
  perform set_config('request.jwt.claims', jsonb_build_object('sub', p_user_id::text, 'role', 'authenticated')::text, true);
  v_visible := exists (select from storage.objects o where o.bucket_id = p_bucket and o.name = p_path);
  perform set_config('request.jwt.claims', '', true);
  return v_visible;
exception when others then
  perform set_config('request.jwt.claims', '', true);
  return false;
end $$;

do $$
begin
  grant create on schema autotag to authenticated;   -- needed to own a function, for this moment
  alter function autotag.may_see_file owner to authenticated;
  revoke create on schema autotag from authenticated;
exception when insufficient_privilege then
  raise warning 'This login cannot give a function to the role authenticated, so a file that replaces another while it is tagged counts as hidden.';
end $$;

-- The location of each image, as describe_assets() returns it. An image has a location only if its uploader was allowed to see this file
-- at enqueue, or is allowed to see it now. p_users[i]: the uploader; null: the service role.
-- refused: as in describe_assets(), or `hidden_file` (the uploader may not see it). A row that no longer exists or has
-- moved to another workspace is missing from the result. If the host's rows cannot be read together, each is read by itself, and
-- one that raises is refused: as `unreadable_row`, or as `unreadable_now` where the error may pass (the adapter is being changed, a
-- page of the table cannot be read). Then the worker reports a transient error, so its slot is free, and the image is tried again.
-- p_workspace_ids[i], p_visible_marks[i]: tasks.workspace_id and tasks.visible_mark of p_asset_ids[i].
create or replace function autotag.locate(
  p_asset_ids autotag.asset_id[], p_workspace_ids autotag.workspace_id[], p_visible_marks uuid[], p_users autotag.user_id[], p_limited boolean default false
)
returns table (asset_id autotag.asset_id, bucket text, path text, url text, refused text, mark uuid)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- locate_together() reads all rows before it returns the first, because an error would not take back what return query has returned.
  return query select l.* from autotag.locate_together(p_asset_ids, p_workspace_ids, p_visible_marks, p_users, p_limited) l;
exception when others or assert_failure then
  if cardinality(p_asset_ids) = 1 then
    raise warning 'autotag could not read the row of image %: %', p_asset_ids[1], sqlerrm;
    -- the first are errors that the data of a row can cause
    return query select p_asset_ids[1], null::text, null::text, null::text,
      case when left(sqlstate, 2) in ('22', '23', 'P0', '09') then 'unreadable_row' else 'unreadable_now' end, null::uuid;
    return;
  elsif autotag.is_lock_error(sqlstate) then
    raise;   -- probably another transaction holds the whole table, and each row would wait again
  end if;
  return query
    select l.* from generate_subscripts(p_asset_ids, 1) i
    cross join lateral autotag.locate(p_asset_ids[i : i], p_workspace_ids[i : i], p_visible_marks[i : i], p_users[i : i]) l;
end $$;

-- The same; raises if one row does. p_limited: a policy of the host may be slow, and images of other workspaces are in the same claim. So
-- files that replaced others are looked at for one second, at least one of them; the others are `unchecked`, and the worker asks again.
create or replace function autotag.locate_together(
  p_asset_ids autotag.asset_id[], p_workspace_ids autotag.workspace_id[], p_visible_marks uuid[], p_users autotag.user_id[], p_limited boolean
)
returns table (asset_id autotag.asset_id, bucket text, path text, url text, refused text, mark uuid)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    with described as materialized (
      select * from autotag.describe_assets(p_asset_ids)
    ), budget as materialized (   -- begins when all rows are read
      select case when p_limited then clock_timestamp() + interval '1 s' else 'infinity' end as ends_at from (select count(*) from described) counted
    )
    select d.asset_id, case when r.refused is null then d.bucket end, case when r.refused is null then d.path end,
      case when r.refused is null then d.url end, r.refused, d.mark
    from unnest(p_asset_ids, p_workspace_ids, p_visible_marks, p_users) t (asset_id, workspace_id, visible_mark, user_id)
    join described d on d.asset_id = t.asset_id and d.workspace_id = t.workspace_id
    cross join budget bu
    cross join lateral (select case
      when d.refused is not null then d.refused
      when (t.visible_mark = d.file_mark) is not false then null   -- the same file, or none that has to be visible
      when clock_timestamp() > bu.ends_at then 'unchecked'
      when not autotag.may_see_file(t.user_id, d.bucket, d.path) then 'hidden_file' end as refused
      offset 0  -- evaluate the case once per image, not once per use
    ) r;
end $$;
