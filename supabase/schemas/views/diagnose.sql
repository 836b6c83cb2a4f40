-- The findings of `autotag doctor` that the database can make by itself, each with its fix.

-- One finding. level: ok, warning (works, but not as well as it should) or error (does not work).
create or replace function autotag.finding(p_check text, p_level text, p_message text, p_fix text default null) returns jsonb
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object('check', p_check, 'level', p_level, 'message', p_message,
    'fix', case when p_level <> 'ok' then p_fix end)
$$;

-- Checks the installation: {findings: [{check, level, message, fix}] in the order to show them, now (epoch seconds), model,
-- sample, storage_hosts (of the adapter)}. sample: bucket and path of one image, which the doctor tries to read. It is the only image
-- whose location a worker's login learns without a claim.
create or replace function autotag.diagnose() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider autotag.provider_limits;
  v_logins name[] := autotag.worker_logins();
  v_host record;
begin
  select * into v_provider from autotag.provider_limits;
  v_host := autotag.diagnose_host();
  return jsonb_build_object(
    'findings', jsonb_build_array(autotag.diagnose_roles(v_logins), autotag.diagnose_grants()) || v_host.findings
      || jsonb_build_array(autotag.diagnose_cron(), autotag.diagnose_clock(), autotag.diagnose_broadcasts(), autotag.diagnose_workers(), autotag.diagnose_waiting(),
        autotag.diagnose_account(v_provider), autotag.diagnose_day(v_provider), autotag.diagnose_spending(), autotag.diagnose_temporary(v_logins))
      || autotag.diagnose_model(v_provider),
    'now', extract(epoch from autotag.now()), 'model', (select s.model from autotag.settings s), 'sample', v_host.sample,
    'storage_hosts', to_jsonb(autotag.storage_hosts()));
end $$;
