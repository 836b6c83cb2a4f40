grant usage on schema public to anon, authenticated;
alter default privileges in schema public grant select on tables to authenticated;  -- as Supabase does
create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.assets (
  id uuid primary key, workspace_id uuid not null references public.workspaces, storage_path text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
