begin;
\ir ../setup.psql
select plan(2);
update autotag.provider_limits p set queued_batch_tokens = 3000 * p.tokens_per_image;
select pg_temp.upload(1000);
select pg_temp.at(1), pg_temp.upload(1000, 2);
select is(pg_temp.handed(4), '1/1 2/1 1/1 1/1', 'the first batch of each upload, then the other batches of the first upload');
select pg_temp.at(1900), pg_temp.upload(60, 3);
select is(pg_temp.handed(2), '3/1 1/1', 'a first batch goes before later batches, even if these have waited longer for a worker');
select * from finish();
rollback;
