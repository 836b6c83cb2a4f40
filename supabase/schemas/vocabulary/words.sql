-- The words of a vocabulary: the form in which they are compared, and which words are refused.

-- Matches punctuation that separates words: Unicode's, ASCII's except # % . @ and the apostrophe, and the minus sign. Planning replaces
-- the call by its value.
create or replace function autotag.punctuation() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select E'[]!"&()*,/:;?[\\\\_{}`~\\u00a1\\u00a7\\u00ab\\u00b6-\\u00b7\\u00bb\\u00bf\\u055a-\\u055f\\u0589-\\u058a\\u05be\\u05c0\\u05c3\\u05c6\\u05f3-\\u05f4\\u0609-\\u060a\\u060c-\\u060d\\u061b\\u061d-\\u061f\\u066a-\\u066d\\u06d4\\u0700-\\u070d\\u07f7-\\u07f9\\u0830-\\u083e\\u085e\\u0964-\\u0965\\u0970\\u09fd\\u0a76\\u0af0\\u0c77\\u0c84\\u0df4\\u0e4f\\u0e5a-\\u0e5b\\u0f04-\\u0f0b\\u0f0d-\\u0f12\\u0f14\\u0f3a-\\u0f3d\\u0f85\\u0fd0-\\u0fd4\\u0fd9-\\u0fda\\u104a-\\u104f\\u10fb\\u1360-\\u1368\\u1400\\u166e\\u169b-\\u169c\\u16eb-\\u16ed\\u1735-\\u1736\\u17d4-\\u17d6\\u17d8-\\u17da\\u1800-\\u180a\\u1944-\\u1945\\u1a1e-\\u1a1f\\u1aa0-\\u1aa6\\u1aa8-\\u1aad\\u1b5a-\\u1b60\\u1b7d-\\u1b7e\\u1bfc-\\u1bff\\u1c3b-\\u1c3f\\u1c7e-\\u1c7f\\u1cc0-\\u1cc7\\u1cd3\\u2010\\u2012-\\u2016\\u2018-\\u2023\\u2027\\u2030-\\u2032\\u2035\\u2038-\\u203b\\u203d\\u203f-\\u2043\\u2045-\\u2046\\u204a-\\u2051\\u2053-\\u2056\\u2058-\\u205e\\u2308-\\u230b\\u2768-\\u2775\\u27c5-\\u27c6\\u27e6-\\u27ef\\u2983-\\u2998\\u29d8-\\u29db\\u29fc-\\u29fd\\u2cf9-\\u2cfc\\u2cfe-\\u2cff\\u2d70\\u2e00-\\u2e2e\\u2e30-\\u2e4f\\u2e52-\\u2e5d\\u3001-\\u3003\\u3008-\\u3011\\u3014-\\u301f\\u3030\\u303d\\u30a0\\u30fb\\ua4fe-\\ua4ff\\ua60d-\\ua60f\\ua673\\ua67e\\ua6f2-\\ua6f7\\ua874-\\ua877\\ua8ce-\\ua8cf\\ua8f8-\\ua8fa\\ua8fc\\ua92e-\\ua92f\\ua95f\\ua9c1-\\ua9cd\\ua9de-\\ua9df\\uaa5c-\\uaa5f\\uaade-\\uaadf\\uaaf0-\\uaaf1\\uabeb\\ufd3e-\\ufd3f\\ufe45-\\ufe46\\u2212-]'
$$;

