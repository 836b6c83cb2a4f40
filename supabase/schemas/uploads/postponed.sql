-- Automatic mode: uploads that cannot become a job yet, and images that prevent it.

-- Adds the new arrivals of one workspace and uploader to a postponed upload. Locks: arrivals (skip locked).
create or replace function autotag.join_upload(p_upload_id bigint, p_workspace_id autotag.workspace_id, p_uploader autotag.user_id) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  update autotag.arrivals ar set upload_id = p_upload_id
  where ar.id in (
    select arrived.id from autotag.arrivals arrived
    where arrived.upload_id is null and arrived.workspace_id = p_workspace_id and arrived.uploader = p_uploader for update skip locked);
end $$;

-- Postpones an upload for which a quota has no room. If the quota is used up by billed images, the upload waits until the quota renews.
-- Otherwise images that are being tagged have reserved the rest, and it waits until some of them are expected to be done (1 min to 1 h).
-- If the quota counts the user's images in all workspaces, the user's other uploads that are due wait as long, so that one call
-- postpones all of them. p_due: the ids of postponed uploads of this workspace and uploader that are due.
-- Locks: uploads and arrivals (skip locked).
create or replace function autotag.postpone_upload(p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_due bigint[], p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id := nullif(p_uploader, autotag.nobody());
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
  if v_scope = 'user' and not exists (select from autotag.quotas qu where qu.scope = 'user' and qu.workspace_id is not null) then
    for v_other in
      select l.workspace_id from autotag.list_uploads(p_now) l
      where l.uploader = p_uploader and l.arriving and l.due_at <= p_now and l.workspace_id <> p_workspace_id
    loop
      perform autotag.put_aside(v_other.workspace_id, p_uploader, '{}', v_until);
    end loop;
    update autotag.uploads up set seal_at = v_until, failures = 0
    where up.id in (
      select due.id from autotag.uploads due where due.uploader = p_uploader and due.seal_at <= p_now
      order by due.seal_at limit 1000 for update skip locked);
  end if;
  perform autotag.put_aside(p_workspace_id, p_uploader, p_due, v_until);
end $$;

-- Makes one postponed upload of the new arrivals of a workspace and uploader and of the postponed uploads p_due, which the caller has
-- locked.
create or replace function autotag.put_aside(p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_due bigint[], p_until timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_upload_id bigint := p_due[1];
begin
  if v_upload_id is null then
    insert into autotag.uploads (workspace_id, uploader, seal_at) values (p_workspace_id, p_uploader, p_until)
    returning id into v_upload_id;
  else
    update autotag.uploads up set seal_at = p_until, failures = 0 where up.id = v_upload_id;
    update autotag.arrivals ar set upload_id = v_upload_id where ar.upload_id = any (p_due[2:]);
    delete from autotag.uploads up where up.id = any (p_due[2:]);
  end if;
  perform autotag.join_upload(v_upload_id, p_workspace_id, p_uploader);
end $$;

-- After an upload has raised an error: finds the images that cause it, and makes a job of the others. An image that the database refuses
-- (a trigger or constraint of the host, an expression in the adapter) fails; its row shows the failure if the row can be written. If the
-- cause is not an image (a locked row, a full disk), the images are postponed with exponential backoff (1 s to 10 min).
-- p_arrivals[i] belongs to p_assets[i]; p_failures: attempts so far. ended: the arrivals that are done.
create or replace function autotag.seal_apart(
  p_workspace_id autotag.workspace_id, p_uploader autotag.user_id, p_arrivals bigint[], p_assets autotag.asset_id[], p_failures integer, p_state text, p_error text,
  out jobs integer, out ended bigint[], out notices jsonb
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_user autotag.user_id := nullif(p_uploader, autotag.nobody());
  v_odd jsonb := (autotag.find_odd(p_workspace_id, v_user, p_assets, p_state, p_error, 64)).odd;
  v_good autotag.asset_id[] := array(select a from unnest(p_assets) a except select (o ->> 'asset')::autotag.asset_id from jsonb_array_elements(v_odd) o);
  v_refused autotag.asset_id[];
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
  select coalesce(array_agg((o ->> 'asset')::autotag.asset_id), '{}'), coalesce(jsonb_agg(jsonb_build_object('event', 'image_not_enqueued', 'notice',
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
    update autotag.arrivals ar set upload_id = v_upload_id where ar.id = any (p_arrivals) and ar.id <> all (ended);
    notices := notices || jsonb_build_array(jsonb_build_object('event', 'upload_postponed', 'notice', format(
      '%s images of workspace %s cannot be enqueued yet: %s', cardinality(p_arrivals) - cardinality(ended), p_workspace_id,
      autotag.printable(p_error, 500))));
  end if;
end $$;

-- Finds which of these images raise, after all of them together raised p_state and p_error: [{asset, state, error}]. It makes at most
-- p_budget tries. A try that waited for a lock counts 20, and a try that was cancelled because this call took too long is the last one.
-- Images that were not tried alone get the state 55000 and the error of their group.
create or replace function autotag.find_odd(
  p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_assets autotag.asset_id[], p_state text, p_error text, p_budget integer, out odd jsonb, out budget integer
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_half integer := cardinality(p_assets) / 2;
  v_part autotag.asset_id[];
  v_try record;
begin
  budget := p_budget - case p_state when '55P03' then 20 when '57014' then p_budget else 0 end;
  if v_half = 0 or budget < 1 then
    odd := (select jsonb_agg(jsonb_build_object('asset', a, 'error', p_error,
      -- several that were not tried apart: it is unknown which of them is the cause
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

-- Whether an error is about the data of a row. Other errors may pass: transactions, locks, limits, resources, configuration, and errors
-- of Postgres itself.
create or replace function autotag.is_refusal(p_state text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return left(p_state, 2) <> all ('{08,25,40,42,53,54,55,57,58,72,F0,HV,PT,XX}');
end $$;

-- Shows on the host's rows that these images failed. A row that raises is left out.
create or replace function autotag.show_refused(p_workspace_id autotag.workspace_id, p_assets autotag.asset_id[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
  v_asset autotag.asset_id;
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

-- Makes uploads due that wait for room, because quotas have changed.
create or replace function autotag.resume_uploads() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update autotag.uploads up set seal_at = autotag.now()
  where up.id in (
    select waiting.id from autotag.uploads waiting
    where waiting.failures = 0 and waiting.seal_at > autotag.now() for update skip locked);
  perform pg_notify('autotag', 'uploads');
  return null;
end $$;

create or replace trigger autotag_resume_uploads after insert or update or delete on autotag.quotas
  for each statement execute function autotag.resume_uploads();
