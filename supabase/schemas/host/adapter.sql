-- The host adapter: everything that autotag assumes about the host's tables is in this file. `autotag init` writes it for a
-- project's tables. From then on it belongs to the project: change it where the project differs.

-- Give up if a lock is not free within a second, so that no query of yours waits behind it. Run the file again then.
set local lock_timeout = '1s';
set local statement_timeout = '30s';
set local check_function_bodies = off;  -- some functions call what the next migration makes

create schema if not exists autotag;

-- The types of your ids. autotag declares its own columns, variables and parameters with the three domains; no other file names
-- the type of an id. The columns of `keys` are the same types without a domain, for the functions that the API publishes
-- (`autotag.keys.asset_ids%type`), because generated client types do not follow domains.
create domain autotag.asset_id as uuid;
create domain autotag.workspace_id as uuid;
create domain autotag.user_id as uuid;
create type autotag.keys as (
  asset_id uuid, asset_ids uuid[], workspace_id uuid, user_id uuid);

-- What your app reads to show the state of an image. Adding nullable columns does not rewrite the table. A column that is new gets a
-- comment that says that it is autotag's, and `autotag uninstall` drops no column without that comment: one that you had before stays
-- yours. Only autotag's columns get a check, NOT VALID because existing rows satisfy it by being null.
do $$
declare
  v_comments constant jsonb := '{"tagging_result": "autotag: what the model answered about this image, and which tags are autotag''s", "tagging_stage": "autotag: how far the tagging of this image is", "tagging_progress": "autotag: percent of the tagging that is done", "tagging_eta": "autotag: when the tagging of this image will probably be done", "tagging_error": "autotag: why this image could not be tagged"}';
  v_new constant name[] := array(
    select n.name from jsonb_object_keys(v_comments) k (name) cross join lateral (select k.name::name) n (name)
    where not exists (select from pg_attribute att where att.attrelid = 'public.assets'::regclass and att.attname = n.name and not att.attisdropped));
  v_name name;
  v_own name[];
begin
  alter table public.assets
    add column if not exists tags text[],
    add column if not exists tagging_result jsonb,
    add column if not exists tagging_stage text,
    add column if not exists tagging_progress integer,
    add column if not exists tagging_eta timestamptz,
    add column if not exists tagging_error text;
  foreach v_name in array v_new loop
    execute format('comment on column %s.%I is %L', 'public.assets', v_name, v_comments ->> v_name::text);
  end loop;
  v_own := array(
    select att.attname from pg_attribute att where att.attrelid = 'public.assets'::regclass and not att.attisdropped
      and col_description(att.attrelid, att.attnum) = v_comments ->> att.attname::text);
  if 'tagging_stage' = any (v_own) and not exists (
    select from pg_constraint c where c.conrelid = 'public.assets'::regclass and c.conname = 'assets_tagging_stage_check') then
    alter table public.assets add constraint assets_tagging_stage_check check (tagging_stage in
      ('queued', 'preparing', 'submitted', 'processing', 'completing', 'completed', 'failed')) not valid;
    comment on constraint assets_tagging_stage_check on public.assets is 'autotag: belongs to the column that autotag has added';
  end if;
  if 'tagging_progress' = any (v_own) and not exists (
    select from pg_constraint c where c.conrelid = 'public.assets'::regclass and c.conname = 'assets_tagging_progress_check') then
    alter table public.assets add constraint assets_tagging_progress_check check (tagging_progress between 0 and 100) not valid;
    comment on constraint assets_tagging_progress_check on public.assets is 'autotag: belongs to the column that autotag has added';
  end if;
end $$;

-- Functions that use the host's tables have its schemas in their search_path (`public, extensions`), because your triggers and
-- policies run inside them. pg_temp is last everywhere: if it is not listed, Postgres looks there first for types, and a caller
-- could replace jsonb by a type of their own whose code would run as the function's owner.

-- The caller's id: auth.uid(), Supabase's own logins. Null if there is no token, or if its claim does not have the type of your users' ids.
-- Everything that needs the user asks this function.
create or replace function autotag.caller() returns autotag.user_id
language plpgsql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
as $$
declare
  v_user autotag.user_id;
begin
  v_user := (select auth.uid());   -- `return` would convert it outside the block, where its error is not caught
  return v_user;
exception when invalid_text_representation or numeric_value_out_of_range then
  return null;
end $$;

