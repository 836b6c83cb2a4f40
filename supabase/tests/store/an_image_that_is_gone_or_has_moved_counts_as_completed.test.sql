-- While an image was tagged, the host deleted its row or moved it to another workspace. Nobody's row is written, and the job ends.
begin;
\ir ../setup.psql
select plan(4);
select pg_temp.upload(3);
create temporary table answers as select (pg_temp.next_claim(3)).ids;
delete from public.assets where storage_path like '%/p1';
update public.assets set workspace_id = pg_temp.workspace_id(2) where storage_path like '%/p2';
select pg_temp.settle_all(jsonb_build_object('result', pg_temp.result()));
select results_eq('select completed, failed, finished_at is not null from autotag.jobs', 'values (3, 0, true)', 'the job has ended');
select results_eq($$ select tags from public.assets where storage_path like '%/p3' $$, $$ values ('{a}'::text[]) $$,
  'the third image has its tags');
select results_eq($$ select tags, tagging_stage from public.assets where storage_path like '%/p2' $$, $$ values (null::text[], 'queued') $$,
  'the row that has moved is not written');
select is((select count(*)::integer from autotag.tasks), 0, 'no task is left');
select * from finish();
rollback;
