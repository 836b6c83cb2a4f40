-- What was used (usage), what may be used (quotas), and how long batches took (durations).

-- Who used what: one row per workspace, user, day (UTC), model and service tier, as the provider's own usage figures say.
create table autotag.usage (
  id bigint generated always as identity primary key,
  workspace_id uuid not null,
  user_id uuid,
  day date not null,
  model text not null,                   -- that answered, by its own word
  service_tier text not null,            -- that it was billed in: default, flex, priority …, or batch
  images integer not null default 0,     -- images tagged
  requests integer not null default 0,   -- answers the provider billed
  input_tokens bigint not null default 0,         -- prompts, the cached tokens included
  cached_tokens bigint not null default 0,
  cache_write_tokens bigint not null default 0,
  output_tokens bigint not null default 0,        -- answers, the reasoning included
  reasoning_tokens bigint not null default 0,
  cost numeric                           -- dollars, by the prices of autotag.models then; null: the model has none
) with (fillfactor = 50);
create unique index usage_key on autotag.usage (workspace_id, day, user_id, model, service_tier) nulls not distinct;
create index usage_day_idx on autotag.usage (day);
create index usage_user_idx on autotag.usage (user_id, day);
create index usage_unpriced_idx on autotag.usage (model) where cost is null;
alter table autotag.usage enable row level security;

-- What may be used: images and dollars, a day or a month (UTC), by a workspace as a whole or by each of its users.
--   insert into autotag.quotas (scope, period, max_images) values ('user', 'day', 500);          -- every user
--   insert into autotag.quotas (workspace_id, scope, period, max_cost) values ('…', 'workspace', 'month', 20);
-- Of several that fit, for each scope and period the one that names the user counts, else the one that names the
-- workspace, else the general one. A null maximum is no limit, so that a special quota can also lift a general one.
create table autotag.quotas (
  id bigint generated always as identity primary key,
  workspace_id uuid,                     -- null: every workspace
  user_id uuid,                          -- null: every user (scope user)
  scope text not null check (scope in ('workspace', 'user')),
  period text not null check (period in ('day', 'month')),
  max_images integer check (max_images >= 0),
  max_cost numeric check (max_cost >= 0),
  check (scope = 'user' or user_id is null)
);
create unique index quotas_key on autotag.quotas (scope, period, workspace_id, user_id) nulls not distinct;
alter table autotag.quotas enable row level security;

-- How long OpenAI took for the batches that it completed.
create table autotag.durations (
  id bigint generated always as identity primary key,
  images integer not null check (images > 0),
  started_at timestamptz not null,       -- when OpenAI got the batch
  seconds double precision not null check (seconds > 0)
);
create index durations_started_at_idx on autotag.durations (started_at);
alter table autotag.durations enable row level security;
