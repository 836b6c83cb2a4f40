-- The tenant is in the token, and the policy of the table says so.
create table public.assets (id uuid primary key, tenant_id uuid not null, storage_path text, tags text[]);
alter table public.assets enable row level security;
create policy "own tenant" on public.assets to authenticated
  using (tenant_id = ((select auth.jwt()) -> 'app_metadata' ->> 'tenant_id')::uuid);
insert into public.assets values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
