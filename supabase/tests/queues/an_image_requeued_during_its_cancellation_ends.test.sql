-- A worker reported a transient error while cancel_tagging() was running: neither call saw the other. The image is not sent again.
begin;
\ir ../setup.psql
select plan(4);
select pg_temp.upload(2);
select is(pg_temp.claim_images(1), '1: 1', 'one image is with the worker');
select is((public.cancel_tagging(id)).cancelled, 1, 'the other is cancelled') from autotag.jobs;
update autotag.tasks set worker_id = null, claim = null, retry_at = autotag.now() where finished_at is null;
select is(pg_temp.claim_images(5), 'nothing', 'the requeued image is not released again');
select pg_temp.store();
select results_eq('select completed, failed, finished_at is not null from autotag.jobs', 'values (0, 2, true)', 'it ends, and so does its job');
select * from finish();
rollback;