-- The form in which tags are compared: "T-Shirts!" and "t shirts" are one tag, but "c#", ".net" and "100%" keep their signs. "": there is
-- nothing to compare. Characters that nobody sees do not count, and neither does the style of an emoji. The worker changes the form of
-- a tag (autotag/tags.py), but never its key.
create or replace function autotag.tag_key(p_tag text) returns text
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_key text := p_tag;
begin
  if v_key ~ '^[a-z0-9]+( [a-z0-9]+)*$' then   -- nearly every tag of a model is in this form already
    return v_key;
  end if;
  v_key := lower(v_key);
  if v_key !~ E'^[a-z0-9\\u00df-\\u00f6\\u00f8-\\u00ff]+( [a-z0-9\\u00df-\\u00f6\\u00f8-\\u00ff]+)*$' then   -- nearly every tag of a person, except for capitals
    v_key := regexp_replace(p_tag, autotag.blanks(), ' ', 'g');
    v_key := regexp_replace(v_key, autotag.invisible() || E'|[\\u180b-\\u180d\\u180f\\u200c\\u200d\\ufe00-\\ufe0f\\U000e0100-\\U000e01ef]', '', 'g');
    -- the lower case of İ has a second dot, and a final sigma is a sigma
    v_key := normalize(replace(lower(replace(normalize(v_key, NFKC), 'İ', 'i')), 'ς', 'σ'), NFKC);
    -- # and % belong to the word before them, a full stop and @ to the word after them
    v_key := regexp_replace(v_key, E'(?<![[:alnum:]])[#%]|[.@](?![[:alnum:]])|(?<=\\.)\\.', ' ', 'g');
    v_key := regexp_replace(v_key, '[''’‘ʼ]', '', 'g');
    v_key := regexp_replace(v_key, autotag.punctuation(), ' ', 'g');
    v_key := btrim(regexp_replace(v_key, ' +', ' ', 'g'));
  end if;
  return v_key;
end $$;

-- The trigrams of a key, word by word as in pg_trgm.
create or replace function autotag.key_grams(p_key text) returns text[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select distinct substr('  ' || w || ' ', i, 3)
    from unnest(string_to_array(p_key, ' ')) w cross join lateral generate_series(1, length(w) + 1) i);
end $$;

create or replace function autotag.refuse_vocabulary(
  p_message text, p_code text default 'bad_vocabulary', p_detail jsonb default '{}'
) returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.refuse(400, p_code, p_message, 'Correct it and try again; nothing was saved.', p_detail);
end $$;

-- Returns a tag, alias or parent in the form that is stored, or refuses it. p_what: `tag`, `alias` or `parent`. p_entry: the place of
-- its entry in a list.
create or replace function autotag.clean_word(p_word text, p_what text, p_entry bigint default null) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_word text := case when length(p_word) <= 1000 then autotag.visible_text(p_word) else p_word end;
  v_detail jsonb := case when p_entry is null then '{}' else jsonb_build_object('entry', p_entry) end;
begin
  if length(v_word) > 50 then
    perform autotag.refuse_vocabulary(format('The %s “%s” has more than 50 characters.', p_what, autotag.printable(v_word, 51)), 'bad_vocabulary', v_detail);
  elsif autotag.tag_key(v_word) = '' then
    perform autotag.refuse_vocabulary(format('The %s “%s” has no letter and no digit.', p_what, v_word), 'bad_vocabulary', v_detail);
  end if;
  return v_word;
end $$;

-- Cleans an entry, or refuses it.
create or replace function autotag.clean_vocabulary() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if new.tag is null then
    perform autotag.refuse_vocabulary('An entry has no tag.');
  elsif cardinality(new.aliases) > 100 then
    perform autotag.refuse_vocabulary(format('The tag “%s” has %s aliases; at most 100 are possible.', new.tag, cardinality(new.aliases)));
  end if;
  new.tag := autotag.clean_word(new.tag, 'tag');
  new.key := autotag.tag_key(new.tag);
  new.aliases := array(
    select (array_agg(a.word order by a.i))[1] from (
      select autotag.clean_word(u.word, 'alias') as word, u.i from unnest(new.aliases) with ordinality u (word, i)
      where autotag.visible_text(u.word) <> '') a
    where autotag.tag_key(a.word) <> new.key group by autotag.tag_key(a.word) order by min(a.i));
  new.description := nullif(autotag.visible_text(left(new.description, 5000)), '');
  if length(new.description) > 500 then
    perform autotag.refuse_vocabulary(format('The description of “%s” has more than 500 characters.', new.tag));
  end if;
  new.parent := case when autotag.visible_text(new.parent) <> '' then autotag.clean_word(new.parent, 'parent') end;
  new.parent_key := autotag.tag_key(new.parent);
  return new;
