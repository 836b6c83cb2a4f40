-- The host's rows are slow or held: outcomes are kept, and stored later.
begin;
\ir ../setup.psql
select plan(30);
update autotag.settings set max_failures = 3;
select autotag.register_worker(pg_temp.worker_id(2), 'test', autotag.schema_version(), true);
select pg_temp.upload(3), pg_temp.upload(2, 2);
create function pg_temp.pick(workspace integer, n integer) returns bigint[] language sql as $$
  select autotag.pick_unstored(pg_temp.worker_id(), pg_temp.workspace_id(workspace), n)
$$;
create function pg_temp.waiting() returns text language sql as $$
  select coalesce(array_length(w.workspaces, 1), 0) || ' after ' || coalesce(w.wait::text, 'never') from autotag.list_unstored(pg_temp.worker_id()) w
$$;
select is(pg_temp.waiting(), '0 after never', 'nothing waits');
select pg_temp.claim_images(5);
select is(pg_temp.settle(pg_temp.reports(array(select id from autotag.tasks where workspace_id = pg_temp.workspace_id(1)),
  jsonb_build_object('result', pg_temp.result())), keep => true), 3, 'three answers are kept');
select is((select count(*)::integer from public.assets where tags is not null), 0, 'no row is written');
select is((select sum(images)::integer from autotag.usage), 3, 'usage counts them');
select is(((public.tagging_job(id)).stages).completing, 3, 'tagging_job() says that they are about to be completed')
from autotag.jobs where workspace_id = pg_temp.workspace_id(1);
select is(pg_temp.waiting(), '1 after never', 'their workspace is due at once');
select is(pg_temp.claim_images(5), 'nothing', 'they are not claimed again');
select is(autotag.release_worker(pg_temp.worker_id()), 2, 'when the worker stops, it has only the other two');
select autotag.register_worker(pg_temp.worker_id(), 'test', autotag.schema_version(), true);
select is((public.cancel_tagging(id)).cancelled, 0, 'cancelling the upload takes no answer away')
from autotag.jobs where workspace_id = pg_temp.workspace_id(1);
select is(autotag.store_waiting(pg_temp.worker_id(9), pg_temp.workspace_id(1), pg_temp.pick(1, 10)) ->> 'stored', '0', 'a stranger stores nothing');
select is(autotag.pick_unstored(pg_temp.worker_id(9), pg_temp.workspace_id(1), 10), '{}', 'nor learns of any');
select is(autotag.store_waiting(pg_temp.worker_id(), pg_temp.workspace_id(2), pg_temp.pick(1, 10)) ->> 'stored', '0',
  'nothing is stored as another workspace''s');
select is(autotag.store_waiting(pg_temp.worker_id(), pg_temp.workspace_id(2), pg_temp.pick(2, 10)),
  '{"more": false, "stored": 0, "notices": []}', 'another workspace has nothing to store');
select is(autotag.store_waiting(pg_temp.worker_id(), pg_temp.workspace_id(1), pg_temp.pick(1, 2)),
  '{"more": true, "stored": 2, "notices": []}', 'two are stored, and one is still due');
select is(pg_temp.store(), 1, 'then the third');
select results_eq($$ select completed, failed, finished_at is not null from autotag.jobs where workspace_id = pg_temp.workspace_id(1) $$,
  'values (3, 0, true)', 'their job has ended');
select is((select count(*)::integer from public.assets where tags = '{a}'), 3, 'their rows have the tags');

-- Rows that were tried in vain wait longer each time.
select pg_temp.claim_images(5);
create temporary table items as
  select array_agg(row(t.id, t.job_id, t.asset_id, pg_temp.result(), null, null, null)::autotag.finished order by t.id) as items
  from autotag.tasks t where t.finished_at is null;
select autotag.keep(items) from items;
select is(pg_temp.waiting(), '0 after 0.25', 'after a first try in vain, a quarter of a second');
select pg_temp.set_time(0.25), autotag.keep(items) from items;
select is(pg_temp.waiting(), '0 after 0.5', 'the second time twice as long');
select pg_temp.set_time(0.75), autotag.keep(items) from items;
select is(pg_temp.waiting(), '0 after 1', 'then twice as long again');
select autotag.keep(items) from items, generate_series(1, 20);
select is(pg_temp.waiting(), '0 after 60', 'and a minute at most');

-- A call that takes too long is cancelled by its worker.
select pg_temp.set_time(100);
select is(autotag.postpone_stores(pg_temp.worker_id(9), pg_temp.workspace_id(2), pg_temp.pick(2, 1)), '[]', 'a stranger postpones nothing');
select autotag.postpone_stores(pg_temp.worker_id(), pg_temp.workspace_id(2), pg_temp.pick(2, 100));
select is((select array_agg(timeouts) from autotag.unstored), '{0,0}', 'no single image is to blame for a timeout of several');
select autotag.postpone_stores(pg_temp.worker_id(), pg_temp.workspace_id(1), pg_temp.pick(2, 1));
select is((select array_agg(timeouts) from autotag.unstored), '{0,0}', 'nor is one of another workspace');
create temporary table tried as select pg_temp.pick(2, 1) as tasks;
select is((select tasks from tried), array(select min(u.task_id) from autotag.unstored u), 'a worker picks what it tries');
select autotag.postpone_stores(pg_temp.worker_id(), pg_temp.workspace_id(2), tasks) from tried;
select autotag.postpone_stores(pg_temp.worker_id(2), pg_temp.workspace_id(2), tasks) from tried;
select is((select array_agg(timeouts order by task_id) from autotag.unstored), '{1,0}', 'a timeout of one image counts, and is never the next one''s');
update autotag.unstored set timeouts = 2, next_at = autotag.now() where timeouts = 1;
update autotag.unstored set next_at = autotag.now() + interval '1 min' where timeouts = 0;
select is(autotag.postpone_stores(pg_temp.worker_id(), pg_temp.workspace_id(2), pg_temp.pick(2, 1)) -> 0 ->> 'event', 'not_stored',
  'after max_failures timeouts the image fails');
select results_eq('select error_code from autotag.tasks where finished_at is not null', array['not_stored'], 'with the code not_stored');
select is((select count(*)::integer from public.assets where tagging_stage = 'failed'), 0, 'its row is not touched again');
select pg_temp.set_time(200), pg_temp.store();
select results_eq($$ select completed, failed, finished_at is not null from autotag.jobs where workspace_id = pg_temp.workspace_id(2) $$,
  'values (1, 1, true)', 'the other is stored, and the job ends');
select * from finish();
rollback;
