-- Users may read the tags of the rows that they see, and not the ids.
create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
create table public.assets (
  id integer primary key, workspace_id uuid not null references public.workspaces, image_url text, tags text[]);
insert into public.assets values (1, '{w1}', 'https://cdn.example.com/1.jpg'), (2, '{w2}', null);
alter table public.assets enable row level security;
revoke all on public.assets from anon, authenticated;
grant select (tags) on public.assets to authenticated;
create policy members on public.assets for select to authenticated using (
  workspace_id in (select m.workspace_id from public.workspace_members m where m.user_id = auth.uid()));