end $$;

create or replace trigger autotag_clean before insert or update of tag, key, aliases, description, parent, parent_key on autotag.vocabulary
  for each row execute function autotag.clean_vocabulary();

-- Records the names of new entries. Refuses a name that another tag has already, and an invalid chain of parents (check_parents).
create or replace function autotag.keep_names() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.add_names(array(select n.id from new_rows n));
  return null;
end $$;

-- The same for entries that have changed.
create or replace function autotag.keep_changed_names() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_changed bigint[] := array(
    select n.id from new_rows n left join old_rows o on o.id = n.id
    where (n.workspace_id, n.tag, n.aliases, n.parent_key) is distinct from (o.workspace_id, o.tag, o.aliases, o.parent_key));
begin
  delete from autotag.vocabulary_names vn where vn.vocabulary_id = any (v_changed);
  perform autotag.add_names(v_changed);
  return null;
end $$;

create or replace trigger autotag_names after insert on autotag.vocabulary
  referencing new table as new_rows for each statement execute function autotag.keep_names();
create or replace trigger autotag_names_changed after update on autotag.vocabulary
  referencing old table as old_rows new table as new_rows for each statement execute function autotag.keep_changed_names();

-- Adds the names of these entries, and checks their chains of parents. Refuses what keep_names() refuses.
create or replace function autotag.add_names(p_entries bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_clash record;
begin
  if p_entries = '{}' then
    return;
  end if;
  with named as materialized (
    select v.id, v.workspace_id, autotag.tag_key(u.name) as key
    from autotag.vocabulary v cross join lateral unnest(v.tag || v.aliases) u (name) where v.id = any (p_entries)
  ), added as (
    insert into autotag.vocabulary_names (vocabulary_id, workspace_id, key)
    select n.id, n.workspace_id, n.key from named n order by n.id, n.key
    on conflict (workspace_id, key) do nothing returning vocabulary_id, key
  )
  select n.id, n.workspace_id, n.key into v_clash
  from named n left join added a on a.vocabulary_id = n.id and a.key = n.key where a.key is null order by n.id limit 1;
  if found then
    perform autotag.refuse_vocabulary(format('“%s” is a name of two tags: %s.', v_clash.key, (
      select autotag.name_some(array_agg(format('“%s”', v.tag) order by v.key)) from autotag.vocabulary v
      where v.id = v_clash.id or v.id = (
        select vn.vocabulary_id from autotag.vocabulary_names vn
        where vn.workspace_id is not distinct from v_clash.workspace_id and vn.key = v_clash.key))), 'two_tags',
      jsonb_build_object('name', v_clash.key));
  end if;
  perform autotag.check_parents(p_entries);
end $$;

-- Refuses an entry whose chain of parents contains the entry itself or more than ten entries. (A chain of general entries and entries of
-- a workspace can still be a circle, so matching follows at most ten parents.)
create or replace function autotag.check_parents(p_entries bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_workspace autotag.workspace_id;
  v_ids bigint[];
  v_deep bigint;
begin
  for v_workspace, v_ids in
    select v.workspace_id, array_agg(v.id) from autotag.vocabulary v
    where v.id = any (p_entries) and v.parent_key is not null group by v.workspace_id
  loop
    select a.id into v_deep from unnest(autotag.find_ancestors(v_workspace, v_ids, 11)) a
    where a.above = a.id or a.depth = 11 order by a.id limit 1;
    if found then
      perform autotag.refuse_vocabulary(format(
        'The tag “%s” is above itself, or more than ten tags are above it.', (select v.tag from autotag.vocabulary v where v.id = v_deep)), 'parent_cycle',
        jsonb_build_object('name', (select v.key from autotag.vocabulary v where v.id = v_deep)));
    end if;
  end loop;
end $$;
