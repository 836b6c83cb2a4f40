-- The strategy realtime-chunked: five images, a pause of two seconds, the next five.
begin;
\ir ../setup.psql
select plan(8);
select pg_temp.upload(12);
select is(pg_temp.claim_images(64), '1: 5', 'the first chunk is released at once');
select is(pg_temp.claim_images(64), 'nothing', 'then the upload pauses');
select is((select wait from pg_temp.next_claim(64)), 2::double precision,
  'the worker should claim again in two seconds');
select pg_temp.set_time(1.999);
select is(pg_temp.claim_images(64), 'nothing', '1 ms earlier nothing is released');
select pg_temp.set_time(2);
select is(pg_temp.claim_images(64), '1: 5', 'after 2 s, the second chunk');
select pg_temp.set_time(4);
select is(pg_temp.claim_images(64), '1: 2', 'after 4 s, the rest');
select is(pg_temp.claim_images(64), 'nothing', 'then nothing is queued');
select is((select wait from pg_temp.next_claim(64)), null,
  'without queued images, the worker waits for a notification');
select * from finish();
rollback;
