-- A project belongs to the user who made it.
create table public.projects (id uuid primary key, owner_id uuid not null references auth.users, title text);
create table public.images (id uuid primary key, project_id uuid not null references public.projects, storage_path text, tags text[]);
insert into public.projects values ('{w1}', '{u1}'), ('{w2}', '{u2}');
insert into public.images values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
