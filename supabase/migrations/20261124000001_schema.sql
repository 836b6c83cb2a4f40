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
do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'autotag_worker') then
    create role autotag_worker nologin;
  end if;
end $$;
grant usage on schema autotag to authenticated, service_role, autotag_worker;

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
  meaning text not null
);
alter table autotag.error_kinds enable row level security;
insert into autotag.error_kinds values
  ('transient', true, true, false, false, 'nobody''s fault: a broken connection, an error of the service, or what nobody knows'),
  ('rate_limit', false, false, false, false, 'the provider asks to wait: again when it says so'),
  ('account', false, true, true, false, 'key, credit, model, address or an unsupported request: again when somebody has fixed it'),
  ('image', true, false, false, true, 'this image, by the provider''s own word or by its file');

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
