-- Other reports about the provider: the model's shutdown date, the Batch API, deleted files, webhooks.

-- When a worker (of the caller's login) was last assigned a poll of the provider; null: never.
create or replace function autotag.is_poll_assigned(p_worker uuid) returns timestamptz
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select wk.poll_assigned_at from autotag.workers wk where wk.id = p_worker and wk.login = session_user);
end $$;

-- Records the daily check of the model and the provider (claim_batches: look_up). p_facts: {model, shutdown_date, batches}, each
-- optional; batches: whether the provider has a Batch API. Ignores workers without an assigned poll, and the shutdown date of
-- another model than the present one. Returns a sentence for the log if the model shuts down soon, else null.
-- Locks: the model's row, provider.
create or replace function autotag.provider_checked(p_worker uuid, p_facts jsonb) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := (select p.question ->> 'model' from autotag.provider_limits p where p.question ->> 'model' = p_facts ->> 'model');
  m autotag.models := autotag.find_model(v_model);
  v_date date;
begin
  if autotag.is_poll_assigned(p_worker) is null then
    return null;
  end if;
  if p_facts ->> 'shutdown_date' ~ E'^20\\d{2}-\\d{2}-\\d{2}$' then
    begin
      v_date := (p_facts ->> 'shutdown_date')::date;
    exception when datetime_field_overflow then
      v_date := null;
    end;
  end if;
  if v_date is not null and v_model is not null then
    -- This comes before the lock of the provider row, so that no transaction that holds it waits for a model's row. The model
    -- gets its own row, a copy of its family's, because the shutdown date of one snapshot does not apply to the others.
    m.name := v_model;
    m.shutdown_date := v_date;
    m.cap_parameter := coalesce(m.cap_parameter, 'max_completion_tokens');
    m.answer_format := coalesce(m.answer_format, 'json_schema');
    m.sends_effort := coalesce(m.sends_effort, true);
    m.sends_detail := coalesce(m.sends_detail, true);
    m.sends_tier := coalesce(m.sends_tier, true);
    m.degraded := coalesce(m.degraded, '{}');
    m.batch_discount := coalesce(m.batch_discount, 0.5);
    m.flex_discount := coalesce(m.flex_discount, 0.5);
    m.priority_factor := coalesce(m.priority_factor, 2);
    insert into autotag.models as mo values (m.*)
    on conflict (name) do update set shutdown_date = v_date where mo.shutdown_date is distinct from v_date;
  end if;
  update autotag.provider_limits p
  set checked_at = autotag.now(),
      -- A failed attempt outweighs this check: a provider may list batches and not be able to create one.
      has_batches = case when p.batches_refused then false
        when jsonb_typeof(p_facts -> 'batches') = 'boolean' then (p_facts ->> 'batches')::boolean else p.has_batches end
  where p.id;
  perform pg_notify('autotag', 'realtime');
  return (autotag.describe_shutdown()) ->> 'message';
end $$;

-- Removes the ids of files that were deleted at OpenAI, so that they are not deleted again. p_unrecorded: batches whose unrecorded
-- files were deleted. Ignores batches that have not ended. A false report only means that OpenAI keeps the files until they expire.
-- Locks: batches by id.
create or replace function autotag.files_deleted(p_worker uuid, p_files text[], p_unrecorded uuid[] default '{}') returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_ids(cardinality(p_files));
  perform autotag.check_ids(cardinality(p_unrecorded));
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  update autotag.batches b
  set input_file_id = case when b.input_file_id = any (p_files) then null else b.input_file_id end,
      output_file_id = case when b.output_file_id = any (p_files) then null else b.output_file_id end,
      error_file_id = case when b.error_file_id = any (p_files) then null else b.error_file_id end,
      unrecorded_files = case when b.id = any (p_unrecorded) then 0 else b.unrecorded_files end
  where b.id in (
    select ended.id from autotag.batches ended
    where ended.state in ('done', 'cancelled')
      and (ended.input_file_id = any (p_files) or ended.output_file_id = any (p_files) or ended.error_file_id = any (p_files)
        or ended.id = any (p_unrecorded))
    order by ended.id for update);
end $$;

-- Handles a verified webhook delivery. Returns `accepted` (the next poll is due at once), `replayed` (this delivery was received
-- before), `ignored` (another type of event, or more than 600 deliveries in a minute) or `unknown` (no batch in flight has this
-- id; if it is being created, batch_submitted() makes the poll due). Locks: provider.
create or replace function autotag.receive_webhook(p_webhook_id text, p_event_type text, p_openai_batch_id text) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
begin
  if p_event_type is null or p_event_type not in
    ('batch.completed', 'batch.failed', 'batch.expired', 'batch.cancelled') then
    return 'ignored';
  end if;
  if coalesce(p_webhook_id !~ '^[!-~]{1,200}$', true) or autotag.clean_id(p_openai_batch_id) is null then
    perform autotag.refuse(400, 'bad_webhook', 'A webhook delivery needs an id and the id of a batch.',
      'Pass the header webhook-id and the event''s data.id.');
  end if;
  v_provider := autotag.lock_provider();
  if (select count(*) from autotag.webhooks wh where wh.received_at > v_provider.refilled_at - interval '1 min') >= 600 then
    return 'ignored';   -- no account ends that many batches; the next poll sees what is left out here
  end if;
  insert into autotag.webhooks (id, openai_batch_id, received_at)
  values (p_webhook_id, p_openai_batch_id, v_provider.refilled_at) on conflict do nothing;
  if not found then
    return 'replayed';
  end if;
  if not exists (
    select from autotag.batches b where b.openai_batch_id = p_openai_batch_id and b.state = 'submitted') then
    return 'unknown';
  end if;
  update autotag.provider_limits set next_poll_at = '-infinity' where id;
  perform pg_notify('autotag', 'batch');
  return 'accepted';
end $$;
