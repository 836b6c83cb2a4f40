-- autotag: every image of public.assets gets tags.
--
-- One upload is a *job*; each of its images is a *task*. A task is tagged in one of two ways (its *lane*):
--
--   realtime   claim() gives it to a worker within the limits. The worker calls OpenAI once and reports with settle().
--   batch      It belongs to a *batch*, which is one OpenAI Batch. claim_batches() gives the whole batch to a worker, which
--              builds and uploads the input file. When OpenAI has finished, a worker harvests the answers.
--
-- Workers keep no state that would be missed. They ask (claim, claim_batches), do the I/O, and report (report_stages, settle,
-- batch_*). This schema makes every decision. Its files:
--
--   tables/       everything that is stored; settings has every number that can be changed
--   host/         the host's tables for a stand-alone stack, and the adapter: everything that autotag knows of a host's tables
--   basics/       the clock, checks of values from outside, who calls
--   profiles/     what a workspace wants asked about its images, in versions, and what that costs in tokens
--   models/       what a model costs, how it is asked, what its answers were like; another model asked (autotag compare)
--   vocabulary/   the tags that a workspace uses: their names, and what becomes of a model's tags
--   uploads/      the strategy of an upload; enqueue, cancel, retry; quotas; automatic mode; images that exist already
--   scheduling/   exact windows per workspace, the mirror of the provider's bucket, leases, the release of single calls
--   batches/      OpenAI Batches: planned, uploaded, polled, harvested
--   results/      what a worker reports: tags, failures, requeued images; usage; broadcasts
--   views/        stage, progress and ETA; status, metrics, what autotag doctor asks
--   seed          the first rows of every installation
--   api_types, api, cron, version, grants    the public RPCs and their types, tick and housekeeping, the version, all rights
--   changes       steps for existing installations since the last release
--
-- supabase/config.toml has the order in which they run. docs/contributing/change-the-schema.md has the aliases of the tables.
--
-- Locks. A workspace's tables, transactions, triggers and clock belong to its tenant, but every tenant needs the provider row. So:
--   * A transaction that holds the provider row never waits for a lock that a tenant's transaction can hold (skip locked), and never
--     reads or writes the host's tables. claim() and claim_batches() begin with it; the others take it last.
--   * The host's rows are written one workspace at a time (finish, show). Such a transaction holds nothing else that tenants share,
--     and waits at most 50 ms for a lock. An outcome that cannot be written is kept (unstored) and tried again.
--   * Only a transaction that holds the provider row updates queues or workspaces. (enqueue_tagging inserts new queues under an
--     advisory lock.)
--   * A transaction locks in this order: advisory locks, jobs by id, batches by id, tasks by id, assets. Windows and the provider
--     row come last, or before all of these. A worker's row and the clock come after the provider row.

-- Every function sets its search_path to pg_catalog, pg_temp (the adapter's functions have the host's schemas before pg_temp),
-- and every name outside pg_catalog has its schema.
create schema if not exists autotag;

-- A worker's login needs this role and nothing else:
--   create role tagger login in role autotag_worker;   -- then set its password with psql's \password tagger
-- A person who operates autotag without being its owner needs autotag_operator. It sees every workspace's images and usage and
-- may enqueue images, which a worker may not.
do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'autotag_worker') then
    create role autotag_worker nologin;
  end if;
  if not exists (select from pg_catalog.pg_roles where rolname = 'autotag_operator') then
    create role autotag_operator nologin;
  end if;
end $$;

-- The database does not trust a worker. A stolen worker's login can call every function that is granted to it, with any
-- arguments. These limits hold then:
--   * A worker's id belongs to its login (session_user, which poolers keep). No login acts for the workers of another one, even
--     if it learns their ids from status(). Workers of one login count as one.
--   * A worker acts only on what it holds: tasks with their attempt, batches with theirs, and the poll of the provider that
--     claim_batches assigned to it. Only the worker that holds an image learns where it is stored.
--   * Reports are data. Counts, waits and sizes are cut to bounds (clean_number, clean_usage), shapes are validated
--     (clean_result, clean_error), and texts are made printable. check_list refuses a report that is not a list or too long
--     before any work is done. One bad report of many affects its own image only.
-- A stolen login can do these things, and nothing else:
--   * It can claim queued images and report anything about them. When the login is revoked, its images are requeued as its
--     leases run out.
--   * It can pause tagging (an hour at most each time), slow it down and make it dearer. A worker's report about the provider
--     (waits, limits, request form, Batch API) or the account applies to every workspace, because only workers see the provider.
--     Missing features are tried again after model_check_interval, usage is believed up to believable_usage(), and
--     forget_provider() forgets all such reports.
--   * It can read what it claims, and what status(), metrics() and diagnose() return: counts, ids, and one path.
