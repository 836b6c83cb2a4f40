begin;
\ir ../setup.psql
select plan(3);
create function pg_temp.rows_read() returns bigint language sql as $$
  select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relid = 'autotag.batches'::regclass
$$;
select pg_temp.upload(60);
insert into autotag.batches (job_id, workspace_id, ordinal, image_count, state, created_at)
select b.job_id, b.workspace_id, 1 + n, 60, 'done', b.created_at from autotag.batches b, generate_series(1, 5000) n;
analyze autotag.batches;
select pg_temp.upload(60, n) from generate_series(2, 5) n;
create temporary table before as select pg_temp.rows_read() as n;
create function pg_temp.claimed_batches(slots integer) returns integer language sql as $$
  select jsonb_array_length(c.batches) from autotag.claim_batches(pg_temp.worker(), slots) c
$$;
select is(pg_temp.claimed_batches(2), 2, 'two batches of five that wait, next to five thousand that are done');
select is(pg_temp.claimed_batches(9), 3, 'and the others');
select cmp_ok(pg_temp.rows_read() - (select n from before), '<', 500::bigint, 'and nobody has read all of them for it');
select * from finish();
rollback;
