-- Auth0: the tenant is in a namespaced claim.
create table public.assets (id uuid primary key, tenant_id uuid not null, image_url text, tags text[]);
insert into public.assets values ('{i1}', '{w1}', 'https://img.example.com/a.jpg'), ('{i2}', '{w2}', 'https://img.example.com/b.jpg');
