-- The host's tables for a stand-alone stack, as a Supabase project with an image library has them. Not applied to an existing
-- project.

create table public.workspaces (
  id uuid primary key default gen_random_uuid(),
  name text not null,
  created_at timestamptz not null default now()
);

create table public.workspace_members (
  workspace_id uuid not null references public.workspaces on delete cascade,
  user_id uuid not null references auth.users on delete cascade,
  primary key (workspace_id, user_id)
);
create index workspace_members_user_id_idx on public.workspace_members (user_id);

-- An image is in Storage (bucket and path) or at an https URL. The fillfactor leaves room on the page for the four updates of
-- an image while it is tagged.
create table public.assets (
  id uuid primary key default gen_random_uuid(),
  workspace_id uuid not null references public.workspaces on delete cascade,
  storage_bucket text,
  storage_path text,
  image_url text,
  tags text[],
  tagging_result jsonb,
  created_at timestamptz not null default now(),
  check (num_nonnulls(storage_path, image_url) >= 1)
) with (fillfactor = 12);   -- with tags a row is several times larger; it stays on its page (HOT), so that no index is written
create index assets_workspace_id_idx on public.assets (workspace_id);

alter table public.workspaces enable row level security;
alter table public.workspace_members enable row level security;
alter table public.assets enable row level security;

create policy "members see their workspaces" on public.workspaces for select to authenticated
  using (id in (select m.workspace_id from public.workspace_members m where m.user_id = (select auth.uid())));
create policy "users see their memberships" on public.workspace_members for select to authenticated
  using (user_id = (select auth.uid()));
create policy "members see the assets of their workspaces" on public.assets for select to authenticated
  using (workspace_id in (select m.workspace_id from public.workspace_members m where m.user_id = (select auth.uid())));
-- The worker reads Storage with the secret key, so a row may name only files in its own workspace's folder.
create policy "members add assets to their workspaces" on public.assets for insert to authenticated
  with check (
    workspace_id in (select m.workspace_id from public.workspace_members m where m.user_id = (select auth.uid()))
    and (storage_path is null or (coalesce(storage_bucket, 'assets') = 'assets'
      and split_part(storage_path, '/', 1) = workspace_id::text and storage_path !~ '(^|/)\.\.?(/|$)')));
create policy "members edit the tags of their workspaces" on public.assets for update to authenticated
  using (workspace_id in (select m.workspace_id from public.workspace_members m where m.user_id = (select auth.uid())));
create policy "members delete assets of their workspaces" on public.assets for delete to authenticated
  using (workspace_id in (select m.workspace_id from public.workspace_members m where m.user_id = (select auth.uid())));

-- Supabase projects differ in the default privileges of new tables, so they are explicit here.
revoke all on public.workspaces, public.workspace_members, public.assets from anon, authenticated;
grant select on public.workspaces, public.workspace_members to authenticated;
grant select, delete on public.assets to authenticated;
grant insert (id, workspace_id, storage_bucket, storage_path, image_url) on public.assets to authenticated;
grant update (tags) on public.assets to authenticated;   -- no other column: autotag writes the rest
grant all on public.workspaces, public.workspace_members, public.assets to service_role;

-- The private bucket of the images, one folder per workspace: assets/<workspace_id>/<file>.
insert into storage.buckets (id, name, public) values ('assets', 'assets', false) on conflict (id) do nothing;

create policy "members read the images of their workspaces" on storage.objects for select to authenticated
  using (bucket_id = 'assets' and split_part(name, '/', 1) in (
    select m.workspace_id::text from public.workspace_members m where m.user_id = (select auth.uid())));
create policy "members upload images to their workspaces" on storage.objects for insert to authenticated
  with check (bucket_id = 'assets' and split_part(name, '/', 1) in (
    select m.workspace_id::text from public.workspace_members m where m.user_id = (select auth.uid())));

-- A file that a signed-in user uploads gets its row in the transaction that makes it an object of Storage. So there is no file without
-- a row and no row without a file, wherever an upload breaks off (docs/frontend.md, "Uploading on a bad connection"). It needs no rights of
-- its own: Storage tries the insert as the user first, under the policies of both tables, and repeats it as service_role when the file
-- is there. A server's uploads have no owner: it inserts its rows itself.
create unique index assets_file_idx on public.assets (storage_bucket, storage_path);

create function public.insert_uploaded_asset() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_workspace_id public.assets.workspace_id%type := split_part(new.name, '/', 1);
begin
  insert into public.assets (workspace_id, storage_bucket, storage_path) values (v_workspace_id, new.bucket_id, new.name)
  on conflict (storage_bucket, storage_path) do nothing;
  return null;
end $$;
revoke execute on function public.insert_uploaded_asset from public, anon, authenticated, service_role;

create trigger insert_uploaded_asset after insert on storage.objects
  for each row when (new.bucket_id = 'assets' and new.owner_id is not null) execute function public.insert_uploaded_asset();
