-- Automatic mode must never fail an insert of the host. The rows of each uploader become a separate upload.
begin;
\ir ../setup.psql
select plan(3);
select pg_temp.workspace_id(1);
select autotag.set_automatic(true);
alter table autotag.uploads rename to uploads_gone;
set client_min_messages = error;
create function pg_temp.insert_row(name text) returns void language sql as $$
  insert into public.assets (workspace_id, storage_path) select w, w || '/' || name from pg_temp.workspace_id(1) w
$$;
select lives_ok($$ select pg_temp.insert_row('a.jpg') $$,
  'the host''s insert succeeds although autotag is broken');
select is((select count(*)::integer from public.assets), 1, 'the row is inserted');
alter table autotag.uploads_gone rename to uploads;

-- The rows of each uploader become a separate upload.
select set_config('request.jwt.claims', '{"sub": "aaaaaaaa-0000-4000-8000-000000000001"}', true);
select pg_temp.insert_row('b.jpg');
select set_config('request.jwt.claims', '{"sub": "aaaaaaaa-0000-4000-8000-000000000002"}', true);
select pg_temp.insert_row('c.jpg');
select results_eq(
  $$ select right(user_id::text, 1), count(*)::integer from autotag.uploads u join autotag.arrivals a on a.upload_id = u.id
     group by 1 order by 1 $$,
  $$ values ('1', 1), ('2', 1) $$, 'the rows of each uploader become a separate upload');
select * from finish();
rollback;
