create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
-- Several buckets, and the column has `fullPath` of the upload's reply.
insert into storage.buckets (id, name) values ('scans', 'scans');
create table public.assets (id uuid primary key, workspace_id uuid not null, storage_path text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', 'library/{w1}/a.jpg'), ('{i2}', '{w2}', 'scans/{w2}/b.jpg'), ('{i3}', '{w1}', '/scans//{w1}/c.jpg');