-- A value that is no user's id: automatic mode stores it as the uploader of rows that no user has inserted.
create or replace function autotag.nobody() returns autotag.user_id
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select '00000000-0000-0000-0000-000000000000'::autotag.user_id
$$;

-- Whether the caller may act for a workspace. Called by every RPC and by the policy of Realtime topics.
create or replace function autotag.is_member(p_workspace_id autotag.workspace_id) returns boolean
language sql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
as $$
  select exists (select from public.workspace_members m where m.workspace_id = p_workspace_id and m.user_id = (select autotag.caller()))
$$;

-- Whether the caller may change what the images of a workspace are asked: its profile and its vocabulary. Services always may.
create or replace function autotag.is_editor(p_workspace_id autotag.workspace_id) returns boolean
language sql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
as $$
  select false
$$;

-- The table of images, for `autotag doctor`.
create or replace function autotag.image_table() returns regclass
language sql stable set search_path = pg_catalog, pg_temp
as $$
  select 'public.assets'::regclass
$$;

-- Name of the rule for the files that a workspace's rows may name (docs/install.md, "Whose a file is").
create or replace function autotag.file_rule() returns text
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select 'workspace-folder'
$$;

-- Whether row level security of storage.objects lets signed-in users see their files. If so, it is checked for the files that
-- they enqueue.
create or replace function autotag.users_see_files() returns boolean
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select true
$$;

-- The hosts at which this project serves its Storage. An image URL of Storage there names one of your own files, so it is read through
-- Storage and the file rule applies to it. Any other URL is fetched like a browser would, if the worker's AUTOTAG_IMAGE_HOSTS allow it.
create or replace function autotag.storage_hosts() returns text[]
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select '{}'::text[]
$$;

-- {bucket, path} of the file that a URL of the project's own Storage names: public, signed, authenticated or rendered. Null: any other
-- URL. One that cannot be decoded gets a bucket without a name, which the file rule refuses.
create or replace function autotag.storage_file(p_url text) returns text[]
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
declare
  v_found text[] := regexp_match(p_url,
    E'^https?://([^/?#@\\\\]+)/storage/v1/(?:object/(?:(?:public|sign|authenticated)/)?|render/image/(?:public|sign|authenticated)/)([^/?#]+)/([^?#]+)', 'i');
begin
  if v_found is null or regexp_replace(lower(v_found[1]), ':(443|80)$', '') <> all (autotag.storage_hosts()) then
    return null;
  end if;
  return array[autotag.percent_decode(v_found[2]), btrim(regexp_replace(autotag.percent_decode(v_found[3]), '/+', '/', 'g'), '/')];
exception when character_not_in_repertoire or untranslatable_character then
  return array['', '']::text[];
end $$;

-- Decodes %20 and the like in a part of a URL. Raises if the bytes are not UTF-8.
create or replace function autotag.percent_decode(p_text text) returns text
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select case when strpos(p_text, '%') = 0 then p_text else (
    select convert_from(string_agg(
      case when p.part[1] ~ '^%[0-9A-Fa-f]{2}$' then decode(substr(p.part[1], 2), 'hex') else convert_to(p.part[1], 'UTF8') end,
      ''::bytea order by p.i), 'UTF8')
    from regexp_matches(p_text, '%[0-9A-Fa-f]{2}|[^%]+|%', 'g') with ordinality p (part, i)) end
$$;

-- describe_assets, store_tags and show_stage find images by key. A connection that kept a plan from when the table was small would
-- read all of it later. So describe_assets, which only reads, keeps a plan that uses the key's index (planning again takes a third
-- of its call). The others are planned at every call (`force_custom_plan`), and allow every kind of plan (`enable_seqscan`) that
-- their callers forbid, because your triggers run inside.

