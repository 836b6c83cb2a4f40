-- Heartbeats extend a worker's lease. When the lease ends, other workers get the worker's images and batches.
begin;
\ir ../setup.psql
select plan(12);
select pg_temp.upload(5), pg_temp.upload(60, 2);
select is(pg_temp.claim_images(3), '1: 3', 'the worker holds three images');
select is((select jsonb_array_length(batches) from pg_temp.next_batch_claim(2)), 1, 'and a batch');
select pg_temp.set_time(59);
select ok((autotag.heartbeat(pg_temp.worker_id(), '{1}', '{1}')).alive, 'a heartbeat extends the lease');
-- Another worker goes on beating, so the database can be reached.
select autotag.register_worker('00000000-0000-4000-8000-00000000000b', 'other', autotag.schema_version(), true);
select pg_temp.set_time(88), autotag.heartbeat('00000000-0000-4000-8000-00000000000b', '{}', '{}');
select pg_temp.set_time(118), autotag.heartbeat('00000000-0000-4000-8000-00000000000b', '{}', '{}');
select autotag.tick();
select is((select count(*)::int from autotag.tasks where worker_id is not null), 3, 'so the worker keeps its images');
select pg_temp.set_time(120);
select autotag.tick();
select is((select count(*)::int from autotag.tasks where worker_id is not null), 0, 'without a heartbeat, its images are requeued');
select is((select count(*)::int from autotag.batches where worker_id is not null), 0, 'its batch is released, too');
select is((select bound from pg_temp.next_claim(3)), 'lease',
  'without a lease it gets no images, because no expiry would release them');
select is((select batches from pg_temp.next_batch_claim(2)), '[]', 'and no batch');
select is((select array_agg(distinct (failures, crashes)::text) from autotag.tasks where crashes is not null), '{"(0,1)"}',
  'each image may have crashed the worker, so none counts a failure');
select ok(not (autotag.heartbeat(pg_temp.worker_id(), '{1}', '{1}')).alive, 'its next heartbeat returns false');
select autotag.register_worker(pg_temp.worker_id(), 'test', autotag.schema_version(), true);
select is(pg_temp.claim_images(64), '1: 5, 2: 5', 'after it registers again, it gets images');
select is((select jsonb_array_length(batches) from pg_temp.next_batch_claim(2)), 1, 'and batches');
select * from finish();
rollback;
