-- Refusals, and checks of values from outside. `check_…` refuses an invalid value, `clean_…` returns a valid one.

-- Refuses a call; every refusal goes through here. PostgREST turns the sqlstate PTnnn into HTTP status nnn and passes
-- message, detail and hint on. The detail is JSON: a stable `code` and the data that a program needs to react.
create or replace function autotag.refuse(
  p_status integer, p_code text, p_message text, p_hint text, p_detail jsonb default '{}'
) returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using
    errcode = 'PT' || p_status, message = p_message, hint = p_hint,
    detail = (jsonb_build_object('code', p_code) || p_detail)::text;
end $$;

-- Matches characters that a printable text does not have: control, bidirectional and invisible ones, and white space except U+0020.
-- U+200C and U+200D (joiners) count as letters. Planning replaces the call by its value.
create or replace function autotag.unprintable() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select E'[\\u0001-\\u001f\\u007f-\\u00a0\\u00ad\\u0600-\\u0605\\u061c\\u06dd\\u070f\\u0890\\u0891\\u08e2\\u1680\\u180e\\u2000-\\u200b\\u200e\\u200f\\u2028-\\u202f\\u205f-\\u206f\\u3000\\ue000-\\uf8ff\\ufdd0-\\ufdef\\ufeff\\ufff0-\\ufffb\\ufffe\\uffff\\U000110bd\\U000110cd\\U00013430-\\U0001343f\\U0001bca0-\\U0001bca3\\U0001d173-\\U0001d17a\\U00040000-\\U000e00ff\\U000e01f0-\\U000e0fff\\U000f0000-\\U0010ffff]'
$$;

-- Names for a sentence: at most five, and how many more there are.
create or replace function autotag.name_some(p_names text[]) returns text
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return array_to_string(p_names[:5], ', ')
    || case when cardinality(p_names) > 5 then format(' and %s more', cardinality(p_names) - 5) else '' end;
end $$;

-- Whether a text is printable.
create or replace function autotag.is_plain(p_text text) returns boolean
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return p_text !~ autotag.unprintable();
end $$;

-- A text from outside in the form in which it is stored and shown: one line of at most p_length characters that cannot move
-- the cursor, hide text or imitate output. Any white space, including line ends, becomes one space. Control, bidirectional
-- and invisible characters are escaped (\x1b, \u202e), so that a reader sees them. A text that was cut ends in “…”. The
-- worker does the same (autotag/texts.py); a test compares the two.
create or replace function autotag.printable(p_text text, p_length integer) returns text
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_text text := left(p_text, 4 * p_length);   -- what is cut off is not scanned
begin
  if not autotag.is_plain(v_text) then
    v_text := regexp_replace(v_text,
      E'[\\u0009-\\u000d\\u001c-\\u0020\\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+', ' ', 'g');
    select string_agg(case
        when autotag.is_plain(c) then c
        when ascii(c) < 256 then E'\\x' || lpad(to_hex(ascii(c)), 2, '0')
        when ascii(c) < 65536 then E'\\u' || lpad(to_hex(ascii(c)), 4, '0')
        else E'\\U' || lpad(to_hex(ascii(c)), 8, '0') end, '' order by i)
    into v_text from unnest(string_to_array(btrim(v_text), null)) with ordinality u (c, i);
  elsif v_text like '%  %' then
    v_text := regexp_replace(v_text, ' +', ' ', 'g');
  end if;
  v_text := coalesce(btrim(v_text), '');
  if length(v_text) > p_length or length(p_text) > 4 * p_length then
    return left(v_text, p_length - 1) || '…';
  end if;
  return v_text;
end $$;

-- Matches characters that are removed from words: unprintable ones, and fillers and others that nobody sees. Planning replaces the
-- call by its value, here and in the next two functions.
create or replace function autotag.invisible() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select autotag.unprintable() || E'|[\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u3164\\uffa0]' $$;

create or replace function autotag.blanks() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select E'[\\u0009-\\u000d\\u001c-\\u0020\\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+' $$;

-- Scripts in which a joiner between two letters changes what a reader sees, and emojis (JOINED in autotag/texts.py).
create or replace function autotag.joined() returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select E'[\\u0600-\\u0dff\\u0f00-\\u10ff\\u1200-\\u1cff\\u2190-\\u2bff\\ua800-\\ua95f\\ua980-\\uabff\\ufb50-\\ufdff\\ufe0f\\ufe70-\\ufefc\\U00010800-\\U0001ffff]' $$;

