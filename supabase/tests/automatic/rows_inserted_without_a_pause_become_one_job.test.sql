-- Automatic mode collects new rows until none has come for 2 s, but for 30 s at most. Then they become one job.
begin;
\ir ../setup.psql
select plan(19);
select pg_temp.workspace_id(1), pg_temp.workspace_id(2);
create function pg_temp.insert_rows(images integer, workspace integer default 1) returns void language sql as $$
  insert into public.assets (workspace_id, storage_path)
  select w, w || '/p' || i from pg_temp.workspace_id(workspace) w, generate_series(1, images) i
$$;
create function pg_temp.list_jobs() returns text language sql as $$
  select coalesce(string_agg(j.strategy || ' ' || j.image_count, ', ' order by j.created_at, j.image_count), 'none') from autotag.jobs j
$$;
-- What sealing says: whether a job was made, and when to call again.
create function pg_temp.sealed() returns text language sql as $$
  select s.sealed || case when s.more then ' more' else coalesce(' wait ' || round(s.wait::numeric, 1), '') end
  from autotag.seal_uploads(pg_temp.worker_id()) s
$$;

select pg_temp.insert_rows(3);
select is((select count(*)::integer from autotag.arrivals), 0, 'automatic mode is off by default: nothing is collected');
select is(pg_temp.sealed(), '0', 'and nobody needs to call again');

select autotag.set_automatic(true);
select is(pg_temp.sealed(), '0 wait 2.0', 'while it is on, a worker looks every upload_quiet');
select pg_temp.insert_rows(1);
select pg_temp.set_time(0.5);
select is(pg_temp.sealed(), '0 wait 1.5', 'a new row does not start a job at once: it is due 2 s after it came');
select pg_temp.set_time(1.5);
select pg_temp.insert_rows(299);
select pg_temp.set_time(2);
select is(pg_temp.sealed(), '0 wait 1.5', 'later rows extend the quiet time');
select is(pg_temp.list_jobs(), 'none', 'so there is no job yet');
select pg_temp.set_time(3.5);
select pg_temp.sealed();
select is(pg_temp.list_jobs(), 'batch-parallel 300', '2 s after the last row, all rows become one upload');
select is((select count(*)::integer from autotag.arrivals), 0, 'nothing of the sealed upload is left');

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
select is(pg_temp.sealed(), '0 wait 0.1', 'before 30 s, a steady stream is still collected');
select pg_temp.set_time(130);
select pg_temp.sealed();
select is(pg_temp.list_jobs(), 'batch-parallel 300, realtime-chunked 30', 'after 30 s it is sealed');

-- Rows that arrive while that job runs become the next upload.
select pg_temp.insert_rows(4, 2);
select pg_temp.set_time(133);
select pg_temp.sealed();
select is(pg_temp.list_jobs(), 'batch-parallel 300, realtime-chunked 30, realtime 4', 'rows that arrive while a job runs become the next job');

-- A row whose transaction took an hour is not lost, and waits no longer. One from the future (the clock was set back) neither.
insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at)
select a.id, a.workspace_id, '00000000-0000-0000-0000-000000000000', autotag.now() + t
from (select * from public.assets where workspace_id = pg_temp.workspace_id(1) and tagging_stage is null order by id limit 2) a
join (values (1, interval '-1 h'), (2, '1 h')) x (n, t) on true where x.n = 1;
select is(pg_temp.sealed(), '1 wait 2.0', 'rows that became visible late are sealed at once');
insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at)
select a.id, a.workspace_id, '00000000-0000-0000-0000-000000000000', autotag.now() + interval '1 h'
from public.assets a where workspace_id = pg_temp.workspace_id(1) and tagging_stage is null;
select is(pg_temp.sealed(), '1 wait 2.0', 'rows from the future are sealed at once');

-- Images beyond the workspace's live_images_max stay in the upload.
update autotag.settings set live_images_max = 36;
select pg_temp.insert_rows(5, 2);
select pg_temp.set_time(140);
select is(pg_temp.sealed(), '1 more', 'a part of the upload has room');
select is(pg_temp.sealed(), '0 wait 2.0', 'there is no room for the rest');
select is((select count(*)::integer from autotag.arrivals a join autotag.uploads u on u.id = a.upload_id), 3, 'which waits');
select pg_temp.insert_rows(1, 2);
select pg_temp.set_time(143);
select is(pg_temp.sealed(), '0 wait 2.0', 'nor for later rows');
select is((select count(distinct a.upload_id) || '/' || count(a.upload_id) from autotag.arrivals a), '1/4', 'which wait with them');

select autotag.set_automatic(false);
select pg_temp.insert_rows(2, 2);
select is((select count(*)::integer from autotag.arrivals), 4, 'automatic mode is off again: nothing is collected');
select * from finish();
rollback;