-- Workspace and location of images: a Storage bucket and path, or an https URL. Images that do not exist (any more) are missing
-- from the result. A row that is refused has no location. refused: `filtered` (the row filter leaves it out), `foreign_file` (it
-- names a file of another workspace, and the worker reads Storage with a key that opens every file) or `location_too_long`. The
-- lengths are checked first, because members can write large values, and octet_length() reads only the header of a value.
-- place: the picture's location as the row has it. mark: of the picture, a hash of its place. file_mark: of its file (function file_mark);
-- p_marks false: neither, which saves 3 µs an image. stage: what the row shows.
-- A path is read as supabase-js leaves it: without blanks around it, and each run of slashes counts as one. An empty path or URL counts
-- as none. A URL of your own Storage means the file that it names (storage_file). A path that
-- breaks the file rule and begins with the name of its bucket is read without that name (fullPath).
create or replace function autotag.describe_assets(p_asset_ids autotag.asset_id[], p_marks boolean default true)
returns table (asset_id autotag.asset_id, workspace_id autotag.workspace_id, bucket text, path text, url text, refused text, mark uuid, file_mark uuid, stage text, place text)
language plpgsql stable security definer set search_path = pg_catalog, public, extensions, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
#variable_conflict use_column
begin
  return query
    select d.id, d.workspace, case when d.refused is null then d.bucket end, case when d.refused is null then d.path end,
           case when d.refused is null then d.url end, d.refused,
           case when d.refused is null then d.mark end,
           -- If the row already holds bucket/path, its own mark is the file's; this saves a hash (4 µs).
           case when d.refused is null and p_marks then case when (d.bucket || '/' || d.path) collate "C" = d.place then d.mark
             else autotag.file_mark(d.bucket, d.path) end end, d.stage, case when d.refused is null then d.place end
    from (
      select r.*, case when p_marks and r.refused is null then md5(r.place)::uuid end as mark
      from (
        select a.id::autotag.asset_id as id, a.workspace_id::autotag.workspace_id as workspace, f.bucket, f.path, f.url, a.tagging_stage::text as stage,
               case when not c.counts then 'filtered'
               when c.too_long then 'location_too_long'
               when f.path is not null and not coalesce(
                 -- a bucket name that Storage allows, and a path that cannot leave the bucket
                 f.bucket ~ '^[A-Za-z0-9_!.*''() &$@=;:+,?-]+$' and f.bucket not in ('.', '..')
                 and f.path !~ E'(^|/)[.]{0,2}(/|$)|[\\\\[:cntrl:]]'
                 -- the file rule
                 and f.bucket in ('assets') and starts_with(f.path, a.workspace_id::text || '/')
               , false) then 'foreign_file' end as refused,
               case when c.counts and not c.too_long then coalesce(coalesce(nullif(a.storage_bucket::text, ''), 'assets') || '/' || nullif(btrim(a.storage_path, e' \t\r\n'), ''), split_part(a.image_url, '?token=', 1), '') end as place
        from public.assets a
        cross join lateral (
          select coalesce(true, false) as counts, coalesce(octet_length(a.image_url) > 8192, false) or coalesce(octet_length(a.storage_path) > 1024, false) or coalesce(octet_length(a.storage_bucket) > 100, false) as too_long
        ) c
        cross join lateral (select case when s.path is not null then s.bucket end as bucket, (case when starts_with(s.path, s.bucket || '/') and not coalesce(s.bucket in ('assets') and starts_with(s.path, a.workspace_id::text || '/'), false) then substr(s.path, length(s.bucket) + 2) else s.path end)::text as path, s.url as url from (select case when not c.too_long then coalesce(nullif(a.storage_bucket::text, ''), 'assets') end as bucket, case when not c.too_long then case when strpos(a.storage_path, '//') = 0 then nullif(btrim(a.storage_path, e' \t\r\n/'), '') when a.storage_path !~* E'^\\s*https?://' then nullif(btrim(regexp_replace(a.storage_path, '/+', '/', 'g'), e' \t\r\n/'), '') end end as path, case when not c.too_long then coalesce(case when strpos(a.storage_path, '//') > 0 and a.storage_path ~* E'^\\s*https?://' then btrim(a.storage_path, e' \t\r\n') end, nullif(btrim(a.image_url, e' \t\r\n'), '')) end as url offset 0) s offset 0) f
        where a.id = any (p_asset_ids)
        offset 0  -- evaluate what stands here once per row, not once per use
      ) r
      offset 0
    ) d;
end $$;

