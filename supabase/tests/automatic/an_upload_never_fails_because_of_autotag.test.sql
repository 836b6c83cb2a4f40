begin;
\ir ../setup.psql
select plan(3);
select pg_temp.workspace(1);
select autotag.set_automatic(true);
alter table autotag.uploads rename to uploads_gone;
set client_min_messages = error;
select lives_ok($$ insert into public.assets (workspace_id, storage_path) values (pg_temp.workspace(1), pg_temp.workspace(1) || '/a.jpg') $$,
  'the host''s insert succeeds although autotag is broken');
select is((select count(*)::integer from public.assets), 1, 'the row is inserted');
alter table autotag.uploads_gone rename to uploads;

-- The rows of each uploader become a separate upload.
select set_config('request.jwt.claims', '{"sub": "aaaaaaaa-0000-4000-8000-000000000001"}', true);
insert into public.assets (workspace_id, storage_path) values (pg_temp.workspace(1), pg_temp.workspace(1) || '/b.jpg');
select set_config('request.jwt.claims', '{"sub": "aaaaaaaa-0000-4000-8000-000000000002"}', true);
insert into public.assets (workspace_id, storage_path) values (pg_temp.workspace(1), pg_temp.workspace(1) || '/c.jpg');
select results_eq(
  $$ select right(user_id::text, 1), count(*)::integer from autotag.uploads u join autotag.arrivals a on a.upload_id = u.id group by 1 order by 1 $$,
  $$ values ('1', 1), ('2', 1) $$, 'the rows of each uploader become a separate upload');
select * from finish();
rollback;
