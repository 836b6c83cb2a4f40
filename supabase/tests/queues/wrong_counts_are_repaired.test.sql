-- Counts of queues and workspaces are kept by claims. repair_queues(), which tick() calls, corrects each way in which they can be wrong.
begin;
\ir ../setup.psql
select plan(19);
update autotag.settings set realtime_max_images = 50, realtime_requests_per_minute = 1000, realtime_tokens_per_minute = 1000000;
select pg_temp.upload(6), pg_temp.upload(4, 2);
create function pg_temp.counts() returns text language sql as $$
  select string_agg(right(w.workspace_id::text, 2)::integer || ': ' || w.queued || ' of ' || coalesce(q.queued, 0), ', ' order by w.workspace_id)
  from autotag.workspaces w
  left join (select workspace_id, sum(queued) as queued from autotag.queues group by 1) q on q.workspace_id = w.workspace_id
$$;
select is(pg_temp.counts(), null, 'a workspace is not known before a claim has seen its first queue');
select is(pg_temp.claim_images(4), '1: 4', 'a claim counts new queues, and releases images');
select is(pg_temp.counts(), '1: 2 of 2, 2: 4 of 4', 'the others wait');
select pg_temp.upload(3, 2);
select is((select count(*)::integer from autotag.queues where not joined), 1, 'a new queue is not counted yet');
select autotag.join_queues(0);
select is(pg_temp.counts(), '1: 2 of 2, 2: 7 of 7', 'then it is, in the same workspace');
select autotag.join_queues(0);
select is(pg_temp.counts(), '1: 2 of 2, 2: 7 of 7', 'and once only');

update autotag.workspaces set queued = 0 where workspace_id = pg_temp.workspace_id(1);
update autotag.workspaces set queued = 99 where workspace_id = pg_temp.workspace_id(2);
select autotag.repair_queues();
select is(pg_temp.counts(), '1: 2 of 2, 2: 7 of 7', 'counts of workspaces follow their queues');

update autotag.queues set queued = 0, cursor = 999999 where workspace_id = pg_temp.workspace_id(1);
select autotag.repair_queues();
select is(pg_temp.counts(), '1: 2 of 2, 2: 7 of 7', 'a queue that is empty by its count gets the tasks that wait in it');
select is(pg_temp.claim_images(50), '1: 2, 2: 7', 'they can be claimed');

update autotag.queues set queued = 50 where workspace_id = pg_temp.workspace_id(1);
select autotag.repair_queues();
select is(pg_temp.claim_images(50), 'nothing', 'a queue that counts too many releases what there is');
select is(pg_temp.counts(), '1: 0 of 0, 2: 0 of 0', 'and its count is right again');

delete from autotag.workspaces;
select pg_temp.upload(2);
update autotag.queues set joined = true where not joined;
select is(pg_temp.claim_images(50), 'nothing', 'a queue that counts as joined in a workspace without a row is never served');
select autotag.repair_queues();
select is(pg_temp.claim_images(50), '1: 2', 'until it is repaired');
update autotag.workspaces set virtual_time = 0;
insert into autotag.workspaces (workspace_id) values (pg_temp.workspace_id(2)) on conflict do nothing;

-- Requeued images come back with the claim after their delay.
select pg_temp.settle_all('{"error": {"kind": "transient", "code": "timeout", "message": "Late."}}');
select is(pg_temp.counts(), '1: 0 of 0, 2: 0 of 0', 'requeued images are not counted while they are delayed');
select pg_temp.set_time(60);
select is(pg_temp.claim_images(50), '1: 8, 2: 7', 'then all of them are released');
select is(pg_temp.counts(), '1: 0 of 0, 2: 0 of 0', 'and the counts are right');

-- A queue is deleted with its job.
select pg_temp.upload(5, 3), pg_temp.claim_images(0);
select autotag.join_queues(0);
delete from autotag.jobs where workspace_id = pg_temp.workspace_id(3);
select autotag.repair_queues();
select is(pg_temp.counts(), '1: 0 of 0, 2: 0 of 0, 3: 0 of 0', 'its workspace counts nothing');
select pg_temp.settle_all(jsonb_build_object('result', pg_temp.result()));
select is((select count(*)::integer from autotag.queues), 4, 'the queues of finished jobs are still there');
select autotag.tick();
select is((select count(*)::integer from autotag.queues), 0, 'until the next tick');
select * from finish();
rollback;
