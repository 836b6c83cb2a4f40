-- Identity of the caller: a service, a member of a workspace, or a worker's login.

-- Whether the caller may act for every workspace: the service role over HTTP, or a direct connection without a user (no JWT
-- claims, and neither the API's login role nor a role that it switches to).
create or replace function autotag.is_service() returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_claims text := nullif(current_setting('request.jwt.claims', true), '');
begin
  if v_claims is not null then
    return coalesce(v_claims::jsonb ->> 'role' = 'service_role', false);
  end if;
  return session_user <> 'authenticator' and current_setting('role') not in ('anon', 'authenticated');
end $$;

-- Refuses a token that names no user: its claim does not have the type of the users' ids. That happens where another service signs
-- people in.
create or replace function autotag.check_caller() returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if not autotag.is_service() and autotag.caller() is null then
    perform autotag.refuse(403, 'unknown_caller', 'Your token does not say who you are in a way that this project knows.',
      'Sign in as a user of this project. Where Clerk, Auth0 or another service signs people in: autotag init --caller-claim sub.');
  end if;
end $$;

create or replace function autotag.check_member(p_workspace_id autotag.workspace_id) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if p_workspace_id is null then
    perform autotag.refuse(400, 'no_workspace', 'No workspace was given.', 'Pass the id of a workspace.');
  elsif octet_length(p_workspace_id::text) > 1024 then   -- an index takes no key over 2.7 kB
    perform autotag.refuse(400, 'workspace_too_long', 'The id of the workspace has more than 1,024 bytes.',
      'Give the workspace a shorter id.');
  elsif not autotag.is_service() and not autotag.is_member(p_workspace_id) then
    perform autotag.refuse(403, 'not_a_member', 'You are not a member of this workspace.',
      'Sign in as one of its members.', jsonb_build_object('workspace_id', p_workspace_id));
  end if;
end $$;

-- The same for a change of a workspace's profile or vocabulary.
create or replace function autotag.check_editor(p_workspace_id autotag.workspace_id) returns void
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.check_member(p_workspace_id);
  if not autotag.is_service() and autotag.is_editor(p_workspace_id) is not true then
    perform autotag.refuse(403, 'not_an_editor', 'You may not change what this workspace''s images are asked.',
      'Ask the people who run this project: autotag.is_editor() decides it.', jsonb_build_object('workspace_id', p_workspace_id));
  end if;
end $$;

-- Returns the job. Refuses a job that does not exist or belongs to another workspace.
create or replace function autotag.visible_job(p_job_id uuid) returns autotag.jobs
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_job autotag.jobs;
begin
  select * into v_job from autotag.jobs j where j.id = p_job_id;
  -- Both cases get the same refusal, so that a caller cannot find out which ids exist.
  if not found or not (autotag.is_service() or autotag.is_member(v_job.workspace_id)) then
    perform autotag.refuse(404, 'unknown_job', 'There is no such upload.', 'Pass the job_id that enqueue_tagging returned.');
  end if;
  return v_job;
end $$;

-- The traceparent header of the HTTP request behind this call; null: it has none, or none that is well-formed.
create or replace function autotag.request_traceparent() returns text
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  v_headers text := nullif(current_setting('request.headers', true), '');
begin
  if v_headers is null then
    return null;
  end if;
  return substring(v_headers::jsonb ->> 'traceparent' from '^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$');
exception when invalid_text_representation then
  return null;
end $$;

-- Whether the calling login has registered this worker. False once the worker's row is deleted (expire_worker, release_worker).
create or replace function autotag.is_own_worker(p_worker uuid) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from autotag.workers wk where wk.id = p_worker and wk.login = session_user);
end $$;
