-- For a local stack (supabase start): two workspaces that cannot see each other, a member of each, and three
-- images of each, which lie in supabase/seed/assets. Sign in as alice@example.com or bob@example.com with the
-- password "password". Runs twice without harm.

insert into auth.users (
  instance_id, id, aud, role, email, encrypted_password, email_confirmed_at, raw_app_meta_data, raw_user_meta_data,
  created_at, updated_at, confirmation_token, recovery_token, email_change, email_change_token_new)
select '00000000-0000-0000-0000-000000000000', u.id, 'authenticated', 'authenticated', u.email,
  '$2a$10$e2XcPN3IXnOAjIHf718/2ur3bsHdAUbPjKKWKPB.6d3yiRuNEzF.q',  -- bcrypt of "password"
  now(), '{"provider": "email", "providers": ["email"]}', '{}', now(), now(), '', '', '', ''
from (values
  ('aaaaaaaa-0000-4000-8000-000000000001'::uuid, 'alice@example.com'),
  ('bbbbbbbb-0000-4000-8000-000000000002'::uuid, 'bob@example.com')) u (id, email)
on conflict (id) do nothing;

insert into auth.identities (id, user_id, provider, provider_id, identity_data, last_sign_in_at, created_at, updated_at)
select u.id, u.id, 'email', u.id::text,
  jsonb_build_object('sub', u.id, 'email', u.email, 'email_verified', true), now(), now(), now()
from auth.users u
where u.email in ('alice@example.com', 'bob@example.com')
on conflict do nothing;

insert into public.workspaces (id, name) values
  ('11111111-0000-4000-8000-000000000001', 'Alice''s pictures'),
  ('22222222-0000-4000-8000-000000000002', 'Bob''s pictures')
on conflict do nothing;

insert into public.workspace_members (workspace_id, user_id) values
  ('11111111-0000-4000-8000-000000000001', 'aaaaaaaa-0000-4000-8000-000000000001'),
  ('22222222-0000-4000-8000-000000000002', 'bbbbbbbb-0000-4000-8000-000000000002')
on conflict do nothing;

insert into public.assets (id, workspace_id, storage_path)
select (left(w.id::text, 35) || i)::uuid, w.id, format('%s/picture-%s.png', w.id, i)
from public.workspaces w, generate_series(1, 3) i
where w.id in ('11111111-0000-4000-8000-000000000001', '22222222-0000-4000-8000-000000000002')
on conflict do nothing;
