-- What a worker's poll of the batches at OpenAI changes: they progress, end, get lost or get stuck.

-- Records a poll: [{id, status, output_file_id, error_file_id, total, done, error_code, error, error_kind}]. Status `gone`:
-- OpenAI does not know the batch (any more, or with this key); `unread`: the worker cannot read its state. What happens to a batch:
--   it has ended                       it waits to be harvested
--   it failed: OpenAI's queue is full  it is planned again, which is no failure. One that is too large for the queue is halved, and
--                                      in the end its images are sent as single calls (refuse_tokens)
--   gone in several polls in a row     it ends, and its images are retried
--   no progress for too long           it is cancelled, if the limits admit its images as single calls
--   in flight for two days, or unread  it ends as if it were gone: OpenAI's window is 24 h
--     after two days
-- Ignores workers without an assigned poll, batches that are not in flight, and invalid elements. Writes only rows that change.
-- A batch that another transaction holds is left to the next poll, so a worker reports many batches in several calls. Returns the
-- batches for which the worker calls show_batch() next.
-- Locks: jobs by id, batches by id (both skip locked), tasks by id, provider (if it pauses or resumes tagging).
create or replace function autotag.record_poll(p_worker uuid, p_polled jsonb) returns uuid[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_look timestamptz := autotag.is_poll_assigned(p_worker);
  v_proven boolean := (select p.proven_at is not null from autotag.provider_limits p);  -- single calls work
  v_polls autotag.batch_poll[];
  v_free uuid[];
  v_changed uuid[];
  v_error text;                -- a batch failed with an account error
  v_limit bigint;              -- of the provider's queue, as the refusal of a batch states it
  v_job uuid;
begin
  perform autotag.check_list(p_polled);
  if v_look is null then
    return array[]::uuid[];
  end if;
  v_polls := autotag.clean_poll(p_polled);
  v_free := array(
    select j.id from autotag.jobs j where j.id in (
      select b.job_id from autotag.batches b
      join unnest(v_polls) seen on seen.id = b.openai_batch_id where b.state = 'submitted')
    order by j.id for no key update skip locked);
  v_free := array(
    select b.id from autotag.batches b
    where b.openai_batch_id in (select seen.id from unnest(v_polls) seen) and b.job_id = any (v_free)
    order by b.id for no key update skip locked);
  v_polls := autotag.blame_briefs(v_polls);
  v_error := (
    select seen.error from unnest(v_polls) seen join autotag.batches b on b.openai_batch_id = seen.id and b.state = 'submitted'
    where b.id = any (v_free) and seen.status = 'failed' and seen.error_kind = 'account' limit 1);
  v_limit := (
    select min(autotag.stated_limit(seen.error)) from unnest(v_polls) seen join autotag.batches b on b.openai_batch_id = seen.id
    where b.id = any (v_free) and b.state = 'submitted' and seen.status = 'failed' and seen.error_code = 'token_limit_exceeded');
  v_changed := autotag.apply_poll(v_polls, v_free, v_look, v_proven, v_now);
  -- Once per upload, even if several of its batches have changed.
  for v_job in select distinct b.job_id from autotag.batches b where b.id = any (v_changed) order by 1 loop
    perform autotag.broadcast_progress(v_job, autotag.refresh_eta(v_job));
  end loop;
  perform autotag.judge_poll(v_error, v_limit);
  return array(select b.id from autotag.batches b where b.id = any (v_changed) and b.state = 'submitted' and b.running_at = v_now);
end $$;

-- Validates a worker's poll and clamps its numbers. Drops elements without a valid batch id or status.
create or replace function autotag.clean_poll(p_polled jsonb) returns autotag.batch_poll[]
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  -- total and done count lines, and a file has at most 50,000.
  return array(
    select row(i.id, i.status, autotag.clean_id(e ->> 'output_file_id'), autotag.clean_id(e ->> 'error_file_id'),
      coalesce(autotag.clean_number(e, 'total', 0, 50000), 0)::integer,
      coalesce(autotag.clean_number(e, 'done', 0, 50000), 0)::integer,
      autotag.printable(e ->> 'error_code', 100), autotag.printable(e ->> 'error', 1000),
      autotag.printable(e ->> 'error_kind', 20))::autotag.batch_poll
    from jsonb_array_elements(p_polled) e
    cross join lateral (select autotag.clean_id(e ->> 'id') as id, autotag.clean_status(e ->> 'status') as status) i
    where i.id is not null and i.status is not null);
end $$;

-- If a batch was refused for something that its brief may have caused (is_about_request), the error says nothing about the account.
-- It becomes an error of the batch's images. They are sent as single calls, whose errors say more (blame_brief).
create or replace function autotag.blame_briefs(p_polls autotag.batch_poll[]) returns autotag.batch_poll[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = 'force_custom_plan'
as $$
declare
  v_refused text[] := array(
    select seen.id from unnest(p_polls) seen where seen.status = 'failed' and seen.error_kind = 'account'
      and autotag.is_about_request(jsonb_build_object('kind', seen.error_kind, 'code', seen.error_code)));
begin
  if v_refused = '{}' then
    return p_polls;
  end if;
  v_refused := array(
    select b.openai_batch_id from autotag.batches b join autotag.jobs j on j.id = b.job_id
    where b.openai_batch_id = any (v_refused) and j.brief_id is not null);
  return array(
    select row(seen.id, seen.status, seen.output_file_id, seen.error_file_id, seen.total, seen.done, seen.error_code, seen.error,
      case when seen.id = any (v_refused) then 'image' else seen.error_kind end)::autotag.batch_poll
    from unnest(p_polls) with ordinality seen order by seen.ordinality);
end $$;

-- Bounds a poll's counts by the batch: it has at most as many lines as images, at least as many as earlier polls reported, and at most
-- all of them are done. A total of 0 is unknown.
create or replace function autotag.bound_counts(p_poll autotag.batch_poll, p_batch autotag.batches) returns autotag.batch_poll
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
  p_poll.total := greatest(p_batch.request_total, least(p_poll.total, p_batch.image_count - p_batch.express_count));
  if p_poll.total > 0 then
    p_poll.total := greatest(p_poll.total, p_batch.request_done);
  end if;
  p_poll.done := least(p_poll.done, coalesce(nullif(p_poll.total, 0), p_batch.image_count - p_batch.express_count));
  return p_poll;
end $$;

-- Applies a poll to the account: a poll that works ends the pause that a failed poll began, and a batch that failed with an
-- account error (p_error: no credit) pauses tagging, as a single call would. p_limit: the limit of the provider's queue, if a
-- refusal stated it. Locks: provider, in these cases.
create or replace function autotag.judge_poll(p_error text, p_limit bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from autotag.provider_limits p where p.account_error_from = 'poll') then
    perform autotag.resume_tagging('poll');
    perform pg_notify('autotag', 'realtime');
  end if;
  if p_error is not null then
    perform autotag.pause_tagging(p_error, 'batch');
  end if;
  update autotag.provider_limits p set queued_batch_tokens = p_limit where p.queued_batch_tokens <> p_limit;
end $$;

-- The limit that a refusal states: `Enqueued token limit reached for gpt-4o-mini in organization org-x. Limit: 2,000,000 enqueued
-- tokens.` Null: it states none.
create or replace function autotag.stated_limit(p_error text) returns bigint
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select case when n.digits is not null then least(greatest(n.digits::bigint, 1000), 1000000000000) end
  from (select replace(substring(p_error from '[Ll]imit: ?([0-9][0-9,]{0,17}) enqueued'), ',', '') as digits) n
$$;

-- Applies a poll to each of p_batches that is in flight, and returns the batches that have changed. p_look: when the worker was
-- assigned this poll; p_proven: single calls work. The caller holds the batches and their jobs.
create or replace function autotag.apply_poll(
  p_polled autotag.batch_poll[], p_batches uuid[], p_look timestamptz, p_proven boolean, p_now timestamptz
) returns uuid[]
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings autotag.settings;
  v_poll autotag.batch_poll;
  v_batch autotag.batches;
  v_changed uuid[] := array[]::uuid[];
begin
  select * into v_settings from autotag.settings;
  for v_poll in
    select seen.* from unnest(p_polled) seen
    join autotag.batches b on b.openai_batch_id = seen.id and b.state = 'submitted'
    where b.id = any (p_batches) order by b.id
  loop
    select * into v_batch from autotag.batches b where b.openai_batch_id = v_poll.id and b.state = 'submitted';
    v_poll := autotag.bound_counts(v_poll, v_batch);
    if v_poll.status = 'gone' then
      perform autotag.count_missing_poll(v_batch, p_look);
    elsif v_poll.status in ('validating', 'in_progress', 'finalizing', 'cancelling', 'unread')
      and v_batch.submitted_at <= p_now - 2 * v_settings.batch_give_up_after then
      perform autotag.requeue_batch(v_batch, true, 1, 'batch_gone', 'OpenAI never finished the batch of this image.');
      perform autotag.end_batch(v_batch, 'OpenAI has not finished this batch within two days.');
    elsif v_poll.status = 'unread' then
      null;
    elsif v_poll.status = 'failed' and v_poll.error_code = 'token_limit_exceeded' then
      perform autotag.refuse_tokens(v_batch, v_poll.error, v_settings, p_now);
    -- If single calls work, an account error counts: after max_bad_answers, this account or deployment cannot do batches.
    elsif v_poll.status = 'failed'
      and v_poll.error_kind = 'account' and (not p_proven or v_batch.failures + 1 < v_settings.max_bad_answers) then
      update autotag.batches b
      set state = 'planned', openai_batch_id = null, openai_status = null, reserved_tokens = 0, error = v_poll.error,
          not_before = p_now + v_settings.batch_poll_interval,
          failures = b.failures + p_proven::integer
      where b.id = v_batch.id;
    elsif v_batch.openai_status is distinct from v_poll.status or v_batch.request_done < v_poll.done or v_batch.missing_polls > 0 then
      perform autotag.move_batch(v_batch, v_poll, p_now);
      v_changed := array_append(v_changed, v_batch.id);
    elsif not v_batch.cancel_requested and v_poll.status in ('validating', 'in_progress', 'finalizing')
      and (v_batch.progress_at <= p_now - v_settings.batch_stuck_after
        or v_batch.submitted_at <= p_now - v_settings.batch_give_up_after)
      and autotag.predict_wait(v_batch.workspace_id, v_batch.image_count - v_batch.express_count - v_batch.request_done)
        <= v_settings.realtime_max_wait
    then
      update autotag.batches b set cancel_requested = true, stuck = true where b.id = v_batch.id;
      update autotag.jobs j
      set fallback = 'A batch made no progress, so the rest of its images are sent as single calls.'
      where j.id = v_batch.job_id;
    end if;
  end loop;
  return v_changed;
end $$;

-- Counts a poll that did not find the batch at OpenAI. After batch_max_missing_polls in a row the batch ends, and its images are
-- retried. p_look: as in apply_poll(). The caller holds job and batch.
create or replace function autotag.count_missing_poll(p_batch autotag.batches, p_look timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_batch.last_missing_poll_at = p_look then  -- this poll is counted already
    return;
  end if;
  update autotag.batches b set missing_polls = b.missing_polls + 1, last_missing_poll_at = p_look where b.id = p_batch.id;
  if p_batch.missing_polls + 1 >= (select s.batch_max_missing_polls from autotag.settings s) then
    perform autotag.requeue_batch(p_batch, true, 1, 'batch_gone', 'OpenAI lost the batch of this image.');
    perform autotag.end_batch(p_batch, 'OpenAI does not know this batch (any more, or with this key).');
  end if;
end $$;

-- Updates a batch whose status or count of answers has changed. One that has ended waits to be harvested. The caller holds job and
-- batch.
create or replace function autotag.move_batch(p_before autotag.batches, p_polled autotag.batch_poll, p_now timestamptz) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch autotag.batches;
begin
  update autotag.batches b
  set openai_status = p_polled.status, request_total = p_polled.total,
      request_done = greatest(b.request_done, p_polled.done), progress_at = p_now, missing_polls = 0,
      running_at = coalesce(b.running_at, case when p_polled.status = 'in_progress' then p_now end),
      output_file_id = p_polled.output_file_id, error_file_id = p_polled.error_file_id, error = p_polled.error
  where b.id = p_before.id returning * into v_batch;
  if p_polled.status in ('completed', 'failed', 'expired', 'cancelled') then
    update autotag.batches b set state = 'ended', ended_at = p_now, reserved_tokens = 0 where b.id = v_batch.id;
    if p_polled.status = 'completed' then
      perform autotag.record_duration(v_batch, p_now);
    end if;
    perform pg_notify('autotag', 'batch');
  end if;
end $$;
