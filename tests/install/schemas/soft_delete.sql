create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
-- A bin, and files that are no images.
create table public.assets (id uuid primary key, workspace_id uuid not null, storage_path text, mime_type text, deleted_at timestamptz, tags text[] default '{}');
insert into public.assets values
  ('{i1}', '{w1}', '{w1}/a.jpg', 'image/jpeg', null), ('{i2}', '{w2}', '{w2}/b.jpg', 'image/png', null), ('{i3}', '{w1}', '{w1}/c.jpg', 'image/jpeg', now()),
  ('{i4}', '{w1}', '{w1}/d.pdf', 'application/pdf', null), ('{i5}', '{w1}', '{w1}/e.jpg', null, null);
