-- check_rate_limit() at the edges of a workspace's sliding window: 30 requests and 100,000 tokens a minute.
begin;
\ir ../setup.psql
select plan(13);
select pg_temp.workspace_id(1);

create function pg_temp.check_limit(requests integer) returns text language sql as $$
  select allowed || ' ' || coalesce(retry_after::text, 'never')
  from public.check_rate_limit('00000000-0000-4000-8000-000000000001', 'realtime', requests)
$$;
select is(pg_temp.check_limit(20), 'true 0', '20 of 30 requests are allowed');
select is(pg_temp.check_limit(11), 'false 60', '11 more do not fit: all or nothing');
select pg_temp.set_time(10);
select is(pg_temp.check_limit(10), 'true 0', '10 more fit');
select is(pg_temp.check_limit(1), 'false 50', 'the window is full: the first 20 leave it in 50 s');
select is(pg_temp.check_limit(21), 'false 60', '21 do not fit before the second admission has left, too');
select pg_temp.set_time(59.999999);
select is(pg_temp.check_limit(1), 'false 1e-06', 'one microsecond before they leave, a request is refused');
select pg_temp.set_time(60);
select is(pg_temp.check_limit(20), 'true 0', 'when they leave, 20 are allowed');
select is(pg_temp.check_limit(1), 'false 10', 'but not one more');
select is(pg_temp.check_limit(31), 'false never', 'more than the limit never fits');
select is((select cardinality(admitted_at) from public.workspace_rate_limits), 2,
  'admissions that have left the window are removed from the row');

update public.workspace_rate_limits set max_requests = 100, max_units = 40 * 1000;
select is(pg_temp.check_limit(10), 'true 0', 'a workspace''s own limits apply at once');
select is(pg_temp.check_limit(1), 'false 10', 'now the limit of tokens refuses a request');

-- A reservation is corrected by the usage: 10,000 tokens reserved at second 60, 2,000 used.
select autotag.correct_window('00000000-0000-4000-8000-000000000001', 'realtime', autotag.now(), 0, -8000);
select is(pg_temp.check_limit(8), 'true 0', 'unused tokens are available again');
select * from finish();
rollback;
