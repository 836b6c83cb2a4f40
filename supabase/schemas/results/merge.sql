-- People's tags and the tags of autotag are in one column. What autotag stores is decided here, by comparing the column with what it
-- remembers in tagging_result. The memory has three lists:
--
--   given     tags that autotag gave and that are in the column, spelled as there. Every other tag of the column is a person's.
--   added     people's tags, as autotag last saw them
--   removed   the keys of tags that were in one of the two lists and later not in the column: people have removed them
--
-- autotag stores nothing else. So it does not notice if a tag is removed and typed again between two runs. A tag that is in the column
-- more than once, or that is spelled in another way than autotag gave it, is a person's.
--
-- Bounds: a list of 1,000 tags or 65,536 bytes takes 6 ms, 10 with capitals and 18 with punctuation. Longer ones are left as they are, and the row says so.

-- The keys of tags (tag_key), as a vocabulary compares them. A tag without a letter or digit has no such key, so its key is its lower
-- case. Null stays null. (Most tags are their own key. A call for each of them would take longer.)
create or replace function autotag.tag_keys(p_tags text[]) returns text[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return array(
    select case when u.tag ~ '^[a-z0-9]+( [a-z0-9]+)*$' then u.tag
      else coalesce(nullif(autotag.tag_key(u.tag), ''), btrim(regexp_replace(normalize(lower(u.tag)), E'\\s+', ' ', 'g'))) end
    from unnest(p_tags) with ordinality u (tag, i) order by u.i);
end $$;

-- Matches a list of tags (JSON as text) of which two can have the same key: one of them has a capital, a compatible character, or
-- anything else that tag_key() changes. Planning replaces the call by its value.
create or replace function autotag.odd_tags() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select E'[^][[:alnum:] ",]|[[:upper:]\\u00aa\\u00b2-\\u00b3\\u00b5\\u00b9-\\u00ba\\u0132-\\u0133\\u013f-\\u0140\\u0149\\u017f\\u01c4-\\u01cc\\u01f1-\\u01f3\\u02b0-\\u02b8\\u02bc\\u02e0-\\u02e4\\u0300-\\u0385\\u03c2\\u03d0-\\u03d6\\u03f0-\\u03f9\\u0587\\u0675-\\u0678\\u0958-\\u095f\\u09dc-\\u09df\\u0a33-\\u0a5e\\u0b5c-\\u0b5d\\u0e33\\u0eb3\\u0edc-\\u0edd\\u0f0c-\\u0fbf\\u10fc\\u1100-\\u11ff\\u1c80-\\u1c8f\\u1d2c-\\u1dbf\\u1e9a-\\u1e9b\\u1f71-\\u1fff\\u2070-\\u24ff\\u2c7c-\\u2c7d\\u2d6f\\u2e80-\\u2fdf\\u3130-\\u318f\\u3164\\u3038-\\u303a\\u3099-\\u309f\\u30ff\\u3192-\\u33ff\\ua69c-\\ua69d\\ua770\\ua7f2-\\ua7f9\\uab5c-\\uab69\\uf900-\\uffff\\U00010000-\\U0010ffff]' $$;

-- Whether each of an answer's tags has its own key. In ASCII, tags with one key have the same letters and digits. So it seldom has to
-- make keys, which takes longer.
create or replace function autotag.are_different(p_tags jsonb) returns boolean
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_text text := p_tags::text;
begin
  if v_text !~ autotag.odd_tags() or v_text !~ E'[^ -~]|\\\\' and (
      select count(distinct w) = count(*)
      from unnest(string_to_array(translate(lower(left(right(v_text, -2), -2)), ' !#$%&''()*+-./:;<=>?@^_`{|}~', ''), '","')) w) then
    return true;
  end if;
  return (select count(distinct k) = count(*) from unnest(autotag.tag_keys(array(select jsonb_array_elements_text(p_tags)))) k);
end $$;

-- The keys of the vocabulary's tags that have one of people's words as a name, or a name that is nearly the same (know_tags). p_names:
-- the names in an answer (match_tags); p_keys: the words' keys. Only words that begin like a name are looked up.
create or replace function autotag.near_tags(p_workspace_id autotag.workspace_id, p_names jsonb, p_keys text[]) returns text[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_begins text[];
  v_keys text[];
begin
  if p_names = '{}' or p_keys = '{}' then
    return array[]::text[];
  end if;
  v_begins := array(select distinct left(k, 3) from jsonb_each(p_names) n cross join lateral jsonb_array_elements_text(n.value) k);
  v_keys := array(select distinct k from unnest(p_keys) k where left(k, 3) = any (v_begins));
  if v_keys = '{}' then
    return array[]::text[];
  end if;
  return array(select v.key from unnest(autotag.know_tags(p_workspace_id, v_keys)) k join autotag.vocabulary v on v.id = k.id);
end $$;

-- One list (p_list) of tagging_result. Empty if tagging_result does not have the form that merge_tags() writes.
create or replace function autotag.recall_tags(p_memory jsonb, p_list text) returns text[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  if coalesce(jsonb_typeof(p_memory) = 'object' and p_memory ?& '{given,confidence,caption,model}'
    and jsonb_typeof(p_memory -> p_list) = 'array', false) then
    return array(select e #>> '{}' from jsonb_array_elements(p_memory -> p_list) e where jsonb_typeof(e) = 'string');
  end if;
  return array[]::text[];
end $$;

-- The tags of an answer, without parents that were only added for tags that people removed (`above` of match_tags). p_removed: the
-- removed keys; p_there: the keys of the tags in the column.
create or replace function autotag.answered_tags(p_answer jsonb, p_removed text[], p_there text[], p_workspace_id autotag.workspace_id)
returns text[]
language plpgsql stable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_tags text[] := array(select jsonb_array_elements_text(p_answer -> 'tags'));
  v_gone text[];               -- those of them that people removed
begin
  if p_answer -> 'above' is null or p_removed = '{}' then
    return v_tags;
  end if;
  v_gone := p_removed || autotag.near_tags(p_workspace_id, p_answer -> 'names', p_removed);
  v_gone := array(
    select t.tag from unnest(v_tags, autotag.tag_keys(v_tags)) t (tag, key)
    where (t.key = any (p_removed) or p_answer -> 'names' -> t.tag ?| v_gone)
      and (t.key = any (p_there)) is not true);
  return array(
    select t.tag from unnest(v_tags) with ordinality t (tag, i)
    where (p_answer -> 'above' -> t.tag <@ to_jsonb(v_gone)) is not true order by t.i);
end $$;

-- What the answer of a run changes. p_tags: the tags in the column; null: an element that is not a text. p_memory: the present
-- tagging_result. p_answer: as in store_tags; a tag is left out if one of its `names` (match_tags) is a person's tag or was removed, or
-- is nearly the same as one (near_tags). p_longest: the column's limit of a tag's length, if it has one. dropped: the places of tags
-- that an earlier run gave and this one does not. fresh: the tags to append. result: the new tagging_result.
create or replace function autotag.merge_tags(
  p_tags text[], p_memory jsonb, p_answer jsonb, p_longest integer, p_workspace_id autotag.workspace_id,
  out dropped integer[], out fresh text[], out result jsonb
)
language plpgsql stable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_keys text[] := autotag.tag_keys(p_tags);
  v_given text[] := autotag.recall_tags(p_memory, 'given');
  v_added text[];
  v_removed text[];
  v_kept text[];               -- the keys of what stays in the column
  v_answer text[];
  v_answer_keys text[];
  v_names jsonb := coalesce(p_answer -> 'names', '{}');
  v_taken text[];              -- the keys of people's tags, of those that they removed, and of what is nearly the same in the vocabulary
begin
  v_removed := array(
    select k from unnest(autotag.tag_keys(
      v_given || autotag.recall_tags(p_memory, 'added') || autotag.recall_tags(p_memory, 'removed'))) k
    where k <> '' except select unnest(v_keys) order by 1);
  v_answer := autotag.answered_tags(p_answer, v_removed, v_keys, p_workspace_id);
  v_answer_keys := autotag.tag_keys(v_answer);
  select coalesce(array_agg(t.i) filter (where t.given and not t.again), '{}'),
    coalesce(array_agg(t.tag order by t.i) filter (where t.given and t.again), '{}'),
    array_agg(t.tag order by t.i) filter (where not t.given),
    coalesce(array_agg(t.key) filter (where not t.given or t.again), '{}'), array_agg(t.key) filter (where not t.given)
  into dropped, v_given, v_added, v_kept, v_taken
  from (
    select u.tag, u.i, u.key, u.tag = any (v_answer) as again,
      u.tag in (select unnest(v_given)) and count(*) over (partition by u.tag) = 1 as given
    from unnest(p_tags, v_keys) with ordinality u (tag, key, i) where u.tag <> '') t;
  v_taken := v_taken || v_removed;
  v_taken := v_taken || autotag.near_tags(p_workspace_id, v_names, v_taken);
  fresh := array(
    select (array_agg(t.tag order by t.i))[1] from unnest(v_answer, v_answer_keys) with ordinality t (tag, key, i)
    where t.key not in (select k from unnest(v_kept || v_removed) k where k is not null)
      and (v_names -> t.tag ?| v_taken) is not true and (p_longest is null or length(t.tag) <= p_longest)
    group by t.key order by min(t.i));
  v_given := v_given || fresh;
  result := autotag.remember_tags(p_answer || jsonb_build_object('confidence', (p_answer -> 'confidence') - array(
    select t.tag from unnest(v_answer, v_answer_keys) t (tag, key)
    where t.tag <> all (v_given) and t.key not in (select k from unnest(v_keys) k where k is not null))), v_given, v_added, v_removed);
end $$;

-- The memory of a row, corrected after its tags were stored, because triggers of the host can change what autotag writes. p_tags: the
-- texts in the column now; null: the column is too large. Null: the memory is right already.
--   * A given tag that is not in the column counts neither as given nor as removed by a person.
--   * A given tag that is spelled differently there counts as given, in that spelling.
--   * If given tags are missing and all of people's are there, other tags have replaced the missing ones (a trigger that knows synonyms),
--     so they count as given. Otherwise they are a person's.
--   * A given tag that became a tag that people have or removed counts as removed, because each run would bring it again.
create or replace function autotag.kept_tags(p_tags text[], p_memory jsonb) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_keys text[];               -- of p_tags
  v_given text[];
  v_added text[];
  v_given_keys text[];
  v_lost text[];               -- the keys of people's tags that are not there as they were spelled
  v_gone text[];               -- the keys of given tags that are not there
  v_removed text[] := autotag.recall_tags(p_memory, 'removed');
  v_named text[];              -- the tags with a confidence
begin
  if ((p_memory -> 'given') || coalesce(p_memory -> 'added', '[]') <@ to_jsonb(p_tags)) is not false
    or jsonb_typeof(p_memory -> 'confidence') is distinct from 'object' then
    return null;
  end if;
  v_keys := autotag.tag_keys(p_tags);
  v_given := autotag.recall_tags(p_memory, 'given');
  v_added := autotag.recall_tags(p_memory, 'added');
  v_given_keys := autotag.tag_keys(v_given);
  v_lost := autotag.tag_keys(array(select a from unnest(v_added) a where a <> all (p_tags)));
  v_gone := array(select k from unnest(v_given_keys) k except select unnest(v_keys));
  if exists (
      select from unnest(p_tags, v_keys) u (tag, key) where u.tag <> '' group by u.tag
      having count(*) > greatest((select count(*) from unnest(v_added) a where a = u.tag), 1)
        or min(u.key) = any (v_removed) and u.tag <> all (v_added)) then
    v_removed := array(select k from unnest(v_removed || v_gone) k group by k order by k);
  end if;
  select coalesce(array_agg(t.tag order by t.i) filter (where t.given), '{}'), array_agg(t.tag order by t.i) filter (where not t.given)
  into v_given, v_added
  from (
    select u.tag, u.i, u.tag <> all (v_added) and u.key <> all (v_lost) and count(*) over (partition by u.tag) = 1
      and (u.key = any (v_given_keys) or v_lost = '{}' and v_gone <> '{}') as given
    from unnest(p_tags, v_keys) with ordinality u (tag, key, i) where u.tag <> '') t;
  v_named := array(select jsonb_object_keys(p_memory -> 'confidence'));
  return autotag.remember_tags(p_memory - '{added,removed}'::text[] || jsonb_build_object('confidence', (
      select coalesce(jsonb_object_agg(coalesce(g.tag, c.tag), p_memory -> 'confidence' -> c.tag), '{}')
      from unnest(v_named, autotag.tag_keys(v_named)) c (tag, key)
      left join unnest(v_given, autotag.tag_keys(v_given)) g (tag, key) on g.key = c.key
      where c.key = any (v_keys))),
    v_given, v_added, v_removed);
end $$;

-- An answer without its tags, with the three lists.
create or replace function autotag.remember_tags(p_answer jsonb, p_given text[], p_added text[], p_removed text[]) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return p_answer - '{tags,names,above}'::text[] || jsonb_build_object('given', p_given)
    || case when p_added <> '{}' then jsonb_build_object('added', p_added) else '{}' end
    || case when p_removed <> '{}' then jsonb_build_object('removed', p_removed) else '{}' end;
end $$;

-- The same for a row whose tags autotag leaves as they are. It keeps the lists, so that nothing is forgotten, and adds the reason.
create or replace function autotag.leave_tags(p_memory jsonb, p_answer jsonb, p_reason text, out result jsonb, out error text)
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  result := autotag.remember_tags(p_answer, autotag.recall_tags(p_memory, 'given'), autotag.recall_tags(p_memory, 'added'),
    autotag.recall_tags(p_memory, 'removed'));
  error := case p_reason
    when 'form' then 'The tags of this image are not a list, so they stay as they are.'
    when 'objects' then 'The tags of this image are objects, so they stay as they are.'
    when 'size' then 'This image has too many tags to add to, so they stay as they are.'
    else 'People have removed too many tags of this image to remember more, so its tags stay as they are.' end;
end $$;

-- Merges an answer into a column of texts (text[], varchar[], citext[]), for store_tags. p_large: the value is too large to be read
-- (p_tags is null then). tags: the new value; null: unchanged. error: a sentence for the user.
create or replace function autotag.merge_array(
  p_tags text[], p_large boolean, p_memory jsonb, p_answer jsonb, p_longest integer, p_workspace_id autotag.workspace_id,
  out tags text[], out result jsonb, out error text
)
language plpgsql stable set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_merged record;
  v_reason text;
begin
  if coalesce(p_tags = '{}', not p_large) and p_memory is null and p_longest is null then
    tags := array(select jsonb_array_elements_text(p_answer -> 'tags'));
    result := autotag.remember_tags(p_answer, tags, '{}', '{}');
    return;
  end if;
  v_reason := case when p_large or cardinality(p_tags) > 1000 or pg_column_size(p_tags) > 65536 then 'size'
    when array_ndims(p_tags) > 1 then 'form' end;
  if v_reason is null then
    v_merged := autotag.merge_tags(p_tags, p_memory, p_answer, p_longest, p_workspace_id);
    v_reason := case when pg_column_size(v_merged.result) > 131072 then 'memory' end;
  end if;
  if v_reason is not null then
    select l.result, l.error into result, error from autotag.leave_tags(p_memory, p_answer, v_reason) l;
    return;
  end if;
  result := v_merged.result;
  if v_merged.dropped <> '{}' then
    tags := array(select u.tag from unnest(p_tags) with ordinality u (tag, i) where u.i <> all (v_merged.dropped) order by u.i)
      || v_merged.fresh;
  elsif p_tags is null or v_merged.fresh <> '{}' then
    tags := p_tags || v_merged.fresh;
  end if;
end $$;

-- The same for a column of JSON (jsonb, json). Elements stay as they are written, even if they are not texts. A list with an object is
-- left alone, because texts among objects would break its readers.
create or replace function autotag.merge_json(
  p_tags json, p_large boolean, p_memory jsonb, p_answer jsonb, p_workspace_id autotag.workspace_id, out tags json, out result jsonb, out error text
)
language plpgsql stable set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
as $$
declare
  v_list text[];           -- the elements as JSON
  v_texts text[];          -- the same as texts
  v_objects boolean;       -- one is an object
  v_merged record;
  v_reason text;
begin
  if not p_large and (p_tags is null or p_tags::text = '[]') and p_memory is null then
    tags := p_answer -> 'tags';
    result := autotag.remember_tags(p_answer, array(select jsonb_array_elements_text(p_answer -> 'tags')), '{}', '{}');
    return;
  end if;
  v_reason := case when p_large or octet_length(p_tags::text) > 65536 then 'size'
    when coalesce(json_typeof(p_tags) not in ('array', 'null'), false) then 'form' end;
  if v_reason is null and json_typeof(p_tags) = 'array' then
    begin
      select array_agg(e::text order by i), array_agg(case when json_typeof(e) = 'string' then e #>> '{}' end order by i),
        bool_or(json_typeof(e) = 'object')
      into v_list, v_texts, v_objects from json_array_elements(p_tags) with ordinality u (e, i);
    exception when data_exception then
      v_reason := 'form';   -- JSON can hold texts that Postgres cannot: "\u0000"
    end;
  end if;
  if v_reason is null then
    v_reason := case when cardinality(v_list) > 1000 then 'size' when v_objects then 'objects' end;
  end if;
  if v_reason is null then
    v_merged := autotag.merge_tags(v_texts, p_memory, p_answer, null, p_workspace_id);
    v_reason := case when pg_column_size(v_merged.result) > 131072 then 'memory' end;
  end if;
  if v_reason is not null then
    select l.result, l.error into result, error from autotag.leave_tags(p_memory, p_answer, v_reason) l;
    return;
  end if;
  result := v_merged.result;
  if v_list is null or v_merged.dropped <> '{}' or v_merged.fresh <> '{}' then
    v_list := array(select u.e from unnest(v_list) with ordinality u (e, i) where u.i <> all (v_merged.dropped) order by u.i)
      || array(select to_json(t)::text from unnest(v_merged.fresh) with ordinality u (t, i) order by u.i);
    tags := ('[' || array_to_string(v_list, ', ') || ']')::json;
  end if;
end $$;

-- A json value as jsonb; null if Postgres cannot read it ("\u0000", a number of a million digits).
create or replace function autotag.read_json(p_json json) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return p_json::jsonb;
exception when data_exception then
  return null;
end $$;
