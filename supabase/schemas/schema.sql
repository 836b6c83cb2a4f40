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

-- The login role that a worker uses is granted this role and needs nothing else:
--   create role tagger login in role autotag_worker;   -- then its password with psql's \password tagger
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
