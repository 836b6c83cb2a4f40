-- Small uploads pass a large one until it has waited for upload_patience. Very large ones can be passed for longer.
begin;
\ir ../setup.psql
select plan(6);
update autotag.settings set chunk_delay = '0', upload_patience = '2 min', realtime_requests_per_minute = 10;
create function pg_temp.queue_of(images integer) returns autotag.queues language sql as $$
  select q from autotag.queues q join autotag.jobs j on j.id = q.job_id where j.image_count = images
$$;
select pg_temp.upload(40);
select pg_temp.claim_images(10);
select pg_temp.set_time(61);
select pg_temp.upload(3);
select pg_temp.claim_images(10);
select is((pg_temp.queue_of(3)).queued, 0, 'an upload of three passes one of 40 that has waited for a minute');
select pg_temp.set_time(122);
select pg_temp.upload(2);
select pg_temp.claim_images(10);
select is((pg_temp.queue_of(2)).queued, 2, 'none passes it after two minutes');
select pg_temp.set_time(183);
select pg_temp.claim_images(10);
select is((pg_temp.queue_of(40)).queued, 3, 'it has the whole window now');
select pg_temp.set_time(244);
select pg_temp.claim_images(10);
select is((pg_temp.queue_of(2)).queued, 0, 'then the others go on');
select is(autotag.patience_ends_at(50, now()) - now(), interval '2 min', 'patience is the same up to chunk_max_images');
select is(autotag.patience_ends_at(5000, now()) - now(), interval '200 min', 'an upload of 5,000 single calls can be passed for longer');
select * from finish();
rollback;
