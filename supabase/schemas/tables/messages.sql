-- Messages on their way out (outbox) and deliveries that have arrived (webhooks).

-- OpenAI says by webhook that a batch has ended. The word is taken for a hint and not for the truth: it makes
-- the workers look at OpenAI now instead of within a minute, and what they see there counts.

-- Where realtime.send() does not exist (older self-hosted stacks) messages wait here, and a worker delivers
-- them through Realtime's HTTP broadcast endpoint.
create table autotag.outbox (
  id bigint generated always as identity primary key,
  topic text not null,
  event text not null,
  payload jsonb not null,
  private boolean not null,
  created_at timestamptz not null
);
alter table autotag.outbox enable row level security;

-- Deliveries by their id, so that one that comes again (OpenAI retries for up to 72 hours) does nothing.
create table autotag.webhooks (
  id text primary key check (length(id) between 1 and 200),
  openai_batch_id text not null check (length(openai_batch_id) between 1 and 200),
  received_at timestamptz not null
);
create index webhooks_batch_idx on autotag.webhooks (openai_batch_id);
create index webhooks_received_at_idx on autotag.webhooks (received_at);
alter table autotag.webhooks enable row level security;
