-- A webhook is a hint: it can make the next poll due, and nothing else.
begin;
\ir ../setup.psql
select plan(9);
select pg_temp.upload(60);
select pg_temp.claim_batches(1);
update autotag.batches set state = 'creating';
select autotag.batch_submitted(pg_temp.worker_id(), b.id, b.attempt, 'batch_1', 'validating', 'file_1') from autotag.batches b;
create function pg_temp.poll_due() returns boolean language sql as $$
  select next_poll_at <= autotag.now() from autotag.provider_limits
$$;
select ok(not pg_temp.poll_due(), 'the next poll is not due yet');
select is(autotag.receive_webhook('wh_0', 'response.completed', 'resp_1'), 'ignored', 'an event of another type is ignored');
select is(autotag.receive_webhook('wh_1', 'batch.completed', 'batch_of_another_program'), 'unknown',
  'a batch of another program is unknown');
select ok(not pg_temp.poll_due(), 'neither makes the poll due');
select is(autotag.receive_webhook('wh_2', 'batch.completed', 'batch_1'), 'accepted', 'an event for our batch is accepted');
select ok(pg_temp.poll_due(), 'it makes the poll due at once');
update autotag.provider_limits set next_poll_at = 'infinity';
select is(autotag.receive_webhook('wh_2', 'batch.completed', 'batch_1'), 'replayed', 'the same delivery again is a replay');
select ok(not pg_temp.poll_due(), 'a replay changes nothing');
select is((select state from autotag.batches), 'submitted', 'a webhook alone does not change the state of the batch');
select * from finish();
rollback;
