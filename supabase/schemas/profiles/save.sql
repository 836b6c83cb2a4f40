-- Saving a profile: `autotag profile set`, and set_tagging_profile for a person's page.

-- Saves a new version of a workspace's profile (null: of the one for all), and returns it. p_changes: what changes, by the names of the
-- columns (instructions, language, tag_count, min_confidence, vocabulary_mode, add_parents, fields); null: the default. The rest stays
-- as it is in profile_of(), so a workspace's first own version starts from the profile for all. Without a change there is no new version.
-- Locks: the workspace's profile (advisory).
create or replace function autotag.save_profile(p_workspace_id autotag.workspace_id, p_changes jsonb) returns autotag.profiles
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_old autotag.profiles;
  v_new autotag.profiles;
begin
  perform autotag.check_changes(p_changes);
  perform pg_advisory_xact_lock(hashtextextended('autotag.profile ' || coalesce(p_workspace_id::text, ''), 0));
  v_old := autotag.profile_of(p_workspace_id);
  v_new := jsonb_populate_record(v_old, jsonb_strip_nulls(p_changes));
  -- Nulls are removed from fields, too: a field without values or description is the same as one where they are null.
  v_new.fields := coalesce(jsonb_strip_nulls(p_changes -> 'fields'), v_old.fields);
  v_new.instructions := btrim(replace(v_new.instructions, E'\r\n', E'\n'), E' \n\t');
  if p_changes ? 'instructions' and v_new.instructions = '' or p_changes -> 'instructions' = 'null' then v_new.instructions := ''; end if;
  v_new.language := btrim(v_new.language);
  if p_changes -> 'language' = 'null' then v_new.language := null; end if;
  if p_changes -> 'tag_count' = 'null' then v_new.tag_count := null; end if;
  if p_changes -> 'min_confidence' = 'null' then v_new.min_confidence := 0; end if;
  if p_changes -> 'vocabulary_mode' = 'null' then v_new.vocabulary_mode := 'open'; end if;
  if p_changes -> 'add_parents' = 'null' then v_new.add_parents := false; end if;
  if p_changes -> 'fields' = 'null' then v_new.fields := '[]'; end if;
  if v_new = v_old then
    return v_old;
  end if;
  insert into autotag.profiles (workspace_id, instructions, language, tag_count, min_confidence, vocabulary_mode, add_parents,
    fields, created_at)
  values (p_workspace_id, v_new.instructions, v_new.language, v_new.tag_count, v_new.min_confidence,
    v_new.vocabulary_mode, v_new.add_parents, v_new.fields, autotag.now())
  returning * into v_new;
  return v_new;
end $$;

-- Refuses changes of a profile that are not an object of the right names and types. check_profile() checks the values.
create or replace function autotag.check_changes(p_changes jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_types jsonb := '{"instructions": "string", "language": "string", "tag_count": "number", "min_confidence": "number",
    "vocabulary_mode": "string", "add_parents": "boolean", "fields": "array"}'::jsonb;
  v_odd text;
begin
  if p_changes is null or jsonb_typeof(p_changes) <> 'object' then
    perform autotag.refuse_profile('A profile has to be an object.');
  elsif octet_length(p_changes::text) > 1000000 then
    perform autotag.refuse_profile('A profile may have at most 1,000,000 bytes.');
  end if;
  select autotag.printable(c.key, 50) into v_odd from jsonb_object_keys(p_changes) c (key) where not v_types ? c.key limit 1;
  if v_odd is not null then
    perform autotag.refuse_profile(format('A profile has no %s; it has %s.', v_odd, (
      select string_agg(t.key, ', ' order by t.key) from jsonb_object_keys(v_types) t (key))));
  end if;
  select format('%s has to be of the type %s', c.key, v_types ->> c.key) into v_odd
  from jsonb_each(p_changes) c where jsonb_typeof(c.value) not in (v_types ->> c.key, 'null') limit 1;
  if v_odd is not null then
    perform autotag.refuse_profile(v_odd || '.');
  elsif jsonb_typeof(p_changes -> 'tag_count') = 'number' and not coalesce(p_changes ->> 'tag_count' ~ E'^\\d{1,4}$', false) then
    perform autotag.refuse_profile('The number of tags has to be a whole number from 1 to 50.');
  elsif jsonb_typeof(p_changes -> 'min_confidence') = 'number' and not coalesce(p_changes -> 'min_confidence' between '0' and '1', false) then
    perform autotag.refuse_profile('The minimum confidence has to be from 0 to 1.');
  end if;
