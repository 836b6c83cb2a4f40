-- Broadcasts to browsers, sent by the transaction that makes them true, and the right to receive them.

-- Broadcasts a message. It only warns of an error of Realtime (a partition is missing), which must not undo the reported change.
create or replace function autotag.broadcast(p_topic text, p_event text, p_payload jsonb, p_private boolean) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if to_regprocedure('realtime.send(jsonb,text,text,boolean)') is not null then
    -- the cast picks the overload; newer servers also have one for bytea
    perform realtime.send(p_payload::jsonb, p_event, p_topic, p_private);
  else
    insert into autotag.outbox (topic, event, payload, private, created_at)
    values (p_topic, p_event, p_payload, p_private, autotag.now());
    perform pg_notify('autotag', 'outbox');
  end if;
exception when others or assert_failure then
  raise warning 'autotag could not broadcast %: %', p_event, sqlerrm;
end $$;

create or replace function autotag.broadcast_to_workspace(p_workspace_id autotag.workspace_id, p_event text, p_payload jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform autotag.broadcast('tagging:' || p_workspace_id, p_event, p_payload, true);
end $$;

-- Takes messages out of the outbox for delivery: [{topic, event, payload, private}]. They are deleted at once, because Realtime
-- delivers at most once, and clients rely on it that no message comes twice.
create or replace function autotag.take_outbox(p_limit integer) returns jsonb
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  with taken as (
    delete from autotag.outbox ob where ob.id in (
      select oldest.id from autotag.outbox oldest order by oldest.id limit greatest(least(p_limit, 1000), 0) for update skip locked)
    returning ob.*
  )
  select coalesce(jsonb_agg(jsonb_build_object(
    'topic', t.topic, 'event', t.event, 'payload', t.payload, 'private', t.private) order by t.id), '[]')
  from taken t
$$;

-- Whether the caller may join a private topic: tagging:<workspace_id> of one of their workspaces.
-- The id has to be written as Postgres prints it, as in the topics of broadcasts.
create or replace function autotag.may_listen(p_topic text) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_workspace_id autotag.workspace_id;
begin
  if starts_with(p_topic, 'tagging:') then
    begin
      v_workspace_id := substr(p_topic, 9)::autotag.workspace_id;
    exception when data_exception then
      return false;
    end;
    return coalesce(p_topic = 'tagging:' || v_workspace_id and autotag.is_member(v_workspace_id), false);
  end if;
  return false;
end $$;
