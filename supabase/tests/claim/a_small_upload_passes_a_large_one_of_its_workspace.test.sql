begin;
\ir ../setup.psql
select plan(3);
update autotag.settings set chunk_delay = '0';
select pg_temp.upload(25);
select is(pg_temp.claimed(10), '1: 10', 'the large upload is on its way');
select pg_temp.upload(3);
select is(pg_temp.claimed(5), '1: 5', 'five more of the workspace');
select is((select min(q.queued) from autotag.queues q), 0, 'the small upload was among them, whole');
select * from finish();
rollback;
