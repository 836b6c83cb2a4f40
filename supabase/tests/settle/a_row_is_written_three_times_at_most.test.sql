-- Each write of a row fires the host's triggers, webhooks and Postgres Changes. A single call writes three times, an image of a batch four.
begin;
\ir ../setup.psql
select plan(5);
update autotag.settings set express_images = 0;
create temporary table writes (id uuid, stage text, was text);
create function pg_temp.count_writes() returns trigger language plpgsql as $$
begin
  insert into writes values (new.id, new.tagging_stage, old.tagging_stage);
  return null;
end $$;
create trigger count_writes after update on public.assets for each row execute function pg_temp.count_writes();
create function pg_temp.stages() returns text language sql as $$
  select string_agg(distinct w.stages, ' / ') from (select string_agg(stage, ' ' order by ctid) as stages from writes group by id) w
$$;
select pg_temp.upload(3), pg_temp.claim_images(3);
select autotag.report_stages(pg_temp.worker_id(), pg_temp.workspace_id(1), pg_temp.reports(array(select id from autotag.tasks), jsonb_build_object('stage', s)))
from unnest(array['preparing', 'submitted', 'processing', 'completing']) s;
select is(((public.tagging_job(id)).stages).completing, 3, 'tagging_job() knows every stage') from autotag.jobs;
select pg_temp.settle_all(jsonb_build_object('result', pg_temp.result()));
select is(pg_temp.stages(), 'queued processing completed', 'a single call writes three times');
truncate writes;
select pg_temp.upload(1), pg_temp.claim_images(1);
select pg_temp.settle_all('{"error": {"kind": "image", "code": "bad_image", "message": "No image."}}');
select is(pg_temp.stages(), 'queued failed', 'a failure without a call twice');

truncate writes;
select pg_temp.upload(60, 2), pg_temp.claim_batches(1);
create temporary table batch as select id, attempt from autotag.batches;
select autotag.batch_step(pg_temp.worker_id(), id, attempt, 'uploading'),
  autotag.batch_step(pg_temp.worker_id(), id, attempt, 'creating', 'file_1'),
  autotag.batch_submitted(pg_temp.worker_id(), id, attempt, 'batch_1', 'validating', 'file_1') from batch;
select autotag.show_batch(pg_temp.worker_id(), id, 0, 60) from batch, generate_series(1, 2);
create function pg_temp.poll(seconds integer, poll jsonb) returns void language plpgsql as $$
begin
  perform pg_temp.set_time(seconds);
  perform pg_temp.next_batch_claim(1);
  perform autotag.show_batch(pg_temp.worker_id(), b, 0, 60) from unnest(autotag.record_poll(pg_temp.worker_id(), jsonb_build_array(
    '{"id": "batch_1", "total": 60}'::jsonb || poll))) b;
end $$;
select pg_temp.poll(60, '{"status": "in_progress"}'), pg_temp.poll(120, '{"status": "in_progress", "done": 20}'),
  pg_temp.poll(180, '{"status": "finalizing", "done": 60}'), pg_temp.poll(240, '{"status": "completed", "done": 60, "output_file_id": "file_2"}');
select is(pg_temp.claim_batches(1), '2/1', 'the batch is harvested');
select autotag.batch_answers(pg_temp.worker_id(), b.id, b.attempt, (
  select jsonb_agg(jsonb_build_object('task', t.id, 'result', pg_temp.result())) from autotag.tasks t where t.batch_id = b.id)) from autotag.batches b;
select is(pg_temp.stages(), 'queued submitted processing completed', 'an image of a batch writes four times');
select * from finish();
rollback;
