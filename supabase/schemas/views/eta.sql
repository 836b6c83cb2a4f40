-- Predicts when a job ends. Single calls: from their schedule under the present limits and queues. Batches: from the durations
-- of earlier ones (by size and time of day, the newest weigh most), and once a batch makes progress, from its pace. Users see
-- the median; the 90th percentile is available too. Predictions run inside uploads, reports and polls, and read values that providers
-- and operators set. So they never raise: predict_batch, batch_eta, predict_new_batch, predict_single_calls, predict_job, predict_wait
-- and estimate_seconds warn and return null instead (that takes 5 µs of the millisecond of a prediction).

-- Possible durations of a batch of p_images images that starts at p_started, in seconds with weights: those of recent batches
-- and a prior with a median of settings.batch_seconds (45 min), from a third (15 min) to 16 times that (12 h); OpenAI promises
-- 24 h. A batch in flight counts with its projection: by its pace once 10 % are done; before, if it is overdue, the predicted
-- duration plus twice the delay. So a slow day shows before its first batch has ended.
create or replace function autotag.batch_lengths(p_images integer, p_started timestamptz, p_now timestamptz, p_except uuid)
returns table (seconds double precision, weight double precision)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_half_life double precision;    -- in days
begin
  select * into v_settings from autotag.settings;
  v_half_life := least(greatest(v_settings.eta_half_life_days, 0.000001), 1000000);
  return query
    -- 100 half-lives weigh as good as nothing (10^-30), and beyond 1,074 power() fails.
    select s.seconds,
      power(0.5, least(greatest(date_part('epoch', p_now - s.known_at), 0) / 86400 / v_half_life, 100))
      * exp(-abs(ln(s.images::double precision / p_images)))
      * (0.65 + 0.35 * cos(2 * pi() * date_part('epoch', s.started_at - p_started) / 86400)) * s.boost
    from (
      select d.seconds, d.images, d.started_at, d.started_at + make_interval(secs => d.seconds) as known_at, 1.0 as boost
      from (select * from autotag.durations order by started_at desc limit 300) d
      union all
      select f.heading, f.images, f.submitted_at, p_now, 2.0
      from (
        select b.image_count - b.express_count as images, b.submitted_at,
          case when d.share > 0.1 and b.running_at is not null
            then autotag.projected_duration(b.submitted_at, b.running_at, p_now, d.share)
            else 2 * nullif(greatest(date_part('epoch', p_now - b.submitted_at) - b.predicted_seconds, 0), 0)
              + b.predicted_seconds end as heading
        from autotag.batches b cross join lateral (select autotag.share_done(b) as share offset 0) d
        where b.state = 'submitted' and b.id is distinct from p_except
        order by b.submitted_at desc limit 50) f
      where f.heading is not null
    ) s
    union all
    select v_settings.batch_seconds * x, 0.3
    from unnest(array[0.33, 0.5, 0.75, 1, 2, 5, 16]::double precision[]) x;
end $$;

-- How much of a batch is done, from 0 to 1: of the lines that the provider counts, or of its images if the provider does not say.
create or replace function autotag.share_done(p_batch autotag.batches) returns double precision
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return least(1, p_batch.request_done::double precision
    / coalesce(nullif(p_batch.request_total, 0), p_batch.image_count - p_batch.express_count));
end $$;

-- Total duration of a batch whose share p_share is done: the wait until p_running, then a constant pace.
create or replace function autotag.projected_duration(
  p_started timestamptz, p_running timestamptz, p_now timestamptz, p_share double precision
) returns double precision
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select date_part('epoch', p_running - p_started) + date_part('epoch', p_now - p_running) / p_share
$$;

