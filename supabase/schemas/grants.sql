-- All privileges and all policies of row level security. This file may run again at any time.
--
-- New functions are executable by everyone (and by anon through the default privileges of Supabase projects), so everything is
-- revoked first.
revoke all on schema autotag from public, anon;
grant usage on schema autotag to authenticated, service_role, autotag_worker, autotag_operator;
revoke all on all functions in schema autotag from public, anon, authenticated, service_role;
revoke all on all tables in schema autotag from public, anon, authenticated, service_role;
revoke all on all sequences in schema autotag from public, anon, authenticated, service_role;
revoke all on public.workspace_rate_limits from anon, authenticated;
grant select on autotag.windows, public.workspace_rate_limits to authenticated;
grant all on autotag.windows, public.workspace_rate_limits to service_role;
-- the shapes of results (api_types.sql), which nobody reads
revoke all on public.tagging_stage_counts, public.tagging_batch_result, public.tagging_vocabulary_tag, public.tagging_job_result,
  public.tagging_upload_result, public.tagging_cancel_result, public.tagging_strategy_result, public.tagging_limit_result,
  public.tagging_usage_result, public.tagging_profile_result, public.tagging_vocabulary_result, public.tagging_vocabulary_change,
  public.tagging_webhook_result from anon, authenticated, service_role;
revoke all on function
  public.enqueue_tagging, public.cancel_tagging, public.retry_tagging, public.tagging_job, public.tagging_jobs,
  public.tagging_strategy, public.check_rate_limit, public.peek_rate_limit, public.tagging_usage,
  public.tagging_vocabulary, public.set_tagging_vocabulary, public.edit_tagging_vocabulary,
  public.tagging_profile, public.set_tagging_profile
  from public, anon;
revoke all on function public.openai_webhook from public, anon, authenticated;

-- users: the RPCs, the functions that they call with the user's rights, and those in row level security policies
grant execute on function
  public.enqueue_tagging, public.cancel_tagging, public.retry_tagging, public.tagging_job, public.tagging_jobs,
  public.tagging_strategy, public.check_rate_limit, public.peek_rate_limit, public.tagging_usage,
  public.tagging_profile, public.set_tagging_profile, autotag.read_profile, autotag.edit_profile,
  autotag.check_image_count, autotag.enqueue, autotag.visible_file_marks, autotag.files_to_check,
  autotag.visible_assets, autotag.has_to_see, autotag.check_caller, autotag.failed_assets,
  autotag.cancel, autotag.retry,
  autotag.describe_job, autotag.list_jobs,
  autotag.describe_strategy, autotag.take_allowance, autotag.list_usage
  to authenticated, service_role;
grant execute on function
  public.tagging_vocabulary, public.set_tagging_vocabulary, public.edit_tagging_vocabulary,
  autotag.describe_vocabulary, autotag.edit_vocabulary
  to authenticated, service_role;
grant execute on function autotag.is_member, autotag.may_listen to authenticated;

-- the project's own server
grant execute on function public.openai_webhook, autotag.receive_webhook to service_role;

-- workers: their reports are validated (results/reports.sql), and they can act only on what they hold
grant execute on function
  autotag.register_worker, autotag.worker_settings, autotag.heartbeat, autotag.tick_if_due,
  autotag.release_worker, autotag.release_lost, autotag.claim, autotag.describe_tasks, autotag.describe_brief, autotag.report_unreadable, autotag.seal_uploads, autotag.report_stages, autotag.settle,
  autotag.list_unstored, autotag.pick_unstored, autotag.store_waiting, autotag.postpone_stores,
  autotag.claim_batches, autotag.batch_images, autotag.batch_step, autotag.batch_split, autotag.note_images, autotag.batch_submitted, autotag.show_batch,
  autotag.report_batch_failure, autotag.report_poll_failure, autotag.files_deleted, autotag.provider_checked, autotag.record_poll, autotag.batch_answers, autotag.batch_finish,
  autotag.take_outbox, autotag.receive_webhook, autotag.diagnose, autotag.diagnose_write, autotag.send_test_broadcast, autotag.status, autotag.metrics
  to autotag_worker;

-- its owner is authenticated; locate() runs as this login
grant execute on function autotag.may_see_file to current_user;

-- operators: monitoring, existing images, comparisons. They see images, tags and usage of every workspace.
grant execute on function
  autotag.diagnose, autotag.diagnose_write, autotag.send_test_broadcast, autotag.status, autotag.metrics,
  autotag.preview_backfill, autotag.backfill, autotag.list_usage,
  autotag.show_profile, autotag.set_profile, autotag.profile_history, autotag.knows_workspace,
  autotag.preview_comparison, autotag.comparison_sample, autotag.admit_comparison, autotag.settle_comparison
  to autotag_operator;

grant execute on function
  autotag.edit_vocabulary, autotag.list_vocabulary, autotag.tags_in_use, autotag.count_uses
  to autotag_operator;

-- everyone who has to compare versions
grant execute on function autotag.schema_version to autotag_worker, autotag_operator, service_role;

-- row level security
drop policy if exists "members see the limits of their workspaces" on autotag.windows;
create policy "members see the limits of their workspaces" on autotag.windows for select to authenticated
  using ((select autotag.is_member(workspace_id)));

do $$
begin
  if to_regclass('realtime.messages') is not null then
    drop policy if exists "autotag: members listen to their workspaces" on realtime.messages;
    create policy "autotag: members listen to their workspaces" on realtime.messages
      for select to authenticated
      using ((select autotag.may_listen((select realtime.topic()))));
  end if;
end $$;
