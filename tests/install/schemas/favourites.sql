create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
-- A list with an exact key that is about something else.
create table public.stars (workspace_id uuid, user_id uuid, primary key (workspace_id, user_id));
insert into public.stars values ('{w1}', '{u2}');
create table public.assets (
  id uuid primary key, workspace_id uuid not null references public.workspaces, storage_path text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
