-- While OpenAI's queue has room: the first batch of every upload, then the other batches in the order of their uploads.
begin;
\ir ../setup.psql
select plan(2);
update autotag.provider_limits p set queued_batch_tokens = 3000 * p.tokens_per_image;
select pg_temp.upload(1000);
select pg_temp.set_time(1), pg_temp.upload(1000, 2);
select is(pg_temp.claim_batches(4), '1/1 2/1 1/1 1/1',
  'the first batch of each upload, then the other batches of the first upload');
select pg_temp.set_time(1900), pg_temp.upload(60, 3);
select is(pg_temp.claim_batches(2), '3/1 1/1',
  'a first batch goes before later batches, even if these have waited longer for a worker');
select * from finish();
rollback;
