-- Exact sliding windows of workspaces.

-- Length of a window, and a workspace's limits in it.
create or replace function autotag.window_limits(p_workspace_id autotag.workspace_id, p_request_type text)
returns table (length interval, max_requests integer, max_units integer) rows 1
language sql stable set search_path = pg_catalog, pg_temp
as $$
  select case p_request_type when 'realtime' then interval '1 min' else interval '1 h' end,
         coalesce(wn.max_requests, case p_request_type
           when 'realtime' then s.realtime_requests_per_minute else s.batch_batches_per_hour end),
         coalesce(wn.max_units, case p_request_type
           when 'realtime' then s.realtime_tokens_per_minute else s.batch_images_per_hour end)
  from autotag.settings s
  left join autotag.windows wn on wn.workspace_id = p_workspace_id and wn.request_type = p_request_type
$$;

-- Keys of advisory locks: window_key() for the insert of a window; job_key() for an upload that is being cancelled (exclusive) or served
-- (shared).
create or replace function autotag.window_key(p_workspace_id autotag.workspace_id, p_request_type text) returns bigint
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return hashtextextended('autotag.window ' || p_request_type || p_workspace_id, 0);
end $$;

create or replace function autotag.job_key(p_job_id uuid) returns bigint
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return hashtextextended('autotag.job ' || p_job_id, 0);
end $$;

-- Takes the advisory lock for each insert of a window. claim() tries to take it first, and skips the workspace if it is not free, because
-- its own insert would wait for the other transaction.
create or replace function autotag.lock_new_window() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_advisory_xact_lock(autotag.window_key(new.workspace_id, new.request_type));
  return new;
end $$;

create or replace trigger autotag_lock_new_window before insert on autotag.windows
  for each row execute function autotag.lock_new_window();