-- For `autotag doctor`: checks the files that rows name. checked: number of rows; foreign_files: how many of them name a file
-- of another workspace, with up to three examples. may_write: why signed-in users can write such rows; null: they cannot.
-- (A user who may edit only tags cannot change which file a row names.)
create or replace function autotag.check_files(p_rows integer, out checked integer, out foreign_files integer, out examples autotag.asset_id[], out may_write text)
language plpgsql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
as $$
begin
  select count(*), count(*) filter (where d.refused = 'foreign_file'),
    (array_agg(d.asset_id) filter (where d.refused = 'foreign_file'))[1:3]
  into checked, foreign_files, examples
  from autotag.describe_assets(array(select a.id from public.assets a limit p_rows)) d;
  select case
    when not exists (select from unnest(array['workspace_id', 'storage_path', 'storage_bucket', 'image_url']) k (name) where has_column_privilege(r.oid, c.oid, k.name, 'insert, update')) then null
    when not c.relrowsecurity then 'row level security is off'
    else (
      select format('the policy “%s” does not check the file', p.polname)
      from pg_policy p
      where p.polrelid = c.oid and p.polpermissive and p.polcmd in ('a', 'w', '*') and p.polroles && array[r.oid, 0]
        and exists (select from unnest(array['workspace_id', 'storage_path', 'storage_bucket', 'image_url']) k (name) where has_column_privilege(r.oid, c.oid, k.name,
          case p.polcmd when 'a' then 'insert' when 'w' then 'update' else 'insert, update' end))
        and pg_get_expr(coalesce(p.polwithcheck, p.polqual), c.oid) !~ E'\\mstorage_path\\M'
      order by p.polname limit 1) end
  into may_write
  from pg_class c, pg_roles r
  where c.oid = 'public.assets'::regclass and r.rolname = 'authenticated';
end $$;

-- The mark of a file: a hash of bucket and path. An image at a URL has one, too.
create or replace function autotag.file_mark(p_bucket text, p_path text) returns uuid
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return md5(coalesce(p_bucket || '/' || p_path, ''))::uuid;
end $$;

-- The files of these images that visible_file_marks() has to check: those in workspaces of the signed-in caller. everybody: the bucket
-- is public, or there is no file. No rows if no check is needed. An image that is being tagged will be skipped, so nobody looks for
-- its file: it has no path. (If it has ended by then, the zero mark makes its claim look.)
create or replace function autotag.files_to_check(p_asset_ids autotag.asset_id[])
returns table (asset_id autotag.asset_id, bucket text, path text, mark uuid, everybody boolean)
language plpgsql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
as $$
declare
  v_live autotag.asset_id[];
begin
  if autotag.is_service() or not autotag.users_see_files() or cardinality(p_asset_ids) > 100000 then
    return;
  end if;
  v_live := autotag.own_live_assets(p_asset_ids);
  return query
    with files as materialized (
      select d.asset_id, d.workspace_id, d.bucket, d.path from autotag.describe_assets(
        case v_live when '{}' then p_asset_ids else array(select unnest(p_asset_ids) except select unnest(v_live)) end, false) d
      where d.refused is null
    ), theirs as materialized (
      -- offset 0: call is_member once per workspace, not once per image
      select w.id from (select distinct f.workspace_id as id from files f offset 0) w where autotag.is_member(w.id)
    )
    select f.asset_id, f.bucket, f.path, md5(coalesce(f.bucket || '/' || f.path, ''))::uuid,   -- file_mark(), inline
      f.path is null or exists (select from storage.buckets b where b.id = f.bucket and b.public)
    from files f where f.workspace_id in (select t.id from theirs t)
    union all
    select l.asset_id, null, null, null, false from unnest(v_live) l (asset_id);
end $$;

-- For each image the mark of its file, if the caller may see that file. This runs as the caller, under row level security. A zero mark:
-- the caller may not see the file, or it does not exist (yet), which looks the same. Null: not checked. An error of a policy is not
-- passed on, because it can contain parts of any file's name.
create or replace function autotag.visible_file_marks(p_asset_ids autotag.asset_id[]) returns uuid[]
language plpgsql stable set search_path = pg_catalog, public, extensions, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
begin
  return array(
    with marks as materialized (
      -- The policies of storage.objects are asked about these files alone, by their names: another row of the bucket may make one raise.
      select f.asset_id, case when f.everybody or f.path is not null and (
        select true from storage.objects o where o.bucket_id = f.bucket and o.name = f.path limit 1)
        then f.mark else '00000000-0000-0000-0000-000000000000'::uuid end as mark
      from autotag.files_to_check(p_asset_ids) f)
    select k.mark from unnest(p_asset_ids) with ordinality x (id, i) left join marks k on k.asset_id = x.id order by x.i);
exception when others or assert_failure then
  perform autotag.check_caller();
  raise exception using errcode = 'PT403', detail = '{"code": "unreadable_files"}',
    message = format('autotag could not check whether you may see the files of these images (error %s).', sqlstate),
    hint = 'Tell the people who run this project: your login cannot read storage.objects, because of a policy or a missing privilege.';
end $$;

