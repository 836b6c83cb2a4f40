-- autotag's clock. Tests can change it; all other code reads the time here.

-- How much faster autotag's clock runs than real time: 1, except in tests and benchmarks that compress time
-- (`alter database … set autotag.speed = 10`). Functions that are called often are in plpgsql, because it keeps their plans.
-- An SQL function that cannot be inlined is planned again in every call.
create or replace function autotag.speed() returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- Usually nothing is set. Then it does not read settings, and takes 2 µs instead of 10.
  if coalesce(current_setting('autotag.speed', true), '') = '' or not (select s.test_clock from autotag.settings s) then
    return 1;
  end if;
  return current_setting('autotag.speed')::double precision;
end $$;

-- The current time, for all of autotag. It advances within a transaction, so that time spent waiting for a lock counts.
create or replace function autotag.now() returns timestamptz
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if coalesce(current_setting('autotag.now', true), '') = '' and coalesce(current_setting('autotag.speed', true), '') = ''
    or not (select s.test_clock from autotag.settings s) then
    return clock_timestamp();
  end if;
  return coalesce(nullif(current_setting('autotag.now', true), '')::timestamptz,
    timestamptz '2026-01-01' + (clock_timestamp() - timestamptz '2026-01-01') * autotag.speed());
end $$;

-- Real seconds in an interval of autotag's clock. clock_interval() is the inverse.
create or replace function autotag.real_seconds(p_interval interval) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return extract(epoch from p_interval) / autotag.speed();
end $$;

-- A time of autotag's clock as real epoch seconds.
create or replace function autotag.real_epoch(p_time timestamptz) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return extract(epoch from clock_timestamp()) - autotag.real_seconds(autotag.now() - p_time);
end $$;

create or replace function autotag.clock_interval(p_real_seconds double precision) returns interval
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return make_interval(secs => p_real_seconds * autotag.speed());
end $$;
