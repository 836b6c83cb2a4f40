begin;
\ir ../setup.psql
select plan(8);
select pg_temp.upload(12);
select is(pg_temp.claimed(64), '1: 5', 'the first chunk at once');
select is(pg_temp.claimed(64), 'nothing', 'no more of it now');
select is((select wait from autotag.claim(pg_temp.worker(), 64)), 2::double precision, 'ask again in two seconds');
select pg_temp.at(1.999);
select is(pg_temp.claimed(64), 'nothing', 'not a moment earlier');
select pg_temp.at(2);
select is(pg_temp.claimed(64), '1: 5', 'the second chunk');
select pg_temp.at(4);
select is(pg_temp.claimed(64), '1: 2', 'the rest');
select is(pg_temp.claimed(64), 'nothing', 'and then nothing');
select is((select wait from autotag.claim(pg_temp.worker(), 64)), null, 'nothing queued: only a notification can bring more');
select * from finish();
rollback;
