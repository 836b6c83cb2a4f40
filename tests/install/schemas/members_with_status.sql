create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
-- Not every row is a member: {u2} was removed.
create table public.workspace_members (
  workspace_id uuid, user_id uuid, status text not null default 'active', deleted_at timestamptz, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}', 'active'), ('{w1}', '{u2}', 'removed'), ('{w2}', '{u2}', 'active');
create table public.assets (
  id uuid primary key, workspace_id uuid not null references public.workspaces, storage_path text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
