-- A worker's session plans its queries while the tables are almost empty. The plans must stay fast when the tables are full.
begin;
\ir ../setup.psql
select plan(2);
update autotag.settings set realtime_requests_per_minute = 1000000, realtime_tokens_per_minute = 1000000000,
  realtime_max_images = 50;
update autotag.provider_limits set requests_per_minute = 1000000, tokens_per_minute = 1000000000, requests_per_day = null;
create function pg_temp.claim_and_settle(images integer) returns integer language sql as $$
  select pg_temp.settle((
    select jsonb_agg(jsonb_build_object('task', x -> 'task', 'attempt', x -> 'attempt', 'mark', x -> 'mark', 'result', pg_temp.result()))
    from jsonb_array_elements((pg_temp.next_claim(images)).tasks) x))
$$;
create function pg_temp.rows_read() returns bigint language sql as $$
  select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relid = 'autotag.tasks'::regclass
$$;
truncate autotag.tasks, autotag.unstored;  -- small on disk, too: other tests may have left it large
select pg_temp.upload(5);
analyze autotag.tasks;  -- as autovacuum may at any time
select pg_temp.claim_and_settle(5);

select pg_temp.upload(50, n % 50) from generate_series(1, 100) n;
create temporary table before as select pg_temp.rows_read() as n;
select is(pg_temp.claim_and_settle(50), 50, '50 of 5,000 images are claimed and settled');
select cmp_ok(pg_temp.rows_read() - (select n from before), '<', 1000::bigint, 'this reads fewer than 1,000 rows');
select * from finish();
rollback;
