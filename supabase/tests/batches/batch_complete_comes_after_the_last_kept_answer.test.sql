-- Answers of a batch are kept, because the host's rows are slow. batch-complete is broadcast once, when the last of them is stored.
begin;
\ir ../setup.psql
select plan(19);
update autotag.settings set express_images = 0;
select pg_temp.upload(60);
create function pg_temp.batch_complete() returns integer language sql as $$
  select count(*)::integer from realtime.messages where event = 'batch-complete'
$$;
select is(pg_temp.claim_batches(1), '1/1', 'the batch is prepared');
create function pg_temp.stages() returns text language sql as $$
  select string_agg(s.key || ' ' || s.value, ', ') from jsonb_each_text((select to_jsonb((public.tagging_job(id)).stages) from autotag.jobs)) s where s.value <> '0'
$$;
create function pg_temp.rows() returns text language sql as $$
  select string_agg(n, ', ') from (select tagging_stage || ' ' || count(*) as n from public.assets group by tagging_stage order by 1) s
$$;
select is(pg_temp.stages(), 'preparing 60', 'tagging_job() says so');
select is(pg_temp.rows(), 'queued 60', 'the rows do not: each write costs the host''s triggers');
create temporary table batch as select id, attempt from autotag.batches;
select autotag.batch_step(pg_temp.worker_id(), id, attempt, 'uploading'),
  autotag.batch_step(pg_temp.worker_id(), id, attempt, 'creating', 'file_1'),
  autotag.batch_submitted(pg_temp.worker_id(), id, attempt, 'batch_1', 'validating', 'file_1') from batch;
select is(pg_temp.stages(), 'submitted 60', 'OpenAI has it');
select is(pg_temp.rows(), 'queued 60', 'the rows show it when the worker shows it');
select isnt(autotag.show_batch(pg_temp.worker_id(), id, 0, 50), null, 'fifty of them') from batch;
select is(pg_temp.rows(), 'queued 10, submitted 50', 'at a time') from batch;
select is(autotag.show_batch(pg_temp.worker_id(9), id, 0, 60), null, 'a stranger shows nothing') from batch;
select isnt(autotag.show_batch(pg_temp.worker_id(), id, 0, 60), null, 'then the others') from batch;
select pg_temp.claim_batches(1);
select is((select count(*)::integer from unnest(autotag.record_poll(pg_temp.worker_id(), '[{"id": "batch_1", "status": "in_progress", "total": 60}]'))), 1,
  'a poll sees OpenAI working on it, so the worker shows it again') from (select pg_temp.set_time(60), pg_temp.next_batch_claim(1)) c;
select autotag.show_batch(pg_temp.worker_id(), id, 0, 60) from batch;
select is(pg_temp.rows(), 'processing 60', 'as processing');
select pg_temp.set_time(120), pg_temp.next_batch_claim(1);
select autotag.record_poll(pg_temp.worker_id(), '[{"id": "batch_1", "status": "completed", "total": 60, "done": 60, "output_file_id": "file_2"}]');
select is(pg_temp.claim_batches(1), '1/1', 'the batch is harvested');
update batch set attempt = (select b.attempt from autotag.batches b);
select autotag.heartbeat(pg_temp.worker_id(), '{}', '{}');
select is((autotag.batch_answers(pg_temp.worker_id(), b.id, b.attempt, (
    select jsonb_agg(jsonb_build_object('task', t.id, 'result', pg_temp.result())) from autotag.tasks t where t.id % 2 = 0), true) ->> 'accepted')::integer
  + (autotag.batch_answers(pg_temp.worker_id(), b.id, b.attempt, (
    select jsonb_agg(jsonb_build_object('task', t.id, 'result', pg_temp.result())) from autotag.tasks t where t.id % 2 = 1)) ->> 'accepted')::integer, 60,
  'half of the answers are kept, the others are stored') from batch b;
select autotag.batch_finish(pg_temp.worker_id(), b.id, b.attempt) from batch b;
select is((select state from autotag.batches), 'done', 'the batch has ended');
select autotag.tick();
select is(pg_temp.batch_complete(), 0, 'it is not complete, because answers are not stored');
select autotag.store_waiting(pg_temp.worker_id(), pg_temp.workspace_id(1),
  autotag.pick_unstored(pg_temp.worker_id(), pg_temp.workspace_id(1), 29));
select is(pg_temp.batch_complete(), 0, 'nor is it before the last of them');
select is(pg_temp.store(), 1, 'the last one is stored');
select is(pg_temp.batch_complete(), 2, 'now batch-complete is broadcast, to everybody and to the workspace');
select autotag.tick(), autotag.announce_stored(array(select id from batch));
select is(pg_temp.batch_complete(), 2, 'and only once');
select * from finish();
rollback;
