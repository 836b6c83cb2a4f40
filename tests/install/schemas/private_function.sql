-- The project decides who is a member in a function, as Supabase's guide to row level security advises.
create schema private;
create table public.orgs (id uuid primary key);
create table private.grants (org uuid, who uuid, until timestamptz);
create function private.is_org_member(org_id uuid) returns boolean language sql stable security definer set search_path = '' as
  $f$ select exists (select from private.grants g where g.org = org_id and g.who = (select auth.uid()) and g.until > now()) $f$;
create function private.is_open(org_id uuid) returns text language sql as $f$ select 'yes' $f$;
create table public.images (id uuid primary key, org_id uuid not null references public.orgs, storage_path text, tags text[]);
insert into public.orgs values ('{w1}'), ('{w2}');
insert into private.grants values ('{w1}', '{u1}', 'infinity'), ('{w1}', '{u2}', '2020-01-01');
insert into public.images values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
