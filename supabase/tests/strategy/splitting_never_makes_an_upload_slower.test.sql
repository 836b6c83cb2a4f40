begin;
\ir ../setup.psql
select plan(9);

-- plan_batches(images, batches left in the hour, images that an hour admits)
select is(autotag.plan_batches(300, 10, 5000), 3, '300 images are 3 × 100');
select is(autotag.plan_batches(300, 2, 5000), 2, 'only 2 batches left: 2 × 150, not a third that waits an hour');
select is(autotag.plan_batches(300, 0, 5000), 1, 'none left: one batch waits, not three');
select is(autotag.plan_batches(300, -4, 5000), 1, 'others wait already: still one');
select is(autotag.plan_batches(5000, 10, 5000), 10, '5,000 images are 10 × 500');
select is(autotag.plan_batches(5000, 10, 1000), 10, 'a batch is never larger than an hour of the workspace admits');
select is(autotag.plan_batches(50000, 10, 5000), 50000 / (2000000 / 1000), 'nor than the provider''s queue takes');

select is(pg_temp.upload(300) ->> 'batches', '3', 'an upload takes its place in the window');
update public.workspace_rate_limits set max_requests = 10;
select bag_eq(
  $$ select image_count, express_count from autotag.batches $$,
  $$ values (100, 5), (100, 0), (100, 0) $$,
  'its batches hold 100 images, and the first gives five to the express lane');
select * from finish();
rollback;