-- What a role may read of the table of images: nothing (null), some `columns` but not the ids, or the `ids`. visible_assets() tells which
-- rows it sees.
create or replace function autotag.may_read_images(p_role name) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select case when not has_schema_privilege(p_role, c.relnamespace, 'usage') then null
    when has_column_privilege(p_role, c.oid, 'id', 'select') then 'ids'
    when has_any_column_privilege(p_role, c.oid, 'select') then 'columns' end
  from pg_class c where c.oid = autotag.image_table()
$$;

-- Whether a caller with this role may tag only images whose rows they see. Raises an error if visible_assets() could not find these rows,
-- because the role may not read the column of the ids.
create or replace function autotag.has_to_see(p_role name) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_reads text := autotag.may_read_images(p_role);
begin
  if autotag.is_service() or v_reads is null then
    return false;
  elsif v_reads = 'columns' then
    if not (select c.relrowsecurity from pg_class c where c.oid = autotag.image_table()) then
      return false;
    end if;
    perform autotag.check_caller();
    perform autotag.refuse(403, 'unreadable_rows',
      format('autotag could not check which images you see: you may read columns of %s, but not its ids.', autotag.image_table()),
      format('Ask the people who run this project to grant it: grant select (%I) on %s to %I;', 'id', autotag.image_table(), p_role));
  end if;
  return true;
end $$;

-- The images among these whose rows the caller can read, in their order. This runs as the caller, so your policies decide, and the
-- rights of a view. If the caller is a service, it returns all of them. It does so, too, if the caller may read no column of the table:
-- only your server shows images to users then, so membership alone decides.
create or replace function autotag.visible_assets(p_asset_ids autotag.asset_id[]) returns autotag.asset_id[]
language plpgsql stable set search_path = pg_catalog, public, extensions, pg_temp set plan_cache_mode = 'force_custom_plan'
  set enable_seqscan = on
as $$
begin
  if not autotag.has_to_see(current_user) then
    return p_asset_ids;
  end if;
  begin
    return array(
      select x.id from unnest(p_asset_ids) with ordinality x (id, i)
      where x.id in (select a.id from public.assets a where a.id = any (p_asset_ids)) order by x.i);
  exception when others or assert_failure then
    perform autotag.check_caller();
    raise exception using errcode = 'PT403', detail = '{"code": "unreadable_rows"}',
      message = 'autotag could not check whether you may see these images: ' || sqlerrm,
      hint = 'Tell the people who run this project: your login cannot read the table of images, because of a policy or a missing privilege.';
  end;
end $$;

-- The next images of a workspace that are not being tagged and that the row filter does not leave out, by id after p_after.
-- A row may show `processing` although nobody tags its image: its id or workspace was changed meanwhile, so its outcome was dropped.
-- p_untagged: only those without tags (null or an empty list) that autotag has not tagged. (An image whose answer had no fitting tag
-- counts as tagged, because a second answer would have none either.) p_profile: only images that autotag has tagged with another version
-- of the profile. A result without a version has version 0.
create or replace function autotag.list_assets(
  p_workspace_id autotag.workspace_id, p_untagged boolean, p_after autotag.asset_id, p_limit integer, p_profile integer default null
)
returns autotag.asset_id[]
language sql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
as $$
  select coalesce(array_agg(x.id order by x.id), '{}')
  from (
    select a.id from public.assets a
    where a.workspace_id = p_workspace_id and (p_after is null or a.id > p_after)
      and (a.tagging_stage is null or a.tagging_stage in ('completed', 'failed')
        or a.id not in (select live.asset_id from autotag.live_in_workspace(p_workspace_id) live))
      and (not p_untagged or (a.tags is null or cardinality(a.tags) = 0) and jsonb_typeof(a.tagging_result -> 'given') = 'array' is not true)
      and (p_profile is null or a.tagging_result is not null and p_profile <> case
        when jsonb_typeof(a.tagging_result -> 'profile') = 'number' then (a.tagging_result -> 'profile')::numeric else 0 end)
      and true
    order by a.id limit p_limit) x (id)
$$;

