-- A batch whose workspace has used up its hour waits. Batches behind it, of any workspace, start if their windows have room.
begin;
\ir ../setup.psql
select plan(7);
select pg_temp.upload(1000);
select is((select count(*)::integer from autotag.batches), 10, 'ten batches, as many as an hour admits');
select is(pg_temp.claim_batches(1), '1/1', 'the first of them starts');
select pg_temp.set_time(1), pg_temp.upload(60);
select pg_temp.set_time(2), pg_temp.upload(60);
select pg_temp.set_time(3), pg_temp.upload(60);
select pg_temp.set_time(4), pg_temp.upload(60, 2);
select is(pg_temp.claim_batches(1), '2/1', 'another workspace does not wait for the three uploads without room in their window');
select is(pg_temp.claim_batches(2), '1/1 1/1', 'the upload that the window has room for does not wait either');
select is((select min(b.not_before) from autotag.batches b where b.not_before > autotag.now()), '2030-01-01 13:00:00+00',
  'the first of the three starts when the first batch leaves the window');
update autotag.settings set batch_batches_per_hour = 11;
select pg_temp.set_time(5), autotag.tick();
select is(pg_temp.claim_batches(1), '1/2', 'a higher limit lets one of the three start earlier');
select is(pg_temp.claim_batches(9), '1/1 1/1 1/1 1/1 1/1 1/1 1/1', 'but only one');
select * from finish();
rollback;
