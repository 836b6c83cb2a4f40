-- Automatic mode: uploads that cannot become a job yet, and images with which none can.

-- Adds what has arrived of one workspace and uploader to a postponed upload. Locks: arrivals (skip locked).
create or replace function autotag.join_upload(p_upload_id bigint, p_workspace_id uuid, p_uploader uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  update autotag.arrivals a set upload_id = p_upload_id
  where a.id in (
    select o.id from autotag.arrivals o
    where o.upload_id is null and o.workspace_id = p_workspace_id and o.uploader = p_uploader for update skip locked);
end $$;

-- Postpones an upload without room: until its quota renews, where all of it is billed; else until some of what is being tagged is
-- expected to be done (1 min to 1 h). Where the quota is its user's in all workspaces, the user's other uploads that are due wait as
-- long, so that one call settles a crowd of them. p_due: its postponed uploads that are due.
-- Locks: uploads and arrivals (skip locked).
create or replace function autotag.postpone_upload(p_workspace_id uuid, p_uploader uuid, p_due bigint[], p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user uuid := nullif(p_uploader, '00000000-0000-0000-0000-000000000000');
  v_prices autotag.reservation_prices := autotag.price_reservations(p_workspace_id);
  v_until timestamptz;
  v_scope text;
  v_other record;
begin
  select u.renews_at, u.scope into v_until, v_scope
  from autotag.quota_use(p_workspace_id, v_user, v_prices) u
  where u.maximum - u.billed < case u.kind when 'images' then 1 else greatest(v_prices.single, 0.0000001) end
    and not (u.kind = 'cost' and v_prices.free)
  order by u.renews_at desc, u.scope limit 1;
  v_until := coalesce(v_until, least(greatest(p_now + interval '1 min', (
    select min(j.eta) from autotag.jobs j
    where j.finished_at is null and (j.workspace_id = p_workspace_id or j.user_id = v_user))), p_now + interval '1 h'));
  if v_scope = 'user' and not exists (select from autotag.quotas q where q.scope = 'user' and q.workspace_id is not null) then
    for v_other in
      select l.workspace_id from autotag.list_uploads(p_now) l
      where l.uploader = p_uploader and l.arriving and l.due_at <= p_now and l.workspace_id <> p_workspace_id
    loop
      perform autotag.put_aside(v_other.workspace_id, p_uploader, '{}', v_until);
    end loop;
    update autotag.uploads u set seal_at = v_until, failures = 0
    where u.id in (
      select o.id from autotag.uploads o where o.uploader = p_uploader and o.seal_at <= p_now
      order by o.seal_at limit 1000 for update skip locked);
  end if;
  perform autotag.put_aside(p_workspace_id, p_uploader, p_due, v_until);
end $$;

-- Makes one postponed upload of what has arrived of a workspace and uploader, and of these postponed ones, which the caller has locked.
create or replace function autotag.put_aside(p_workspace_id uuid, p_uploader uuid, p_due bigint[], p_until timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_upload_id bigint := p_due[1];
begin
  if v_upload_id is null then
    insert into autotag.uploads (workspace_id, uploader, seal_at) values (p_workspace_id, p_uploader, p_until)
    returning id into v_upload_id;
  else
    update autotag.uploads u set seal_at = p_until, failures = 0 where u.id = v_upload_id;
    update autotag.arrivals a set upload_id = v_upload_id where a.upload_id = any (p_due[2:]);
    delete from autotag.uploads u where u.id = any (p_due[2:]);
  end if;
  perform autotag.join_upload(v_upload_id, p_workspace_id, p_uploader);
end $$;

-- An upload raised as a whole: finds the images that are the reason, and makes a job of the others. An image that the database refuses
-- (a trigger or constraint of the host, an expression in the adapter) fails, and its row shows that if the host lets it. Where the
-- reason is not the image (a held row, a full disk), the images are postponed with growing delays (1 s to 10 min).
-- p_arrivals[i] belongs to p_assets[i]; p_failures: attempts so far. ended: the arrivals that are settled.
create or replace function autotag.seal_apart(
  p_workspace_id uuid, p_uploader uuid, p_arrivals bigint[], p_assets uuid[], p_failures integer, p_state text, p_error text,
  out jobs integer, out ended bigint[], out notices jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user uuid := nullif(p_uploader, '00000000-0000-0000-0000-000000000000');
  v_odd jsonb := (autotag.find_odd(p_workspace_id, v_user, p_assets, p_state, p_error, 64)).odd;
  v_good uuid[] := array(select a from unnest(p_assets) a except select (o ->> 'asset')::uuid from jsonb_array_elements(v_odd) o);
  v_refused uuid[];
  v_upload_id bigint;
  v_try record;
begin
  jobs := 0;
  notices := '[]';
  if v_good <> '{}' then
    v_try := autotag.try_upload(p_workspace_id, v_user, array(select a from unnest(p_assets) a where a = any (v_good)), true);
    jobs := v_try.jobs;
    if v_try.state is not null then
      v_good := '{}';
    end if;
  end if;
  select coalesce(array_agg((o ->> 'asset')::uuid), '{}'), coalesce(jsonb_agg(jsonb_build_object('event', 'image_not_enqueued', 'notice',
    format('The database refused to enqueue image %s: %s', o ->> 'asset', autotag.printable(o ->> 'error', 500)))), '[]')
  into v_refused, notices
  from jsonb_array_elements(v_odd) o where autotag.is_refusal(o ->> 'state');
  if v_refused <> '{}' then
    perform autotag.show_refused(p_workspace_id, v_refused);
  end if;
  ended := array(select p.id from unnest(p_arrivals, p_assets) p (id, asset) where p.asset = any (v_good || v_refused));
  if cardinality(ended) < cardinality(p_arrivals) then
    insert into autotag.uploads (workspace_id, uploader, seal_at, failures)
    values (p_workspace_id, p_uploader, autotag.now() + least(interval '1 s' * power(2, least(p_failures, 20)), '10 min'), p_failures + 1)
    returning id into v_upload_id;
    update autotag.arrivals a set upload_id = v_upload_id where a.id = any (p_arrivals) and a.id <> all (ended);
    notices := notices || jsonb_build_array(jsonb_build_object('event', 'upload_postponed', 'notice', format(
      '%s images of workspace %s cannot be enqueued yet: %s', cardinality(p_arrivals) - cardinality(ended), p_workspace_id,
      autotag.printable(p_error, 500))));
  end if;
end $$;

-- Which of these images, that raised p_state and p_error together, raise: [{asset, state, error}]. At most p_budget tries; a try that
-- waited for a lock counts 20, and one that was cancelled because this call took too long is the last. What was not tried has the
-- state 55000 and the error of its whole.
create or replace function autotag.find_odd(
  p_workspace_id uuid, p_user_id uuid, p_assets uuid[], p_state text, p_error text, p_budget integer, out odd jsonb, out budget integer
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_half integer := cardinality(p_assets) / 2;
  v_part uuid[];
  v_try record;
begin
  budget := p_budget - case p_state when '55P03' then 20 when '57014' then p_budget else 0 end;
  if v_half = 0 or budget < 1 then
    odd := (select jsonb_agg(jsonb_build_object('asset', a, 'error', p_error,
      -- several that were not tried apart: nobody knows which of them is the reason
      'state', case when v_half = 0 then p_state else '55000' end)) from unnest(p_assets) a);
    return;
  end if;
  odd := '[]';
  for i in 1 .. 2 loop
    v_part := case i when 1 then p_assets[:v_half] else p_assets[v_half + 1:] end;
    if budget < 1 then
      odd := odd || (autotag.find_odd(p_workspace_id, p_user_id, v_part, '55000', p_error, 0)).odd;
      continue;
    end if;
    budget := budget - 1;
    v_try := autotag.try_upload(p_workspace_id, p_user_id, v_part, false);
    if v_try.state is not null then
      v_try := autotag.find_odd(p_workspace_id, p_user_id, v_part, v_try.state, v_try.error, budget);
      odd := odd || v_try.odd;
      budget := v_try.budget;
    end if;
  end loop;
end $$;

-- Whether an error is about the data of a row. Others may be over later: transactions, locks, limits, resources, configuration, and
-- errors of Postgres itself.
create or replace function autotag.is_refusal(p_state text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return left(p_state, 2) <> all ('{08,25,40,42,53,54,55,57,58,72,F0,HV,PT,XX}');
end $$;

-- Shows on the host's rows that these images failed, on each row that the host lets it.
create or replace function autotag.show_refused(p_workspace_id uuid, p_assets uuid[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_asset uuid;
begin
  foreach v_asset in array p_assets loop
    begin
      perform autotag.show_stage(array[v_asset], p_workspace_id, 'failed', 0, null,
        array['The database refused to enqueue this image.']);
      set constraints all immediate;
    exception when others or assert_failure then
      null;   -- the notice says why
    end;
  end loop;
end $$;

-- Quotas have changed: what waits for room is looked at again.
create or replace function autotag.resume_uploads() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.uploads u set seal_at = autotag.now()
  where u.id in (select o.id from autotag.uploads o where o.failures = 0 and o.seal_at > autotag.now() for update skip locked);
  perform pg_notify('autotag', 'uploads');
  return null;
end $$;

create or replace trigger autotag_resume_uploads after insert or update or delete on autotag.quotas
  for each statement execute function autotag.resume_uploads();
