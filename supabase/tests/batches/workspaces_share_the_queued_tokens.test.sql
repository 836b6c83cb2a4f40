-- While OpenAI's queue is full, the workspace with the fewest queued tokens is next.
begin;
\ir ../setup.psql
select plan(5);
select pg_temp.upload(1000);
select pg_temp.set_time(1), pg_temp.upload(1000, 2);
update autotag.provider_limits p set queued_batch_tokens = 4 * p.tokens_per_image * 100;
select is(pg_temp.claim_batches(9), '1/1 2/1 1/1 2/1', 'OpenAI has room for four batches: two of each workspace');
select pg_temp.set_time(2), pg_temp.upload(60, 3);
select autotag.end_batch(b, 'gone') from autotag.batches b where b.workspace_id = pg_temp.workspace_id(2) and b.ordinal = 1;
select is(pg_temp.claim_batches(9), '3/1', 'the first batch of an upload goes before the others');
select pg_temp.set_time(3), autotag.end_batch(b, 'gone') from autotag.batches b where b.workspace_id = pg_temp.workspace_id(3);
select is(pg_temp.claim_batches(9), '2/1', 'then the workspace with the fewest queued tokens');
select pg_temp.set_time(1900), pg_temp.upload(60, 4);
select autotag.end_batch(b, 'gone') from autotag.batches b where b.workspace_id = pg_temp.workspace_id(2) and b.reserved_tokens > 0;
select is(pg_temp.claim_batches(1), '2/1', 'a batch that has waited for half an hour is treated like a first batch');
select pg_temp.claim_batches(9);
select pg_temp.set_time(1901), public.cancel_tagging(j.id) from autotag.jobs j
where j.workspace_id in (pg_temp.workspace_id(1), pg_temp.workspace_id(2));
select pg_temp.set_time(1902), pg_temp.upload(150, 5), pg_temp.upload(150, 6);
select is(pg_temp.claim_batches(9), '5/1 6/1', 'cancelled batches release their tokens');
select * from finish();
rollback;
