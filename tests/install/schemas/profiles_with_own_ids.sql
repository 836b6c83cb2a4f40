create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
-- Members are profiles, and a profile has another id than its user.
create table public.profiles (id uuid primary key, user_id uuid references auth.users);
create table public.workspace_members (workspace_id uuid references public.workspaces, profile_id uuid references public.profiles, primary key (workspace_id, profile_id));
insert into public.profiles values ('{u2}', '{u1}');
insert into public.workspace_members values ('{w1}', '{u2}');
create table public.assets (
  id uuid primary key, workspace_id uuid not null references public.workspaces, storage_path text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
