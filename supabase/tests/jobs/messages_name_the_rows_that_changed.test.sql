-- Each message of an upload names the images whose rows have changed since its last one. Nothing is lost to the limit of one message a second.
begin;
\ir ../setup.psql
select plan(15);
create temporary table heard (id uuid);
create temporary table named (id uuid);
-- What was sent since the last call: 'event completed/images: rows'. The images that it names are in `named`.
create function pg_temp.hear() returns text language plpgsql as $$
declare
  v_new uuid[] := array(select m.id from realtime.messages m where m.id not in (select h.id from heard h));
begin
  insert into heard select unnest(v_new);
  delete from named where true;
  insert into named select jsonb_array_elements_text(nullif(m.payload -> 'asset_ids', 'null'))::uuid from realtime.messages m where m.id = any (v_new);
  return (
    select coalesce(string_agg(m.event || case when m.private then format(' %s/%s: %s', m.payload ->> 'completed', m.payload ->> 'image_count',
        case when (m.payload ->> 'many')::boolean then 'many' else jsonb_array_length(m.payload -> 'asset_ids')::text end)
        else ' of ' || coalesce(m.payload ->> 'batch_id', 'no batch') end, ', ' order by m.event desc), 'nothing')
    from realtime.messages m where m.id = any (v_new));
end $$;
create function pg_temp.settle_some(images integer) returns integer language sql as $$
  select pg_temp.settle(pg_temp.reports(array(
    select t.id from autotag.tasks t where t.worker_id = pg_temp.worker_id() order by t.id limit images), jsonb_build_object('result', pg_temp.result())))
$$;
create function pg_temp.report_again(workspace integer) returns jsonb language sql as $$
  select autotag.report_stages(pg_temp.worker_id(), pg_temp.workspace_id(workspace), '[]')
$$;

select pg_temp.set_time(0), pg_temp.upload(8), pg_temp.claim_images(5), pg_temp.settle_some(2);
select is(pg_temp.hear(), 'job-progress 2/8: 8', 'the first message names all images of the upload');
create temporary table before as select a.id from public.assets a where a.tagging_stage = 'completed';
select pg_temp.settle_some(2);
select is(pg_temp.hear(), 'nothing', 'no second message within a second');
select pg_temp.report_again(1);
select is(pg_temp.hear(), 'nothing', 'and none when the worker reports again too early');
select pg_temp.set_time(1), pg_temp.report_again(1);
select is(pg_temp.hear(), 'job-progress 4/8: 2', 'a second later the worker reports again, and it follows');
select set_eq('select id from named', $$select a.id from public.assets a where a.tagging_stage = 'completed' and a.id not in (select b.id from before b)$$,
  'it names the two rows that have changed since the first');
select pg_temp.set_time(2), pg_temp.report_again(1);
select is(pg_temp.hear(), 'nothing', 'when nothing has changed, nothing is said');
select pg_temp.settle_some(1);
select is(pg_temp.hear(), 'job-progress 5/8: 1', 'one more');
select pg_temp.set_time(10), pg_temp.claim_images(3);
select autotag.report_stages(pg_temp.worker_id(), pg_temp.workspace_id(1), pg_temp.reports(array(
  select t.id from autotag.tasks t where t.worker_id = pg_temp.worker_id() order by t.id limit 2), '{"stage": "processing"}'));
select is(pg_temp.hear(), 'job-progress 5/8: 2', 'rows that show `processing` have changed');
select pg_temp.settle_some(1);
select is(pg_temp.hear(), 'nothing', 'within a second again');
select pg_temp.settle_some(2);
select is(pg_temp.hear(), 'job-complete 8/8: 3, batch-complete of no batch', 'the end has the rest, and those who listen only in public hear of it');

select pg_temp.set_time(20), pg_temp.upload(150, 2), pg_temp.claim_images(5), pg_temp.settle_some(1);
select is(pg_temp.hear(), 'job-progress 1/150: many', 'more than 100 are many');
select pg_temp.settle_some(1), pg_temp.set_time(21), autotag.tick();
select is(pg_temp.hear(), 'job-progress 2/150: 1', 'and then it counts anew; tick() tells what no worker has');
select public.cancel_tagging(j.id), pg_temp.set_time(22) from autotag.jobs j where j.finished_at is null;
select pg_temp.settle_some(2);
select is((select m.payload ->> 'status' from realtime.messages m where m.event = 'job-progress' order by (m.payload ->> 'failed')::integer desc limit 1),
  'cancelling', 'a message says that the upload is being cancelled');
select pg_temp.settle_some(1), pg_temp.hear();

update autotag.settings set broadcast_single_calls = false;
select pg_temp.set_time(30), pg_temp.upload(1, 3), pg_temp.claim_images(1), pg_temp.settle_some(1);
select is(pg_temp.hear(), 'job-complete 1/1: 1', 'the public message is a setting');
select is((select count(*) from autotag.jobs j where j.finished_at is null), 0::bigint, 'all have ended');
select * from finish();
rollback;