-- Predicts the total duration of a batch in seconds: median and 90th percentile. p_running: when OpenAI began to work on it
-- (null: not yet); p_share: how much of it is done. Only durations longer than its age count. Once a third is done, only its own pace
-- counts.
create or replace function autotag.predict_batch(
  p_images integer, p_started timestamptz, p_now timestamptz, p_running timestamptz, p_share double precision,
  p_except uuid, out p50 double precision, out p90 double precision
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_age double precision;
  v_trust double precision;
  v_heading double precision;
  v_unsure double precision;    -- ln(p90 / p50) of the history, weighted by 1 - v_trust
begin
  v_age := greatest(date_part('epoch', p_now - p_started), 0);
  v_trust := case when p_running is null then 0 else least(1, 3 * p_share) end;
  select min(l.seconds) filter (where l.upto >= 0.5 * l.total), min(l.seconds) filter (where l.upto >= 0.9 * l.total)
  into p50, p90
  from (
    select h.seconds, sum(h.weight) over (order by h.seconds) as upto, sum(h.weight) over () as total
    from autotag.batch_lengths(p_images, p_started, p_now, p_except) h
    where h.seconds > v_age) l;
  p50 := coalesce(p50, 1.5 * v_age);
  p90 := greatest(coalesce(p90, 3 * v_age), 1.1 * p50);
  if v_trust > 0 then
    v_heading := greatest(autotag.projected_duration(p_started, p_running, p_now, p_share), v_age);
    v_unsure := (1 - v_trust) * ln(p90 / p50);
    p50 := greatest(v_age, exp((1 - v_trust) * ln(p50) + v_trust * ln(greatest(v_heading, 1))));
    -- In one case of ten the rest takes a third longer than at the pace so far.
    p90 := exp(v_unsure) * (p50 + v_trust * (p50 - v_age) / 3);
  end if;
exception when others then
  raise warning 'autotag could not predict a batch: %', sqlerrm;
  p50 := null; p90 := null;
end $$;

-- When a batch may start. A batch that the workspace's window has not admitted waits until the window has room for the batches
-- ahead and for itself; each max_requests batches ahead of it delay it by one full window.
create or replace function autotag.batch_start_eta(p_batch autotag.batches, p_now timestamptz) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_turn timestamptz := greatest(p_now, case when p_batch.not_before < 'infinity' then p_batch.not_before end);
  v_before integer;
  v_window record;
begin
  if p_batch.state <> 'planned' or p_batch.admitted_at is not null then
    return v_turn;
  end if;
  select count(*) into v_before from autotag.batches b
  where b.workspace_id = p_batch.workspace_id and b.state = 'planned' and b.admitted_at is null
    and (b.created_at, b.ordinal) < (p_batch.created_at, p_batch.ordinal);
  select l.length, l.max_requests, a.retry_at into v_window
  from autotag.window_limits(p_batch.workspace_id, 'batch') l
  cross join lateral autotag.admit(
    p_batch.workspace_id, 'batch', v_before % l.max_requests + 1, 0, false, p_take => false) a;
  return greatest(v_turn, coalesce(v_window.retry_at, p_now) + v_before / v_window.max_requests * v_window.length);
end $$;

-- Predicted end of a batch: median and 90th percentile. One that was not submitted starts at batch_start_eta().
create or replace function autotag.batch_eta(p_batch autotag.batches, p_now timestamptz, out p50 timestamptz, out p90 timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_started timestamptz;
  v_seconds record;
begin
  v_started := coalesce(p_batch.submitted_at, autotag.batch_start_eta(p_batch, p_now));
  v_seconds := autotag.predict_batch(p_batch.image_count - p_batch.express_count, v_started, greatest(p_now, v_started),
    p_batch.running_at, autotag.share_done(p_batch), p_batch.id);
  p50 := v_started + make_interval(secs => v_seconds.p50);
  p90 := v_started + make_interval(secs => v_seconds.p90);
exception when others then
  raise warning 'autotag could not predict the end of a batch: %', sqlerrm;
  p50 := null; p90 := null;
end $$;

-- When one more batch of p_images images would start and end, behind all batches of the workspace that wait for its window.
create or replace function autotag.predict_new_batch(
  p_workspace_id autotag.workspace_id, p_images integer, p_now timestamptz, out starts_at timestamptz, out ends_at timestamptz
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
begin
  v_batch.workspace_id := p_workspace_id;
  v_batch.state := 'planned';
  v_batch.image_count := p_images;
  v_batch.express_count := 0;
  v_batch.created_at := 'infinity';   -- later than the others
  v_batch.ordinal := 1;
  starts_at := autotag.batch_start_eta(v_batch, p_now);
  ends_at := (autotag.batch_eta(v_batch, p_now)).p50;
exception when others then
  raise warning 'autotag could not predict the start of a batch: %', sqlerrm;
  starts_at := null; ends_at := null;
end $$;

-- When the last single call of a job ends: it waits for the limits and for its chunk. p_wait: the wait for the limits, if the caller
-- has computed it. Null: no prediction is possible.
create or replace function autotag.predict_single_calls(p_job_id uuid, p_wait interval) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_settings autotag.settings;
begin
  select * into v_settings from autotag.settings;
  return v_now + make_interval(secs => v_settings.call_seconds) + coalesce((
    select greatest(coalesce(p_wait, autotag.predict_wait(q.workspace_id, 0, true)),
      case when q.chunk is not null then greatest(q.ready_at, v_now) - v_now
        + v_settings.chunk_delay * ((q.queued - 1) / q.chunk) end)
    from autotag.queues q where q.job_id = p_job_id and q.queued > 0), interval '0');
exception when others then
  raise warning 'autotag could not predict single calls: %', sqlerrm;
  return null;
end $$;

-- Predicts the end of a job: its last batch, or the last of its single calls, which wait for the limits and for their chunks.
-- p_wait: the wait for the limits, if the caller has computed it.
create or replace function autotag.predict_job(p_job_id uuid, p_wait interval, out p50 timestamptz, out p90 timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_single timestamptz;
  v_batches record;
begin
  v_single := autotag.predict_single_calls(p_job_id, p_wait);
  select max(e.p50) as p50, max(e.p90) as p90 into v_batches
  from (
    -- Batches that wait for the window are mostly alike, so only the last one is predicted.
    select distinct on (b.openai_batch_id, b.not_before, b.image_count - b.express_count) b as batch
    from autotag.batches b where b.job_id = p_job_id and b.state not in ('done', 'cancelled')
    order by b.openai_batch_id, b.not_before, b.image_count - b.express_count, b.ordinal desc) d
  cross join lateral autotag.batch_eta(d.batch, v_now) e;
  p50 := greatest(v_single, v_batches.p50);
  p90 := greatest(v_single + (v_single - v_now), v_batches.p90);
exception when others then
  raise warning 'autotag could not predict the end of an upload: %', sqlerrm;
  p50 := null; p90 := null;
end $$;

-- The predicted end of a job as it is shown, never in the past. A stored prediction that is over, or nearly so, is computed again. Null:
-- the job has ended, or no prediction is possible.
create or replace function autotag.current_eta(p_job autotag.jobs, out p50 timestamptz, out p90 timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_end record;
begin
  if p_job.finished_at is null and p_job.eta < autotag.now() + interval '1 s' then
    v_end := autotag.predict_job(p_job.id, null);
    p50 := v_end.p50;
    p90 := v_end.p90;
  else
    p50 := p_job.eta;
    p90 := p_job.eta_p90;
  end if;
end $$;

-- Predicts the end of a job (predict_job) and stores it. The caller holds the job's lock.
create or replace function autotag.refresh_eta(p_job_id uuid, p_wait interval default null) returns timestamptz
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_end record;
  v_eta timestamptz;
begin
  -- The write is outside of predict_job()'s subtransaction, which would have to get an id for it.
  v_end := autotag.predict_job(p_job_id, p_wait);
  update autotag.jobs j set eta = v_end.p50, eta_p90 = v_end.p90
  where j.id = p_job_id and j.finished_at is null
  returning j.eta into v_eta;
  return v_eta;
end $$;

-- Records the duration of a batch that OpenAI completed.
create or replace function autotag.record_duration(p_batch autotag.batches, p_now timestamptz) returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  insert into autotag.durations (images, started_at, seconds)
  select p_batch.image_count - p_batch.express_count, p_batch.submitted_at,
    greatest(date_part('epoch', p_now - p_batch.submitted_at), 1)
$$;
