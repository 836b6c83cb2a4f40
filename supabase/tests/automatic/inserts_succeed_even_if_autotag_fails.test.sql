-- Automatic mode must never fail an insert of the host. The rows of each uploader become a separate upload.
begin;
\ir ../setup.psql
select plan(10);
select pg_temp.workspace_id(1);
select autotag.set_automatic(true);
create function pg_temp.insert_image(path text) returns void language sql as $$
  insert into public.assets (workspace_id, storage_path) values (pg_temp.workspace_id(1), pg_temp.workspace_id(1) || path)
$$;
create function pg_temp.claims(claims text) returns void language sql as $$ select set_config('request.jwt.claims', claims, true) $$;

alter table autotag.arrivals rename to arrivals_gone;
set client_min_messages = error;
select lives_ok($$ select pg_temp.insert_image('/a.jpg') $$, 'the host''s insert succeeds although autotag is broken');
select is((select count(*)::integer from public.assets), 1, 'the row is inserted');
alter table autotag.arrivals_gone rename to arrivals;

-- The rows of each uploader become a separate upload; a token that names nobody is no error.
select pg_temp.claims('{"sub": "aaaaaaaa-0000-4000-8000-000000000001"}');
select pg_temp.insert_image('/b.jpg');
select pg_temp.claims('{"sub": "aaaaaaaa-0000-4000-8000-000000000002"}');
select pg_temp.insert_image('/c.jpg');
select pg_temp.claims('{"sub": "user_2abc"}');
select lives_ok($$ select pg_temp.insert_image('/d.jpg') $$, 'a sub that is not a uuid');
select pg_temp.claims('no JSON');
select lives_ok($$ select pg_temp.insert_image('/e.jpg') $$, 'claims that are not JSON');
select pg_temp.claims('{"role": "anon"}');
select lives_ok($$ select pg_temp.insert_image('/g.jpg') $$, 'no user');
select pg_temp.claims('');
select lives_ok($$ select pg_temp.insert_image('/f.jpg') $$, 'no claims');
select results_eq(
  $$ select right(uploader::text, 1), count(*)::integer from autotag.arrivals group by 1 order by 1 $$,
  $$ values ('0', 2), ('1', 1), ('2', 1) $$, 'the rows of each uploader become a separate upload, and of no token without a user');
update autotag.settings set automatic_for_anyone = true;
select pg_temp.claims('{"role": "anon"}');
select pg_temp.insert_image('/h.jpg');
select is((select count(*)::integer from autotag.arrivals a where a.uploader = autotag.nobody()), 3, 'unless the owner allows it');
select pg_temp.claims('');

-- Something odd in one row costs no other.
truncate autotag.arrivals;
alter table autotag.arrivals add constraint odd check (asset_id <> '00000000-0000-4000-8000-00000000000d');
select lives_ok($$ insert into public.assets (id, workspace_id, storage_path)
  select ('00000000-0000-4000-8000-00000000000' || to_hex(i))::uuid, pg_temp.workspace_id(1), pg_temp.workspace_id(1) || '/' || i
  from generate_series(11, 15) i $$, 'one of five rows cannot be collected');
select is((select count(*)::integer from autotag.arrivals), 4, 'the others are');
select * from finish();
rollback;
