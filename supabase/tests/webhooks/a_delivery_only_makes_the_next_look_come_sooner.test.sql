begin;
\ir ../setup.psql
select plan(9);
select pg_temp.upload(60);
select autotag.claim_batches(pg_temp.worker(), 1);
update autotag.batches set state = 'creating';
select autotag.batch_submitted(pg_temp.worker(), b.id, b.attempt, 'batch_1', 'validating', 'file_1') from autotag.batches b;
create function pg_temp.poll_due() returns boolean language sql as $$
  select next_poll_at <= autotag.now() from autotag.provider_limits
$$;
select ok(not pg_temp.poll_due(), 'the next look is a minute away');
select is(autotag.receive_webhook('wh_0', 'response.completed', 'resp_1'), 'ignored', 'an event of another kind is ignored');
select is(autotag.receive_webhook('wh_1', 'batch.completed', 'batch_of_somebody_else'), 'unknown', 'a batch of somebody else''s is unknown');
select ok(not pg_temp.poll_due(), 'neither makes anybody look');
select is(autotag.receive_webhook('wh_2', 'batch.completed', 'batch_1'), 'accepted', 'a batch of ours is accepted');
select ok(pg_temp.poll_due(), 'and looked at now');
update autotag.provider_limits set next_poll_at = 'infinity';
select is(autotag.receive_webhook('wh_2', 'batch.completed', 'batch_1'), 'replayed', 'the same delivery again is a replay');
select ok(not pg_temp.poll_due(), 'which changes nothing');
select is((select state from autotag.batches), 'submitted', 'what the delivery says about the batch is not believed');
select * from finish();
rollback;
