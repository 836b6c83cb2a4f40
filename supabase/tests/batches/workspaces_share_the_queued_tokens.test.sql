begin;
\ir ../setup.psql
select plan(4);
select pg_temp.upload(1000);
select pg_temp.at(1), pg_temp.upload(1000, 2);
update autotag.provider_limits p set queued_batch_tokens = 4 * p.tokens_per_image * 100;
select is(pg_temp.handed(9), '1/1 2/1 1/1 2/1', 'OpenAI has room for four batches: two of each workspace');
select pg_temp.at(2), pg_temp.upload(60, 3);
select autotag.end_batch(b, 'gone') from autotag.batches b where b.workspace_id = pg_temp.workspace(2) and b.ordinal = 1;
select is(pg_temp.handed(9), '3/1', 'the first batch of an upload goes before the others');
select pg_temp.at(3), autotag.end_batch(b, 'gone') from autotag.batches b where b.workspace_id = pg_temp.workspace(3);
select is(pg_temp.handed(9), '2/1', 'and then the workspace that has the least there');
select pg_temp.at(1900), pg_temp.upload(60, 4);
select autotag.end_batch(b, 'gone') from autotag.batches b where b.workspace_id = pg_temp.workspace(2) and b.reserved_tokens > 0;
select is(pg_temp.handed(1), '2/1', 'what has waited for half an hour goes like a first batch');
select * from finish();
rollback;