-- At most p_limit images of a workspace that have tags, with what is stored about them; spread evenly by id, and the same at
-- every call. tags: a JSON array. Images with more than 20,000 stored bytes of tags or result are left out, because only people write
-- that much.
create or replace function autotag.tagged_assets(p_workspace_id autotag.workspace_id, p_limit integer)
returns table (asset_id autotag.asset_id, tags jsonb, result jsonb)
language sql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
as $$
  with tagged as (
    select a.id as id, row_number() over (order by a.id) as place, count(*) over () as found
    from public.assets a
    where a.workspace_id = p_workspace_id and true
      and case when pg_column_size(a.tags) <= 20000 and coalesce(pg_column_size(a.tagging_result), 0) <= 20000
        then jsonb_path_exists(to_jsonb(a.tags), 'strict $[*] ? (@.type() == "string")', '{}', true) end
  )
  select a.id,
         to_jsonb(a.tags),
         a.tagging_result
  from tagged t join public.assets a on a.id = t.id
  where t.place * p_limit / t.found > (t.place - 1) * p_limit / t.found
  order by a.id
$$;

-- The tags of the next p_limit images by id after p_after, in a workspace or in all (null): {tags: {tag: images}, images, last (null: no
-- more images)}. For `autotag vocabulary import --from-tags`.
create or replace function autotag.tags_in_use(p_workspace_id autotag.workspace_id, p_after autotag.asset_id, p_limit integer) returns jsonb
language sql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
as $$
  with page as materialized (
    select a.id as id, case when pg_column_size(a.tags) <= 20000 then to_jsonb(a.tags) end as tags
    from public.assets a
    where (p_workspace_id is null or a.workspace_id = p_workspace_id) and (p_after is null or a.id > p_after) and true
    order by a.id limit p_limit
  ), counted as (
    select t.tag #>> '{}' as tag, count(distinct p.id) as images
    from page p cross join lateral jsonb_path_query(p.tags, 'strict $[*] ? (@.type() == "string")', '{}', true) t (tag) group by 1
  )
  select jsonb_build_object('images', (select count(*) from page), 'last', (select p.id from page p order by p.id desc limit 1),
    'tags', (select coalesce(jsonb_object_agg(c.tag, c.images), '{}') from counted c where length(c.tag) between 1 and 50))
$$;

-- The rows of images: the texts in their tags (null: too large to be read), what autotag remembers, and the stage and error that they show.
create or replace function autotag.stored_tags(p_asset_ids autotag.asset_id[])
returns table (asset_id autotag.asset_id, tags text[], result jsonb, stage text, error text)
language plpgsql stable security definer set search_path = pg_catalog, public, extensions, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
begin
  return query
    select a.id::autotag.asset_id,
      case when coalesce(pg_column_size(a.tags), 0) <= 65536 then array(
        select t.tag #>> '{}' from jsonb_path_query(to_jsonb(a.tags), 'strict $[*] ? (@.type() == "string")', '{}', true)
          with ordinality t (tag, i) order by t.i) end,
      case when pg_column_size(a.tagging_result) <= 200000 then a.tagging_result end, a.tagging_stage::text, a.tagging_error::text
    from public.assets a where a.id = any (p_asset_ids);
end $$;

-- Stores the tags and everything else about finished images of a workspace, in one update per row. What a person typed stays, and
-- what a person removed stays away (autotag.merge_tags). The update compares the row as it finds it, so an edit that commits while it
-- waits counts. Values too large to be compared are not read: a value's header has its size. If the table has update triggers, it then
-- reads the rows again. A row without the new result counts as not written. If a trigger has changed the tags, tagging_result keeps only
-- those that are in the row (kept_tags), and the triggers run once more. Returns the images whose rows it wrote. A row that has moved to
-- another workspace is not written, because it may be another image, and neither is one whose picture is not the one that the model saw.
-- p_results[i] and p_marks[i] belong to p_asset_ids[i]: {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model}, with normalized
-- tags, each with a key of its own (clean_result), the most confident first; and the picture's mark (describe_assets; null: any).
create or replace function autotag.store_tags(p_asset_ids autotag.asset_id[], p_workspace_id autotag.workspace_id, p_results jsonb[], p_marks uuid[])
returns autotag.asset_id[]
language plpgsql security definer set search_path = pg_catalog, public, extensions, pg_temp set plan_cache_mode = 'force_custom_plan'
  set enable_seqscan = on
as $$
declare
  v_written autotag.asset_id[];
  v_kept jsonb[];              -- what these rows have to remember instead; null: nothing else
