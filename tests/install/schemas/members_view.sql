create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
-- The members are a view of two tables.
create table public.people (workspace_id uuid, user_id uuid, left_at timestamptz);
create view public.workspace_members as select p.workspace_id, p.user_id from public.people p where p.left_at is null;
insert into public.people values ('{w1}', '{u1}', null), ('{w1}', '{u2}', now()), ('{w2}', '{u2}', null);
create table public.assets (
  id uuid primary key, workspace_id uuid not null references public.workspaces, storage_path text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
