begin;
\ir ../setup.psql
select plan(12);
select pg_temp.workspace(1), pg_temp.workspace(2);
create function pg_temp.arrive(images integer, workspace integer default 1) returns void language sql as $$
  insert into public.assets (workspace_id, storage_path)
  select w, w || '/p' || i from pg_temp.workspace(workspace) w, generate_series(1, images) i
$$;
create function pg_temp.jobs() returns text language sql as $$
  select coalesce(string_agg(j.strategy || ' ' || j.image_count, ', ' order by j.created_at, j.image_count), 'none') from autotag.jobs j
$$;

select pg_temp.arrive(3);
select is((select count(*)::integer from autotag.uploads), 0, 'off by default: nothing is collected');

select autotag.set_automatic(true);
select pg_temp.arrive(1);
select is(pg_temp.jobs(), 'none', 'a new row waits for the others');
select is((select wait from autotag.claim(pg_temp.worker(), 10)), 2::double precision, 'a worker comes back in 2 s');
select pg_temp.at(1.5);
select pg_temp.arrive(299);
select pg_temp.at(2);
select is(pg_temp.claimed(10), 'nothing', 'what came later moves the end');
select is(pg_temp.jobs(), 'none', 'so that there is no job yet');
select pg_temp.at(3.5);
select pg_temp.claimed(10);
select is(pg_temp.jobs(), 'batch-parallel 300', 'after 2 s of quiet all of them are one upload');
select is((select count(*)::integer from autotag.uploads), 0, 'and nothing is left behind');

-- a stream that never pauses is sealed after 30 s
select pg_temp.at(100 + i) from generate_series(0, 0) i;
select pg_temp.arrive(1, 2);
do $$ begin
  for i in 1 .. 29 loop
    perform pg_temp.at(100 + i);
    perform pg_temp.arrive(1, 2);
  end loop;
end $$;
select pg_temp.at(129.9);
select pg_temp.claimed(10);
select is(pg_temp.jobs(), 'batch-parallel 300', 'a steady stream is still collected');
select pg_temp.at(130);
select pg_temp.claimed(10);
select is(pg_temp.jobs(), 'batch-parallel 300, realtime-chunked 30', 'and sealed after 30 s at the latest');

-- rows inserted while that job runs start the next (a claim after one that sealed an upload only releases)
select pg_temp.claimed(10);
select pg_temp.arrive(4, 2);
select pg_temp.at(133);
select pg_temp.claimed(10);
select is(pg_temp.jobs(), 'batch-parallel 300, realtime-chunked 30, realtime 4', 'rows that come while a job runs are the next');

-- an upload larger than the room its workspace has waits with the rest
update autotag.settings set live_images_max = 36;
select pg_temp.claimed(10);
select pg_temp.arrive(5, 2);
select pg_temp.at(140);
select pg_temp.claimed(10);
select is((select count(*)::integer from autotag.arrivals), 3, 'what has no room waits');

select autotag.set_automatic(false);
select pg_temp.arrive(2, 2);
select is((select count(*)::integer from autotag.arrivals), 3, 'off again: nothing is collected');
select * from finish();
rollback;
