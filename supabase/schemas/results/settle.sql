-- Single calls: a worker reports their outcomes in bulk.

-- settle: a worker reports the outcomes of its single calls.
-- p_reports: [{task, attempt, result | error, usage: {input, cached, cache_write, output, reasoning, model, tier}, called}].
--   usage: given whenever the provider answered, even if the answer was unusable. called: false if the call was not sent.
-- p_observed: the newest limits from response headers (update_provider_limits), and {sent, sent_age} (record_sent).
-- Ignores reports for tasks that the worker does not hold (any more), with an older attempt, or from another login.
-- Returns {accepted, notices: [{event, notice}]}: the number of accepted reports, and sentences for the log.
-- Locks: provider, workspaces (only where there are errors), windows, jobs, tasks; each by id.
create or replace function autotag.settle(p_worker uuid, p_reports jsonb, p_observed jsonb default null) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_generic_plan' set random_page_cost = 1.1
as $$
declare
  v_answers autotag.answer[];
  v_failed boolean;            -- whether any of them is an error
  v_changed text;              -- a sentence if the provider's limits have changed
begin
  perform set_config('request.jwt.claims', '', true);   -- triggers on the host's tables trust these claims
  perform autotag.check_list(p_reports);
  if not autotag.is_own_worker(p_worker) then
    return jsonb_build_object('accepted', 0, 'notices', '[]'::jsonb);
  end if;
  perform from autotag.provider_limits for update;
  v_answers := autotag.read_reports(p_worker, p_reports);
  v_failed := exists (select from unnest(v_answers) a where a.error is not null);
  if v_failed then
    v_answers := autotag.reclassify_errors(v_answers);
  end if;

  v_changed := autotag.correct_bucket(p_worker, v_answers, p_observed);
  perform autotag.record_outcomes(v_answers);

  if v_failed then
    perform from autotag.workspaces w
    where w.workspace_id in (select a.workspace_id from unnest(v_answers) a where a.error is not null)
    order by w.workspace_id for update;
  end if;

  perform autotag.correct_windows(v_answers);
  perform from autotag.jobs j
  where j.id = any (array(select a.job_id from unnest(v_answers) a)) order by j.id for update;
  -- While the jobs are locked, no other transaction changes their tasks. Drop reports for tasks that the worker has lost.
  execute $q$ select array(
    select a from unnest($1) a join autotag.tasks t on t.id = a.task and t.attempt = a.attempt and t.worker_id = $2) $q$
  into v_answers using v_answers, p_worker;

  perform autotag.add_usage(v_answers, false);
  if v_failed then
    v_answers := autotag.judge_retries(v_answers);
  end if;
  return jsonb_build_object('accepted', cardinality(v_answers), 'notices', case when v_changed is null then '[]'::jsonb
    else jsonb_build_array(jsonb_build_object('event', 'provider_limits_changed', 'notice', v_changed)) end
    || autotag.apply_answers(v_answers));
end $$;

-- Validates reports and returns those for tasks that the worker holds, at most one per task.
create or replace function autotag.read_reports(p_worker uuid, p_reports jsonb) returns autotag.answer[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_answers autotag.answer[];
  v_max_allowed record := autotag.believable_usage();
begin
  execute $q$ select array(
    select row(x.id, x.attempt, x.job_id, x.workspace_id, x.reserved_at, x.reserved_tokens, x.output_tokens,
      x.result, autotag.clean_error(x.error, x.result), autotag.clean_usage(x.usage, $3, greatest(coalesce(4 * x.output_tokens + 4000, 100000), $4)), x.called)::autotag.answer
    from (
      select distinct on (t.id) t.id, t.attempt, t.job_id, t.workspace_id, t.reserved_at, t.reserved_tokens, t.output_tokens,
        autotag.clean_result(r.result) as result, r.error, r.usage, r.called
      from (
        select case when e -> 'task' between '1' and '9223372036854775807' then (e -> 'task')::bigint end as task,
          case when e -> 'attempt' between '1' and '2147483647' then (e -> 'attempt')::integer end as attempt,
          e -> 'result' as result, e -> 'error' as error, e -> 'usage' as usage,
          e -> 'called' is distinct from 'false' as called
        from jsonb_array_elements($1) e) r
      join autotag.tasks t on t.id = r.task and t.attempt = r.attempt and t.worker_id = $2
      order by t.id) x) $q$
  into v_answers using p_reports, p_worker, v_max_allowed.input, v_max_allowed.uncapped;
  return v_answers;
end $$;

-- Corrects the mirror of the provider's bucket by the usage of these calls and by their response headers (p_observed, as in
-- settle). Returns a sentence for the log if the provider's limits have changed, else null. The caller holds the provider row.
create or replace function autotag.correct_bucket(p_worker uuid, p_answers autotag.answer[], p_observed jsonb) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_refund record;
begin
  -- Refund the over-reservation: everything if no call was made or it got a 429, otherwise all but the prompt and the cap.
  select coalesce(sum(u.requests), 0)::integer as requests, coalesce(sum(u.tokens), 0)::bigint as tokens into v_refund
  from unnest(p_answers) a
  cross join lateral (
    select case when not a.called or a.error ->> 'code' = 'rate_limited' then 1 else 0 end as requests,
      case when not a.called or a.error ->> 'code' = 'rate_limited' then a.reserved_tokens
        when a.usage is not null then a.reserved_tokens - (a.usage -> 'input')::integer - a.output_tokens
        else 0 end as tokens) u
  where a.reserved_tokens is not null;
  if p_observed ? 'sent' then
    perform autotag.record_sent(p_worker, autotag.clean_number(p_observed, 'sent', 0, 100000)::integer,
      coalesce(autotag.clean_number(p_observed, 'sent_age', 0, 3600), 0));
  end if;
  -- The refund comes first: after it, the headers may still lower the mirror.
  if v_refund.requests <> 0 or v_refund.tokens <> 0 then
    perform autotag.refund_provider(v_refund.requests, v_refund.tokens);
  end if;
  if p_observed is not null then
    return autotag.update_provider_limits(p_observed);
  end if;
  return null;
end $$;

-- Corrects the windows of these answers' workspaces by the usage of their calls. Locks: windows by workspace.
create or replace function autotag.correct_windows(p_answers autotag.answer[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_window record;
begin
  -- A call that was not sent counts no request and no tokens; one that the provider refused or failed counts no tokens. If the
  -- usage is unknown because the connection broke before the answer, the reservation stays.
  for v_window in
    select a.workspace_id, a.reserved_at,
      -count(*) filter (where not a.called)::integer as requests,
      least(sum(case when a.usage is not null
            then (a.usage -> 'input')::integer + (a.usage -> 'output')::integer - a.reserved_tokens
          when a.error ->> 'code' = 'provider_unreachable' then 0
          else -a.reserved_tokens end), 1000000000)::integer as units
    from unnest(p_answers) a
    where a.reserved_at is not null
    group by a.workspace_id, a.reserved_at order by a.workspace_id, a.reserved_at
  loop
    perform autotag.correct_window(
      v_window.workspace_id, 'realtime', v_window.reserved_at, v_window.requests, v_window.units);
  end loop;
end $$;
