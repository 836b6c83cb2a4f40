-- OpenAI's queue has no room for a large batch. Smaller ones may overtake it for half an hour; then they wait for it.
begin;
\ir ../setup.psql
select plan(7);
update autotag.provider_limits p set queued_batch_tokens = 1000 * p.tokens_per_image;
update autotag.settings set batch_batches_per_hour = 1;
create function pg_temp.end_batches_at_openai(workspace integer) returns void language sql as $$
  select autotag.end_batch(b, 'gone') from autotag.batches b
  where b.workspace_id = pg_temp.workspace_id(workspace) and b.reserved_tokens > 0
$$;
select pg_temp.upload(150, 1), pg_temp.upload(150, 2), pg_temp.upload(150, 3);
select is(pg_temp.claim_batches(9), '1/1 2/1 3/1', 'OpenAI has three small batches');

select pg_temp.set_time(1), pg_temp.upload(800, 1);
select pg_temp.claim_batches(9);
select pg_temp.set_time(1900), pg_temp.upload(150, 4), pg_temp.end_batches_at_openai(1);
select is(pg_temp.claim_batches(9), '4/1', 'no batch waits for a large one whose own window has no room');

select pg_temp.set_time(2000), pg_temp.upload(800, 5);
select is(pg_temp.claim_batches(9), 'nothing',
  'the window has room for another large one, but OpenAI''s queue has none until two small ones are done');
select pg_temp.set_time(2600), pg_temp.upload(150, 6), pg_temp.end_batches_at_openai(2);
select is(pg_temp.claim_batches(1), '6/1', 'a later batch that is small enough overtakes it');
select pg_temp.set_time(3900), pg_temp.upload(150, 7), pg_temp.end_batches_at_openai(3);
select is(pg_temp.claim_batches(9), 'nothing', 'after half an hour no batch overtakes it any more');
select pg_temp.end_batches_at_openai(4);
select is(pg_temp.claim_batches(9), '5/1', 'it starts when there is room');
select pg_temp.end_batches_at_openai(6);
select is(pg_temp.claim_batches(9), '7/1', 'then the next batch starts');
select * from finish();
rollback;
