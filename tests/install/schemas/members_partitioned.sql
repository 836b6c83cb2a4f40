create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (workspace_id uuid, user_id uuid, primary key (workspace_id, user_id)) partition by hash (workspace_id);
create table public.workspace_members_0 partition of public.workspace_members for values with (modulus 1, remainder 0);
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
create table public.assets (
  id uuid primary key, workspace_id uuid not null references public.workspaces, storage_path text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
