-- Fair queueing: what a claim releases does not depend on how many images a workspace has queued.
begin;
\ir ../setup.psql
select plan(6);
-- The workspaces' limits are high, so only the number of slots limits a claim.
update autotag.settings set realtime_max_images = 50, realtime_requests_per_minute = 1000, realtime_tokens_per_minute = 1000000;
select pg_temp.upload(45, 1), pg_temp.upload(45, 1), pg_temp.upload(10, 2), pg_temp.upload(10, 3);
select is(pg_temp.claim_images(15), '1: 5, 2: 5, 3: 5', 'a workspace with 90 queued images gets no more than one with 10');
select is(pg_temp.claim_images(15), '1: 5, 2: 5, 3: 5', 'the second claim is shared evenly, too');
select is(pg_temp.claim_images(10), '1: 10', 'the large workspace gets what the others do not need');

-- A new workspace starts at the present virtual time, without credit or penalty for its idle time.
select pg_temp.upload(40, 4);
select is(pg_temp.claim_images(20), '1: 10, 4: 10', 'a new workspace gets an equal share from now on');

update autotag.provider_limits set requests_left = 3;
select matches(pg_temp.claim_images(20), '^\d: 3$', 'no more is released than the provider''s bucket holds');
select is(pg_temp.claim_images(20), 'nothing', 'after that the bucket is empty');
select * from finish();
rollback;
