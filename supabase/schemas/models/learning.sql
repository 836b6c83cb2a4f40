-- Token use of a model's answers: histograms of prompt and answer tokens that decay, and the reservations derived from them.

-- A histogram after new counts: {size: weight}. Each new count multiplies the old weights by 1 - 1 / p_memory (in answers). A bin is
-- named by its upper end, and bins are 2 % apart.
create or replace function autotag.decayed_histogram(p_old jsonb, p_counts integer[], p_memory integer) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_object_agg(b.size, b.weight), '{}')
    from (
      select x.size, round(sum(x.weight)::numeric, 3) as weight
      from (
        select o.key as size, o.value::double precision * power(1 - 1.0 / p_memory, cardinality(p_counts)) as weight
        from jsonb_each_text(p_old) o
        union all
        select (case when c.tokens <= 50 then greatest(c.tokens, 1)
          else ceil(power(1.02, ceil(ln(c.tokens) / ln(1.02) - 0.000001)))::integer end)::text, c.answers
        from (select u.tokens, count(*) as answers from unnest(p_counts) u (tokens) group by u.tokens) c) x
      group by x.size having sum(x.weight) > 0.01) b);
end $$;

-- The quantile p_share (0 to 1) of a histogram; null for an empty one.
create or replace function autotag.quantile(p_weights jsonb, p_share double precision) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select min(x.size) from (
      select w.key::integer as size, sum(w.value::double precision) over (order by w.key::integer) as upto,
        sum(w.value::double precision) over () as total
      from jsonb_each_text(p_weights) w) x
    where x.upto >= p_share * x.total - 0.000001);
end $$;

create or replace function autotag.mean_size(p_weights jsonb) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select round(sum(w.key::integer * w.value::double precision) / sum(w.value::double precision))::integer
    from jsonb_each_text(p_weights) w);
end $$;

-- First guess of a prompt's tokens: 300 for instructions and schema (measured with o200k and rounded up), plus a square image,
-- the most expensive shape. The worker sends image_side pixels a side, or 512 for detail low and 2,048 for high. A model without a row
-- counts as the most expensive one (gpt-4o-mini).
create or replace function autotag.guess_prompt(p_question jsonb) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  m autotag.models := autotag.find_model(p_question ->> 'model');
  v_low boolean := p_question ->> 'image_detail' = 'low';
  v_side integer := coalesce((p_question ->> 'image_side')::integer, case when v_low then 512 else 2048 end);
begin
  return 300 + case
    when m.patch_tokens is not null then ceil(least(ceil(v_side / 32.0) ^ 2, 1536) * m.patch_tokens)
    -- the provider scales a square to at most 768 pixels a side: up to four tiles of 512
    else coalesce(m.base_tokens, 2833)
      + case when v_low then 0 else ceil(least(v_side, 768) / 512.0) ^ 2 * coalesce(m.tile_tokens, 5667) end end;
end $$;

-- First guess of the tokens that an answer may need: 100, 30 per tag, and the reasoning. OpenAI publishes no figures for
-- reasoning efforts; these are generous, because an answer that is cut off is billed and unusable.
create or replace function autotag.guess_output(p_question jsonb) returns integer
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
    else 4000 end;  -- medium, and a model's own default
end $$;

-- Sets what one image reserves and what it uses on average, from what was learned about the present question, or from the
-- first guess below 10 answers. Few answers get a margin of 2 / answers, because ten may not have included the largest.
-- p_brief: what is asked beside the question; the row that is returned then says what such an image needs. The caller holds the provider
-- row.
create or replace function autotag.estimate_tokens(p_provider autotag.provider_limits, p_brief autotag.briefs default null)
returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_learned autotag.learned;
  v_question jsonb := p_provider.question;
  v_prompt_guess integer := autotag.guess_prompt(v_question) + coalesce(p_brief.extra_prompt, 0);
  v_output_guess integer := coalesce(p_brief.extra_output, 0)
    + autotag.guess_output(v_question || jsonb_build_object('max_tags', coalesce(p_brief.tag_count, (v_question -> 'max_tags')::integer)));
  v_prompt integer := v_prompt_guess;
  v_output integer := v_output_guess;
  v_margin double precision;
begin
  select * into v_settings from autotag.settings;
  select * into v_learned from autotag.learned l
  where l.model = v_question ->> 'model' and l.image_detail = v_question ->> 'image_detail'
    and l.image_side = coalesce((v_question ->> 'image_side')::integer, 0)
    and l.reasoning_effort = coalesce(v_question ->> 'reasoning_effort', '')
    and l.max_tags = (v_question ->> 'max_tags')::integer and l.tag_language = v_question ->> 'tag_language'
    and l.brief_id = coalesce(p_brief.id, 0);
  p_provider.prompt_mean := v_prompt;
  p_provider.output_mean := v_output / 3;
  if v_learned.answers >= 10 then
    v_margin := 1 + 2.0 / v_learned.answers;
    v_prompt := ceil(autotag.quantile(v_learned.prompt, 0.99) * v_margin);
    p_provider.prompt_mean := autotag.mean_size(v_learned.prompt);
    p_provider.output_mean := autotag.mean_size(v_learned.output);
    -- Cut off 0.5 % of answers: each costs another call, but a higher cap would cost every call its share of the limit.
    v_output := ceil(autotag.quantile(v_learned.output, 0.995) * 1.05 * v_margin) + 8;
    if v_learned.answers < 30 then
      v_output := greatest(v_output, v_output_guess);
    end if;
  end if;
  -- A cap above the limit per minute would never be admitted.
  v_output := least(greatest(v_output, v_settings.min_output_tokens), v_settings.max_output_tokens,
    greatest((0.9 * p_provider.tokens_per_minute)::integer - v_prompt, v_settings.min_output_tokens));
  -- Limit a learned prompt so that the workspace's minute always holds two images, or as many as with the first guess: too
  -- high a value slows tagging down but never stops it. settle() corrects the windows by the real use.
  v_prompt := least(v_prompt, greatest(v_settings.realtime_tokens_per_minute / 2 - v_output, v_prompt_guess));
  p_provider.output_tokens := v_output;
  p_provider.tokens_per_image := v_prompt + v_output;
  return p_provider;
