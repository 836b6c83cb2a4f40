-- Housekeeping deletes finished jobs with their tasks after 30 days. It never deletes an unfinished job.
begin;
\ir ../setup.psql
select plan(4);
select pg_temp.upload(1), pg_temp.upload(1, 2);
select public.cancel_tagging(id) from autotag.jobs where workspace_id = pg_temp.workspace_id(1);
select pg_temp.claim_images(9);
select pg_temp.set_time(29 * 86400);
select autotag.housekeeping();
select is((select count(*)::int from autotag.jobs), 2, 'a finished job is kept for 30 days');
select pg_temp.set_time(31 * 86400);
select autotag.housekeeping();
select is((select count(*)::int from autotag.jobs), 1, 'then it is deleted');
select is((select count(*)::int from autotag.tasks), 1, 'its tasks are deleted with it');
select is((select workspace_id::uuid from autotag.workspaces), pg_temp.workspace_id(2), 'an unfinished job is kept at any age');
select * from finish();
rollback;
