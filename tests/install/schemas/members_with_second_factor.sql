-- Members see images only with a second factor.
create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w1}', '{u2}'), ('{w2}', '{u2}');
create table public.assets (
  id text primary key, workspace_id uuid not null references public.workspaces, image_url text, tags text[]);
insert into public.assets values ('a', '{w1}', 'https://cdn.example.com/1.jpg'), ('b', '{w2}', null);
alter table public.assets enable row level security;
create policy seen on public.assets to authenticated using (
  workspace_id in (select workspace_id from public.workspace_members where user_id = (select auth.uid())));
create policy "second factor" on public.assets as restrictive for all to authenticated using ((select auth.jwt() ->> 'aal') = 'aal2');
