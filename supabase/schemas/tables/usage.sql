-- Usage, quotas, and the durations of batches.

-- Usage: one row per workspace, user, day (UTC), model and service tier, from the figures that the provider returns.
create table autotag.usage (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id not null,
  user_id autotag.user_id,
  day date not null,
  model text not null,                   -- the model that answered, as the provider names it
  service_tier text not null,            -- the tier it was billed at: default, flex, priority …, or batch
  images integer not null default 0,     -- images tagged
  requests integer not null default 0,   -- answers the provider billed
  input_tokens bigint not null default 0,         -- prompts, including cached tokens
  cached_tokens bigint not null default 0,
  cache_write_tokens bigint not null default 0,
  output_tokens bigint not null default 0,        -- answers, including reasoning
  reasoning_tokens bigint not null default 0,
  cost numeric                           -- dollars, by the prices in autotag.models at that time; null: no price known
) with (fillfactor = 50);
create unique index usage_key on autotag.usage (workspace_id, day, user_id, model, service_tier) nulls not distinct;
create index usage_day_idx on autotag.usage (day);
create index usage_user_idx on autotag.usage (user_id, day);
create index usage_unpriced_idx on autotag.usage (model) where cost is null;
alter table autotag.usage enable row level security;

-- Quotas: images and dollars per day or month (UTC), for a workspace as a whole or for each of its users.
--   insert into autotag.quotas (scope, period, max_images) values ('user', 'day', 500);          -- every user
--   insert into autotag.quotas (workspace_id, scope, period, max_cost) values ('…', 'workspace', 'month', 20);
-- For each scope and period one quota applies: the one that names the user, else the one that names the workspace, else the
-- general one. A null maximum is no limit, so a specific quota can also lift a general one.
create table autotag.quotas (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id,                     -- null: every workspace
  user_id autotag.user_id,                          -- null: every user (scope user)
  scope text not null check (scope in ('workspace', 'user')),
  period text not null check (period in ('day', 'month')),
  max_images integer check (max_images >= 0),
  max_cost numeric check (max_cost >= 0),
  check (scope = 'user' or user_id is null)
);
create unique index quotas_key on autotag.quotas (scope, period, workspace_id, user_id) nulls not distinct;
alter table autotag.quotas enable row level security;

-- The dollars that images reserve in quotas while they are being tagged.
create type autotag.reservation_prices as (
  single numeric,              -- an image that goes as a single call …
  batch numeric,               -- … or in a batch
  token numeric,               -- each token of a cap above the usual one
  free boolean,                -- the prices are known, and all are zero
  usual_cap integer            -- tokens
);

-- How long OpenAI took for each batch that it completed.
create table autotag.durations (
  id bigint generated always as identity primary key,
  images integer not null check (images > 0),
  started_at timestamptz not null,       -- when OpenAI got the batch
  seconds double precision not null check (seconds > 0)
);
create index durations_started_at_idx on autotag.durations (started_at);
alter table autotag.durations enable row level security;
