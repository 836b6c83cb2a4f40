-- The picture of a row was replaced after the model saw it. Its answer is not stored: the image is queued again, until max_failures.
begin;
\ir ../setup.psql
select plan(14);
update autotag.settings set max_failures = 3;
select pg_temp.upload(2);
-- Answers about the pictures that the worker was given.
create function pg_temp.answers(tasks jsonb) returns jsonb language sql as $$
  select jsonb_agg(jsonb_build_object('task', x -> 'task', 'attempt', x -> 'attempt', 'mark', x -> 'mark', 'result',
    pg_temp.result(split_part(x ->> 'path', '/', 2)))) from jsonb_array_elements(tasks) x
$$;
create function pg_temp.replace_picture() returns void language sql as $$
  update public.assets set storage_path = storage_path || 'x' where storage_path like '%/p1%'
$$;
create temporary table claims as select pg_temp.answers((pg_temp.next_claim(5)).tasks) as reports;
select pg_temp.replace_picture();
select is((select pg_temp.settle(reports) from claims), 2, 'both answers are accepted');
select results_eq('select tags from public.assets where tags is not null', $$ values ('{p2}'::text[]) $$, 'only the other image has its tags');
select is(pg_temp.claim_images(5), '1: 1', 'the image is queued again');
select pg_temp.replace_picture();
select pg_temp.settle_all('{"error": {"kind": "transient", "code": "timeout", "message": "Late."}}');
select is((select failures from autotag.tasks), 2, 'a failure of the provider counts as before');

-- The answer is kept, and the picture is replaced before it is stored.
select pg_temp.set_time(60);
update autotag.tasks set failures = 1;
update claims set reports = pg_temp.answers((pg_temp.next_claim(5)).tasks);
select is((select pg_temp.settle(reports, keep => true) from claims), 1, 'the next answer is kept');
select pg_temp.replace_picture();
select is(pg_temp.store(), 1, 'what is kept is tried');
select is((select count(*)::integer from autotag.unstored), 0, 'and given up');
select is((select failures from autotag.tasks), 2, 'it counts one failure');
select is(pg_temp.claim_images(5), '1: 1', 'the image is queued again');
select pg_temp.replace_picture();
select is(pg_temp.settle((select jsonb_agg(jsonb_build_object('task', t.id, 'attempt', t.attempt, 'mark', gen_random_uuid(),
  'result', pg_temp.result())) from autotag.tasks t)), 1, 'the third answer is accepted');
select is(pg_temp.claim_images(5), 'nothing', 'after max_failures the image is not queued again');
select is(pg_temp.store(), 1, 'it ends');
select results_eq('select completed, failed, finished_at is not null from autotag.jobs', 'values (1, 1, true)', 'the job has ended');
select results_eq('select error_code, error from autotag.tasks',
  $$ values ('picture_replaced', 'The picture was replaced again and again while it was being tagged.') $$, 'the image says why it failed');
select * from finish();
rollback;
