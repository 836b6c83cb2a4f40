-- A team whose members keep some images for themselves.
create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w1}', '{u2}'), ('{w2}', '{u2}');
create table public.assets (
  id uuid primary key, workspace_id uuid not null references public.workspaces, created_by uuid references auth.users,
  visibility text not null default 'team', image_url text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', '{u1}', 'private', 'https://cdn.example.com/1.jpg'), ('{i2}', '{w2}', '{u2}', 'team', null);
alter table public.workspace_members enable row level security;
create policy own on public.workspace_members for select to authenticated using (user_id = auth.uid());
alter table public.assets enable row level security;
create policy seen on public.assets using (
  workspace_id in (select workspace_id from public.workspace_members where user_id = auth.uid())
  and (visibility = 'team' or created_by = auth.uid()));
