-- The types that the public RPCs take and return, so that `supabase gen types` gives exact types. As tried with the real CLI (3.1), a
-- jsonb result becomes `Json`, OUT parameters become `Record<string, unknown>`, `returns table` an array without any null, and a
-- composite type an object whose fields may all be null. Only the row of a relation in an exposed schema keeps `not null`, also through
-- a view. So each result is the row of a view of autotag.shapes, which never has a row. Nobody may read the views (grants.sql).

-- Your own column tagging_stage stays text with a check: your triggers, policies and clients compare it with text.
create type public.tagging_stage as enum ('queued', 'preparing', 'submitted', 'processing', 'completing', 'completed', 'failed');
create type public.tagging_strategy_name as enum ('realtime', 'realtime-chunked', 'batch', 'batch-parallel');
create type public.tagging_request_type as enum ('realtime', 'batch');
create type public.tagging_job_status as enum ('running', 'cancelling', 'completed', 'cancelled');

-- One column of each type that the results have, and one of each that may be null. (A view's column keeps `not null` only if it is a
-- column of a table.)
create table autotag.shapes (
  id boolean primary key check (false),
  a_uuid uuid not null, maybe_uuid uuid,
  a_text text not null, maybe_text text, texts text[] not null,
  an_integer integer not null, maybe_integer integer, a_bigint bigint not null, a_number double precision not null, maybe_number double precision,
  maybe_numeric numeric,
  a_boolean boolean not null,
  a_date date not null, a_time timestamptz not null, maybe_time timestamptz,
  a_json jsonb not null,
  a_strategy public.tagging_strategy_name not null, maybe_strategy public.tagging_strategy_name,
  a_status public.tagging_job_status not null
);
do $$
begin
  -- the base type of the domain, which generated client types do not follow
  execute (select format('alter table autotag.shapes add column maybe_user %s', format_type(k.atttypid, null))
    from pg_attribute k where k.attrelid = 'autotag.keys'::regclass and k.attname = 'user_id');
end $$;
alter table autotag.shapes enable row level security;

-- The number of images in each stage.
create view public.tagging_stage_counts with (security_invoker = true) as
  select sh.an_integer as queued, sh.an_integer as preparing, sh.an_integer as submitted, sh.an_integer as processing,
    sh.an_integer as completing, sh.an_integer as completed, sh.an_integer as failed
  from autotag.shapes sh;
create view public.tagging_batch_result with (security_invoker = true) as
  select sh.maybe_text as batch_id, sh.a_text as state, sh.an_integer as image_count from autotag.shapes sh;
create view public.tagging_vocabulary_tag with (security_invoker = true) as
  select sh.a_text as tag, sh.texts as aliases, sh.maybe_text as description, sh.maybe_text as parent, sh.a_boolean as general
  from autotag.shapes sh;
alter table autotag.shapes  -- it never has a row
  -- squawk-ignore adding-required-field
  add column a_stage_counts public.tagging_stage_counts not null,
  -- squawk-ignore adding-required-field
  add column batches public.tagging_batch_result[] not null,
  -- squawk-ignore adding-required-field
  add column tags public.tagging_vocabulary_tag[] not null;

-- tagging_job, tagging_jobs
create view public.tagging_job_result with (security_invoker = true) as
  select sh.a_uuid as job_id, sh.a_status as status, sh.a_strategy as strategy, sh.an_integer as image_count, sh.a_stage_counts as stages,
    sh.an_integer as completed, sh.an_integer as failed, sh.an_integer as progress, sh.maybe_time as eta, sh.maybe_time as eta_p90,
    sh.maybe_text as error, sh.maybe_text as fallback, sh.batches, sh.a_time as created_at, sh.maybe_time as finished_at,
    sh.a_boolean as cancelled
  from autotag.shapes sh;
-- enqueue_tagging, retry_tagging
create view public.tagging_upload_result with (security_invoker = true) as
  select sh.maybe_uuid as job_id, sh.maybe_strategy as strategy, sh.an_integer as image_count, sh.an_integer as skipped,
    sh.an_integer as batches, sh.maybe_time as eta
  from autotag.shapes sh;
create view public.tagging_cancel_result with (security_invoker = true) as
  select sh.a_uuid as job_id, sh.an_integer as cancelled from autotag.shapes sh;
create view public.tagging_strategy_result with (security_invoker = true) as
  select sh.a_strategy as type, sh.an_integer as chunks, sh.a_bigint as delay_ms, sh.an_integer as batches,
    sh.maybe_number as estimate_seconds, sh.maybe_text as note
  from autotag.shapes sh;
-- check_rate_limit, peek_rate_limit
create view public.tagging_limit_result with (security_invoker = true) as
  select sh.a_boolean as allowed, sh.maybe_number as retry_after, sh.maybe_text as reason from autotag.shapes sh;
create view public.tagging_usage_result with (security_invoker = true) as
  select sh.maybe_user as user_id, sh.a_date as day, sh.a_text as model, sh.a_text as service_tier, sh.an_integer as images,
    sh.an_integer as requests, sh.a_bigint as input_tokens, sh.a_bigint as cached_tokens, sh.a_bigint as cache_write_tokens,
    sh.a_bigint as output_tokens, sh.a_bigint as reasoning_tokens, sh.maybe_numeric as cost
  from autotag.shapes sh;
-- tagging_profile, set_tagging_profile
create view public.tagging_profile_result with (security_invoker = true) as
  select sh.an_integer as version, sh.a_boolean as own, sh.a_text as instructions, sh.maybe_text as language,
    sh.maybe_integer as tag_count, sh.a_number as min_confidence, sh.a_text as vocabulary_mode, sh.a_boolean as add_parents,
    sh.a_json as fields, sh.maybe_time as created_at
  from autotag.shapes sh;
create view public.tagging_vocabulary_result with (security_invoker = true) as
  select sh.a_text as mode, sh.a_boolean as add_parents, sh.a_boolean as may_edit, sh.tags from autotag.shapes sh;
-- set_tagging_vocabulary, edit_tagging_vocabulary
create view public.tagging_vocabulary_change with (security_invoker = true) as
  select sh.an_integer as tags, sh.an_integer as added, sh.an_integer as changed, sh.an_integer as removed from autotag.shapes sh;
create view public.tagging_webhook_result with (security_invoker = true) as
  select sh.a_text as result from autotag.shapes sh;
