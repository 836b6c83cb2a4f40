-- Validation of workers' reports, before any other function reads them.

-- Validates a worker's result: {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model} without further keys; at most 50
-- tags of 50 characters with different keys, and a caption of 300. Drops invalid tags (empty, not a string, longer) and confidences
-- without a tag. Null: there is no list of tags, or none of them is valid.
create or replace function autotag.clean_result(p_result jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_tags jsonb := p_result -> 'tags';
  v_kept text[];
  v_sure jsonb;
begin
  if v_tags is null or jsonb_typeof(p_result) <> 'object' or jsonb_typeof(v_tags) <> 'array' then
    return null;
  end if;
  v_kept := array(
    select kept.tag from (
      select distinct on (x.tag) x.tag, x.i from (
        select autotag.printable(e #>> '{}', 51) as tag, i from jsonb_array_elements(v_tags) with ordinality u (e, i)
        where jsonb_typeof(e) = 'string' limit 1000) x
      where length(x.tag) between 1 and 50 order by x.tag, x.i) kept
    order by kept.i limit 50);
  if v_kept = '{}' and v_tags <> '[]' then
    return null;
  end if;
  if not autotag.are_different(to_jsonb(v_kept)) then
    v_kept := array(
      select (array_agg(kept.tag order by kept.i))[1] from unnest(v_kept, autotag.tag_keys(v_kept)) with ordinality kept (tag, key, i)
      group by kept.key order by min(kept.i));
  end if;
  if jsonb_typeof(p_result -> 'confidence') = 'object' then
    select jsonb_object_agg(tag, autotag.clean_number(p_result -> 'confidence', tag, 0, 1)) into v_sure
    from unnest(v_kept) tag where jsonb_typeof(p_result -> 'confidence' -> tag) = 'number';
  end if;
  return jsonb_build_object('tags', to_jsonb(v_kept), 'confidence', coalesce(v_sure, '{}'),
    'caption', coalesce(autotag.printable(case when jsonb_typeof(p_result -> 'caption') = 'string' then p_result ->> 'caption' end, 300), ''),
    'model', coalesce(autotag.printable(case when jsonb_typeof(p_result -> 'model') = 'string' then p_result ->> 'model' end, 100), ''));
end $$;

-- For each result: true only if clean_result() would return it unchanged. (Some that it would return unchanged are false, too, which
-- costs only time.) Nearly every result passes, so this decides how long a report takes: 4 µs an image instead of 30. It checks the JSON
-- as text, and all results in one query, because a function call for each would take as long again.
create or replace function autotag.canonical_results(p_results jsonb[]) returns boolean[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select coalesce(texts.tags is not null
      and cardinality(texts.list) <= 50 and r.result - '{tags,confidence,caption,model}'::text[] = '{}'
      and length(texts.caption) <= 300 and length(texts.model) <= 100
      and texts.tags || texts.caption || texts.model !~ autotag.unprintable() and strpos(texts.tags || texts.sure, E'\\') = 0
      -- spaces that printable() would remove
      and strpos(texts.tags || texts.caption || texts.model, '  ') = 0 and texts.caption = btrim(texts.caption) and texts.model = btrim(texts.model)
      -- no element that is not a string; no tag or key that is empty or has a space at an end; no confidence outside 0 to 1
      and texts.tags !~ E'\\[[^"\\]]|, [^"]|""|" |[^,] "|, "[],]' and texts.sure !~ ': (1[^,}]|0[^.,}]|[^01])|""'
      -- As many tags as confidences, and every confidence has its tag: so no tag is there twice. (The cast to varchar(50) finds
      -- tags that are too long; `[^"]{51}` in the pattern above would take three quarters of the time.)
      and texts.list::varchar(50)[]::text[] = texts.list and (r.result -> 'confidence') - texts.list = '{}'
      and 3 * cardinality(texts.list) = length(texts.sure) - length(replace(texts.sure, '": ', ''))
      and (texts.tags !~ autotag.odd_tags() or autotag.are_different(r.result -> 'tags')), false)
    from unnest(p_results) with ordinality r (result, i)
    -- offset 0 makes each text once. Only results with the right types and at most 8 kB are read, because a number of a few bytes can be
    -- a text of 131 kB.
    left join lateral (
      select x.*, string_to_array(left(right(x.tags, -2), -2), '", "') as list from (
        select (r.result -> 'tags')::text as tags, (r.result -> 'confidence')::text as sure, r.result ->> 'caption' as caption,
          r.result ->> 'model' as model
        where pg_column_size(r.result) < 8000 and jsonb_typeof(r.result -> 'tags') = 'array'
          and jsonb_typeof(r.result -> 'confidence') = 'object'
          and jsonb_typeof(r.result -> 'caption') = 'string' and jsonb_typeof(r.result -> 'model') = 'string' offset 0) x offset 0) texts on true
    order by r.i);
end $$;

-- Validates a worker's notes about an image, for its user, for example {truncated: 0.97}: at most 8 names, each with a number, a boolean,
-- a text of 100 characters or a list of 8 numbers. Null: no notes.
create or replace function autotag.clean_image_notes(p_notes jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  if p_notes is null or jsonb_typeof(p_notes) <> 'object' then
    return null;
  end if;
  return (
    select jsonb_object_agg(x.name, x.note) from (
      select n.name, case jsonb_typeof(n.note)
        when 'string' then to_jsonb(nullif(autotag.printable(n.note #>> '{}', 100), ''))
        when 'array' then case when jsonb_array_length(n.note) <= 8 and length(n.note::text) <= 200
          and not exists (select from jsonb_array_elements(n.note) e where jsonb_typeof(e) <> 'number') then n.note end
        when 'number' then case when length(n.note::text) <= 30 then n.note end
        when 'boolean' then n.note end as note
      from jsonb_each(p_notes) n (name, note) where n.name ~ '^[a-z][a-z0-9_]{0,29}$' order by n.name limit 8) x
    where x.note is not null);
end $$;

-- The same as a part of a result: {image: …}, or nothing.
create or replace function autotag.image_part(p_notes jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_strip_nulls(jsonb_build_object('image', autotag.clean_image_notes(p_notes)));
end $$;

-- Reads answers as workers report them, in their order: [{task, attempt, result | error, usage, called, mark}]. result: as clean_result()
-- returns it, with image: clean_image_notes(); fields: as the worker gave them, for fit_result(). valid_usage: clean_usage() would
-- return this usage unchanged with any cap, because the answer has at most 4,000 tokens, and the prompt at most p_input.
-- error and another usage are as the worker gave them.
create or replace function autotag.read_answers(p_answers jsonb, p_input integer)
returns table (task bigint, attempt integer, result jsonb, fields jsonb, error jsonb, usage jsonb, valid_usage boolean, called boolean, mark uuid, place bigint)
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp rows 500
as $$
declare
  v_max jsonb := jsonb_build_object('max', p_input);
  v_canonical boolean[] := autotag.canonical_results(array(
    select case when jsonb_typeof(e -> 'result') = 'object' then (e -> 'result') - '{fields,image}'::text[] end from jsonb_array_elements(p_answers) e));
begin
  return query
    -- A JSON path compares numbers three times as fast as jsonb's operators. A value that is not a number never matches.
    select case when jsonb_path_match(e, 'strict $.task >= 1 && $.task <= 9223372036854775807', '{}', true) then (e -> 'task')::bigint end,
      case when jsonb_path_match(e, 'strict $.attempt >= 1 && $.attempt <= 2147483647', '{}', true) then (e -> 'attempt')::integer end,
      case when not v_canonical[i] then autotag.clean_result(e -> 'result')
        else (e -> 'result') - '{fields,image}'::text[] end
        || case when e -> 'result' ? 'image' then autotag.image_part(e #> '{result,image}') else '{}' end, e -> 'result' -> 'fields',
      nullif(e -> 'error', 'null'), u.usage,
      coalesce(jsonb_path_match(u.usage, 'strict $.input >= 0 && $.input <= $max && $.output >= 0 && $.output <= 4000
          && $.cached >= 0 && $.cached <= $max && $.cache_write >= 0 && $.cache_write <= $max && $.reasoning >= 0 && $.reasoning <= 4000',
          v_max, true)
        and u.model <> '' and u.tier <> '' and length(u.model) <= 100 and length(u.tier) <= 20
        and u.model || u.tier !~ autotag.unprintable(), false),
      e -> 'called' is distinct from 'false',
      -- The mark must look like a uuid as Postgres prints it. One pattern for all of this takes twice as long.
      case when u.mark like '________-____-____-____-____________' and u.mark !~ '[^0-9a-f-]' and length(replace(u.mark, '-', '')) = 32
        then u.mark::uuid end, i
    from jsonb_array_elements(p_answers) with ordinality a (e, i)
    cross join lateral (
      select e -> 'usage' as usage, e -> 'usage' ->> 'model' as model, e -> 'usage' ->> 'tier' as tier, e ->> 'mark' as mark offset 0) u;
end $$;

-- Validates a worker's error: its kind is one of error_kinds (else transient), texts are short and printable, waits are at most
-- an hour. Without an error the result must be storable (p_result, from clean_result()), or the error is `no_result`. Null: no
-- error.
create or replace function autotag.clean_error(p_error jsonb, p_result jsonb default '{"tags": []}') returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_error is null or jsonb_typeof(p_error) = 'null' then
    if p_result is not null then
      return null;
    end if;
    p_error := '{"kind": "transient", "code": "no_result"}';
  end if;
  return jsonb_build_object(
    'kind', coalesce((select k.kind from autotag.error_kinds k where k.kind = p_error ->> 'kind'), 'transient'),
    'code', coalesce(nullif(autotag.printable(p_error ->> 'code', 100), ''), 'unknown'),
    'message', coalesce(nullif(autotag.printable(p_error ->> 'message', 1000), ''), 'This image could not be tagged.'),
    'retry', coalesce(p_error ->> 'retry', '') = 'true',
    'retry_after', autotag.clean_number(p_error, 'retry_after', 0, 3600),
    'origin', case when p_error ->> 'origin' in ('provider', 'storage', 'host', 'worker') then p_error ->> 'origin' end,
    'parameter', case when p_error ->> 'parameter' in
      ('token_cap', 'reasoning_effort', 'response_format', 'detail', 'service_tier', 'expires_after')
      then p_error ->> 'parameter' end,
    'about_request', coalesce(p_error ->> 'about_request', '') = 'true');
end $$;

-- The largest believable usage of one answer in tokens, so that no report uses up a quota. input: 20 times what a prompt reserves, at
-- least 20,000. output: 4 times the cap plus 4,000, because some providers count reasoning separately; at least 4 times
-- max_output_tokens if the provider accepts no cap (uncapped).
create or replace function autotag.believable_usage(out input integer, out uncapped integer)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  select greatest(20 * (p.tokens_per_image - p.output_tokens), 20000),
    case when p.question ->> 'cap_parameter' = 'none' then (select 4 * s.max_output_tokens from autotag.settings s) else 0 end
  into input, uncapped from autotag.provider_limits p;
end $$;

-- Validates a worker's usage figures: {input, cached, cache_write, output, reasoning} (tokens, clamped to 0 to p_input and
-- p_output), model (that answered) and tier (null: not given). Null: the provider gave no figures.
create or replace function autotag.clean_usage(p_usage jsonb, p_input integer default 10000000, p_output integer default 10000000)
returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := p_usage ->> 'model';
  v_tier text := p_usage ->> 'tier';
begin
  if p_usage is null or jsonb_typeof(p_usage) <> 'object' then
    return null;
  end if;
  return jsonb_build_object(
    'input', coalesce(autotag.clean_number(p_usage, 'input', 0, p_input), 0)::integer,
    'cached', coalesce(autotag.clean_number(p_usage, 'cached', 0, p_input), 0)::integer,
    'cache_write', coalesce(autotag.clean_number(p_usage, 'cache_write', 0, p_input), 0)::integer,
    'output', coalesce(autotag.clean_number(p_usage, 'output', 0, p_output), 0)::integer,
    'reasoning', coalesce(autotag.clean_number(p_usage, 'reasoning', 0, p_output), 0)::integer,
    'model', nullif(autotag.printable(v_model, 100), ''), 'tier', nullif(autotag.printable(v_tier, 20), ''));
end $$;

-- Validates what a worker has observed of the provider's limits: the numbers among those that update_provider_limits() and
-- record_sent() read, which bound them further. Null: nothing.
create or replace function autotag.clean_observed(p_observed jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  if p_observed is null or jsonb_typeof(p_observed) <> 'object' then
    return null;
  end if;
  return (
    select jsonb_object_agg(n, autotag.clean_number(p_observed, n, 0, 2000000000))
    from unnest('{requests_limit,requests_left,tokens_limit,tokens_left,day_limit,day_left,unclear_limit,unclear_left,age,retry_after,sent,sent_age}'::text[]) n
    where jsonb_typeof(p_observed -> n) = 'number');
end $$;

-- Records the stages of a worker's single calls of one workspace: [{task, attempt, stage}], stages between `queued` and `completed`.
-- Ignores tasks that the worker does not hold (any more), and workers of another login. Only `processing` is written to
-- the host's row, because each write fires the host's triggers, webhooks and Postgres Changes; tagging_job() shows the others.
-- It also broadcasts changes that no message has named yet (broadcast_held), so a worker calls it once more a second after a report.
-- p_sent: {sent, sent_age (seconds)}, as in record_sent(). Returns sentences for the operator's log, as settle() does.
-- Locks: tasks by id (skip locked), jobs (skip locked), assets (show), provider (skip locked).
create or replace function autotag.report_stages(p_worker uuid, p_workspace_id autotag.workspace_id, p_stages jsonb, p_sent jsonb default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_moved autotag.ended[];
  v_free uuid[];
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  perform autotag.check_list(p_stages);
  if not autotag.is_own_worker(p_worker) then
    return '[]'::jsonb;
  end if;
  with reported as (
    select case when e -> 'task' between '1' and '9223372036854775807' then (e -> 'task')::bigint end as task,
      case when e -> 'attempt' between '1' and '2147483647' then (e -> 'attempt')::integer end as attempt,
      e ->> 'stage' as stage
    from jsonb_array_elements(p_stages) e
  ), held as (
    select t.id, r.stage from reported r
    join autotag.tasks t on t.id = r.task and t.attempt = r.attempt and t.worker_id = p_worker and t.workspace_id = p_workspace_id
    where r.stage in ('preparing', 'submitted', 'processing', 'completing')
      and autotag.stage_rank(t.stage) < autotag.stage_rank(r.stage)
    order by t.id for update of t skip locked
  ), moved as (
    update autotag.tasks t set stage = h.stage from held h where t.id = h.id returning t.asset_id, t.job_id, t.stage
  )
  select array_agg(row(m.job_id, 0, 0, m.assets)::autotag.ended) into v_moved
  from (
    select x.job_id, coalesce(array_agg(x.asset_id) filter (where x.stage = 'processing'), '{}') as assets from moved x group by x.job_id) m;
  -- Rows of an upload that another transaction holds are left out, so that no row changes without a message.
  v_free := array(
    select j.id from autotag.jobs j where j.id in (select m.job_id from unnest(v_moved) m) order by j.id for no key update skip locked);
  perform autotag.show(p_workspace_id, array(select a from unnest(v_moved) m, unnest(m.assets) a where m.job_id = any (v_free)),
    'processing', autotag.stage_progress('processing'), null, true);
  perform autotag.broadcast_progress(m.job_id, null, m.assets) from unnest(v_moved) m where m.job_id = any (v_free);
  perform autotag.broadcast_held(p_workspace_id);
  return case when p_sent is null then '[]'::jsonb else autotag.report_provider(autotag.summarize_calls(p_worker, '{}', p_sent)) end;
end $$;
