-- Validates what a worker reports before anything else reads it.

-- Validates a worker's result and cuts it to its bounds: {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model} and
-- nothing else, at most 50 tags of 50 characters, each once, a caption of 300. Tags that are none (empty, no text, a sentence) are left out, like
-- confidences of none of them. Null: there is no list of tags, or none of it is a tag.
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
  -- Nearly every result is as it should be, and is only looked at.
  if autotag.is_tidy(p_result) then
    return p_result;
  end if;
  v_kept := array(
    select k.tag from (
      select distinct on (x.tag) x.tag, x.i from (
        select autotag.printable(e #>> '{}', 51) as tag, i from jsonb_array_elements(v_tags) with ordinality u (e, i)
        where jsonb_typeof(e) = 'string' limit 1000) x
      where length(x.tag) between 1 and 50 order by x.tag, x.i) k
    order by k.i limit 50);
  if v_kept = '{}' and v_tags <> '[]' then
    return null;
  end if;
  if jsonb_typeof(p_result -> 'confidence') = 'object' then
    select jsonb_object_agg(t, autotag.clean_number(p_result -> 'confidence', t, 0, 1)) into v_sure
    from unnest(v_kept) t where jsonb_typeof(p_result -> 'confidence' -> t) = 'number';
  end if;
  return jsonb_build_object('tags', to_jsonb(v_kept), 'confidence', coalesce(v_sure, '{}'),
    'caption', coalesce(autotag.printable(case when jsonb_typeof(p_result -> 'caption') = 'string' then p_result ->> 'caption' end, 300), ''),
    'model', coalesce(autotag.printable(case when jsonb_typeof(p_result -> 'model') = 'string' then p_result ->> 'model' end, 100), ''));
end $$;

-- Whether clean_result() would change nothing of a result (an object with a list of tags). It is looked at as text, which
-- costs a fifth of taking it apart. A result whose tags do not have a confidence each is taken apart.
create or replace function autotag.is_tidy(p_result jsonb) returns boolean
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_tags text := p_result -> 'tags';
  v_sure text := p_result -> 'confidence';
  v_caption text := p_result ->> 'caption';
  v_model text := p_result ->> 'model';
  v_list text[];               -- the tags
begin
  if pg_column_size(p_result) < 8000 and jsonb_array_length(p_result -> 'tags') <= 50
    and p_result - '{tags,confidence,caption,model}'::text[] = '{}'
    and jsonb_typeof(p_result -> 'caption') = 'string' and length(v_caption) <= 300
    and jsonb_typeof(p_result -> 'model') = 'string' and length(v_model) <= 100
    and jsonb_typeof(p_result -> 'confidence') = 'object'
    and autotag.is_plain(v_tags || v_sure || v_caption || v_model) and strpos(v_tags || v_sure, '\') = 0
    -- blanks that printable() takes away
    and strpos(v_tags || v_caption || v_model, '  ') = 0 and v_caption = btrim(v_caption) and v_model = btrim(v_model)
    -- an element that is no text, a tag or label that is empty or begins or ends with a blank, a number that is none from 0 to 1
    and v_tags !~ '\[[^"\]]|, [^"]|""|" |[^,] "|, "[],]' and v_sure !~ ': (1[^,}]|0[^.,}]|[^01])|""' then
    -- The tags are as many as there are confidences, and there is none of anything else: so no tag is there twice. (What
    -- varchar(50) cuts is too long: `[^"]{51}` above would take three quarters of the whole time.)
    v_list := ('{' || substr(v_tags, 2, length(v_tags) - 2) || '}')::text[];
    return v_list::varchar(50)[]::text[] = v_list and (p_result -> 'confidence') - v_list = '{}'
      and 3 * cardinality(v_list) = length(v_sure) - length(replace(v_sure, '": ', ''));
  end if;
  return false;
end $$;

-- Validates a worker's error and cuts it to its bounds: its kind is one of error_kinds, texts are short and printable, waits make
-- sense. What has no error has to have a result that can be stored (p_result, as clean_result() makes it).
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
    'message', coalesce(nullif(autotag.printable(p_error ->> 'message', 1000), ''), 'Tagging this image did not work.'),
    'retry', coalesce(p_error ->> 'retry', '') = 'true',
    'retry_after', autotag.clean_number(p_error, 'retry_after', 0, 3600),
    'origin', case when p_error ->> 'origin' in ('provider', 'storage', 'host', 'worker') then p_error ->> 'origin' end,
    'parameter', case when p_error ->> 'parameter' in
      ('token_cap', 'reasoning_effort', 'response_format', 'detail', 'service_tier', 'expires_after')
      then p_error ->> 'parameter' end);
end $$;

-- Validates a worker's figures of usage and cuts them to bounds: {input, cached, cache_write, output, reasoning} tokens, none
-- negative or beyond what one answer can have, the model that answered and the service tier (null: it does not say). Null:
-- the provider gave no figures.
create or replace function autotag.clean_usage(p_usage jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_model text := p_usage ->> 'model';
  v_tier text := p_usage ->> 'tier';
begin
  if p_usage is null or jsonb_typeof(p_usage) <> 'object' then
    return null;
  end if;
  -- Nearly all are as they should be, and are only looked at. (In jsonb's order nothing but numbers lies between two.)
  if p_usage -> 'input' between '0' and '10000000' and p_usage -> 'output' between '0' and '10000000'
    and p_usage -> 'cached' between '0' and '10000000' and p_usage -> 'cache_write' between '0' and '10000000'
    and p_usage -> 'reasoning' between '0' and '10000000'
    and length(v_model) between 1 and 100 and length(v_tier) between 1 and 20 and autotag.is_plain(v_model || v_tier) then
    return p_usage;
  end if;
  return jsonb_build_object(
    'input', coalesce(autotag.clean_number(p_usage, 'input', 0, 10000000), 0)::integer,
    'cached', coalesce(autotag.clean_number(p_usage, 'cached', 0, 10000000), 0)::integer,
    'cache_write', coalesce(autotag.clean_number(p_usage, 'cache_write', 0, 10000000), 0)::integer,
    'output', coalesce(autotag.clean_number(p_usage, 'output', 0, 10000000), 0)::integer,
    'reasoning', coalesce(autotag.clean_number(p_usage, 'reasoning', 0, 10000000), 0)::integer,
    'model', nullif(autotag.printable(v_model, 100), ''), 'tier', nullif(autotag.printable(v_tier, 20), ''));
end $$;

-- A worker says where its single calls are: [{task, attempt, stage}], a stage between `queued` and `completed`. Those that
-- are not its own (any more) are ignored, and so is what another login says of a worker. p_sent: {sent, sent_age} as in note_sent. Locks: provider, jobs (for the broadcast), tasks by id.
create or replace function autotag.report_stages(p_worker uuid, p_stages jsonb, p_sent jsonb default null) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_held record;
  v_stage text;
  v_job uuid;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers of the host's tables believe what stands there
  perform autotag.check_list(p_stages);
  if not autotag.is_own_worker(p_worker) then
    return;
  end if;
  if p_sent is not null then
    perform autotag.note_sent(p_worker, autotag.clean_number(p_sent, 'sent', 0, 100000)::integer,
      coalesce(autotag.clean_number(p_sent, 'sent_age', 0, 3600), 0));
  end if;
  select coalesce(array_agg(t.id), '{}') as tasks, array_agg(t.attempt) as attempts, array_agg(r.stage) as stages,
    array_agg(distinct t.job_id) as jobs
  into v_held
  from (
    select case when e -> 'task' between '1' and '9223372036854775807' then (e -> 'task')::bigint end as task,
      case when e -> 'attempt' between '1' and '2147483647' then (e -> 'attempt')::integer end as attempt,
      e ->> 'stage' as stage
    from jsonb_array_elements(p_stages) e) r
  join autotag.tasks t on t.id = r.task and t.attempt = r.attempt and t.worker_id = p_worker
  where r.stage in ('preparing', 'submitted', 'processing', 'completing');
  perform from autotag.jobs j where j.id = any (v_held.jobs) order by j.id for update;
  perform from autotag.tasks t where t.id = any (v_held.tasks) order by t.id for update;
  for v_stage in select u.stage from unnest(v_held.stages) u (stage) group by 1 order by autotag.stage_rank(u.stage) loop
    perform autotag.advance(array(
      select t.id from unnest(v_held.tasks, v_held.attempts, v_held.stages) r (task, attempt, stage)
      join autotag.tasks t on t.id = r.task and t.attempt = r.attempt and t.worker_id = p_worker
      where r.stage = v_stage), v_stage);
  end loop;
  for v_job in select u.job from unnest(v_held.jobs) u (job) order by 1 loop
    perform autotag.tell_progress(v_job);
  end loop;
end $$;
