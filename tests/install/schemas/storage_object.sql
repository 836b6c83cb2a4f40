create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
-- A row refers to the object in Storage.
insert into storage.objects (id, bucket_id, name, owner_id) values
  ('{o1}', 'library', '{w1}/a b.jpg', '{u1}'), ('{o2}', 'library', '{w2}/b.jpg', '{u2}');
create table public.assets (id uuid primary key, workspace_id uuid not null, object_id uuid references storage.objects, tags text[]);
insert into public.assets values ('{i1}', '{w1}', '{o1}'), ('{i2}', '{w2}', '{o2}');
