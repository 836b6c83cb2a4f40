-- Automatic mode collects new rows until none has come for 2 s, but for 30 s at most. Then they become one job.
begin;
\ir ../setup.psql
select plan(12);
select pg_temp.workspace_id(1), pg_temp.workspace_id(2);
create function pg_temp.insert_rows(images integer, workspace integer default 1) returns void language sql as $$
  insert into public.assets (workspace_id, storage_path)
  select w, w || '/p' || i from pg_temp.workspace_id(workspace) w, generate_series(1, images) i
$$;
create function pg_temp.list_jobs() returns text language sql as $$
  select coalesce(string_agg(j.strategy || ' ' || j.image_count, ', ' order by j.created_at, j.image_count), 'none')
  from autotag.jobs j
$$;

select pg_temp.insert_rows(3);
select is((select count(*)::integer from autotag.uploads), 0, 'automatic mode is off by default: nothing is collected');

select autotag.set_automatic(true);
select pg_temp.insert_rows(1);
select is(pg_temp.list_jobs(), 'none', 'a new row does not start a job at once');
select is((select wait from pg_temp.next_claim(10)), 2::double precision, 'a worker should claim again in 2 s');
select pg_temp.set_time(1.5);
select pg_temp.insert_rows(299);
select pg_temp.set_time(2);
select is(pg_temp.claim_images(10), 'nothing', 'later rows extend the quiet time');
select is(pg_temp.list_jobs(), 'none', 'so there is no job yet');
select pg_temp.set_time(3.5);
select pg_temp.claim_images(10);
select is(pg_temp.list_jobs(), 'batch-parallel 300', '2 s after the last row, all rows become one upload');
select is((select count(*)::integer from autotag.uploads), 0, 'the sealed upload is deleted');

-- A stream without a pause is sealed after 30 s.
select pg_temp.set_time(100);
select pg_temp.insert_rows(1, 2);
do $$ begin
  for i in 1 .. 29 loop
    perform pg_temp.set_time(100 + i);
    perform pg_temp.insert_rows(1, 2);
  end loop;
end $$;
select pg_temp.set_time(129.9);
select pg_temp.claim_images(10);
select is(pg_temp.list_jobs(), 'batch-parallel 300', 'before 30 s, a steady stream is still collected');
select pg_temp.set_time(130);
select pg_temp.claim_images(10);
select is(pg_temp.list_jobs(), 'batch-parallel 300, realtime-chunked 30', 'after 30 s it is sealed');

-- Rows that arrive while that job runs become the next upload. (A claim after one that sealed an upload only releases.)
select pg_temp.claim_images(10);
select pg_temp.insert_rows(4, 2);
select pg_temp.set_time(133);
select pg_temp.claim_images(10);
select is(pg_temp.list_jobs(), 'batch-parallel 300, realtime-chunked 30, realtime 4',
  'rows that arrive while a job runs become the next job');

-- Images beyond the workspace's live_images_max stay in the upload.
update autotag.settings set live_images_max = 36;
select pg_temp.claim_images(10);
select pg_temp.insert_rows(5, 2);
select pg_temp.set_time(140);
select pg_temp.claim_images(10);
select is((select count(*)::integer from autotag.arrivals), 3, 'images beyond live_images_max wait');

select autotag.set_automatic(false);
select pg_temp.insert_rows(2, 2);
select is((select count(*)::integer from autotag.arrivals), 3, 'automatic mode is off again: nothing is collected');
select * from finish();
rollback;
