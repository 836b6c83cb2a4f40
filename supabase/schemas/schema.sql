-- autotag: every image of public.assets gets its tags.
--
-- One upload is a *job*; each of its images is a *task*. A task goes one of two ways (its *lane*):
--
--   realtime   claim() hands it to a worker under the limits; the worker calls OpenAI once and settle()s.
--   batch      it belongs to a *batch*, one OpenAI Batch: claim_batches() hands the whole batch to a worker,
--              which builds and uploads the input file, and, when OpenAI is done, harvests the answers.
--
-- Workers hold no state. They ask (claim, claim_batches), do the I/O, and report (report_stages, settle,
-- batch_*). Everything that is decided is decided here, in this order (supabase/config.toml):
--
--   tables/       everything that is stored; settings has every number that can be changed
--   host/         the host's tables for a stand-alone stack, and the adapter: everything autotag believes of a host's tables
--   basics/       the clock, checks of what comes from outside, who calls
--   models/       what a model costs, how it is asked, what its answers were like; a second model asked (autotag compare)
--   uploads/      which way an upload goes; it begins, is cancelled, is tried again; quotas
--   scheduling/   exact windows per workspace, the mirror of the provider's bucket, leases, the release of single calls
--   batches/      OpenAI Batches: planned, uploaded, looked at, harvested
--   results/      what a worker reports: tags, failures, what goes back to the queue; usage; what is pushed to browsers
--   views/        stage, progress and time left; status, metrics, what the doctor asks
--   seed          what every installation begins with
--   api, cron, version, grants    the public RPCs, tick and housekeeping, who may do what
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

-- The worker is not trusted either. Whoever has stolen a worker's login can call what is granted to it, with anything, and
-- can so slow down and waste what that login's workers may hold; what follows is nobody else's:
--   * A worker's id is its login's (session_user, which poolers keep): nobody acts for the workers of another login,
--     whatever ids they have learned from status(). Workers of one login are one.
--   * It acts on what its worker holds: tasks with their attempt, batches with theirs, and the look at the provider that it
--     was handed (claim_batches). Images are described only to the worker that holds them.
--   * What is reported is data: counts, waits and sizes are cut to bounds (clean_number, clean_usage), shapes are validated
--     (clean_result, clean_error), texts are made printable; what is no list of reports, or more than a worker can have, is
--     refused before any work is done (check_list). One bad report of many is that image's trouble, and not the others'.
--   * What a worker says of the provider (waits, limits, its form, its Batch API) and of the account holds for all, because
--     nobody but workers sees the provider. So it can pause tagging (each time for an hour at most), slow it and make it
--     dearer. And it can claim whatever waits, and say anything of that: it is its worker. When the login is taken away,
--     what it held goes back with the lease.
--   * It reads what it claims, and besides that what status(), metrics() and diagnose() tell: counts, ids, and one path.
