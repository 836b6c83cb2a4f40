-- Members, of whom some are blocked by a restrictive policy.
create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w1}', '{u2}'), ('{w2}', '{u2}');
create table public.blocked (user_id uuid primary key);
insert into public.blocked values ('{u2}');
create table public.assets (
  id bigint primary key, workspace_id uuid not null references public.workspaces, image_url text, tags text[]);
insert into public.assets values (1, '{w1}', 'https://cdn.example.com/1.jpg'), (2, '{w2}', null);
alter table public.assets enable row level security;
alter table public.assets force row level security;
create policy seen on public.assets to authenticated using (
  workspace_id in (select workspace_id from public.workspace_members where user_id = (select auth.uid())));
create policy blocked on public.assets as restrictive to authenticated using (
  (select auth.uid()) not in (select user_id from public.blocked));
