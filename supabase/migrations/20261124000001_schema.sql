-- autotag: every image of public.assets gets its tags.
--
-- One upload is a *job*; each of its images is a *task*. A task goes one of two ways (its *lane*):
--
--   realtime   claim() hands it to a worker under the limits; the worker calls OpenAI once and settle()s.
--   batch      it belongs to a *batch*, one OpenAI Batch: claim_batches() hands the whole batch to a worker,
--              which builds and uploads the input file, and, when OpenAI is done, harvests the answers.
--
-- Workers hold no state. They ask (claim, claim_batches), do the I/O, and report (report_stages, settle,
-- batch_*). Everything that is decided is decided here, in one of these files, read in this order:
--
--   schema        this page, roles, stages, errors
--   host_baseline the host's tables for a stand-alone stack (left out of an existing project)
--   host_adapter  everything that autotag believes about the host's tables
--   settings      every number that can be changed, and the clock
--   models        what a model costs, how it is asked, what its answers were like, when it shuts down
--   rate_limits   exact sliding windows per workspace; the mirror of the provider's bucket
--   jobs          workspaces, jobs, queues, tasks; the strategy table
--   enqueue       uploads begin, are cancelled, are tried again
--   workers       who they are; their leases
--   claim         the release of single calls under all limits
--   settle        what a worker reports: tags, failures, what goes back to the queue
--   batches       OpenAI Batches until OpenAI has them
--   harvest       and from then on
--   progress      stage, progress and time left, in the rows and in tagging_job()
--   eta           when it will be done
--   usage         who used what
--   broadcast     what is pushed to browsers, and who may listen
--   webhooks      OpenAI says that a batch has ended
--   automatic     new rows of the host's assets become uploads by themselves
--   diagnose      what `autotag doctor` asks
--   status        what an operator and a monitoring system see; existing images brought in
--   compare       a second model asked about images that have their tags (`autotag compare`)
--   api           the public RPCs, and who may call what
--   cron          tick and housekeeping
--
-- Locks are taken in one order everywhere: provider row, workspaces by id (a workspace's lock also covers
-- its queues), windows by workspace, jobs by id, batches by id, tasks by id, assets.

-- Every function fixes its search_path to pg_catalog, pg_temp (the adapter's to the host's schemas before pg_temp), and
-- every name outside pg_catalog is written with its schema.

create schema if not exists autotag;
revoke all on schema autotag from public;

-- The login role that a worker uses is granted this role and needs nothing else:
--   create role tagger login password '…' in role autotag_worker;
-- Whoever looks after autotag without being its owner is granted autotag_operator: it sees every workspace's images and
-- usage, and may have them tagged, which a worker may not.
do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'autotag_worker') then
    create role autotag_worker nologin;
  end if;
  if not exists (select from pg_catalog.pg_roles where rolname = 'autotag_operator') then
    create role autotag_operator nologin;
  end if;
end $$;
grant usage on schema autotag to authenticated, service_role, autotag_worker, autotag_operator;

-- The worker is not trusted either. Whoever has stolen a worker's login can call what is granted to it, with anything, and
-- can so slow down and waste what that login's workers may hold; what follows is nobody else's:
--   * A worker's id is its login's (session_user, which poolers keep): nobody acts for the workers of another login,
--     whatever ids they have learned from status(). Workers of one login are one.
--   * It acts on what its worker holds: tasks with their attempt, batches with theirs, and the look at the provider that it
--     was handed (claim_batches). Images are described only to the worker that holds them.
--   * What is reported is data: counts, waits and sizes are clamped (check_number, check_usage), shapes are made sure of
--     (check_result, check_error), texts are made printable; what is no list of reports, or more than a worker can have, is
--     refused before any work is done (check_list). One bad report of many is that image's trouble, and not the others'.
--   * What a worker says of the provider (waits, limits, its form, its Batch API) and of the account holds for all, because
--     nobody but workers sees the provider. So it can pause tagging (each time for an hour at most), slow it and make it
--     dearer. And it can claim whatever waits, and say anything of that: it is its worker. When the login is taken away,
--     what it held goes back with the lease.
--   * It reads what it claims, and besides that what status(), metrics() and diagnose() tell: counts, ids, and one path.

-- The seven stages in order. A pass only moves forward through them; completed and failed end it.
create function autotag.stage_rank(stage text) returns integer
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case stage
    when 'queued' then 1 when 'preparing' then 2 when 'submitted' then 3 when 'processing' then 4
    when 'completing' then 5 when 'completed' then 6 when 'failed' then 6 end
$$;

