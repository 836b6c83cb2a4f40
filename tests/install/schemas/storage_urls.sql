create table public.workspaces (id uuid primary key, name text);
insert into public.workspaces values ('{w1}'), ('{w2}');
create table public.workspace_members (
  workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
-- Only URLs: of the project's Storage in all their forms, and of others.
create table public.assets (id uuid primary key, workspace_id uuid not null, image_url text, tags text[]);
insert into public.assets values
  ('{i1}', '{w1}', 'https://abcdefghijklmnopqrst.supabase.co/storage/v1/object/public/library/{w1}/a%20b.jpg'),
  ('{i2}', '{w2}', 'https://abcdefghijklmnopqrst.supabase.co/storage/v1/object/public/library/{w2}/b.jpg'),
  ('{i3}', '{w1}', 'https://ABCDEFGHIJKLMNOPQRST.supabase.co/storage/v1/object/sign/library/{w1}/%C3%A4.jpg?token=e30.e30.x'),
  ('{i4}', '{w1}', 'https://abcdefghijklmnopqrst.supabase.co/storage/v1/render/image/public/library/{w1}/c.jpg?width=200'),
  ('{i5}', '{w1}', 'https://abcdefghijklmnopqrst.supabase.co:443/storage/v1/object/authenticated/library//{w1}/d.jpg'),
  ('{i6}', '{w1}', 'https://img.example.com/storage/v1/object/public/library/{w2}/b.jpg'),
  ('{i7}', '{w1}', '');
