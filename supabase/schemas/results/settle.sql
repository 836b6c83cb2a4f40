-- Single calls: a worker reports their outcomes in bulk.

-- settle: records the outcomes of a worker's single calls of one workspace.
-- p_reports: [{task, attempt, result | error, usage: {input, cached, cache_write, output, reasoning, model, tier}, called, mark}].
--   usage: given whenever the provider answered, even if the answer was unusable. called: false if the call was not sent.
--   mark: of the picture that the model saw, as describe_tasks() gave it.
-- p_observed: the newest limits from response headers (update_provider_limits), and {sent, sent_age} (record_sent).
-- p_keep: the host's rows are slow (an earlier call was cancelled for it): keep the outcomes for store_waiting() instead.
-- Ignores reports for tasks that the worker does not hold (any more), with an older attempt, or from another login.
-- Returns {accepted, busy, notices: [{event, notice}], held}: the number of accepted reports, and sentences for the log. busy: another
-- call of this worker for this workspace is still running; nothing was done, so call again. held: messages have not named all
-- changed rows yet, so call report_stages() in a second.
--
-- This transaction writes the host's rows of one workspace only, and holds nothing that other workspaces need until its end:
-- report_provider() comes last, and takes the provider row if it is free.
-- Locks: the worker's workspace (advisory), window (skip locked), tasks, jobs, assets (finish), usage, provider (skip locked).
create or replace function autotag.settle(
  p_worker uuid, p_workspace_id autotag.workspace_id, p_reports jsonb, p_observed jsonb default null, p_keep boolean default false
) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan' set random_page_cost = 1.1
as $$
declare
  v_answers autotag.answer[];
  v_failed boolean;            -- one of them has an error
  v_report autotag.provider_report;
  v_judged record;
  v_notices jsonb;
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  perform autotag.check_list(p_reports);
  if not autotag.is_own_worker(p_worker) then
    return jsonb_build_object('accepted', 0, 'busy', false, 'notices', '[]'::jsonb);
  end if;
  -- The worker calls again after a broken connection, while the first call may still run.
  if not pg_try_advisory_xact_lock(hashtextextended('autotag.settle ' || p_worker || p_workspace_id, 0)) then
    return jsonb_build_object('accepted', 0, 'busy', true, 'notices', '[]'::jsonb);
  end if;
  v_answers := autotag.read_reports(p_worker, p_workspace_id, p_reports);
  v_report := autotag.summarize_calls(p_worker, v_answers, p_observed);
  v_failed := exists (select from unnest(v_answers) a where a.error is not null);
  if v_failed then
    v_judged := autotag.reclassify_errors(v_answers);
    v_answers := v_judged.answers;
    v_report.form_changed := v_judged.form_changed;
  end if;
  v_report.answers := v_answers;
  v_report.windows := autotag.correct_windows(autotag.window_corrections(v_answers));
  if v_failed then
    v_answers := autotag.judge_retries(v_answers, false);
  end if;
  v_notices := autotag.apply_answers(p_workspace_id, v_answers, not p_keep);
  perform autotag.add_usage(v_answers, false);
  return jsonb_build_object('accepted', cardinality(v_answers), 'busy', false,
    'held', exists (
      select from autotag.jobs j
      where j.id = any (array(select distinct a.job_id from unnest(v_answers) a)) and j.finished_at is null and j.changed is distinct from '{}'),
    'notices', v_notices || autotag.report_provider(v_report));
end $$;

