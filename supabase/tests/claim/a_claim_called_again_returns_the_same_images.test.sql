-- The reply of a claim was lost. The same number again gives the same images; a claim that the worker does not list is taken back.
begin;
\ir ../setup.psql
select plan(18);
select pg_temp.upload(5), pg_temp.upload(5, 2), pg_temp.upload(60, 3), pg_temp.upload(60, 4);
create temporary table first as select c.tasks from autotag.claim(pg_temp.worker_id(), 3, 1) c;
select is((select cardinality(tasks) from first), 3, 'claim 1 gives three images');
select is((select c.tasks from autotag.claim(pg_temp.worker_id(), 3, 1) c), (select tasks from first), 'claim 1 again gives the same three');
select is((select c.wait from autotag.claim(pg_temp.worker_id(), 3, 1) c), 0::double precision, 'and the worker should claim again at once');
select is((select sum(attempt)::integer from autotag.tasks), 3, 'their attempts are counted once');
select is((select array_length(requests, 1) || ' ' || requests[1] from public.workspace_rate_limits where workspace_id = pg_temp.workspace_id(1)
  and request_type = 'realtime'), '1 3', 'so are the window''s requests');
create temporary table second as select c.tasks from autotag.claim(pg_temp.worker_id(), 3, 2) c;
select ok(not (select f.tasks && s.tasks from first f, second s), 'claim 2 gives others');
select is((select c.tasks from autotag.claim(pg_temp.worker_id(), 3, 1) c), (select tasks from first), 'an old number gives no new images');
select is(json_array_length(autotag.describe_tasks(pg_temp.worker_id(), (select tasks from second))), 3, 'the worker may read what it holds');
select autotag.register_worker(pg_temp.worker_id(2), 'test', autotag.schema_version(), true);
select is(json_array_length(autotag.describe_tasks(pg_temp.worker_id(2), (select tasks from second))), 0, 'and no other worker');

create temporary table batch as select c.batches -> 0 as batch from autotag.claim_batches(pg_temp.worker_id(), 1, 1) c;
select is((select c.batches -> 0 -> 'batch' from autotag.claim_batches(pg_temp.worker_id(), 1, 1) c), (select batch -> 'batch' from batch),
  'a claim of batches called again gives the same batch');
select is((select c.batches -> 0 -> 'attempt' from autotag.claim_batches(pg_temp.worker_id(), 1, 1) c), '1', 'at the same attempt');

select ok(not (select lost from autotag.heartbeat(pg_temp.worker_id(), '{1,2}', '{1}')), 'a worker that lists its claims has lost nothing');
select ok(not (select lost from autotag.heartbeat(pg_temp.worker_id(), '{1}', '{1}')),
  'a claim that is newer than the list is not lost: the list was made before');
select ok((select lost from autotag.heartbeat(pg_temp.worker_id(), '{2}', '{1}')), 'claim 1 is lost where only claim 2 is listed');
select is(autotag.release_lost(pg_temp.worker_id(), '{2}', '{1}'), 3, 'its three images are taken back');
select is((select array_agg(distinct claim) from autotag.tasks where worker_id is not null), '{2}', 'the worker keeps the others');
select is((select sum(failures)::integer from autotag.tasks), 3, 'each counts a failure, so that none is asked for ever');
select pg_temp.claim_images(50, 2);
select is((select count(*)::integer from autotag.tasks t, first f where t.id = any (f.tasks) and t.worker_id = pg_temp.worker_id(2)), 3,
  'the next claim of another worker gets them');
select * from finish();
rollback;
