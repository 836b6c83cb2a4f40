-- autotag.now() can be set for a session, but only while the setting test_clock is on.
begin;
\ir ../setup.psql
select plan(2);
select is(autotag.now(), timestamptz '2030-01-01 12:00:00+00', 'sessions can set autotag.now while test_clock is on');
update autotag.settings set test_clock = false;
select ok(autotag.now() between clock_timestamp() - interval '1 min' and clock_timestamp(),
  'while it is off, autotag.now has no effect');
select * from finish();
rollback;
