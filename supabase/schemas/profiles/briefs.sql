-- Briefs: what the images of an upload are asked beside the question, what that costs in tokens, and what is kept of the answers.

-- The brief of a workspace at this moment. No row (profile_id is null): it has no profile, so the question alone is asked. id is null:
-- no upload has been asked this yet. Reads only.
--
-- The first guess: a token of a prompt has three bytes. English has more than four, but lists of words, and other scripts, have fewer;
-- ten answers later it is measured (learn). A field takes twenty tokens in the schema and ten in the answer, beside its texts; a short
-- text takes 60.
create or replace function autotag.compose_brief(p_workspace_id autotag.workspace_id) returns autotag.briefs
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles := autotag.profile_of(p_workspace_id);
  v_brief autotag.briefs;
  v_vocabulary jsonb;
  v_provider autotag.provider_limits;
begin
  if v_profile.id is null then
    return v_brief;
  end if;
  select * into v_provider from autotag.provider_limits;
  if v_provider.question <> autotag.describe_question() then   -- the next claim makes it the present one
    v_provider.question := autotag.describe_question();
    v_provider.question_version := -1;
  end if;
  v_vocabulary := case when v_profile.vocabulary_mode = 'open' then '[]' else coalesce(autotag.vocabulary_for_prompt(p_workspace_id), '[]') end;
  select * into v_brief from autotag.briefs b
  where b.profile_id = v_profile.id and md5(b.vocabulary::text) = md5(v_vocabulary::text) order by b.id limit 1;
  if found then
    return case when v_brief.question_version = v_provider.question_version then v_brief
      else autotag.estimate_brief(v_brief, v_provider) end;
  end if;
  v_brief.profile_id := v_profile.id;
  v_brief.vocabulary := v_vocabulary;
  v_brief.tag_count := v_profile.tag_count;
  v_brief.extra_prompt := 120 + 20 * jsonb_array_length(v_profile.fields)
    + ceil(octet_length(concat(v_profile.instructions, v_profile.language, nullif(v_vocabulary, '[]'), nullif(v_profile.fields, '[]'))) / 3.0)::integer;
  v_brief.extra_output := coalesce((
    select sum(10 + ceil(octet_length(f ->> 'name') / 3.0) + case f ->> 'kind' when 'text' then 60 when 'enum' then (
      select ceil(max(octet_length(e)) / 3.0) from jsonb_array_elements_text(f -> 'values') e) else 0 end)
    from jsonb_array_elements(v_profile.fields) f), 0);
  return autotag.estimate_brief(v_brief, v_provider);
end $$;

-- A brief with what one image reserves and uses on average, for the question in p_provider.
create or replace function autotag.estimate_brief(p_brief autotag.briefs, p_provider autotag.provider_limits) returns autotag.briefs
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_estimate autotag.provider_limits := autotag.estimate_tokens(p_provider, p_brief);
begin
  p_brief.question_version := p_provider.question_version;
  p_brief.tokens_per_image := v_estimate.tokens_per_image;
  p_brief.output_tokens := v_estimate.output_tokens;
  p_brief.prompt_mean := v_estimate.prompt_mean;
  p_brief.output_mean := v_estimate.output_mean;
  return p_brief;
end $$;

-- The same, and stores it. The caller holds the provider row.
create or replace function autotag.refresh_brief(p_brief autotag.briefs, p_provider autotag.provider_limits) returns autotag.briefs
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  p_brief := autotag.estimate_brief(p_brief, p_provider);
  update autotag.briefs b
  set question_version = p_brief.question_version, tokens_per_image = p_brief.tokens_per_image, output_tokens = p_brief.output_tokens,
      prompt_mean = p_brief.prompt_mean, output_mean = p_brief.output_mean
  where b.id = p_brief.id and (b.question_version, b.tokens_per_image, b.output_tokens, b.prompt_mean, b.output_mean)
    is distinct from (p_brief.question_version, p_brief.tokens_per_image, p_brief.output_tokens, p_brief.prompt_mean, p_brief.output_mean);
  return p_brief;
end $$;

-- The brief of a new upload, which is inserted if it is new; null: the question alone. It may run in a long transaction of the tenant's,
-- so it only inserts.
create or replace function autotag.make_brief(p_workspace_id autotag.workspace_id) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_brief autotag.briefs := autotag.compose_brief(p_workspace_id);
begin
  if v_brief.id is null and v_brief.profile_id is not null then
    insert into autotag.briefs (profile_id, vocabulary, tag_count, extra_prompt, extra_output, question_version, tokens_per_image,
      output_tokens, prompt_mean, output_mean, created_at)
    values (v_brief.profile_id, v_brief.vocabulary, v_brief.tag_count, v_brief.extra_prompt, v_brief.extra_output, v_brief.question_version,
      v_brief.tokens_per_image, v_brief.output_tokens, v_brief.prompt_mean, v_brief.output_mean, autotag.now())
    returning id into v_brief.id;
  end if;
  return v_brief.id;
end $$;

-- The brief of a job, estimated for the present question; no row: it has none. The caller holds the provider row.
create or replace function autotag.job_brief(p_job_id uuid, p_provider autotag.provider_limits) returns autotag.briefs
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_brief autotag.briefs;
begin
  select b.* into v_brief from autotag.jobs j join autotag.briefs b on b.id = j.brief_id where j.id = p_job_id;
  if v_brief.question_version <> p_provider.question_version then
    v_brief := autotag.refresh_brief(v_brief, p_provider);
  end if;
  return v_brief;
