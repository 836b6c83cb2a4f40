-- Within a workspace, the job that has been served least is next.
begin;
\ir ../setup.psql
select plan(3);
update autotag.settings set chunk_delay = '0';
select pg_temp.upload(25);
select is(pg_temp.claim_images(10), '1: 10', 'the large upload has started');
select pg_temp.upload(3);
select is(pg_temp.claim_images(5), '1: 5', 'five more images of the workspace are released');
select is((select min(q.queued) from autotag.queues q), 0, 'they include the whole small upload');
select * from finish();
rollback;
