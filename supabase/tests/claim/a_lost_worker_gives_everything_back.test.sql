begin;
\ir ../setup.psql
select plan(8);
select pg_temp.upload(5), pg_temp.upload(60, 2);
select is(pg_temp.claimed(3), '1: 3', 'three images in its hands');
select is((select jsonb_array_length(batches) from autotag.claim_batches(pg_temp.worker(), 2)), 1, 'and a batch');
select pg_temp.at(59);
select ok(autotag.heartbeat(pg_temp.worker()), 'a heartbeat extends the lease');
select pg_temp.at(118);
select autotag.tick();
select is((select count(*)::int from autotag.tasks where worker_id is not null), 3, 'so nothing is taken from it');
select pg_temp.at(120);
select autotag.tick();
select is((select count(*)::int from autotag.tasks where worker_id is not null), 0, 'without one, its images go back');
select is((select count(*)::int from autotag.batches where worker_id is not null), 0, 'and its batch');
select is((select sum(failures)::int from autotag.tasks), 3, 'each image counts a failure, in case it was the killer');
select ok(not autotag.heartbeat(pg_temp.worker()), 'the worker is told when it comes back');
select * from finish();
rollback;
