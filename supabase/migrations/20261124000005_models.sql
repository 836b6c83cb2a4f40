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

-- Prices: OpenAI's pages, autumn 2026. Cache writes of the 5.6 and 6 families cost 1.25 times the input. Shutdowns: OpenAI's
-- page of deprecations on 2026-11-28. Where reasoning is a choice, tagging needs none: OpenAI's own advice for the move from
-- the 4.1 family. OpenAI publishes no figure for the images of the newer models; 1.62 tokens a patch is that of gpt-4.1-mini.
insert into autotag.models (name, input_price, cached_price, cache_write_price, output_price, reasons, reasoning_effort, patch_tokens) values
  ('gpt-6-luna', 0.10, 0.01, 0.125, 0.50, true, 'none', 1.62),
  ('gpt-6.1-terra', 1.00, 0.05, 1.25, 5.00, true, 'none', 1.62),
  ('gpt-5.6-luna', 0.20, 0.02, 0.25, 1.20, true, 'none', 1.62),
  ('gpt-5.6-terra', 2.00, 0.20, 2.50, 12.00, true, 'none', 1.62),
  ('gpt-5.6-sol', 4.00, 0.40, 5.00, 20.00, true, 'none', 1.62),
  ('gpt-5.4-mini', 0.75, 0.075, null, 4.50, true, 'none', 1.62);
insert into autotag.models (name, input_price, cached_price, output_price, reasons, patch_tokens, base_tokens, tile_tokens, shutdown_date, successor) values
  ('gpt-4.1-mini', 0.40, 0.10, 1.60, false, 1.62, null, null, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4o-mini', 0.15, 0.075, 0.60, false, null, 2833, 5667, '2027-01-14', 'gpt-6-luna'),
  -- known to shut down; their prices are not kept here
  ('gpt-4.1', null, null, null, false, null, 85, 170, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4o', null, null, null, false, null, 85, 170, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4.1-nano', null, null, null, false, 2.46, null, null, '2026-10-23', null),
  ('o4-mini', null, null, null, true, 1.72, null, null, '2026-10-23', null),
  ('gpt-5', null, null, null, true, null, 70, 140, '2026-12-11', null),
  ('gpt-5-mini', null, null, null, true, 1.62, null, null, '2026-12-11', null),
  ('gpt-5-nano', null, null, null, true, 2.46, null, null, '2026-12-11', null);

-- Whether a row of this name stands for a model.
create function autotag.names_model(p_row text, p_model text) returns boolean
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select p_model = p_row
    or right(p_row, 1) = '*' and starts_with(p_model, left(p_row, -1))
    -- asked for mistral-small-latest, mistral-small-2506 answers
    or right(p_row, 7) = '-latest' and starts_with(p_model, left(p_row, -6))
    or starts_with(p_model, p_row) and substr(p_model, length(p_row) + 1) ~ '^[-@](latest|\d{4}-?\d{2}-?\d{2}|\d{4})$'
$$;

-- The row that stands for a model; all null when there is none.
create function autotag.find_model(p_model text) returns autotag.models
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_row autotag.models;
begin
  select * into v_row from autotag.models m where m.name = p_model;
  if not found then
    select * into v_row from autotag.models m
    where autotag.names_model(m.name, p_model) order by length(m.name) desc limit 1;
  end if;
  return v_row;
end $$;

-- Dollars that tokens of a model cost in a service tier (`batch` for a batch); null: unknown, because the model has no
-- prices or nobody knows the tier. Input counts the cached and cache-written tokens too, as OpenAI's figures do.
create function autotag.price_tokens(
  p_model text, p_tier text, p_input numeric, p_cached numeric, p_cache_write numeric, p_output numeric
) returns numeric
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_model);
begin
  return (
    greatest(p_input - p_cached - p_cache_write, 0) * m.input_price
    + p_cached * coalesce(m.cached_price, m.input_price)
    + p_cache_write * coalesce(m.cache_write_price, m.input_price)
    + p_output * m.output_price
  ) / 1000000 * case
    when p_tier in ('default', 'auto', 'standard', 'on_demand') then 1
    when p_tier = 'batch' then 1 - m.batch_discount
    when p_tier = 'flex' then 1 - m.flex_discount
    when p_tier in ('priority', 'fast') then m.priority_factor end;
end $$;

-- Everything that is asked of a model besides the picture, as workers get it. p_effort null: that of the model's row.
create function autotag.question_for(p_model text, p_effort text default null) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  m autotag.models := autotag.find_model(p_model);
begin
  select * into v_settings from autotag.settings;
  return jsonb_build_object(
    'model', p_model, 'image_detail', v_settings.image_detail,
    'max_tags', v_settings.max_tags, 'tag_language', v_settings.tag_language,
    'reasoning_effort', case when coalesce(m.sends_effort, true) then coalesce(p_effort, m.reasoning_effort) end,
    'service_tier', case when v_settings.service_tier <> 'auto' and coalesce(m.sends_tier, true) then v_settings.service_tier end,
    'cap_parameter', coalesce(m.cap_parameter, 'max_completion_tokens'),
    'answer_format', coalesce(m.answer_format, 'json_schema'),
    'sends_detail', coalesce(m.sends_detail, true));