end $$;

-- What one image of a brief reserves, cut to what the window of its workspace holds: otherwise it would wait for ever for the sake of a
-- long vocabulary. settle() corrects the window by the real use.
create or replace function autotag.fit_window(p_tokens integer, p_workspace_id autotag.workspace_id) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select least(p_tokens, l.max_units) from autotag.window_limits(p_workspace_id, 'realtime') l);
end $$;

-- How many tokens more than usual each image of a batch reserves in the provider's queue because of this brief (null: none).
create or replace function autotag.extra_tokens(p_brief bigint) returns bigint
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_brief is null then
    return 0;
  end if;
  return coalesce((select greatest(b.tokens_per_image - p.tokens_per_image, 0) from autotag.briefs b, autotag.provider_limits p where b.id = p_brief), 0);
end $$;

-- The provider's row with what one image of a workspace reserves and uses now; null: of a workspace without a profile.
create or replace function autotag.provider_for(p_workspace_id autotag.workspace_id) returns autotag.provider_limits
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_brief autotag.briefs;
begin
  select * into v_provider from autotag.provider_limits;
  if p_workspace_id is not null then
    v_brief := autotag.compose_brief(p_workspace_id);
  end if;
  if v_brief.profile_id is not null then
    v_provider.tokens_per_image := v_brief.tokens_per_image;
    v_provider.output_tokens := v_brief.output_tokens;
    v_provider.prompt_mean := v_brief.prompt_mean;
    v_provider.output_mean := v_brief.output_mean;
  end if;
  return v_provider;
end $$;

-- A brief as a worker needs it for prompt and answer: {id, version (of the profile), instructions, language, tag_count, vocabulary_mode,
-- vocabulary, fields}. Null: the worker holds no image that is asked this.
create or replace function autotag.describe_brief(p_worker uuid, p_brief bigint) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
begin
  if not autotag.is_own_worker(p_worker) or not exists (
      select from autotag.tasks t join autotag.jobs j on j.id = t.job_id
      where t.id = any (autotag.leased_tasks(p_worker)) and j.brief_id = p_brief
      union all
      select from autotag.batches b join autotag.jobs j on j.id = b.job_id where b.worker_id = p_worker and j.brief_id = p_brief) then
    return null;
  end if;
  return (select autotag.spell_brief(b) from autotag.briefs b where b.id = p_brief);
end $$;

-- A brief with the words of its profile (describe_brief); id is 0 where no upload has been asked this. Null: there is none.
create or replace function autotag.spell_brief(p_brief autotag.briefs) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select jsonb_build_object('id', coalesce(p_brief.id, 0), 'version', p.version, 'instructions', p.instructions, 'language', p.language,
      'tag_count', p.tag_count, 'vocabulary_mode', p.vocabulary_mode, 'vocabulary', p_brief.vocabulary, 'fields', p.fields)
    from autotag.profiles p where p.id = p_brief.profile_id);
end $$;

-- What is stored of a result (clean_result) that was asked by this brief: the tags that are sure enough, no more than were asked for; the
-- fields of its profile, from those that the worker reports; and the profile's version.
create or replace function autotag.fit_result(p_result jsonb, p_fields jsonb, p_brief bigint) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles;
  v_tags text[];
begin
  select p.* into v_profile from autotag.briefs b join autotag.profiles p on p.id = b.profile_id where b.id = p_brief;
  if not found or p_result is null then
    return p_result;
  end if;
  v_tags := array(
    select t.tag from jsonb_array_elements_text(p_result -> 'tags') with ordinality t (tag, i)
    -- a tag whose confidence the model did not give is kept
    where coalesce((p_result -> 'confidence' ->> t.tag)::real >= v_profile.min_confidence, true) order by t.i limit v_profile.tag_count);
  return p_result || jsonb_build_object('tags', to_jsonb(v_tags), 'profile', v_profile.version,
    'confidence', coalesce((
      select jsonb_object_agg(c.key, c.value) from jsonb_each(p_result -> 'confidence') c where c.key = any (v_tags)), '{}'))
    || case when v_profile.fields = '[]' then '{}' else jsonb_build_object('fields', autotag.clean_fields(p_fields, v_profile.fields)) end;
end $$;

-- The values of these fields ([{name, kind, values}]) in a worker's report; null where there is none of the right type. Of an enum only
-- its own values, of an integer at most 53 bits (JavaScript's), of a text 200 characters.
create or replace function autotag.clean_fields(p_report jsonb, p_fields jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_object_agg(f ->> 'name', case f ->> 'kind'
      when 'boolean' then case when jsonb_typeof(v) = 'boolean' then v end
      -- in jsonb's sort order only numbers lie between two numbers
      when 'integer' then case when v between '-9007199254740991' and '9007199254740991'
        then case when v::numeric = trunc(v::numeric) then to_jsonb(trunc(v::numeric)) end end
      when 'enum' then case when jsonb_typeof(v) = 'string' then (
        select to_jsonb(e) from jsonb_array_elements_text(f -> 'values') e where normalize(e, NFKC) = normalize(v #>> '{}', NFKC) limit 1) end
      when 'text' then case when jsonb_typeof(v) = 'string' then to_jsonb(nullif(autotag.printable(v #>> '{}', 200), '')) end end), '{}')
    from jsonb_array_elements(p_fields) f
    cross join lateral (select case when jsonb_typeof(p_report) = 'object' then p_report -> (f ->> 'name') end as v) x);
end $$;
