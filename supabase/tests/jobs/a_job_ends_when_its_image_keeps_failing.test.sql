-- An image fails after max_failures transient failures, with growing delays between them. Then its job has ended.
begin;
\ir ../setup.psql
select plan(6);
update autotag.settings set max_failures = 3, retry_delay = '1 s';
select pg_temp.upload(1);

create function pg_temp.fail_once() returns void language sql as $$
  select pg_temp.settle_all('{"error": {"kind": "transient", "code": "provider_error", "message": "The AI service had a problem."}}')
$$;
select is(pg_temp.claim_images(1), '1: 1', 'the image is claimed');
select pg_temp.fail_once();
select is(pg_temp.claim_images(1), 'nothing', 'after a failure its retry is delayed');
select pg_temp.set_time(10);
select is(pg_temp.claim_images(1), '1: 1', 'it is claimed a second time');
select pg_temp.fail_once();
select pg_temp.set_time(30);
select is(pg_temp.claim_images(1), '1: 1', 'it is claimed a third time');
select pg_temp.fail_once();
select results_eq(
  $$ select completed, failed, finished_at is not null from autotag.jobs $$,
  $$ values (0, 1, true) $$, 'after max_failures the image has failed and the job has ended');
select results_eq(
  $$ select tagging_stage, tagging_error from public.assets $$,
  $$ values ('failed', 'The AI service had a problem.') $$, 'the host''s row says why');
select * from finish();
rollback;
