begin;
\ir ../setup.psql
select plan(7);
-- What a worker is handed, which asks again at once where it is told to, as 'workspace/upload'.
create function pg_temp.handed(slots integer) returns text language plpgsql as $$
declare
  v_batches jsonb;
  v_wait double precision;
begin
  for i in 1 .. 10 loop
    select c.batches, c.wait into v_batches, v_wait from autotag.claim_batches(pg_temp.worker(), slots) c;
    exit when v_batches <> '[]' or v_wait is distinct from 0;
  end loop;
  return (
    select coalesce(string_agg(right(j.workspace_id::text, 2)::integer || '/' || j.upload, ' ' order by x.i), 'nothing')
    from jsonb_array_elements(v_batches) with ordinality x (batch, i)
    join autotag.batches b on b.id = (x.batch ->> 'batch')::uuid
    join (select j.id, j.workspace_id, rank() over (partition by j.workspace_id order by j.created_at) as upload
          from autotag.jobs j) j on j.id = b.job_id);
end $$;
select pg_temp.upload(1000);
select is((select count(*)::integer from autotag.batches), 10, 'ten batches, as many as the hour has');
select is(pg_temp.handed(1), '1/1', 'the first of them is on its way');
select pg_temp.at(1), pg_temp.upload(60);
select pg_temp.at(2), pg_temp.upload(60);
select pg_temp.at(3), pg_temp.upload(60);
select pg_temp.at(4), pg_temp.upload(60, 2);
select is(pg_temp.handed(1), '2/1', 'the other workspace does not wait for the three that have no place');
select is(pg_temp.handed(2), '1/1 1/1', 'nor does the upload that has its places');
select is((select min(b.not_before) from autotag.batches b where b.not_before > autotag.now()), '2030-01-01 13:00:00+00',
  'the first of the three goes when the first place comes back');
update autotag.settings set batch_batches_per_hour = 11;
select pg_temp.at(5), autotag.tick();
select is(pg_temp.handed(1), '1/2', 'unless there is more room');
select is(pg_temp.handed(9), '1/1 1/1 1/1 1/1 1/1 1/1 1/1', 'for one');
select * from finish();
rollback;