-- The kinds of error, and what follows from each. Python has the same table (autotag/errors.py); a test compares them.
-- A kind that is not here counts as transient, so that what nobody knows can neither fail an image at once nor be tried
-- for ever.
create table autotag.error_kinds (
  kind text primary key,
  counts boolean not null,               -- each one counts as a failure of its image, which ends after max_failures
  delays boolean not null,               -- the image waits before its next try, longer each time (or as long as was asked)
  pauses boolean not null,               -- nothing is tagged until one image that tries succeeds
  ends boolean not null,                 -- the image ends as failed, unless the error says that another answer may help
  meaning text not null,
  -- codes with which it may be the image's after all (it is too large, and a smaller one would pass): these count, too
  suspects text[] not null default '{}'
);
alter table autotag.error_kinds enable row level security;
insert into autotag.error_kinds values
  ('transient', true, true, false, false, 'nobody''s fault: a broken connection, an error of the service, or what nobody knows', '{}'),
  ('rate_limit', false, false, false, false, 'the provider asks to wait: again when it says so', '{}'),
  ('account', false, true, true, false, 'key, credit, model, address or an unsupported request: again when somebody has fixed it',
    '{http_413,context_too_small}'),
  ('image', true, false, false, true, 'this image, by the provider''s own word or by its file', '{}');

-- Whether a text has nothing in it that controls, turns the direction of writing or is invisible, and no white space but
-- blanks. (Two that join letters are as good as letters: U+200C and U+200D.)
create function autotag.is_plain(p_text text) returns boolean
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return p_text !~ '[\u0001-\u001f\u007f-\u00a0\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u1680\u180e\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f-\u206f\u3000\ue000-\uf8ff\ufdd0-\ufdef\ufeff\ufff0-\ufffb\ufffe\uffff\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U00040000-\U000e00ff\U000e01f0-\U000e0fff\U000f0000-\U0010ffff]';
end $$;

-- Anybody's text as it is stored and shown: one line of at most p_length characters that moves no cursor, hides nothing and
-- forges nothing. White space, line ends included, becomes one blank; what controls, turns the direction of writing or is
-- invisible is spelled out (\x1b, \u202e), so that whoever reads it sees the attempt; what is cut ends in “…”. The worker does
-- the same (autotag/texts.py); a test compares them.
create function autotag.printable(p_text text, p_length integer) returns text
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_text text := left(p_text, 4 * p_length);   -- what is cut off is never looked at
begin
  if not autotag.is_plain(v_text) then
    v_text := regexp_replace(v_text,
      '[\u0009-\u000d\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+', ' ', 'g');
    select string_agg(case
        when autotag.is_plain(c) then c
        when ascii(c) < 256 then '\x' || lpad(to_hex(ascii(c)), 2, '0')
        when ascii(c) < 65536 then '\u' || lpad(to_hex(ascii(c)), 4, '0')
        else '\U' || lpad(to_hex(ascii(c)), 8, '0') end, '' order by i)
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

-- An id of something at the provider (batch_…, file-…), made sure of: null for what can be none.
create function autotag.check_id(p_id text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$ select case when p_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:/=-]{0,199}$' then p_id end $$;

-- A number that a worker reports, made sure of: null for what is none, else within bounds that make sense.
create function autotag.check_number(p_report jsonb, p_name text, p_least double precision, p_most double precision)
returns double precision
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  return case when jsonb_typeof(p_report -> p_name) = 'number'
    then least(greatest((p_report -> p_name)::numeric, p_least::numeric), p_most::numeric)::double precision end;
end $$;

-- The one way to refuse a call. PostgREST turns the sqlstate PTnnn into HTTP status nnn and hands message,
-- detail and hint through; the detail is JSON with a stable `code` and whatever a program needs to react.
create function autotag.refuse(
  p_status integer, p_code text, p_message text, p_hint text, p_detail jsonb default '{}'
) returns void
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using
    errcode = 'PT' || p_status, message = p_message, hint = p_hint,
    detail = (jsonb_build_object('code', p_code) || p_detail)::text;
end $$;

-- Refuses what is no list of reports, or is more than a worker can have to say at once.
create function autotag.check_list(p_list jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
  if p_list is null or jsonb_typeof(p_list) <> 'array' then
    perform autotag.refuse(400, 'bad_report', 'A report has to be a list.', 'Pass a JSON array of objects.');
  elsif jsonb_array_length(p_list) > 10000 or pg_column_size(p_list) > 50000000 then
    perform autotag.refuse(413, 'report_too_large', 'This report is larger than a worker''s can be.',
      'Report at most 10,000 things and 50 MB at a time.');
  end if;
end $$;

-- The same of a list of ids.
create function autotag.check_ids(p_count integer) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
  if p_count > 10000 then
    perform autotag.refuse(413, 'report_too_large', 'This report is larger than a worker''s can be.',
      'Name at most 10,000 ids at a time.');
  end if;
end $$;
