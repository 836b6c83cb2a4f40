-- Reading one of the host's rows raises. Its image fails with unreadable_row, or is tried again if that may pass, and the others are
-- tagged.
begin;
\ir ../setup.psql
select plan(10);
select pg_temp.upload(5);
set local test.state = 'P0001';
set local client_min_messages = error;
-- The project's policies on storage.objects run in it.
create or replace function autotag.may_see_file(p_user_id autotag.user_id, p_bucket text, p_path text) returns boolean language plpgsql as $$
begin
  if p_path like '%/p3' then
    raise exception 'no file is called %', p_path using errcode = current_setting('test.state');
  end if;
  return true;
end $$;
update autotag.tasks set visible_mark = md5('another file')::uuid;
create temporary table tasks as select jsonb_array_elements((pg_temp.next_claim(5)).tasks) as task;
select is((select count(*)::integer from tasks), 5, 'the claim gives all five images');
select results_eq($$ select split_part(task ->> 'path', '/', 2) from tasks where task ->> 'refused' is null order by 1 $$,
  array['p1', 'p2', 'p4', 'p5'], 'four have their paths');
select results_eq($$ select task ->> 'refused', task -> 'path', task -> 'url' from tasks where task ->> 'refused' is not null $$,
  $$ values ('unreadable_row', 'null'::jsonb, 'null'::jsonb) $$, 'one says that its row cannot be read');
create function pg_temp.refused() returns text language sql as $$
  select string_agg(i ->> 'refused', ', ') || ' of ' || count(*)
  from jsonb_array_elements(autotag.describe_tasks(pg_temp.worker_id(), array(select id from autotag.tasks))::jsonb) i
$$;
select is(pg_temp.refused(), 'unreadable_now of 5', state || ' may pass')
from unnest(array['XX001', '42703', '42883', '53200', '58030']) state, set_config('test.state', state, true);
set local test.state = '55P03';
select throws_ok('select pg_temp.refused()', '55P03', null, 'a held table is not asked row by row');
set local test.state = '23514';
update autotag.tasks set worker_id = null, claim = null, lane = 'batch', batch_id = '00000000-0000-4000-8000-0000000000bb';
insert into autotag.batches (id, job_id, workspace_id, ordinal, image_count, state, worker_id, attempt, created_at)
select '00000000-0000-4000-8000-0000000000bb', j.id, j.workspace_id, 1, 5, 'preparing', pg_temp.worker_id(), 1, autotag.now() from autotag.jobs j;
select is((select array_agg(i ->> 'refused') from jsonb_array_elements(
  autotag.batch_images(pg_temp.worker_id(), '00000000-0000-4000-8000-0000000000bb', 1, 0, 100)) i where i ->> 'refused' is not null),
  '{unreadable_row}', 'the same in a batch');
select * from finish();
rollback;
