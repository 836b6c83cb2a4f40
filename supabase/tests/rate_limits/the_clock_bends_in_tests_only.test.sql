begin;
\ir ../setup.psql
select plan(2);
select is(autotag.now(), timestamptz '2030-01-01 12:00:00+00', 'autotag.now is honoured where test_clock is on');
update autotag.settings set test_clock = false;
select ok(autotag.now() between clock_timestamp() - interval '1 min' and clock_timestamp(), 'and nowhere else');
select * from finish();
rollback;
