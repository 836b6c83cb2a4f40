create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
create table public.files (id uuid primary key, workspace_id uuid not null, storage_path text, tags text[]);
create view public.images as select id, workspace_id, storage_path, tags from public.files;
