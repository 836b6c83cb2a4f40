-- Finished uploads and usage are kept for a long time. They must not slow down the functions that run all the time.
begin;
\ir ../setup.psql
select plan(7);
create function pg_temp.rows_read() returns numeric language sql as $$
  select sum(seq_tup_read + idx_tup_fetch) from pg_stat_xact_user_tables where schemaname = 'autotag'
$$;
create temporary table before (n numeric);
select pg_temp.workspace_id(n) from generate_series(1, 50) n;
with old as (
  insert into autotag.jobs (workspace_id, strategy, image_count, completed, created_at, finished_at)
  select pg_temp.workspace_id(1 + n % 50), 'batch', 60, 60, autotag.now() - interval '9 days', autotag.now() - interval '9 days'
  from generate_series(1, 5000) n returning id, workspace_id, created_at)
insert into autotag.batches (job_id, workspace_id, ordinal, image_count, state, stored, created_at)
select o.id, o.workspace_id, 1, 60, 'done', true, o.created_at from old o;
insert into autotag.usage (workspace_id, day, model, service_tier, images)
select pg_temp.workspace_id(w), '2029-12-01'::date - d, 'gpt-6-luna',
  'batch', 60 from generate_series(1, 50) w, generate_series(1, 100) d;
insert into autotag.durations (images, started_at, seconds)
select 60, autotag.now() - n * interval '1 min', 1800 from generate_series(1, 5000) n;
analyze autotag.jobs, autotag.batches, autotag.usage, autotag.durations;
select pg_temp.upload(60, n) from generate_series(1, 5) n;
create function pg_temp.count_claimed_batches(slots integer) returns integer language sql as $$
  select jsonb_array_length((pg_temp.next_batch_claim(slots)).batches)
$$;

insert into before select pg_temp.rows_read();
select is(pg_temp.count_claimed_batches(2), 2, 'two of five waiting batches are claimed, while 5,000 others are done');
select is(pg_temp.count_claimed_batches(9), 3, 'the other three are claimed');
select cmp_ok(pg_temp.rows_read() - max(n), '<', 500::numeric, 'these claims read fewer than 500 rows') from before;

insert into before select pg_temp.rows_read();
select is((autotag.metrics() ->> 'live')::integer, 300, 'metrics() counts 300 live images');
select cmp_ok(pg_temp.rows_read() - max(n), '<', 1000::numeric, 'it reads fewer than 1,000 rows') from before;

select autotag.tick();   -- it tells of the new uploads, once
insert into before select pg_temp.rows_read();
select autotag.tick();
select cmp_ok(pg_temp.rows_read() - max(n), '<', 1000::numeric, 'tick() reads fewer than 1,000 rows') from before;

insert into before select pg_temp.rows_read();
select public.tagging_jobs(pg_temp.workspace_id(1)), public.tagging_jobs(pg_temp.workspace_id(9), false);
select cmp_ok(pg_temp.rows_read() - max(n), '<', 500::numeric, 'tagging_jobs() reads fewer than 500 rows') from before;
select * from finish();
rollback;