end $$;

-- The same of the model in use. It is derived whenever somebody asks (sync_question), so that one UPDATE of settings or
-- models is all it takes to change it.
create function autotag.describe_question() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.question_for((select s.model from autotag.settings s));
end $$;

-- Wakes the workers: their next claim notices what has changed.
create function autotag.announce_change() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_notify('autotag', 'realtime');
  perform pg_notify('autotag', 'batch');
  return null;
end $$;
create trigger autotag_announce after update on autotag.settings
  for each statement execute function autotag.announce_change();
create trigger autotag_announce after insert or update or delete on autotag.models
  for each statement execute function autotag.announce_change();

-- The provider refused a parameter: the model's row takes the next form that is known. False: there is none, or somebody
-- holds the row. A model without a row gets one (without prices).
create function autotag.degrade_model(p_model text, p_parameter text) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_model);
begin
  if m.name is null then
    insert into autotag.models (name) values (p_model) on conflict do nothing;
    m.name := p_model;
  end if;
  select * into m from autotag.models x where x.name = m.name for update skip locked;
  if not found then
    return false;
  end if;
  case p_parameter
    when 'token_cap' then
      update autotag.models x set cap_parameter = case x.cap_parameter when 'max_completion_tokens' then 'max_tokens' else 'none' end
      where x.name = m.name and x.cap_parameter <> 'none';
    when 'response_format' then
      update autotag.models x set answer_format = case x.answer_format when 'json_schema' then 'json_object' else 'text' end
      where x.name = m.name and x.answer_format <> 'text';
    when 'reasoning_effort' then
      update autotag.models x set sends_effort = false
      where x.name = m.name and x.sends_effort and x.reasoning_effort is not null;
    when 'detail' then
      update autotag.models x set sends_detail = false where x.name = m.name and x.sends_detail;
    when 'service_tier' then
      update autotag.models x set sends_tier = false where x.name = m.name and x.sends_tier;
    else
      return false;
  end case;
  return found;
end $$;

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

-- The size a count of tokens is kept as: the next of those that are 2 % apart.
create function autotag.token_size(p_tokens integer) returns integer
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case when p_tokens <= 50 then greatest(p_tokens, 1) else ceil(power(1.02, ceil(ln(p_tokens) / ln(1.02) - 0.000001)))::integer end
$$;

-- The weights after new counts: each new one makes the old ones fade by its share of the memory (in answers).
create function autotag.blend(p_old jsonb, p_counts integer[], p_memory integer) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select coalesce(jsonb_object_agg(b.size, b.weight), '{}')
  from (
    select x.size, round(sum(x.weight)::numeric, 3) as weight
    from (
      select o.key as size, o.value::double precision * power(1 - 1.0 / p_memory, cardinality(p_counts)) as weight
      from jsonb_each_text(p_old) o
      union all
      select autotag.token_size(c)::text, 1 from unnest(p_counts) c) x
    group by x.size having sum(x.weight) > 0.01) b
$$;

-- The size that a share of the weights does not exceed; null without any.
create function autotag.quantile(p_weights jsonb, p_share double precision) returns integer
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select min(s.size) from (
    select w.key::integer as size, sum(w.value::double precision) over (order by w.key::integer) as upto,
      sum(w.value::double precision) over () as total
    from jsonb_each_text(p_weights) w) s
  where s.upto >= p_share * s.total - 0.000001
$$;

create function autotag.mean_size(p_weights jsonb) returns integer
language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select round(sum(w.key::integer * w.value::double precision) / sum(w.value::double precision))::integer
  from jsonb_each_text(p_weights) w
$$;

-- First guess of a prompt's tokens: the instructions and the schema (measured with o200k and rounded up), and a square
-- picture, which costs the most. The worker sends 512 pixels a side for detail low and 2,048 for high. A model without a
-- row counts like the dearest (gpt-4o-mini).
create function autotag.guess_prompt(p_question jsonb) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_question ->> 'model');
  v_low boolean := p_question ->> 'image_detail' = 'low';
begin
  return 300 + case
    when m.patch_tokens is not null then ceil(least(case when v_low then 256 else 4096 end, 1536) * m.patch_tokens)
    -- a square is scaled to 768 pixels a side: four tiles of 512
    else coalesce(m.base_tokens, 2833) + case when v_low then 0 else 4 * coalesce(m.tile_tokens, 5667) end end;
end $$;

-- First guess of the tokens that an answer may need: some 30 a tag, and what thinking takes. OpenAI names no figures for
-- the efforts; these are generous, because an answer that is cut off is paid for and of no use.
create function autotag.guess_output(p_question jsonb) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_question ->> 'model');
  v_effort text := p_question ->> 'reasoning_effort';
begin
  return 100 + 30 * (p_question ->> 'max_tags')::integer + case
    when v_effort = 'none' or m.reasons = false then 0
    when v_effort is null and m.reasons is null then 1000
    when v_effort = 'minimal' then 500
    when v_effort = 'low' then 1500
    when v_effort = 'high' then 10000
    when v_effort in ('xhigh', 'max') then 25000
    else 4000 end;  -- medium, and the model's own default
end $$;
