-- After a failed step, a batch keeps its reserved tokens. It continues before batches that have not started.
begin;
\ir ../setup.psql
select plan(4);
select pg_temp.upload(1000);
select is(pg_temp.claim_batches(3), '1/1 1/1', 'two batches of a large upload start; the third slot is for others');
update autotag.provider_limits set queued_batch_tokens = (select sum(b.reserved_tokens) from autotag.batches b);
select pg_temp.set_time(1), pg_temp.upload(60, 2);
select pg_temp.set_time(2), pg_temp.upload(60, 3);
select is(pg_temp.claim_batches(2), 'nothing', 'all tokens of OpenAI''s queue are reserved');
select autotag.report_batch_failure(pg_temp.worker_id(), b.id, b.attempt,
  '{"kind": "transient", "code": "timeout", "message": "Late."}')
from autotag.batches b where b.worker_id is not null and b.ordinal = 2;
select pg_temp.set_time(20);
select is(pg_temp.claim_batches(2), '1/1', 'the batch that holds some of them continues before the waiting ones');
select autotag.end_batch(b, 'gone') from autotag.batches b where b.worker_id is not null;
select is(pg_temp.claim_batches(2), '2/1 3/1', 'the waiting ones start when the tokens are released');
select * from finish();
rollback;
