-- A run keeps the tags that people typed, restores none that they removed, and takes away what only an earlier run gave.
begin;
\ir ../setup.psql
select plan(7);
create function pg_temp.run(variadic tags text[]) returns text language plpgsql as $$
begin
  perform pg_temp.set_time(extract(epoch from autotag.now() - '2030-01-01 12:00:00+00')::integer + 7200);
  perform public.enqueue_tagging(array(select a.id from public.assets a));
  perform pg_temp.settle_all(jsonb_build_object('result', pg_temp.result() || jsonb_build_object('tags', tags,
    'confidence', (select jsonb_object_agg(t, 0.5) from unnest(tags) t)))) from pg_temp.next_claim(5);
  return (select a.tags from public.assets a);
end $$;
insert into public.assets (workspace_id, storage_path, tags)
select w, w || '/p', '{aunt mary,wedding 2019}' from pg_temp.workspace_id(1) w;
select is(pg_temp.run('beach', 'sky'), '{"aunt mary","wedding 2019",beach,sky}', 'the first run adds its tags');
select results_eq($$ select tagging_result -> 'given', tagging_result -> 'added', tagging_result -> 'removed' from public.assets $$,
  $$ values ('["beach", "sky"]'::jsonb, '["aunt mary", "wedding 2019"]'::jsonb, null::jsonb) $$, 'tagging_result says whose each tag is');
select is(pg_temp.run('beach', 'sea'), '{"aunt mary","wedding 2019",beach,sea}', 'the second run takes away what it does not give again');
update public.assets set tags = '{wedding 2019,Beach}';
select is(pg_temp.run('beach', 'sea', 'aunt mary'), '{"wedding 2019",Beach}', 'what people removed does not return');
select is(pg_temp.run('sky'), '{"wedding 2019",Beach,sky}', 'a tag that a person respelled is theirs');
update public.assets set tags = tags || '{Sea}';
select is(pg_temp.run('sea'), '{"wedding 2019",Beach,Sea}', 'so is one that a person typed again');
select is((select tagging_result -> 'removed' from public.assets), '["aunt mary"]', 'and it is not removed any more');
select * from finish();
rollback;