end $$;

-- A profile for programs. own: whether it is the workspace's own, and not the one for all.
create or replace function autotag.describe_profile(p_profile autotag.profiles) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return to_jsonb(p_profile) - '{id,workspace_id}'::text[] || jsonb_build_object('own', p_profile.workspace_id is not null);
end $$;

-- All versions that a workspace's images may have been tagged with, the newest first, at most 100; null: those of the profile for all.
create or replace function autotag.profile_history(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(jsonb_agg(autotag.describe_profile(p) order by p.version desc), '[]')
    from (
      select pr.* from autotag.profiles pr
      where pr.workspace_id is null and p_workspace_id is null or pr.workspace_id = p_workspace_id
      order by pr.version desc limit 100) p);
end $$;

-- tagging_profile: the profile in force for a workspace, for its members.
create or replace function autotag.read_profile(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_member(p_workspace_id);
  return autotag.describe_profile(autotag.profile_of(p_workspace_id));
end $$;

-- set_tagging_profile: saves changes of a workspace's profile (save_profile) for its editors, and returns the profile that is in force
-- from now on. Images that were tagged before stay as they are, until `autotag enqueue --outdated`.
create or replace function autotag.edit_profile(p_workspace_id autotag.workspace_id, p_changes jsonb) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_editor(p_workspace_id);
  return autotag.describe_profile(autotag.save_profile(p_workspace_id, p_changes));
end $$;

-- Whether a workspace (null: one without a vocabulary of its own) has tags to use: its own, or general ones.
create or replace function autotag.has_vocabulary(p_workspace_id autotag.workspace_id) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.vocabulary v where v.workspace_id is null)
    or exists (select from autotag.vocabulary v where v.workspace_id = p_workspace_id);
end $$;

-- For operators: the profile and has_vocabulary, without a check of the caller. Null: the profile for all workspaces.
create or replace function autotag.show_profile(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.describe_profile(autotag.profile_of(p_workspace_id))
    || jsonb_build_object('has_vocabulary', autotag.has_vocabulary(p_workspace_id));
end $$;

create or replace function autotag.set_profile(p_workspace_id autotag.workspace_id, p_changes jsonb) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.describe_profile(autotag.save_profile(p_workspace_id, p_changes))
    || jsonb_build_object('has_vocabulary', autotag.has_vocabulary(p_workspace_id));
end $$;

-- Whether a workspace is known here: it has an image, an upload, usage, or a setting of its own. autotag knows no table of
-- workspaces, so a mistyped id would look like an empty workspace.
create or replace function autotag.knows_workspace(p_workspace_id autotag.workspace_id) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return autotag.list_assets(p_workspace_id, false, null, 1) <> '{}'
    or exists (select from autotag.workspaces ws where ws.workspace_id = p_workspace_id)
    or exists (select from autotag.jobs j where j.workspace_id = p_workspace_id)
    or exists (select from autotag.profiles pr where pr.workspace_id = p_workspace_id)
    or exists (select from autotag.vocabulary v where v.workspace_id = p_workspace_id)
    or exists (select from autotag.usage us where us.workspace_id = p_workspace_id)
    or exists (select from autotag.quotas qu where qu.workspace_id = p_workspace_id)
    or exists (select from autotag.windows wn where wn.workspace_id = p_workspace_id);
end $$;
