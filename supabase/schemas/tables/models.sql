-- Models: prices, form of the request, end of life, and the token use learned from their answers.

-- A row is one model or a family. `gpt-6-luna` also covers its dated snapshots (gpt-6-luna-2026-10-01), and a name that ends
-- with a star (`gemini-2.5-flash*`) covers every name with that prefix. If several rows match, the longest name wins. A model
-- without a row works like any other, but its cost is unknown and shown as unknown.
--   insert into autotag.models (name, input_price, output_price) values ('my-model', 0.10, 0.40);
create table autotag.models (
  name text primary key check (length(name) between 1 and 100),
  -- Dollars per million tokens; null: unknown. Cached tokens and cache writes without a price cost input_price.
  input_price numeric check (input_price >= 0),
  cached_price numeric check (cached_price >= 0),
  cache_write_price numeric check (cache_write_price >= 0),
  output_price numeric check (output_price >= 0),
  batch_discount numeric not null default 0.5 check (batch_discount between 0 and 1),   -- discount in a batch …
  flex_discount numeric not null default 0.5 check (flex_discount between 0 and 1),     -- … and with service_tier flex
  priority_factor numeric not null default 2 check (priority_factor >= 0),              -- of the price, for priority and fast
  reasons boolean,                       -- whether it can reason before it answers; null: unknown
  -- sent with every request; null: not sent, so the model's own default applies
  reasoning_effort text check (reasoning_effort in ('none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max')),
  -- First guess of an image's tokens, until answers show them: per 32-pixel patch, or a base plus tokens per 512-pixel tile.
  patch_tokens numeric check (patch_tokens > 0),
  base_tokens integer check (base_tokens >= 0),
  tile_tokens integer check (tile_tokens >= 0),
  -- The form of the request. When the provider refuses a parameter, downgrade_request_form() moves it to the next form, and
  -- retry_features() moves it back after model_check_interval.
  cap_parameter text not null default 'max_completion_tokens'
    check (cap_parameter in ('max_completion_tokens', 'max_tokens', 'none')),
  answer_format text not null default 'json_schema' check (answer_format in ('json_schema', 'json_object', 'text')),
  sends_effort boolean not null default true,
  sends_detail boolean not null default true,
  sends_tier boolean not null default true,
  degraded jsonb not null default '{}',  -- {column: [its value before, its value since]} of what downgrade_request_form() changed …
  degraded_at timestamptz,               -- … and when it did so last
  -- End of life: as the API reports it once a day, or as known when the row was written.
  shutdown_date date,
  successor text
);
alter table autotag.models enable row level security;

-- Token counts of prompts and answers as weighted histograms: sizes 2 % apart, the newest answers weigh most. One row for
-- each combination of what changes the counts. No history is kept: old weights decay.
create table autotag.learned (
  model text not null,
  image_detail text not null,
  image_side integer not null,           -- 0: by image_detail
  reasoning_effort text not null,        -- '': not sent
  max_tags integer not null,
  tag_language text not null,
  brief_id bigint not null default 0,    -- of autotag.briefs; 0: the question alone
  answers bigint not null default 0,
  prompt jsonb not null default '{}',    -- {size: weight}
  output jsonb not null default '{}',
  learned_at timestamptz not null default '-infinity',
  primary key (model, image_detail, image_side, reasoning_effort, max_tags, tag_language, brief_id)
) with (fillfactor = 50);
alter table autotag.learned enable row level security;
