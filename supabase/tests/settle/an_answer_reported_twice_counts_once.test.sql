-- One report contains the same answer twice, and the whole report comes twice. Counts and usage must contain it once.
begin;
\ir ../setup.psql
select plan(6);
select pg_temp.upload(3);
create temporary table answers as
  select jsonb_agg(jsonb_build_object('task', x -> 'task', 'attempt', x -> 'attempt',
    'usage', '{"input": 10, "cached": 0, "output": 5}'::jsonb, 'result', jsonb_build_object(
    'tags', jsonb_build_array(split_part(x ->> 'path', '/', 2)), 'confidence', '{}'::jsonb,
    'caption', 'c', 'model', 'm'))) as reports
  from jsonb_array_elements((pg_temp.next_claim(2)).tasks) x;
select is(pg_temp.settle(reports || (reports -> 0)), 2, 'two reports are accepted, not three') from answers;
select is((select completed from autotag.jobs), 2, 'two images are completed, not three');
select is((select finished_at from autotag.jobs), null, 'the job is not finished');
select results_eq('select tags from public.assets where tags is not null order by 1', $$values ('{p1}'::text[]), ('{p2}')$$,
  'each has its own tags');
select is((select sum(images)::integer from autotag.usage), 2, 'usage counts two images');
select is((select pg_temp.settle(reports) from answers), 0, 'the same reports again, because the reply was lost, change nothing');
select * from finish();
rollback;
