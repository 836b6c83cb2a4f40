create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
-- Paths as supabase-js, forms and scripts leave them.
create table public.assets (id uuid primary key, workspace_id uuid not null, storage_path text, image_url text, tags text[]);
insert into public.assets values
  ('{i1}', '{w1}', '/{w1}/a.jpg', null), ('{i2}', '{w2}', '{w2}/b.jpg', null), ('{i3}', '{w1}', '{w1}//c.jpg ', null), ('{i4}', '{w1}', E' {w1}/d.jpg\n', null),
  ('{i5}', '{w1}', '{w1}/e.jpg/', null), ('{i6}', '{w1}', '', 'https://img.example.com/f.jpg'), ('{i7}', '{w1}', '  ', '');
