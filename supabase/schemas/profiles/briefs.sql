-- Briefs: what the images of an upload are asked beside the question, what that costs in tokens, and which part of the answers is kept.

-- The brief of a workspace at this moment. profile_id is null: the workspace has no profile, so its images are asked the question
-- alone. id is null: no upload has been asked this yet. Reads only.
--
-- The first guess of its tokens counts three bytes per token. English has more than four, but lists of words and other scripts have
-- fewer. After ten answers the measured use replaces the guess (learn). A field takes twenty tokens in the schema and ten in the answer,
-- beside its texts; a short text takes 60.
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
  select * into v_brief from autotag.briefs br
  where br.profile_id = v_profile.id and md5(br.vocabulary::text) = md5(v_vocabulary::text) order by br.id limit 1;
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

-- Returns the brief with new estimates for the question in p_provider: the tokens that one image reserves, and those that it uses on
-- average.
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
  update autotag.briefs br
  set question_version = p_brief.question_version, tokens_per_image = p_brief.tokens_per_image, output_tokens = p_brief.output_tokens,
      prompt_mean = p_brief.prompt_mean, output_mean = p_brief.output_mean
  where br.id = p_brief.id and (br.question_version, br.tokens_per_image, br.output_tokens, br.prompt_mean, br.output_mean)
    is distinct from (p_brief.question_version, p_brief.tokens_per_image, p_brief.output_tokens, p_brief.prompt_mean, p_brief.output_mean);
  return p_brief;
end $$;

-- The id of a new upload's brief; null: the question alone. Inserts the brief if it is new. It updates nothing, because it may run in
-- a tenant's long transaction.
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
  select br.* into v_brief from autotag.jobs j join autotag.briefs br on br.id = j.brief_id where j.id = p_job_id;
  if v_brief.question_version <> p_provider.question_version then
    v_brief := autotag.refresh_brief(v_brief, p_provider);
  end if;
  return v_brief;
end $$;

-- The tokens that one image of a brief reserves, at most what the window of its workspace holds. Otherwise an image with a long
-- vocabulary would wait for ever. settle() corrects the window by the real use.
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
  return coalesce((select greatest(br.tokens_per_image - p.tokens_per_image, 0) from autotag.briefs br, autotag.provider_limits p where br.id = p_brief), 0);
end $$;

-- The provider's row with the tokens that one image of a workspace reserves and uses now; null: a workspace without a profile.
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
  return (select autotag.spell_brief(br) from autotag.briefs br where br.id = p_brief);
end $$;

-- A brief with the words of its profile (describe_brief); id is 0 where no upload has been asked this. Null: there is none.
create or replace function autotag.spell_brief(p_brief autotag.briefs) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select jsonb_build_object('id', coalesce(p_brief.id, 0), 'version', pr.version, 'instructions', pr.instructions, 'language', pr.language,
      'tag_count', pr.tag_count, 'vocabulary_mode', pr.vocabulary_mode, 'vocabulary', p_brief.vocabulary, 'fields', pr.fields)
    from autotag.profiles pr where pr.id = p_brief.profile_id);
end $$;

-- The part of a result (clean_result) with this brief that is stored: the tags that are sure enough, and no more than the profile asks
-- for; of the fields that the worker reports, those of the profile; and the profile's version.
create or replace function autotag.fit_result(p_result jsonb, p_fields jsonb, p_brief bigint) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles;
  v_tags text[];
begin
  select pr.* into v_profile from autotag.briefs br join autotag.profiles pr on pr.id = br.profile_id where br.id = p_brief;
  if not found or p_result is null then
    return p_result;
  end if;
  v_tags := array(
    select given.tag from jsonb_array_elements_text(p_result -> 'tags') with ordinality given (tag, i)
    -- a tag whose confidence the model did not give is kept
    where coalesce((p_result -> 'confidence' ->> given.tag)::real >= v_profile.min_confidence, true) order by given.i limit v_profile.tag_count);
  return p_result || jsonb_build_object('tags', to_jsonb(v_tags), 'profile', v_profile.version,
    'confidence', coalesce((
      select jsonb_object_agg(c.key, c.value) from jsonb_each(p_result -> 'confidence') c where c.key = any (v_tags)), '{}'))
    || case when v_profile.fields = '[]' then '{}' else jsonb_build_object('fields', autotag.clean_fields(p_fields, v_profile.fields)) end;
end $$;

-- The values of these fields ([{name, kind, values}]) in a worker's report; null where the report has no value of the right type. An
-- enum has only its own values, an integer at most 53 bits (JavaScript's), and a text at most 200 characters.
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
