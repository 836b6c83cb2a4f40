-- Models: what each costs, how it is asked, what its answers were like, and when it shuts down.

-- A row is one model, or one family: `gpt-6-luna` also stands for its dated snapshots (gpt-6-luna-2026-10-01), and a
-- name that ends with a star (`gemini-2.5-flash*`) for every name that begins so. Of several rows that fit, the longest
-- name counts. A model without a row works like any other; what it costs is unknown then, and said to be.
--   insert into autotag.models (name, input_price, output_price) values ('my-model', 0.10, 0.40);
create table autotag.models (
  name text primary key check (length(name) between 1 and 100),
  -- dollars per million tokens; null: unknown. Without a price of their own cached tokens and cache writes cost input_price
  input_price numeric check (input_price >= 0),
  cached_price numeric check (cached_price >= 0),
  cache_write_price numeric check (cache_write_price >= 0),
  output_price numeric check (output_price >= 0),
  batch_discount numeric not null default 0.5 check (batch_discount between 0 and 1),   -- the share taken off in a batch
  flex_discount numeric not null default 0.5 check (flex_discount between 0 and 1),     -- … and with service_tier flex
  priority_factor numeric not null default 2 check (priority_factor >= 0),              -- what priority and fast cost of the price
  reasons boolean,                       -- whether it can think before it answers; null: not known
  -- asked for with every request; null: not sent, so that the model's own default holds
  reasoning_effort text check (reasoning_effort in ('none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max')),
  -- First guess of an image's tokens, until answers tell: so many per 32-pixel patch; or a base and so many per 512-pixel tile
  patch_tokens numeric check (patch_tokens > 0),
  base_tokens integer check (base_tokens >= 0),
  tile_tokens integer check (tile_tokens >= 0),
  -- How it has to be asked: set by itself when the provider refuses a form, one step at a time
  cap_parameter text not null default 'max_completion_tokens'
    check (cap_parameter in ('max_completion_tokens', 'max_tokens', 'none')),
  answer_format text not null default 'json_schema' check (answer_format in ('json_schema', 'json_object', 'text')),
  sends_effort boolean not null default true,
  sends_detail boolean not null default true,
  sends_tier boolean not null default true,
  -- End of life: the API's own word, asked once a day, or what was known when this row was written
  shutdown_date date,
  successor text
);
alter table autotag.models enable row level security;

-- What answers were like: how many tokens prompts and answers had, as weights by size (sizes 2 % apart, the newest
-- counting most), one row for everything that changes them. There is no history: old weights fade.
create table autotag.learned (
  model text not null,
  image_detail text not null,
  reasoning_effort text not null,        -- '': not sent
  max_tags integer not null,
  tag_language text not null,
  answers bigint not null default 0,
  prompt jsonb not null default '{}',    -- {size: weight}
  output jsonb not null default '{}',
  learned_at timestamptz not null default '-infinity',
  primary key (model, image_detail, reasoning_effort, max_tags, tag_language)
) with (fillfactor = 50);
alter table autotag.learned enable row level security;
