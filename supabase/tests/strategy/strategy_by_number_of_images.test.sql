-- tagging_strategy() at every number of images at which the strategy changes.
begin;
\ir ../setup.psql
select plan(14);

create function pg_temp.describe_strategy(images integer) returns text language sql as $$
  select format('%s, %s chunks, %s ms, %s batches', s.type, s.chunks, s.delay_ms, s.batches)
  from public.tagging_strategy(images) s
$$;
select throws_ok($$ select public.tagging_strategy(0) $$, 'PT400', 'There is no image to tag.');
select throws_ok($$ select public.tagging_strategy(-1) $$, 'PT400', 'There is no image to tag.');
select throws_ok($$ select public.tagging_strategy(null) $$, 'PT400', 'There is no image to tag.');
select is(pg_temp.describe_strategy(1), 'realtime, 1 chunks, 0 ms, 0 batches', '1 image');
select is(pg_temp.describe_strategy(5), 'realtime, 1 chunks, 0 ms, 0 batches', '5 images');
select is(pg_temp.describe_strategy(6), 'realtime-chunked, 2 chunks, 2000 ms, 0 batches', '6 images');
select is(pg_temp.describe_strategy(50), 'realtime-chunked, 10 chunks, 2000 ms, 0 batches', '50 images');
select is(pg_temp.describe_strategy(51), 'batch, 0 chunks, 0 ms, 1 batches', '51 images');
select is(pg_temp.describe_strategy(200), 'batch, 0 chunks, 0 ms, 1 batches', '200 images');
select is(pg_temp.describe_strategy(201), 'batch-parallel, 0 chunks, 0 ms, 3 batches', '201 images');
select is(pg_temp.describe_strategy(300), 'batch-parallel, 0 chunks, 0 ms, 3 batches', '300 images');
select is(pg_temp.describe_strategy(5000), 'batch-parallel, 0 chunks, 0 ms, 10 batches',
  '5,000 images: larger batches instead of more');
select throws_ok($$ select public.tagging_strategy(50001) $$, 'PT413', '50001 images are too many for one upload.');

update autotag.settings set realtime_max_images = 2;
select is(pg_temp.describe_strategy(3), 'realtime-chunked, 1 chunks, 2000 ms, 0 batches', 'every number is a setting');
select * from finish();
rollback;
