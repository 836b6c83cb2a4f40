create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
-- The only table with a workspace and a user is a log: whoever looked at a workspace once is not its member.
create table public.activity_log (id bigint generated always as identity primary key, workspace_id uuid, user_id uuid, action text, at timestamptz default now());
insert into public.activity_log (workspace_id, user_id) values ('{w1}', '{u2}');
create table public.assets (
  id uuid primary key, workspace_id uuid not null references public.workspaces, storage_path text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
