-- Outgoing messages (outbox) and webhook deliveries from OpenAI (webhooks).

-- Messages wait here where realtime.send() does not exist (older self-hosted stacks). A worker delivers them through
-- Realtime's HTTP broadcast endpoint.
create table autotag.outbox (
  id bigint generated always as identity primary key,
  topic text not null,
  event text not null,
  payload jsonb not null,
  private boolean not null,
  created_at timestamptz not null
);
alter table autotag.outbox enable row level security;

-- OpenAI's webhooks report that a batch has ended. A delivery is only a hint: the workers poll OpenAI now instead of within
-- a minute, and act on what the poll returns. Deliveries are kept by id, so that a repeated one does nothing (OpenAI retries
-- for up to 72 hours).
create table autotag.webhooks (
  id text primary key check (length(id) between 1 and 200),
  openai_batch_id text not null check (length(openai_batch_id) between 1 and 200),
  received_at timestamptz not null
);
create index webhooks_batch_idx on autotag.webhooks (openai_batch_id);
create index webhooks_received_at_idx on autotag.webhooks (received_at);
alter table autotag.webhooks enable row level security;
