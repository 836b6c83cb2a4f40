-- autotag's own clock. Tests may bend it; everything else reads the time here.

-- How much faster than the real one autotag's clock runs: 1, but in tests and benches that compress time
-- (`alter database … set autotag.speed = 10`). In plpgsql, as all that is called often: its plans are kept, while
-- a function in SQL that cannot be inlined is planned with every call.
create or replace function autotag.speed() returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if not (select s.test_clock from autotag.settings s) then
    return 1;
  end if;
  return coalesce(nullif(current_setting('autotag.speed', true), '')::double precision, 1);
end $$;

-- The time, everywhere in autotag. It moves within a transaction, so that a lock waited for counts.
create or replace function autotag.now() returns timestamptz
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if not (select s.test_clock from autotag.settings s) then
    return clock_timestamp();
  end if;
  return coalesce(nullif(current_setting('autotag.now', true), '')::timestamptz,
    timestamptz '2026-01-01' + (clock_timestamp() - timestamptz '2026-01-01') * autotag.speed());
end $$;

-- Seconds that a worker has to wait for what is so far away on autotag's clock, and the other way round.
create or replace function autotag.real_seconds(p_interval interval) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return extract(epoch from p_interval) / autotag.speed();
end $$;

-- A moment of autotag's clock as others count it: epoch seconds.
create or replace function autotag.real_epoch(p_moment timestamptz) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return extract(epoch from clock_timestamp()) - autotag.real_seconds(autotag.now() - p_moment);
end $$;

create or replace function autotag.clock_interval(p_real_seconds double precision) returns interval
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return make_interval(secs => p_real_seconds * autotag.speed());
end $$;
