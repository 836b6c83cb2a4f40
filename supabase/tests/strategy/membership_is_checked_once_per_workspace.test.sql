-- is_member() may query large tables of the host, so it is called once per workspace and not once per image.
begin;
\ir ../setup.psql
select plan(3);
create sequence pg_temp.is_member_calls;
grant usage on sequence pg_temp.is_member_calls to public;
create or replace function autotag.is_member(p_workspace_id autotag.workspace_id) returns boolean language plpgsql stable security definer as $$
begin
  perform nextval('pg_temp.is_member_calls');
  return true;
end $$;
with added as (
  insert into public.assets (workspace_id, image_url)
  select w, 'https://example.com/' || i || '.jpg' from pg_temp.workspace_id(1) w, generate_series(1, 50) i returning id)
select set_config('test.ids', array_agg(id)::text, true) from added;
grant usage on schema public to authenticated;
create policy everybody on public.assets for select using (true);
set local request.jwt.claims = '{"role": "authenticated", "sub": "00000000-0000-4000-8000-000000000001"}';
set local role authenticated;
select is(count(*), 50::bigint, 'files_to_check() returns the files of 50 images')
from autotag.files_to_check(current_setting('test.ids')::uuid[]);
reset role;
select is((select last_value from pg_temp.is_member_calls), 1::bigint, 'it calls is_member() once');
set local role authenticated;
select public.enqueue_tagging(current_setting('test.ids')::uuid[]);
reset role;
select cmp_ok((select last_value from pg_temp.is_member_calls), '<=', 4::bigint,
  'enqueue_tagging() calls it three times more at most');
select * from finish();
rollback;