-- Locks one window, or the right to insert it. False: another transaction holds it.
create or replace function autotag.try_window(p_workspace_id autotag.workspace_id, p_request_type text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform from autotag.windows wn
  where wn.workspace_id = p_workspace_id and wn.request_type = p_request_type for no key update skip locked;
  return found or not exists (
      select from autotag.windows wn where wn.workspace_id = p_workspace_id and wn.request_type = p_request_type)
    and pg_try_advisory_xact_lock(autotag.window_key(p_workspace_id, p_request_type));
end $$;

-- Admits up to p_wanted requests of p_units_each units each (null: what one image reserves): all or nothing, or with p_partial
-- as many as fit. If not all were admitted, retry_at is the exact time when the next fit (1 µs earlier they are refused); null:
-- they never fit. Without p_take nothing is counted.
--
-- It decides by an unlocked read and writes only if that row version is still current (ctid and xmin together identify it);
-- otherwise it reads again. So a refusal writes and locks nothing. Locks the window's row when it admits.
-- Long: check_rate_limit calls this before every API call. It takes 22 µs, and each function with a search_path of its own would
-- add 2.5 µs.
create or replace function autotag.admit(
  p_workspace_id autotag.workspace_id, p_request_type text, p_wanted integer, p_units_each integer, p_partial boolean,
  out admitted integer, out retry_at timestamptz, out at timestamptz, p_take boolean default true
)
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_ctid tid;                  -- the version of the window's row that was read; null: it has none yet
  v_xmin xid;
  v_test_clock boolean;
  v_length interval := case p_request_type when 'realtime' then interval '1 min' else interval '1 h' end;
  v_each integer;
  v_max_requests integer;
  v_max_units integer;
  v_at timestamptz[];          -- the window as it was read …
  v_requests integer[];
  v_units integer[];
  v_count integer;
  v_old integer;               -- … elements of it that have left it
  v_used_requests bigint;
  v_used_units bigint;
  v_need_requests bigint;      -- requests that must leave the window before the next ones fit
  v_need_units bigint;
  v_min_wanted integer;             -- the smallest number that is worth waiting for
begin
  loop
    select wn.ctid, wn.xmin, s.test_clock,
      coalesce(wn.max_requests, case p_request_type
        when 'realtime' then s.realtime_requests_per_minute else s.batch_batches_per_hour end),
      coalesce(wn.max_units, case p_request_type
        when 'realtime' then s.realtime_tokens_per_minute else s.batch_images_per_hour end),
      coalesce(p_units_each, p.tokens_per_image),
      coalesce(wn.admitted_at, '{}'), coalesce(wn.requests, '{}'), coalesce(wn.units, '{}')
    into v_ctid, v_xmin, v_test_clock, v_max_requests, v_max_units, v_each, v_at, v_requests, v_units
    from autotag.settings s
    cross join autotag.provider_limits p
    left join autotag.windows wn on wn.workspace_id = p_workspace_id and wn.request_type = p_request_type;

    -- Time never runs backwards within a row.
    v_count := cardinality(v_at);
    at := greatest(case when v_test_clock then autotag.now() else clock_timestamp() end, v_at[v_count]);
    v_old := 0;
    while v_old < v_count and v_at[v_old + 1] <= at - v_length loop
      v_old := v_old + 1;
    end loop;
    v_used_requests := 0;
    v_used_units := 0;
    for i in v_old + 1 .. v_count loop
      v_used_requests := v_used_requests + v_requests[i];
      v_used_units := v_used_units + v_units[i];
    end loop;

    admitted := least(
      p_wanted,
      greatest(v_max_requests - v_used_requests, 0),
      case when v_used_units > v_max_units then 0  -- real use was more than the estimate
        when v_each > 0 then (v_max_units - v_used_units) / v_each
        else p_wanted end);
    if not p_partial and admitted < p_wanted then
      admitted := 0;
    end if;
    exit when admitted = 0 or not p_take;

    if v_ctid is null then
      insert into autotag.windows (workspace_id, request_type) values (p_workspace_id, p_request_type)
      on conflict do nothing;
      continue;
    end if;
    if v_count > 0 and v_at[v_count] = at then
      update autotag.windows wn
      set requests = v_requests[v_old + 1 : v_count - 1] || (v_requests[v_count] + admitted),
          units = v_units[v_old + 1 : v_count - 1] || (v_units[v_count] + admitted * v_each),
          admitted_at = v_at[v_old + 1 :]
      where wn.ctid = v_ctid and wn.xmin = v_xmin;
    else
      update autotag.windows wn
      set requests = v_requests[v_old + 1 :] || admitted,
          units = v_units[v_old + 1 :] || (admitted * v_each),
          admitted_at = v_at[v_old + 1 :] || at
      where wn.ctid = v_ctid and wn.xmin = v_xmin;
    end if;
    exit when found;
  end loop;

  if admitted < p_wanted then
    v_min_wanted := case when p_partial then 1 else p_wanted end;
    if v_min_wanted <= v_max_requests and v_min_wanted::bigint * v_each <= v_max_units then
      v_need_requests := v_used_requests + admitted + v_min_wanted - v_max_requests;
      v_need_units := v_used_units + (admitted + v_min_wanted)::bigint * v_each - v_max_units;
      for i in v_old + 1 .. v_count loop
        exit when v_need_requests <= 0 and v_need_units <= 0;
        v_need_requests := v_need_requests - v_requests[i];
        v_need_units := v_need_units - v_units[i];
        retry_at := v_at[i] + v_length;
      end loop;
      -- Only requests that are admitted now are in the way. They leave after one whole window.
      if v_need_requests > 0 or v_need_units > 0 then
        retry_at := at + v_length;
      end if;
    end if;
  end if;
end $$;

-- Corrects a reservation by the real use. p_at: the time that admit() returned; a reservation that has left its window needs
-- no correction. If the use exceeds the limit, the window admits nothing until enough has left it.
create or replace function autotag.correct_window(
  p_workspace_id autotag.workspace_id, p_request_type text, p_at timestamptz, p_requests_delta integer, p_units_delta integer
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.windows wn
  set requests[array_position(wn.admitted_at, p_at)] =
        greatest(0, wn.requests[array_position(wn.admitted_at, p_at)] + p_requests_delta),
      units[array_position(wn.admitted_at, p_at)] =
        least(greatest(0, wn.units[array_position(wn.admitted_at, p_at)]::bigint + p_units_delta), 1000000000)
  where wn.workspace_id = p_workspace_id and wn.request_type = p_request_type
    and array_position(wn.admitted_at, p_at) is not null;
end $$;

-- Whether p_images fit the workspace's window, all or nothing; p_take: count them if so. retry_after: exact seconds; 0: allowed;
-- null: more than the limit, they never fit. reason: null, `window_full` (wait) or `exceeds_limit` (never).
create or replace function autotag.take_allowance(
  p_workspace_id autotag.workspace_id, p_request_type text, p_images integer, p_take boolean,
  out allowed boolean, out retry_after double precision, out reason text
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_service boolean := autotag.is_service();
  v_admission record;
begin
  -- Callers ask before each of their calls, so is_service() runs once, and check_member() only where it may refuse.
  if not v_service or p_workspace_id is null then
    perform autotag.check_member(p_workspace_id);
  end if;
  if p_request_type is null or p_request_type not in ('realtime', 'batch') then
    perform autotag.refuse(400, 'unknown_request_type', format('%L is not a request type.', left(p_request_type, 50)),
      'Pass realtime or batch.');
  end if;
  if p_images is distinct from 1 then   -- one image never exceeds a limit of images
    perform autotag.check_image_count(p_images);
  end if;
  -- A member could use up the workspace's ten batches per hour in ten calls. (A separate `if`: a subquery in the condition
  -- above would cost a service 5 µs, too.)
  if p_take and not v_service then
    if not (select s.members_may_take from autotag.settings s) then
      perform autotag.refuse(403, 'service_only', 'Only your server may call check_rate_limit.',
        'Call peek_rate_limit, or check_rate_limit with the secret key.');
    end if;
  end if;
  if p_request_type = 'realtime' then
    v_admission := autotag.admit(p_workspace_id, 'realtime', p_images, null, false, p_take);
  else
    v_admission := autotag.admit(p_workspace_id, 'batch', 1, p_images, false, p_take);
  end if;
  allowed := v_admission.admitted > 0;
  retry_after := case when allowed then 0 else extract(epoch from v_admission.retry_at - v_admission.at) end;
  reason := case when not allowed then case when retry_after is null then 'exceeds_limit' else 'window_full' end end;
end $$;