begin
  with written as (
    update public.assets a
    set (tags, tagging_result, tagging_error) = (
          -- Usually the row has no tags yet, so there is nothing to merge. Calling merge_array() would take longer than the update.
          select (array(select jsonb_array_elements_text(r.result -> 'tags')))::text[], r.result - '{tags,names,above}'::text[] || jsonb_build_object('given', r.result -> 'tags'), null
          where a.tags is null and a.tagging_result is null
          union all
          select case when merged.tags is null then a.tags else merged.tags::text[] end, merged.result, merged.error
          from autotag.merge_array(
            case when pg_column_size(a.tags) <= 65536 then a.tags::text[] end, coalesce(pg_column_size(a.tags) > 65536, false),
            case when pg_column_size(a.tagging_result) <= 200000 then a.tagging_result end, r.result, null, p_workspace_id) merged
          where a.tags is not null or a.tagging_result is not null),
        tagging_stage = 'completed', tagging_progress = 100, tagging_eta = null
    from unnest(p_asset_ids, p_results, p_marks) as r (asset_id, result, mark)
    where a.id = r.asset_id and a.workspace_id = p_workspace_id
      and (r.mark is null or r.mark = md5(coalesce(coalesce(nullif(a.storage_bucket::text, ''), 'assets') || '/' || nullif(btrim(a.storage_path, e' \t\r\n'), ''), split_part(a.image_url, '?token=', 1), ''))::uuid)
    returning a.id as id
  )
  select array_agg(w.id) into v_written from written w;
  if v_written is not null and exists (
      select from pg_trigger t where t.tgrelid = 'public.assets'::regclass and not t.tgisinternal and t.tgtype & 16 <> 0) then
    select array_agg(s.asset_id), array_agg(case when s.error is null then autotag.kept_tags(s.tags, s.result) end) into v_written, v_kept
    from autotag.stored_tags(v_written) s join unnest(p_asset_ids, p_results) r (asset_id, result) on r.asset_id = s.asset_id
    where case when s.result ? 'caption'
      then s.result -> 'caption' = r.result -> 'caption' or nullif(s.result -> 'confidence', '{}') = r.result -> 'confidence'
      else s.stage = 'completed' end;
    update public.assets a set tagging_result = k.result
    from unnest(v_written, v_kept) k (asset_id, result) where a.id = k.asset_id and k.result is not null;
  end if;
  return v_written;
end $$;

-- Writes the stage of images of a workspace. `queued` begins a new pass and clears what an earlier one left, `failed` ends one; in
-- between progress never decreases, and rows that would not change are not written. A row that has moved to another workspace is
-- not written. p_errors[i] belongs to p_asset_ids[i].
create or replace function autotag.show_stage(
  p_asset_ids autotag.asset_id[], p_workspace_id autotag.workspace_id, p_stage text, p_progress integer, p_eta timestamptz default null, p_errors text[] default null
) returns void
language plpgsql security definer set search_path = pg_catalog, public, extensions, pg_temp set plan_cache_mode = 'force_custom_plan'
  set enable_seqscan = on
as $$
begin
  update public.assets a
  set tagging_stage = p_stage,
      tagging_progress = case
        -- The row still shows the last pass, because it was locked when this pass began.
        when p_stage = 'queued' or p_stage <> 'failed' and a.tagging_stage in ('completed', 'failed') then p_progress
        else greatest(a.tagging_progress, p_progress) end,
      tagging_eta = case p_stage when 'queued' then p_eta when 'failed' then null
        else coalesce(p_eta, a.tagging_eta) end,
      tagging_error = s.error
  from unnest(p_asset_ids, p_errors) as s (asset_id, error)
  where a.id = s.asset_id and a.workspace_id = p_workspace_id
    and (p_stage in ('queued', 'failed') or a.tagging_stage is distinct from p_stage
      or coalesce(a.tagging_progress, 0) < p_progress);
end $$;

-- The images among these whose rows another transaction holds. The other rows are locked.
create or replace function autotag.held_assets(p_asset_ids autotag.asset_id[]) returns autotag.asset_id[]
language plpgsql security definer set search_path = pg_catalog, public, extensions, pg_temp set plan_cache_mode = 'force_custom_plan'
  set enable_seqscan = on
as $$
declare
  v_free autotag.asset_id[] := array(
    select a.id from public.assets a where a.id = any (p_asset_ids) for no key update skip locked);
begin
  return array(select a.id from public.assets a where a.id = any (p_asset_ids) and a.id not in (select unnest(v_free)));
end $$;

-- The trigger of automatic mode on the host's table: collects the rows that one statement inserted. No error reaches your insert. It
-- becomes a warning, and the images wait for enqueue_tagging. If the rows cannot be collected together, each is collected by itself, so
-- that one bad row affects no other. After 20 errors it gives up, because then the rows are not the cause.
create or replace function autotag.collect_inserted() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_row record;
  v_failed integer := 0;
