-- All images of a workspace were in a batch, so nothing of it was ever queued. The provider refuses the batch: its images are queued.
begin;
\ir ../setup.psql
select plan(4);
update autotag.settings set express_images = 0, realtime_requests_per_minute = 1000, realtime_tokens_per_minute = 1000000;
select pg_temp.upload(60);
select is(pg_temp.claim_images(100), 'nothing', 'no image goes as a single call');
select is(pg_temp.claim_batches(1), '1/1', 'the batch is claimed');
select autotag.report_batch_failure(pg_temp.worker_id(), b.id, b.attempt, '{"kind": "image", "code": "request_refused", "message": "No."}')
from autotag.batches b;
select is(pg_temp.claim_images(100), '1: 60', 'its images go as single calls');
select is((select queued from autotag.workspaces), 0, 'and are counted');
select * from finish();
rollback;
