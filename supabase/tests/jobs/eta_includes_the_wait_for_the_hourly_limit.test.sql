-- A workspace may start ten batches an hour. The predicted end of an upload includes its wait for the next hour.
begin;
\ir ../setup.psql
select plan(6);
create function pg_temp.upload_at(seconds bigint) returns text language plpgsql as $$
begin
  perform pg_temp.set_time(seconds);
  return pg_temp.upload(60) ->> 'job_id';
end $$;
create temporary table uploads as select number, pg_temp.upload_at(number) as id from generate_series(1::bigint, 21) number;
create function pg_temp.predicted_minutes(upload_number bigint, out starts numeric, out ends numeric) language sql as $$
  select round(extract(epoch from autotag.batch_start_eta(b, autotag.now()) - '2030-01-01 12:00:00+00') / 60),
         round(extract(epoch from j.eta - '2030-01-01 12:00:00+00') / 60)
  from uploads u join autotag.jobs j on j.id = u.id::uuid join autotag.batches b on b.job_id = j.id where u.number = upload_number
$$;
select results_eq('select starts from unnest(array[1, 10, 11, 20, 21]) n, pg_temp.predicted_minutes(n)',
  array[0, 0, 60, 60, 120]::numeric[],
  'with ten batches per hour, the eleventh starts in one hour and the twenty-first in two');
select is((select array_agg(ends order by n) from unnest(array[1, 10, 11, 21]) n, pg_temp.predicted_minutes(n)),
  '{45,45,105,165}'::numeric[],
  'the eta of each upload includes this wait');
select is(pg_temp.claim_batches(30), '1/1 1/2 1/3 1/4 1/5 1/6 1/7 1/8 1/9 1/10', 'ten batches start');
select pg_temp.set_time(1200);
select results_eq('select starts from unnest(array[11, 20, 21]) n, pg_temp.predicted_minutes(n)', array[60, 60, 120]::numeric[],
  'twenty minutes later, the predicted starts of the others are unchanged');
update autotag.settings set batch_batches_per_hour = 15;
select autotag.tick();
select results_eq('select starts from unnest(array[15, 16, 21]) n, pg_temp.predicted_minutes(n)', array[20, 60, 60]::numeric[],
  'a higher limit lets them start earlier');

update autotag.settings set batch_batches_per_hour = 10;
create temporary table large as select pg_temp.upload(300, 2) ->> 'job_id' as id;
update autotag.settings set batch_batches_per_hour = 2;
select autotag.refresh_eta(l.id::uuid) from large l;
select is((select round(extract(epoch from j.eta - autotag.now()) / 60) from autotag.jobs j join large l on l.id::uuid = j.id),
  105::numeric,
  'an upload of three batches is done when the last of them is');
select * from finish();
rollback;
