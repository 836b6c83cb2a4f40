-- OpenAI says by webhook that a batch has ended. The word is taken for a hint and not for the truth: it makes
-- the workers look at OpenAI now instead of within a minute, and what they see there counts.

-- Deliveries by their id, so that one that comes again (OpenAI retries for up to 72 hours) does nothing.
create table autotag.webhooks (
  id text primary key check (length(id) between 1 and 200),
  openai_batch_id text not null check (length(openai_batch_id) between 1 and 200),
  received_at timestamptz not null
);
create index webhooks_batch_idx on autotag.webhooks (openai_batch_id);
create index webhooks_received_at_idx on autotag.webhooks (received_at);
alter table autotag.webhooks enable row level security;

-- A verified delivery. Returns what came of it: `accepted`, `replayed` (had it before), `ignored` (another
-- kind of event) or `unknown` (no batch of ours; one that is being created now is looked at when it is known).
-- Locks: provider.
create function autotag.receive_webhook(p_webhook_id text, p_event_type text, p_openai_batch_id text) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
begin
  if p_event_type is null or p_event_type not in
    ('batch.completed', 'batch.failed', 'batch.expired', 'batch.cancelled') then
    return 'ignored';
  end if;
  if coalesce(p_webhook_id !~ '^[!-~]{1,200}$', true) or autotag.check_id(p_openai_batch_id) is null then
    perform autotag.refuse(400, 'bad_webhook', 'A delivery has an id and names a batch.',
      'Pass the header webhook-id and the event''s data.id.');
  end if;
  v_provider := autotag.lock_provider();
  insert into autotag.webhooks (id, openai_batch_id, received_at)
  values (p_webhook_id, p_openai_batch_id, v_provider.refilled_at) on conflict do nothing;
  if not found then
    return 'replayed';
  end if;
  if not exists (
    select from autotag.batches b where b.openai_batch_id = p_openai_batch_id and b.state = 'submitted') then
    return 'unknown';
  end if;
  update autotag.provider_limits set next_poll_at = '-infinity';
  perform pg_notify('autotag', 'batch');
  return 'accepted';
end $$;