end $$;

-- Updates the provider's row when the question has changed (settings or models were updated). A new question has to be proven, unless
-- only max_tags, tag_language or image_side changed. Its tokens are estimated again in any case. Every claim calls this. The caller holds
-- the provider row.
create or replace function autotag.sync_question(p_provider autotag.provider_limits) returns autotag.provider_limits
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_question jsonb := autotag.describe_question();
  v_prompt_only text[] := array['max_tags', 'tag_language', 'image_side'];  -- they change no parameter, so no provider refuses them
begin
  if v_question = p_provider.question then
    return p_provider;
  end if;
  if v_question - v_prompt_only <> p_provider.question - v_prompt_only then
    p_provider.proven_at := null;
    p_provider.probe_at := null;
    p_provider.checked_at := '-infinity';
  end if;
  p_provider.question := v_question;
  p_provider.question_version := p_provider.question_version + 1;
  p_provider.question_since := autotag.now();
  p_provider := autotag.estimate_tokens(p_provider);
  update autotag.provider_limits p
  set question = p_provider.question, question_version = p_provider.question_version,
      question_since = p_provider.question_since, proven_at = p_provider.proven_at, probe_at = p_provider.probe_at,
      checked_at = p_provider.checked_at, tokens_per_image = p_provider.tokens_per_image,
      output_tokens = p_provider.output_tokens, prompt_mean = p_provider.prompt_mean, output_mean = p_provider.output_mean
  where p.id;
  return p_provider;
end $$;

-- Learns from the prompt and answer tokens (parallel arrays) of answers to a question (null: the present one). p_briefs: what each was
-- asked beside the question; null: nothing. The caller holds the provider row.
create or replace function autotag.learn(p_inputs integer[], p_outputs integer[], p_question jsonb default null, p_briefs bigint[] default null)
returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_group record;
begin
  if array_remove(p_briefs, null) = '{}' is not false then
    perform autotag.learn_brief(null, p_inputs, p_outputs, p_question);
    return;
  end if;
  for v_group in
    select u.brief, array_agg(u.input) as inputs, array_agg(u.output) as outputs
    from unnest(p_inputs, p_outputs, p_briefs) u (input, output, brief) group by u.brief order by u.brief
  loop
    perform autotag.learn_brief(v_group.brief, v_group.inputs, v_group.outputs, p_question);
  end loop;
end $$;

-- Learns from answers that were all asked the same. A prompt counts as at most 20 times the first guess.
create or replace function autotag.learn_brief(p_brief bigint, p_inputs integer[], p_outputs integer[], p_question jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_brief autotag.briefs;
  v_question jsonb;
  v_memory integer := (select s.learning_memory from autotag.settings s);
  v_max_allowed integer;
begin
  if p_inputs is null or cardinality(p_inputs) = 0 then
    return;
  end if;
  select * into v_provider from autotag.provider_limits;
  v_question := coalesce(p_question, v_provider.question);
  if p_brief is not null then
    select * into v_brief from autotag.briefs br where br.id = p_brief;
    if not found then
      return;
    end if;
  end if;
  v_max_allowed := 20 * (autotag.guess_prompt(v_question) + coalesce(v_brief.extra_prompt, 0));
  p_inputs := array(select least(i, v_max_allowed) from unnest(p_inputs) i);
  update autotag.learned l
  set answers = l.answers + cardinality(p_inputs), learned_at = autotag.now(),
      prompt = autotag.decayed_histogram(l.prompt, p_inputs, v_memory), output = autotag.decayed_histogram(l.output, p_outputs, v_memory)
  where l.model = v_question ->> 'model' and l.image_detail = v_question ->> 'image_detail'
    and l.image_side = coalesce((v_question ->> 'image_side')::integer, 0)
    and l.reasoning_effort = coalesce(v_question ->> 'reasoning_effort', '')
    and l.max_tags = (v_question ->> 'max_tags')::integer and l.tag_language = v_question ->> 'tag_language' and l.brief_id = coalesce(p_brief, 0);
  if not found then
    insert into autotag.learned (model, image_detail, image_side, reasoning_effort, max_tags, tag_language, brief_id, answers, prompt, output, learned_at)
    values (v_question ->> 'model', v_question ->> 'image_detail', coalesce((v_question ->> 'image_side')::integer, 0),
      coalesce(v_question ->> 'reasoning_effort', ''), (v_question ->> 'max_tags')::integer,
      v_question ->> 'tag_language', coalesce(p_brief, 0), cardinality(p_inputs),
      autotag.decayed_histogram('{}', p_inputs, v_memory), autotag.decayed_histogram('{}', p_outputs, v_memory), autotag.now());
  end if;
  if p_brief is not null then
    perform autotag.refresh_brief(v_brief, v_provider);
    return;
  end if;
  v_provider := autotag.estimate_tokens(v_provider);
  update autotag.provider_limits p
  set tokens_per_image = v_provider.tokens_per_image, output_tokens = v_provider.output_tokens,
      prompt_mean = v_provider.prompt_mean, output_mean = v_provider.output_mean
  where (p.tokens_per_image, p.output_tokens, p.prompt_mean, p.output_mean) is distinct from
    (v_provider.tokens_per_image, v_provider.output_tokens, v_provider.prompt_mean, v_provider.output_mean);
end $$;
