begin;
\ir ../setup.psql
select plan(6);
-- The provider's limit is what binds: 20 images at a time.
update autotag.settings set realtime_max_images = 50, realtime_requests_per_minute = 1000, realtime_tokens_per_minute = 1000000;
select pg_temp.upload(45, 1), pg_temp.upload(45, 1), pg_temp.upload(10, 2), pg_temp.upload(10, 3);
select is(pg_temp.claimed(15), '1: 5, 2: 5, 3: 5', 'a workspace with 90 waiting gets no more than one with 10');
select is(pg_temp.claimed(15), '1: 5, 2: 5, 3: 5', 'again');
select is(pg_temp.claimed(10), '1: 10', 'what the others do not need is the large one''s');

-- A latecomer starts at the clock of now: no credit for the time it was away, no penalty either.
select pg_temp.upload(40, 4);
select is(pg_temp.claimed(20), '1: 10, 4: 10', 'a latecomer shares from now on');

update autotag.provider_limits set requests_left = 3;
select matches(pg_temp.claimed(20), '^\d: 3$', 'never more than the provider''s bucket holds');
select is(pg_temp.claimed(20), 'nothing', 'and it is empty then');
select * from finish();
rollback;
