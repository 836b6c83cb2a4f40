-- Matches a model's tags with the vocabulary when they are stored. The vocabulary of that moment decides, whatever the model answered
-- and however long ago. So with the mode `only`, no other tag reaches a row of the host.

-- The results of images of one workspace as they are stored. write_outcomes(), the only caller of store_tags(), calls it.
create or replace function autotag.match_results(p_workspace_id autotag.workspace_id, p_results jsonb[]) returns jsonb[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_profile autotag.profiles := autotag.profile_of(p_workspace_id);
begin
  if v_profile.vocabulary_mode = 'open' then
    return case when autotag.has_vocabulary(p_workspace_id) then autotag.name_tags(p_workspace_id, p_results) else p_results end;
  end if;
  return autotag.match_tags(p_workspace_id, p_results, v_profile.vocabulary_mode, v_profile.add_parents);
end $$;

-- Replaces the tags of each result by the vocabulary's tags. p_mode: `prefer` keeps tags that are not in the vocabulary; every other mode
-- drops them. p_parents: adds the parents of each tag, with the tag's confidence. If several tags become the same tag, it keeps the
-- highest confidence. A result has at most 50 tags: the most confident first, and tags of equal confidence in the model's order. Two keys
-- are added to each result:
--   names   {tag: [key, …]}: the keys under which a person may know a tag of the vocabulary: its own, those of its aliases, and that of
--           the model's word. merge_tags() compares them with the tags of a row.
--   above   {tag: [tag, …]}: for a tag that was added as a parent, the tags below it. A parent that the model gave itself has no entry
--           (answered_tags).
create or replace function autotag.match_tags(
  p_workspace_id autotag.workspace_id, p_results jsonb[], p_mode text, p_parents boolean
) returns jsonb[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set jit = off
as $$
declare
  v_known autotag.known_tag[] := autotag.know_tags(p_workspace_id, array(
    select distinct t.tag from unnest(p_results) r cross join lateral jsonb_array_elements_text(r -> 'tags') t (tag)));
  v_above autotag.ancestor[] := array[]::autotag.ancestor[];
begin
  if p_parents then
    v_above := autotag.find_ancestors(p_workspace_id, array(select distinct k.id from unnest(v_known) k), 10);
  end if;
  return array(
    with given as materialized (
      select r.i, t.tag, k.id, (r.result -> 'confidence' -> t.tag)::numeric as sure, t.place
      from unnest(p_results) with ordinality r (result, i)
      cross join lateral jsonb_array_elements_text(r.result -> 'tags') with ordinality t (tag, place)
      left join unnest(v_known) k on k.given = t.tag
    ), words as materialized (
      select v.id, v.tag from autotag.vocabulary v
      where v.id = any (array(select k.id from unnest(v_known) k union select a.above from unnest(v_above) a))
    ), names as materialized (
      select w.tag, jsonb_agg(n.key) as keys from words w join (
        select f.id, f.key from autotag.names_of(p_workspace_id, array(select x.id from words x)) f
        union
        select k.id, k.key from unnest(v_known, autotag.tag_keys(array(select x.given from unnest(v_known) x))) k (given, id, key)) n on n.id = w.id
      group by w.tag
    ), chosen as (
      select g.i, coalesce(w.tag, g.tag) as tag, g.sure, g.place, null as below from given g left join words w on w.id = g.id
      where w.id is not null or p_mode = 'prefer'
      union all
      select g.i, w.tag, g.sure, 1000 * a.depth + g.place, b.tag
      from given g join unnest(v_above) a on a.id = g.id join words w on w.id = a.above join words b on b.id = g.id
    ), merged as (
      select c.i, c.tag, max(c.sure) as sure, case when bool_and(c.below is not null) then jsonb_agg(c.below) end as below,
        row_number() over (partition by c.i order by max(c.sure) desc nulls last, min(c.place)) as place
      from chosen c group by c.i, c.tag
    ), matched as (
      select m.i, jsonb_agg(m.tag order by m.place) as tags, jsonb_object_agg(m.tag, m.sure) filter (where m.sure is not null) as sure,
        jsonb_object_agg(m.tag, n.keys) filter (where n.keys is not null) as names,
        jsonb_object_agg(m.tag, m.below) filter (where m.below is not null) as above
      from merged m left join names n on n.tag = m.tag where m.place <= 50 group by m.i
    )
    select r.result || jsonb_build_object('tags', coalesce(m.tags, '[]'), 'confidence', coalesce(m.sure, '{}'),
      'names', coalesce(m.names, '{}')) || case when m.above is null then '{}' else jsonb_build_object('above', m.above) end
    from unnest(p_results) with ordinality r (result, i) left join matched m on m.i = r.i order by r.i);
end $$;

-- Adds `names` to results, as match_tags() does, for the mode `open`: their tags stay as they are.
create or replace function autotag.name_tags(p_workspace_id autotag.workspace_id, p_results jsonb[]) returns jsonb[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set jit = off
as $$
declare
  v_known autotag.known_tag[] := autotag.know_tags(p_workspace_id, array(
    select distinct t.tag from unnest(p_results) r cross join lateral jsonb_array_elements_text(r -> 'tags') t (tag)));
begin
  if v_known = '{}' then
    return p_results;
  end if;
  return array(
    with names as materialized (
      select k.given, jsonb_agg(n.key) as keys
      from unnest(v_known, autotag.tag_keys(array(select x.given from unnest(v_known) x))) k (given, id, key) cross join lateral (
        select f.key from autotag.names_of(p_workspace_id, array[k.id]) f union select k.key) n
      group by k.given
    )
    select r.result || jsonb_build_object('names', coalesce((
      select jsonb_object_agg(n.given, n.keys) from names n where r.result -> 'tags' ? n.given), '{}'))
    from unnest(p_results) with ordinality r (result, i) order by r.i);
end $$;

-- The keys of all names that these entries have for a workspace. A name of a general entry does not count if an entry of the workspace
-- has it.
create or replace function autotag.names_of(p_workspace_id autotag.workspace_id, p_entries bigint[]) returns table (id bigint, key text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
  return query
    select n.vocabulary_id, n.key from unnest(p_entries) e cross join lateral (
      select vn.vocabulary_id, vn.key, vn.workspace_id from autotag.vocabulary_names vn where vn.vocabulary_id = e) n
    where n.workspace_id is not null or not exists (
      select from autotag.vocabulary_names own where own.workspace_id = p_workspace_id and own.key = n.key);
end $$;

-- The tags among these that the vocabulary knows: by their key, else because they are a tag with its description, else because exactly
-- one name is nearly the same.
create or replace function autotag.know_tags(p_workspace_id autotag.workspace_id, p_tags text[]) returns autotag.known_tag[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_keys text[] := array(select autotag.tag_key(t) from unnest(p_tags) with ordinality u (t, i) order by i);
  v_names text[];              -- keys that are found …
  v_ids bigint[];              -- … and their entries
begin
  select coalesce(array_agg(f.key), '{}'), coalesce(array_agg(f.id), '{}') into v_names, v_ids
  from autotag.find_names(p_workspace_id, array(select distinct k from unnest(v_keys) k where k <> '')) f;
  select v_names || coalesce(array_agg(d.key), '{}'), v_ids || coalesce(array_agg(d.id), '{}') into v_names, v_ids
  from autotag.find_described(p_workspace_id, array(
    select t.tag from unnest(p_tags, v_keys) t (tag, key) where t.tag ~ '[:(]' and t.key not in (select unnest(v_names)))) d;
  select v_names || coalesce(array_agg(s.key), '{}'), v_ids || coalesce(array_agg(s.id), '{}') into v_names, v_ids
  from autotag.find_similar(p_workspace_id, array(
    select distinct k from unnest(v_keys) k where k <> '' and k not in (select unnest(v_names)))) s;
  return array(
    select row(t.tag, n.id)::autotag.known_tag
    from unnest(p_tags, v_keys) t (tag, key) join unnest(v_names, v_ids) n (key, id) on n.key = t.key);
end $$;

-- The entries that have these names for a workspace: its own, else general ones, unless one of its own has the general entry's tag. (The
-- plan is kept, as in read_reports(), because planning would take longer than the search. The join is lateral, because the planner does
-- not know the number of keys.)
create or replace function autotag.find_names(p_workspace_id autotag.workspace_id, p_keys text[]) returns table (key text, id bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
  return query
    select k.key, f.id from unnest(p_keys) k (key)
    cross join lateral (
      select x.id from (
        select vn.vocabulary_id as id, 1 as rank from autotag.vocabulary_names vn where vn.workspace_id = p_workspace_id and vn.key = k.key
        union all
        select vn.vocabulary_id, 2 from autotag.vocabulary_names vn join autotag.vocabulary v on v.id = vn.vocabulary_id
        where vn.workspace_id is null and vn.key = k.key and not exists (
          select from autotag.vocabulary_names own where own.workspace_id = p_workspace_id and own.key = v.key)) x
      order by x.rank limit 1) f;
end $$;

-- The tags among these that are a name of an entry followed by (the beginning of) its description. The prompt has descriptions, and a
-- model may copy them: "barn: a building for hay", "barn (a building for hay)". Other words after a name can mean something else:
-- "jaguar (car)".
create or replace function autotag.find_described(p_workspace_id autotag.workspace_id, p_tags text[]) returns table (key text, id bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    with copied as materialized (
      select distinct autotag.tag_key(t) as key, autotag.tag_key(m[1]) as name, autotag.tag_key(m[2]) as said
      from unnest(p_tags) t cross join lateral regexp_match(t, '^([^:(]+)[:(](.+)$') m where m is not null
    )
    select distinct on (c.key) c.key, v.id
    from copied c
    join autotag.find_names(p_workspace_id, array(select distinct x.name from copied x)) f on f.key = c.name
    join autotag.vocabulary v on v.id = f.id
    where c.said <> '' and starts_with(autotag.tag_key(v.description), c.said) order by c.key;
end $$;

-- For each of these keys, which no entry has, the entry with a name that is nearly the same. So it finds plurals and misspellings of
-- longer words. Two keys are nearly the same if they share 70 % of their trigrams, counted as pg_trgm does (which need not be
-- installed); if no other entry is within 10 % of that; and if their first three letters, their numbers and their words of less than
-- four letters are equal (is_spelling).
-- A key is compared only with the 20 names before and after it in the alphabet. So it takes the same time in a vocabulary of any size,
-- even if all names begin alike.
create or replace function autotag.find_similar(p_workspace_id autotag.workspace_id, p_keys text[]) returns table (key text, id bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  c_like constant numeric := 0.7;
  c_apart constant numeric := 0.1;
begin
  return query
    with asked as materialized (
      select k.key collate "C" as key, left(k.key, 3) collate "C" as first, (left(k.key, 3) || E'\U0010FFFF') collate "C" as last,
        autotag.key_grams(k.key) as grams
      from unnest(p_keys) k (key) where length(k.key) >= 5
    ), near as materialized (
      select a.key, a.grams, n.vocabulary_id as id, n.key as name, n.general, autotag.key_grams(n.key) as others
      from asked a cross join lateral (
        (select vn.vocabulary_id, vn.key, false as general from autotag.vocabulary_names vn
         where vn.workspace_id = p_workspace_id and vn.key > a.key and vn.key < a.last order by vn.key limit 20)
        union all
        (select vn.vocabulary_id, vn.key, false from autotag.vocabulary_names vn
         where vn.workspace_id = p_workspace_id and vn.key < a.key and vn.key >= a.first order by vn.key desc limit 20)
        union all
        (select vn.vocabulary_id, vn.key, true from autotag.vocabulary_names vn
         where vn.workspace_id is null and vn.key > a.key and vn.key < a.last order by vn.key limit 20)
        union all
        (select vn.vocabulary_id, vn.key, true from autotag.vocabulary_names vn
         where vn.workspace_id is null and vn.key < a.key and vn.key >= a.first order by vn.key desc limit 20)) n
      where length(n.key) between c_like * length(a.key) - 1 and length(a.key) / c_like + 2
        and length(n.key) - length(replace(n.key, ' ', '')) = length(a.key) - length(replace(a.key, ' ', ''))
    ), compared as (
      select n.*, (select count(*) from unnest(n.grams) g where g = any (n.others))::numeric as shared from near n
    ), best as (
      select c.key, c.id, max(c.shared / (cardinality(c.grams) + cardinality(c.others) - c.shared)) as likeness from compared c
      where c.shared >= c_like * (cardinality(c.grams) + cardinality(c.others) - c.shared) and autotag.is_spelling(c.key, c.name)
        and not (c.general and exists (
          select from autotag.vocabulary v join autotag.vocabulary_names own on own.workspace_id = p_workspace_id and own.key in (v.key, c.name)
          where v.id = c.id))
      group by c.key, c.id
    ), ranked as (
      select b.key, b.id, b.likeness, lead(b.likeness) over w as next, row_number() over w as rank
      from best b window w as (partition by b.key order by b.likeness desc, b.id)
    )
    select r.key, r.id from ranked r where r.rank = 1 and coalesce(r.likeness - r.next >= c_apart, true);
end $$;

-- Whether two keys that look alike can be spellings of one tag: equal numbers, equal short words, and as many words.
create or replace function autotag.is_spelling(p_one text, p_other text) returns boolean
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return regexp_replace(p_one, E'\\D', '', 'g') = regexp_replace(p_other, E'\\D', '', 'g') and not exists (
    select from unnest(string_to_array(p_one, ' '), string_to_array(p_other, ' ')) w (one, other)
    where w.one is null or w.other is null or w.one <> w.other and least(length(w.one), length(w.other)) < 4);
end $$;

-- All entries above these in a workspace's vocabulary, up to p_depth. It ends at a parent that is not the name of an entry.
create or replace function autotag.find_ancestors(p_workspace_id autotag.workspace_id, p_entries bigint[], p_depth integer) returns autotag.ancestor[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_above autotag.ancestor[] := array[]::autotag.ancestor[];
  v_level autotag.ancestor[] := array(select row(e, e, 0)::autotag.ancestor from unnest(p_entries) e);
begin
  for v_depth in 1 .. p_depth loop
    v_level := array(
      with tops as materialized (
        select v.id, v.parent_key from autotag.vocabulary v
        where v.id = any (array(select distinct l.above from unnest(v_level) l)) and v.parent_key is not null
      ), parents as materialized (
        select f.key, f.id from autotag.find_names(p_workspace_id, array(select distinct t.parent_key from tops t)) f
      )
      select row(l.id, p.id, v_depth)::autotag.ancestor
      from unnest(v_level) l join tops t on t.id = l.above join parents p on p.key = t.parent_key);
    exit when v_level = '{}';
    v_above := v_above || v_level;
  end loop;
  return v_above;
end $$;