begin
  begin
    perform autotag.collect(array_agg(n.id), array_agg(n.workspace_id)) from added n;
    return null;
  exception when others or assert_failure then
    null;
  end;
  for v_row in select n.* from added n loop
    begin
      perform autotag.collect(array[v_row.id], array[v_row.workspace_id]);
    exception when others or assert_failure then
      v_failed := v_failed + 1;
      raise warning 'autotag could not collect a new image: %', sqlerrm;
      exit when v_failed = 20;
    end;
  end loop;
  return null;
exception when others or assert_failure then
  raise warning 'autotag could not collect new images: %', sqlerrm;
  return null;
end $$;

-- Turns automatic mode on or off. The trigger exists only while the mode is on, so that it costs nothing otherwise.
--   select autotag.set_automatic(true);
create or replace function autotag.set_automatic(p_on boolean) returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  drop trigger if exists autotag_collect on public.assets;
  if p_on then
    create trigger autotag_collect after insert on public.assets
      referencing new table as added for each statement execute function autotag.collect_inserted();
    perform pg_notify('autotag', 'uploads');   -- workers look for new uploads from now on
  end if;
end $$;

-- What `autotag init` was told, and a hash of each function as it wrote it: a later `autotag init` with other answers keeps the
-- answers that it is not given, and replaces no function that you have changed.
create or replace function autotag.adapter_answers() returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select '{"choices": {"table": "public.assets", "id": "id", "workspace": "workspace_id", "path": "storage_path", "bucket": "assets", "url": "image_url", "full_paths": false, "tags": "tags", "where": "true", "members_table": "public.workspace_members", "members_workspace": "workspace_id", "members_user": "user_id", "members_where": "true", "caller_claim": "auth.uid()", "editors": "none"}, "storage_hosts": [], "users_see_files": true, "files": {"name": "workspace-folder", "buckets": ["assets"], "prefix": "", "depth": 1, "uploader": null}, "functions": {"caller": "f830ed77bb91839e0f5c8f2ce1e04423", "nobody": "6c5d38b139b353965449926c78d12f4a", "is_member": "19796b8302d5a46b3911e77265efac71", "is_editor": "1c0b95fc17b9b3f6469e454482cb4a49", "image_table": "d24db7aeb8883ff34d9163c517e0cd7b", "file_rule": "e5132e61b36ed3b88aff49205110856a", "users_see_files": "12121c1c821d63ac9833861df2e81850", "storage_hosts": "030502eb0822a627e8578437ebce8ccd", "storage_file": "91d31d059f2ceb5533688565d89c4678", "percent_decode": "a0eccfadc1e55a87ef193dd340c278b9", "describe_assets": "982790c8aaa26052521052207781c21a", "check_files": "2bf368f4066f64b63178f0e8d29f2d39", "file_mark": "219cdc87aec8cb6caf2f18b3adf94d53", "files_to_check": "aaff0d5c32dd6ee6691d456b4c22016c", "visible_file_marks": "fb3d7292ea03a21b066df2eeee603063", "may_read_images": "4d6ea3cce6c38918ce65b70bcd3596e5", "has_to_see": "841517d2b5dc61837214244b4314a307", "visible_assets": "91a9ac71e2b4afe2a0acd05f04bc9dd7", "list_assets": "f56c22a3b4924ebdf8caed7804caee2a", "tagged_assets": "369dfcb2bc1a94ba8cea34b82e714162", "tags_in_use": "0cb437f5fc8dc68e0004407ee0cf8356", "stored_tags": "ec090ba123f9257f9a6a0f7b0137a764", "store_tags": "b68dd4cb2bb9624604a14c6f01738d5c", "show_stage": "bf8e8c0a1a5abe7e3bb0ac8cb6f1deb2", "held_assets": "74439428a2a7b5d3c9cdd0f84e7c9f20", "collect_inserted": "11282dfb9d2166012a3263eab4651df0", "set_automatic": "df63c22abd345745a09ee933b92e9fe7", "adapter_version": "6ebceba1516d1b8c52d508dc3039fc26"}}'::jsonb
$$;

-- Version of the adapter; `autotag init` of a newer release adds what is missing.
create or replace function autotag.adapter_version() returns integer
language sql immutable set search_path = pg_catalog, pg_temp
as $$ select 1 $$;
