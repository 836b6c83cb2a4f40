-- tagging_jobs() and tagging_job().
begin;
\ir ../setup.psql
select plan(11);
create function pg_temp.list(only_live boolean, before timestamptz, "limit" integer) returns text language sql as $$
  select coalesce(string_agg(j.image_count::text, ' ' order by n), 'none')
  from public.tagging_jobs(pg_temp.workspace_id(1), only_live, before, "limit") with ordinality j
    (job_id, status, strategy, image_count, stages, completed, failed, progress, eta, eta_p90, error, fallback, batches, created_at, finished_at, cancelled, n)
$$;
-- the number of images is the name; 2 and 3 began at the same moment
insert into autotag.jobs (workspace_id, strategy, image_count, created_at, completed, finished_at)
select pg_temp.workspace_id(1), 'realtime', n, '2030-01-01'::timestamptz + n * interval '1 s' - case when n = 3 then interval '1 s' else '0' end,
  case when n % 2 = 0 then n else 0 end, case when n % 2 = 0 then '2030-01-02'::timestamptz end
from generate_series(1, 5) n;
insert into autotag.jobs (workspace_id, strategy, image_count, created_at) values (pg_temp.workspace_id(2), 'realtime', 9, '2030-01-01');
select is(pg_temp.list(true, null, 20), '5 3 1', 'the newest first, without those that have ended');
select is(pg_temp.list(false, null, 2), '5 4', 'a page');
select is(translate(pg_temp.list(false, '2030-01-01 00:00:04', 1), '23', 'xx'), 'x x', 'two that began together come on one page …');
select is(pg_temp.list(false, '2030-01-01 00:00:02', 20), '1', '… so the next page has all others');
select is(pg_temp.list(true, '2030-01-01', 20), 'none', 'none is older');
select is(pg_temp.list(true, null, 0), '5', 'at least one');
select is((select array_agg(s.status order by s.status)::text from public.tagging_jobs(pg_temp.workspace_id(1), false) s),
  '{running,running,running,completed,completed}', 'each says what it is doing');
delete from autotag.jobs where true;

select pg_temp.set_time(0), pg_temp.upload(60);
select results_eq($$select (a.tagging_eta < '2030-01-01 12:01+00'), count(*) from public.assets a group by 1 order by 1$$,
  $$values (false, 55::bigint), (true, 5)$$, 'the images that do not wait for the batch have an eta of their own');
select pg_temp.set_time(40000);
select cmp_ok(autotag.now(), '>', j.eta, 'the stored prediction has passed') from autotag.jobs j;
select cmp_ok((public.tagging_job(j.id)).eta, '>', autotag.now(), 'tagging_job() predicts anew') from autotag.jobs j;
select cmp_ok((public.enqueue_tagging(array(select a.id from public.assets a))).eta, '>', autotag.now(), 'so does a repeated call');
select * from finish();
rollback;