-- A text from outside as people write it: composed, one space for any white space, without characters that nobody sees. Joiners stay
-- where they change something. The worker and its commands do the same (visible_text in autotag/texts.py).
create or replace function autotag.visible_text(p_text text) returns text
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_text text := p_text;
begin
  if v_text ~ '[^ -~]' then
    v_text := regexp_replace(v_text, autotag.blanks(), ' ', 'g');
    v_text := regexp_replace(v_text, '(?<!' || autotag.joined() || E')[\\u200c\\u200d]|[\\u200c\\u200d](?!' || autotag.joined() || ')|'
      || autotag.invisible(), '', 'g');
    v_text := normalize(v_text, NFC);
  end if;
  return btrim(regexp_replace(v_text, ' +', ' ', 'g'));
end $$;

-- Validates an id of an object at the provider (batch_…, file-…). Null: invalid.
create or replace function autotag.clean_id(p_id text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select case when p_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:/=-]{0,199}$' then p_id end $$;

-- Validates a number in a worker's report and clamps it to [p_min, p_max]. Null: not a number.
create or replace function autotag.clean_number(p_report jsonb, p_name text, p_min double precision, p_max double precision)
returns double precision
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return case when jsonb_typeof(p_report -> p_name) = 'number'
    then least(greatest((p_report -> p_name)::numeric, p_min::numeric), p_max::numeric)::double precision end;
end $$;

-- Refuses a report that is not a list, or that is larger than a worker ever needs: 10,000 items or 50 MB.
create or replace function autotag.check_list(p_list jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
  if p_list is null or jsonb_typeof(p_list) <> 'array' then
    perform autotag.refuse(400, 'bad_report', 'A report has to be a list.', 'Pass a JSON array of objects.');
  elsif jsonb_array_length(p_list) > 10000 or pg_column_size(p_list) > 50000000 then
    perform autotag.refuse(413, 'report_too_large', 'This report is too large.',
      'Send at most 10,000 items and 50 MB in one report.');
  end if;
end $$;

-- The same for a list of ids.
create or replace function autotag.check_ids(p_count integer) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
  if p_count > 10000 then
    perform autotag.refuse(413, 'report_too_large', 'This report is too large.',
      'Pass at most 10,000 ids at a time.');
  end if;
end $$;

-- Validates a batch's status as the provider returns it. Null: invalid. `gone`: the provider does not know the batch. `unread`: the
-- worker cannot read it.
create or replace function autotag.clean_status(p_status text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case when p_status in
    ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', 'cancelled', 'gone', 'unread')
    then p_status end
$$;

-- Refuses a worker whose major and minor version differ from the schema's.
create or replace function autotag.check_version(p_version text) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_worker integer[] := (regexp_match(p_version, E'^(\\d{1,6})\\.(\\d{1,6})(?!\\d)'))::integer[];
  v_schema integer[] := (regexp_match(autotag.schema_version(), E'^(\\d+)\\.(\\d+)'))::integer[];
begin
  if v_worker is distinct from v_schema then
    perform autotag.refuse(426, 'versions_differ',
      format('This worker is autotag %s, but the database has the schema of autotag %s.',
        coalesce(autotag.printable(p_version, 50), '(no version)'), autotag.schema_version()),
      case when v_worker > v_schema then 'Apply the new migrations: autotag migrate, or supabase db push.'
        else format('Install the matching worker: pip install ''supabase-autotag==%s.%s.*''.',
          v_schema[1], v_schema[2]) end);
  end if;
end $$;

-- Refuses a number of images that no upload can have: none, or more than settings.job_max_images.
create or replace function autotag.check_image_count(p_images integer) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_max_allowed integer := (select s.job_max_images from autotag.settings s);
begin
  if p_images is null or p_images < 1 then
    perform autotag.refuse(400, 'no_images', 'There is no image to tag.', 'Pass at least one image.');
  elsif p_images > v_max_allowed then
    perform autotag.refuse(413, 'too_many_images',
      format('%s images are too many for one upload.', p_images),
      format('Split it into uploads of at most %s images.', v_max_allowed),
      jsonb_build_object('max_images', v_max_allowed));
  end if;
end $$;
