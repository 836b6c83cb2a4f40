-- The number of batches of an upload: of 100 images each, but no more batches than the window has left.
begin;
\ir ../setup.psql
select plan(9);

-- plan_batches(images, batches left in the window, images that one window admits)
select is(autotag.plan_batches(300, 10, 5000), 3, '300 images go in 3 batches of 100');
select is(autotag.plan_batches(300, 2, 5000), 2, 'with 2 batches left, 2 batches of 150, because a third would wait for an hour');
select is(autotag.plan_batches(300, 0, 5000), 1, 'with none left, one batch waits instead of three');
select is(autotag.plan_batches(300, -4, 5000), 1, 'with other batches waiting, still one');
select is(autotag.plan_batches(5000, 10, 5000), 10, '5,000 images go in 10 batches of 500');
select is(autotag.plan_batches(5000, 10, 1000), 10, 'a batch has no more images than one window admits');
select is(autotag.plan_batches(50000, 10, 5000), 50000 / (2000000 / 1000), 'and no more tokens than the provider''s queue');

select is(pg_temp.upload(300) ->> 'batches', '3', 'an upload of 300 images has 3 batches');
update public.workspace_rate_limits set max_requests = 10;
select bag_eq(
  $$ select image_count, express_count from autotag.batches $$,
  $$ values (100, 5), (100, 0), (100, 0) $$,
  'each has 100 images, and five of the first are express images');
select * from finish();
rollback;
