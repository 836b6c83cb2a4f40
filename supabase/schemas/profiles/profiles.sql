-- Profiles: what a workspace wants asked about its images, in versions.

-- The profile of a workspace: the newest version of its own profile, else of the one for all workspaces, else the default with version 0.
create or replace function autotag.profile_of(p_workspace_id autotag.workspace_id) returns autotag.profiles
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles;
begin
  select * into v_profile from autotag.profiles pr
  where pr.workspace_id = p_workspace_id order by pr.version desc limit 1;
  if not found then
    select * into v_profile from autotag.profiles pr where pr.workspace_id is null order by pr.version desc limit 1;
  end if;
  if not found then
    v_profile.version := 0;
    v_profile.instructions := '';
    v_profile.min_confidence := 0;
    v_profile.vocabulary_mode := 'open';
    v_profile.add_parents := false;
    v_profile.fields := '[]';
  end if;
  return v_profile;
end $$;

-- Refuses a version that no request could ask. Also refuses every change of an existing version, because the answers of a batch arrive
-- hours later and are read by the version that their images were asked.
create or replace function autotag.check_profile() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if tg_op = 'UPDATE' then
    perform autotag.refuse(400, 'profile_is_fixed', 'A version of a profile does not change.', 'Insert a new version (autotag profile set).');
  end if;
  if length(new.instructions) > 2000 then
    perform autotag.refuse_profile(format('The instructions have %s characters; at most 2,000 are possible.', length(new.instructions)));
  elsif new.instructions ~ E'[\\u0001-\\u0008\\u000b\\u000c\\u000e-\\u001f\\u007f]' then
    perform autotag.refuse_profile('The instructions contain a control character.');
  elsif autotag.tag_key(new.language) = '' or length(new.language) > 100 or not autotag.is_plain(new.language) then
    perform autotag.refuse_profile('The language has to be one line of at most 100 characters, for example German.');
  elsif new.tag_count not between 1 and 50 then
    perform autotag.refuse_profile(format('The number of tags has to be from 1 to 50, not %s.', new.tag_count));
  elsif new.min_confidence not between 0 and 1 then
    perform autotag.refuse_profile(format('The minimum confidence has to be from 0 to 1, not %s.', new.min_confidence));
  elsif new.vocabulary_mode not in ('open', 'prefer', 'only') then
    perform autotag.refuse_profile('The vocabulary mode has to be open, prefer or only.');
  end if;
  perform autotag.check_fields(new.fields);
  return new;
end $$;

create or replace trigger autotag_check before insert or update on autotag.profiles
  for each row execute function autotag.check_profile();

create or replace function autotag.refuse_profile(p_message text) returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.refuse(400, 'bad_profile', p_message, 'Change it and save the profile again; nothing was saved.');
end $$;

-- Refuses fields that are not [{name, kind, values, description}] or exceed what OpenAI allows in a strict schema.
create or replace function autotag.check_fields(p_fields jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_field jsonb;
  v_names text[] := array[]::text[];
  v_values integer := 0;       -- of all enums
  v_length bigint := 0;        -- characters of all names and values
  v_one record;
begin
  if p_fields is null or jsonb_typeof(p_fields) <> 'array' then
    perform autotag.refuse_profile('The fields have to be a list.');
  elsif jsonb_array_length(p_fields) > 20 then
    perform autotag.refuse_profile(format('%s fields are too many; at most 20 are possible.', jsonb_array_length(p_fields)));
  end if;
  for v_field in select f from jsonb_array_elements(p_fields) f loop
    v_one := autotag.check_field(v_field);
    if v_field ->> 'name' = any (v_names) then
      perform autotag.refuse_profile(format('Two fields have the name %s.', v_field ->> 'name'));
    end if;
    v_names := v_names || (v_field ->> 'name');
    v_values := v_values + v_one.value_count;
    v_length := v_length + length(v_field ->> 'name') + v_one.characters;
  end loop;
  if v_values > 1000 then
    perform autotag.refuse_profile(format('The fields have %s values together; OpenAI allows at most 1,000.', v_values));
  elsif v_length > 120000 then
    perform autotag.refuse_profile(format(
      'The names and values of the fields have %s characters together; OpenAI allows at most 120,000.', v_length));
  end if;
end $$;

-- Refuses one field that no schema could contain. Returns the number of its values, and of their characters.
create or replace function autotag.check_field(p_field jsonb, out value_count integer, out characters bigint)
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text := autotag.printable(case when jsonb_typeof(p_field) = 'object' then p_field ->> 'name' end, 70);
  v_kind text := p_field ->> 'kind';
  v_values jsonb := coalesce(nullif(p_field -> 'values', 'null'), '[]');
begin
  if jsonb_typeof(p_field -> 'name') is distinct from 'string' or p_field ->> 'name' !~ '^[a-zA-Z0-9_-]{1,64}$' then
    perform autotag.refuse_profile(format(
      'The name of a field has to be 1 to 64 of the characters a-z, A-Z, 0-9, _ and -, not %s.', coalesce(quote_literal(v_name), 'missing')));
  elsif p_field - '{name,kind,values,description}'::text[] <> '{}' then
    perform autotag.refuse_profile(format('The field %s has more than name, kind, values and description.', v_name));
  elsif coalesce(v_kind not in ('enum', 'boolean', 'integer', 'text'), true) then
    perform autotag.refuse_profile(format('The kind of the field %s has to be enum, boolean, integer or text.', v_name));
  elsif jsonb_typeof(coalesce(nullif(p_field -> 'description', 'null'), '""')) <> 'string' or length(p_field ->> 'description') > 500
      or not autotag.is_plain(p_field ->> 'description') then
    perform autotag.refuse_profile(format('The description of the field %s has to be one line of at most 500 characters.', v_name));
  elsif jsonb_typeof(v_values) <> 'array' or (v_kind = 'enum') = (v_values = '[]') then
    perform autotag.refuse_profile(format('The field %s has to have a list of values if it is an enum, and none otherwise.', v_name));
  elsif exists (select from jsonb_array_elements(v_values) e where jsonb_typeof(e) <> 'string' or (e #>> '{}') <> btrim(e #>> '{}')
      or length(e #>> '{}') not between 1 and 200 or not autotag.is_plain(e #>> '{}')) then
    perform autotag.refuse_profile(format('Each value of the field %s has to be one line of 1 to 200 characters.', v_name));
  elsif (select count(distinct lower(normalize(e, NFKC))) < count(*) from jsonb_array_elements_text(v_values) e) then
    perform autotag.refuse_profile(format('The field %s has a value twice.', v_name));
  end if;
  select count(*), coalesce(sum(length(e)), 0) into value_count, characters from jsonb_array_elements_text(v_values) e;
  if value_count > 250 and characters > 15000 then
    perform autotag.refuse_profile(format(
      'The values of the field %s have %s characters; OpenAI allows at most 15,000 for more than 250 values.', v_name, characters));
  end if;
end $$;