-- Validates reports and returns those for tasks of the workspace that the worker holds, at most one per task. (The plan is kept. The
-- enable_… options make it use the index. Without them, a plan from when the table was empty would scan all of the full table.)
create or replace function autotag.read_reports(p_worker uuid, p_workspace_id autotag.workspace_id, p_reports jsonb) returns autotag.answer[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan'
  set enable_seqscan = off set jit = off
as $$
declare
  v_max_allowed record := autotag.believable_usage();
begin
  return array(
    with reported as materialized (
      select * from autotag.read_answers(p_reports, v_max_allowed.input)
    ), held as materialized (
      select t.id, t.attempt, t.job_id, t.asset_id, t.reserved_at, t.reserved_tokens, t.output_tokens,
        (select j.brief_id from autotag.jobs j where j.id = t.job_id) as brief_id,
        greatest(coalesce(4 * t.output_tokens + 4000, 100000), v_max_allowed.uncapped) as max_output
      from autotag.tasks t
      where t.id = any (array(select r.task from reported r)) and t.worker_id = p_worker and t.workspace_id = p_workspace_id
    )
    select row(x.id, x.attempt, x.job_id, p_workspace_id, x.reserved_at, x.reserved_tokens, x.output_tokens, x.result,
      case when x.error is not null or x.result is null then autotag.clean_error(x.error, x.result) end,
      case when x.valid_usage then x.usage else autotag.clean_usage(x.usage, v_max_allowed.input, x.max_output) end,
      x.called, x.mark, x.asset_id, x.brief_id)::autotag.answer
    from (
      select distinct on (h.id) h.*, case when h.brief_id is null then r.result else autotag.fit_result(r.result, r.fields, h.brief_id) end as result, r.error, r.usage, r.valid_usage, r.called, r.mark
      from reported r join held h on h.id = r.task and h.attempt = r.attempt order by h.id, r.place) x);
end $$;

-- What these calls have to say about the provider: the reservations that they did not use, and p_observed (as in settle).
create or replace function autotag.summarize_calls(p_worker uuid, p_answers autotag.answer[], p_observed jsonb) returns autotag.provider_report
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_report autotag.provider_report;
begin
  v_report.worker_id := p_worker;
  v_report.at := autotag.now();
  v_report.observed := autotag.clean_observed(p_observed);
  v_report.form_changed := false;
  v_report.answers := array[]::autotag.answer[];
  v_report.windows := '[]';
  -- Refund the over-reservation: everything if no call was made or it got a 429, otherwise all but the prompt and the cap.
  select coalesce(sum(u.requests), 0)::integer, coalesce(sum(u.tokens), 0)::bigint into v_report.requests, v_report.tokens
  from unnest(p_answers) a
  cross join lateral (
    select case when not a.called or a.error ->> 'code' = 'rate_limited' then 1 else 0 end as requests,
      case when not a.called or a.error ->> 'code' = 'rate_limited' then a.reserved_tokens
        when a.usage is not null then a.reserved_tokens - (a.usage -> 'input')::integer - a.output_tokens
        else 0 end as tokens) u
  where a.reserved_tokens is not null;
  return v_report;
end $$;

-- How the usage of these answers changes the windows of their workspaces, in the form that correct_windows() expects.
create or replace function autotag.window_corrections(p_answers autotag.answer[]) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- A call that was not sent counts no request and no tokens; one that the provider refused or failed counts no tokens. If the
  -- usage is unknown because the connection broke before the answer, the reservation stays.
  return coalesce((
    select jsonb_agg(w) from (
      select a.workspace_id, a.reserved_at,
        -count(*) filter (where not a.called)::integer as requests,
        least(sum(case when a.usage is not null
              then (a.usage -> 'input')::integer + (a.usage -> 'output')::integer - a.reserved_tokens
            when a.error ->> 'code' = 'provider_unreachable' then 0
            else -a.reserved_tokens end), 1000000000)::integer as units
      from unnest(p_answers) a
      where a.reserved_at is not null
      group by a.workspace_id, a.reserved_at order by a.workspace_id, a.reserved_at) w), '[]');
end $$;

-- Corrects windows of single calls: [{workspace_id, reserved_at, requests, units}]. Returns the corrections of windows that another
-- transaction holds. Locks: windows by workspace (skip locked).
create or replace function autotag.correct_windows(p_corrections jsonb) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_window record;
  v_held jsonb := '[]'::jsonb;
begin
  for v_window in
    select c.* from jsonb_to_recordset(p_corrections) c (workspace_id autotag.workspace_id, reserved_at timestamptz, requests integer, units integer)
    order by c.workspace_id, c.reserved_at
  loop
    perform from autotag.windows wn
    where wn.workspace_id = v_window.workspace_id and wn.request_type = 'realtime' for no key update skip locked;
    if found then
      perform autotag.correct_window(v_window.workspace_id, 'realtime', v_window.reserved_at, v_window.requests, v_window.units);
    elsif exists (
      select from autotag.windows wn
      where wn.workspace_id = v_window.workspace_id and wn.request_type = 'realtime'
        and wn.admitted_at[cardinality(wn.admitted_at)] > autotag.now() - interval '1 min') then
      v_held := v_held || to_jsonb(v_window);
    end if;
  end loop;
  return v_held;
end $$;
