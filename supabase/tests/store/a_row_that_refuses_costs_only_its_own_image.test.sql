-- The host's constraints and triggers refuse some rows of a report. Those images fail with not_stored, and their neighbours are stored.
begin;
\ir ../setup.psql
select plan(9);
select pg_temp.upload(12);
alter table public.assets add constraint no_p1 check (not (tags = '{p1}'));
create function pg_temp.refuse() returns trigger language plpgsql as $$
begin
  if new.tags = '{p2}' or new.storage_path like '%/p3' then
    return null;
  elsif new.tags = '{p4}' or new.storage_path like '%/p5' then
    raise exception 'no %', new.tags;
  elsif new.tags = '{p6}' then
    assert false, 'a failed assertion';
  end if;
  return new;
end $$;
create trigger refuse before update on public.assets for each row execute function pg_temp.refuse();
create function pg_temp.refuse_late() returns trigger language plpgsql as $$
begin
  if new.tags = '{p7}' then
    raise exception 'no %', new.tags;
  end if;
  return null;
end $$;
create constraint trigger refuse_late after update on public.assets deferrable initially deferred
  for each row execute function pg_temp.refuse_late();
create temporary table answers as
  select jsonb_agg(jsonb_build_object('task', x -> 'task', 'attempt', x -> 'attempt', 'mark', x -> 'mark', 'result',
    pg_temp.result(split_part(x ->> 'path', '/', 2)))) as reports
  from jsonb_array_elements((pg_temp.next_claim(5)).tasks) x;
select pg_temp.set_time(2);
update answers set reports = reports || (
  select jsonb_agg(jsonb_build_object('task', x -> 'task', 'attempt', x -> 'attempt', 'mark', x -> 'mark', 'result',
    pg_temp.result(split_part(x ->> 'path', '/', 2)))) from jsonb_array_elements((pg_temp.next_claim(5)).tasks) x);
create temporary table reply as select autotag.settle(pg_temp.worker_id(), pg_temp.workspace_id(1), reports) as reply from answers;
select is((select (reply ->> 'accepted')::integer from reply), 10, 'all ten reports are accepted');
select results_eq('select unnest(tags) from public.assets where tags is not null order by 1', array['p10', 'p8', 'p9'],
  'the images of rows that refuse nothing have their tags');
select results_eq('select completed, failed, finished_at from autotag.jobs', 'values (3, 7, null::timestamptz)',
  'three images are completed, and seven have failed');
select results_eq('select distinct error_code from autotag.tasks where finished_at is not null', array['not_stored'],
  'with the code not_stored');
select results_eq(
  $$ select split_part(storage_path, '/', 2) from public.assets where tagging_stage = 'failed'
     and tagging_error = 'The database refused to store the tags of this image.' order by 1 $$,
  array['p1', 'p2', 'p4', 'p6', 'p7'], 'their rows say so, if they let themselves be written at all');
select is((select count(*)::integer from jsonb_array_elements((select reply -> 'notices' from reply)) n where n ->> 'event' = 'not_stored'), 7,
  'the operator''s log names all seven');
select ok(exists (select from jsonb_array_elements((select reply -> 'notices' from reply)) n where n ->> 'notice' like '%: no {p4}'),
  'with the error of the host''s trigger');
select is((select count(*)::integer from autotag.unstored), 0, 'nothing of it is tried again');
select is((select images from autotag.usage), 10, 'usage counts all ten answers: they are paid');
select * from finish();
rollback;
