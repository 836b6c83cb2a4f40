-- Drizzle: a serial key, the members with a key of their own and a unique index.
create table public.organizations (id uuid primary key default gen_random_uuid());
create table public.organization_members (
  id serial primary key, organization_id uuid not null references public.organizations, user_id uuid not null references auth.users,
  role text not null default 'member', created_at timestamptz not null default now());
create unique index organization_members_organization_id_user_id_unique on public.organization_members (organization_id, user_id);
create table public.images (id uuid primary key, organization_id uuid not null references public.organizations, file_path varchar(500), tags text[]);
insert into public.organizations values ('{w1}'), ('{w2}');
insert into public.organization_members (organization_id, user_id) values ('{w1}', '{u1}'), ('{w2}', '{u2}');
insert into public.images values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
