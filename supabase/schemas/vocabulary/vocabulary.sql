-- Reading and changing vocabularies: the prompt's list, the commands `autotag vocabulary`, and the calls for a page.

-- The vocabulary of a workspace for the prompt: at most 500 tags, as a JSON array of "tag" or ["tag", "description"], by key. A workspace's
-- own come before general ones, then those that most images have. It only changes with the vocabulary, because the provider's prompt
-- cache needs the same beginning in every call.
create or replace function autotag.vocabulary_for_prompt(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
begin
  return (
    select coalesce(jsonb_agg(case when p.description is null then to_jsonb(p.tag) else jsonb_build_array(p.tag, p.description) end order by p.key), '[]')
    from (
      select x.key, x.tag, case when length(x.description) > 80 then left(x.description, 79) || '…' else x.description end as description
      from (
        (select v.*, 1 as rank from autotag.vocabulary v where v.workspace_id = p_workspace_id order by v.uses desc, v.key limit 500)
        union all
        (select v.*, 2 from autotag.vocabulary v
         where v.workspace_id is null and not exists (
           select from autotag.vocabulary_names vn where vn.workspace_id = p_workspace_id and vn.key = v.key)
         order by v.uses desc, v.key limit 500)) x
      order by x.rank, x.uses desc, x.key limit 500) p);
end $$;

-- The entries of a workspace (null: the general ones), by key: [{tag, aliases, description, parent, uses}]. For `autotag vocabulary
-- export`.
create or replace function autotag.list_vocabulary(p_workspace_id autotag.workspace_id) returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select coalesce(jsonb_agg(jsonb_build_object('tag', v.tag, 'aliases', v.aliases, 'description', v.description, 'parent', v.parent,
    'uses', v.uses) order by v.key), '[]')
  from autotag.vocabulary v where v.workspace_id is not distinct from p_workspace_id
$$;

-- tagging_vocabulary: the vocabulary in force for a workspace, for its members: {mode, add_parents, may_edit, tags: [{tag, aliases,
-- description, parent, general}]}. general: an entry for all workspaces, which members cannot change.
create or replace function autotag.describe_vocabulary(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles;
begin
  perform autotag.check_member(p_workspace_id);
  v_profile := autotag.profile_of(p_workspace_id);
  return jsonb_build_object(
    'mode', v_profile.vocabulary_mode, 'add_parents', v_profile.add_parents,
    'may_edit', autotag.is_service() or autotag.is_editor(p_workspace_id),
    'tags', (
      select coalesce(jsonb_agg(jsonb_build_object('tag', v.tag, 'aliases', v.aliases, 'description', v.description,
        'parent', v.parent, 'general', v.workspace_id is null) order by v.key), '[]')
      from autotag.vocabulary v
      where v.workspace_id = p_workspace_id or v.workspace_id is null and not exists (
        select from autotag.vocabulary_names vn where vn.workspace_id = p_workspace_id and vn.key = v.key)));
end $$;

-- Changes the vocabulary of a workspace (null: the general one). Adds or changes p_entries ([{tag, aliases, description, parent, uses}];
-- absent keys stay as they are), and deletes the tags p_removed. p_replace: deletes all other entries, too. A parent that is not a name
-- of an entry becomes an entry. Entries with the same tag become one, unless they contradict each other. Returns {tags (in all), added,
-- changed, removed}. Locks: the workspace's vocabulary (advisory).
create or replace function autotag.edit_vocabulary(
  p_workspace_id autotag.workspace_id, p_entries jsonb, p_removed text[] default '{}', p_replace boolean default false
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_entries autotag.vocabulary_entry[];
  v_stays text[];              -- keys of entries that do not change …
  v_gone text[];               -- … and of those that are deleted or written anew
  v_tags integer;
  v_changed integer;
  v_written integer;
begin
  if p_workspace_id is not null or not autotag.is_service() then
    perform autotag.check_editor(p_workspace_id);   -- the general one is the service's
  end if;
  perform autotag.check_entries(p_entries);
  perform pg_advisory_xact_lock(hashtextextended('autotag.vocabulary ' || coalesce(p_workspace_id::text, ''), 0));
  v_entries := autotag.read_entries(p_workspace_id, p_entries, p_replace);
  v_stays := array(
    select v.key from unnest(v_entries) e join autotag.vocabulary v on v.workspace_id is not distinct from p_workspace_id and v.key = e.key
    where (v.tag, v.aliases, v.description, v.parent, v.uses) is not distinct from (e.tag, e.aliases, e.description, e.parent, e.uses));
  with gone as (
    delete from autotag.vocabulary v
    where v.workspace_id is not distinct from p_workspace_id and v.key <> all (v_stays)
      and (p_replace or v.key in (select e.key from unnest(v_entries) e union all select autotag.tag_key(r) from unnest(p_removed) r))
    returning v.key
  )
  select coalesce(array_agg(g.key), '{}') into v_gone from gone g;
  insert into autotag.vocabulary (workspace_id, tag, aliases, description, parent, uses)
  select p_workspace_id, e.tag, e.aliases, e.description, e.parent, e.uses from unnest(v_entries) e where e.key <> all (v_stays);
  get diagnostics v_written = row_count;
  select count(*) into v_tags from autotag.vocabulary v where v.workspace_id is not distinct from p_workspace_id;
  if v_tags > 50000 then
    perform autotag.refuse(413, 'vocabulary_too_large', format('%s tags are too many for one vocabulary.', v_tags),
      'A vocabulary has at most 50,000 tags; nothing was saved.', '{"max_tags": 50000}');
  end if;
  select count(*) into v_changed from unnest(v_entries) e where e.key = any (v_gone);
  return jsonb_build_object('tags', v_tags, 'added', v_written - v_changed, 'changed', v_changed, 'removed', cardinality(v_gone) - v_changed);
end $$;

-- Refuses anything but a list of entries. `entry` in the detail is the place of the wrong one.
create or replace function autotag.check_entries(p_entries jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_wrong record;
begin
  if p_entries is null or jsonb_typeof(p_entries) <> 'array' then
    perform autotag.refuse_vocabulary('The entries have to be a list.');
  elsif jsonb_array_length(p_entries) > 50000 or pg_column_size(p_entries) > 50000000 then
    perform autotag.refuse(413, 'vocabulary_too_large', 'This list is too long.', 'A vocabulary has at most 50,000 tags; nothing was saved.',
      '{"max_tags": 50000}');
  end if;
  select w.i, w.fault into v_wrong from (
    select u.i, case
      when jsonb_typeof(u.e) <> 'object' then 'is not an object'
      when jsonb_typeof(u.e -> 'tag') is distinct from 'string' then 'has no tag'
      when jsonb_typeof(u.e -> 'aliases') not in ('array', 'null') or jsonb_path_exists(u.e, 'strict $.aliases[*] ? (@.type() != "string")', '{}', true)
        then 'has aliases that are no list of texts'
      when jsonb_typeof(u.e -> 'description') not in ('string', 'null') then 'has a description that is no text'
      when jsonb_typeof(u.e -> 'parent') not in ('string', 'null') then 'has a parent that is no text'
      when u.e ? 'uses' and not coalesce(u.e ->> 'uses' ~ '^[0-9]{1,15}$', false) then 'has uses that are no number' end as fault
    from jsonb_array_elements(p_entries) with ordinality u (e, i)) w
  where w.fault is not null order by w.i limit 1;
  if found then
    perform autotag.refuse_vocabulary(format('Entry %s %s.', v_wrong.i, v_wrong.fault), 'bad_vocabulary',
      jsonb_build_object('entry', v_wrong.i));
  end if;
end $$;

-- The entries as they will be stored: cleaned, one for each tag, completed from the stored ones, and with new entries for parents.
create or replace function autotag.read_entries(p_workspace_id autotag.workspace_id, p_entries jsonb, p_replace boolean)
returns autotag.vocabulary_entry[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_entries autotag.vocabulary_entry[];
begin
  v_entries := array(
    with read as materialized (
      select u.i, u.e, c.tag, autotag.tag_key(c.tag) as key,
        case when autotag.visible_text(u.e ->> 'parent') <> '' then autotag.clean_word(u.e ->> 'parent', 'parent', u.i) end as parent
      from jsonb_array_elements(p_entries) with ordinality u (e, i)
      cross join lateral (select autotag.clean_word(u.e ->> 'tag', 'tag', u.i) as tag offset 0) c
    ), aliases as materialized (
      select a.key, array_agg(a.word order by a.place) as words from (
        select r.key, (array_agg(c.word order by r.i, x.place))[1] as word, min(r.i * 1000 + x.place) as place
        from read r
        cross join lateral jsonb_array_elements_text(coalesce(nullif(r.e -> 'aliases', 'null'), '[]')) with ordinality x (alias, place)
        cross join lateral (select autotag.clean_word(x.alias, 'alias', r.i) as word offset 0) c
        where autotag.visible_text(x.alias) <> '' and autotag.tag_key(c.word) <> r.key group by r.key, autotag.tag_key(c.word)) a
      group by a.key
    ), merged as materialized (
      select r.key, (array_agg(r.tag order by r.i))[1] as tag, max(r.i) as i, bool_or(r.e ? 'aliases') as has_aliases,
        bool_or(r.e ? 'description') as has_description, bool_or(r.e ? 'parent') as has_parent,
        array_agg(distinct d.text) filter (where d.text <> '') as descriptions,
        array_agg(distinct autotag.tag_key(r.parent)) filter (where r.parent is not null) as parents,
        min(r.parent) as parent, sum((r.e ->> 'uses')::bigint) as uses
      from read r cross join lateral (select autotag.visible_text(left(r.e ->> 'description', 5000)) as text offset 0) d
      group by r.key
    )
    select autotag.check_merged(row(m.key, m.tag,
        case when m.has_aliases or v.id is null or p_replace then coalesce(a.words, '{}') else v.aliases end,
        case when m.has_description or p_replace then m.descriptions[1] else v.description end,
        case when m.has_parent or p_replace then m.parent else v.parent end,
        coalesce(m.uses, v.uses, 0))::autotag.vocabulary_entry, m.descriptions, m.parents, m.i)
    from merged m left join aliases a on a.key = m.key
    left join autotag.vocabulary v on v.workspace_id is not distinct from p_workspace_id and v.key = m.key
    order by m.i);
  return v_entries || autotag.missing_parents(p_workspace_id, v_entries, p_replace);
end $$;

-- Returns an entry. Refuses one that was given several times with different descriptions or parents.
create or replace function autotag.check_merged(p_entry autotag.vocabulary_entry, p_descriptions text[], p_parents text[], p_place bigint)
returns autotag.vocabulary_entry
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
  if cardinality(p_descriptions) > 1 or cardinality(p_parents) > 1 then
    perform autotag.refuse_vocabulary(format('The tag “%s” is there twice, with different %s.', p_entry.tag,
      case when cardinality(p_parents) > 1 then 'parents' else 'descriptions' end), 'bad_vocabulary', jsonb_build_object('entry', p_place));
  end if;
  return p_entry;
end $$;

-- New entries for the parents that are not a name of any entry, neither of p_entries nor of those that stay.
create or replace function autotag.missing_parents(p_workspace_id autotag.workspace_id, p_entries autotag.vocabulary_entry[], p_replace boolean)
returns autotag.vocabulary_entry[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_parents text[];
  v_keys text[];
begin
  select array_agg(p.parent), array_agg(p.key) into v_parents, v_keys
  from (
    select autotag.tag_key(e.parent) as key, min(e.parent) as parent from unnest(p_entries) e where e.parent is not null group by 1) p
  where p.key not in (
    select e.key from unnest(p_entries) e
    union all
    select autotag.tag_key(a) from unnest(p_entries) e cross join lateral unnest(e.aliases) a);
  return array(
    select row(p.key, p.parent, '{}'::text[], null, null, coalesce(v.uses, 0))::autotag.vocabulary_entry
    from unnest(v_parents, v_keys) p (parent, key)
    left join autotag.vocabulary v on v.workspace_id is not distinct from p_workspace_id and v.key = p.key
    where not exists (
      -- when everything is replaced, only general entries stay
      select from autotag.find_names(case when not p_replace then p_workspace_id end, array[p.key])
      where not (p_replace and p_workspace_id is null))
    order by p.key);
end $$;

-- Records how many images have each tag ({tag: images}) at the entries of a workspace (null: the general ones), and adds the tags that
-- are no name yet and that at least p_min images have. Returns {tags (in all), added, counted, new: [{tag, uses}]}. Locks: as edit_vocabulary().
create or replace function autotag.count_uses(p_workspace_id autotag.workspace_id, p_counts jsonb, p_min bigint) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_counted integer;
  v_tags text[];
  v_uses bigint[];
  v_ids bigint[];              -- of the entry that has this name; null: none
  v_new jsonb;
  v_done jsonb;
begin
  select coalesce(array_agg(c.tag), '{}'), coalesce(array_agg(c.uses), '{}'), coalesce(array_agg(f.id), '{}') into v_tags, v_uses, v_ids
  from (
    -- the spelling that most images have
    select autotag.tag_key(c.tag) as key, (array_agg(c.tag order by c.uses desc, c.tag))[1] as tag, sum(c.uses)::bigint as uses
    from (select autotag.visible_text(t.key) as tag, t.value::bigint as uses from jsonb_each_text(p_counts) t where length(t.key) <= 50 offset 0) c
    where length(c.tag) between 1 and 50 group by 1) c
  left join lateral autotag.find_names(p_workspace_id, array[c.key]) f on true
  where c.key <> '';
  select coalesce(jsonb_agg(jsonb_build_object('tag', t.tag, 'uses', t.uses) order by t.uses desc, t.tag), '[]') into v_new
  from unnest(v_tags, v_uses, v_ids) t (tag, uses, id) where t.id is null and t.uses >= p_min;
  v_done := autotag.edit_vocabulary(p_workspace_id, v_new);
  update autotag.vocabulary v set uses = t.uses
  from (select x.id, sum(x.uses)::bigint as uses from unnest(v_uses, v_ids) x (uses, id) where x.id is not null group by x.id) t
  where v.id = t.id and v.workspace_id is not distinct from p_workspace_id and v.uses <> t.uses;
  get diagnostics v_counted = row_count;
  return v_done - '{changed,removed}'::text[] || jsonb_build_object('counted', v_counted, 'new', v_new);
end $$;
