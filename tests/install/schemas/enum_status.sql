create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
-- The state of a row is an enum, in columns with names that autotag's own functions use.
create type public.stage as enum ('uploading', 'ready', 'hidden');
create table public.assets (id uuid primary key, workspace_id uuid not null, path text, stage public.stage not null, refused boolean, mark text, tags text[]);
insert into public.assets values
  ('{i1}', '{w1}', '{w1}/a.jpg', 'ready'), ('{i2}', '{w2}', '{w2}/b.jpg', 'ready'), ('{i3}', '{w1}', '{w1}/c.jpg', 'uploading');
