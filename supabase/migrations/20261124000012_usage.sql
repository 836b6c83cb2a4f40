-- Who used what: one row per workspace, user and day (UTC), as the provider's own usage figures say.

create table autotag.usage (
  id bigint generated always as identity primary key,
  workspace_id uuid not null,
  user_id uuid,
  day date not null,
  images integer not null default 0,     -- images tagged
  requests integer not null default 0,   -- answers the provider billed
  input_tokens bigint not null default 0,
  cached_tokens bigint not null default 0,
  output_tokens bigint not null default 0,
  cost numeric not null default 0        -- dollars, by the price table in settings
) with (fillfactor = 50);
create unique index usage_key on autotag.usage (workspace_id, day, user_id) nulls not distinct;
alter table autotag.usage enable row level security;

-- Adds what these answers cost: [{task, result | error, usage: {input, cached, output}}]. input counts the
-- cached tokens too, as OpenAI's figures do.
create function autotag.add_usage(p_answers jsonb, p_batch boolean) returns void
language sql security definer set search_path = ''
as $$
  insert into autotag.usage as u
    (workspace_id, user_id, day, images, requests, input_tokens, cached_tokens, output_tokens, cost)
  select j.workspace_id, j.user_id, (autotag.now() at time zone 'utc')::date,
    count(*) filter (where a.error is null), count(*),
    sum((a.usage ->> 'input')::bigint), sum((a.usage ->> 'cached')::bigint), sum((a.usage ->> 'output')::bigint),
    sum(((a.usage ->> 'input')::bigint - (a.usage ->> 'cached')::bigint) * s.input_price
      + (a.usage ->> 'cached')::bigint * s.cached_price
      + (a.usage ->> 'output')::bigint * s.output_price) / 1000000
      * case when p_batch then s.batch_discount else 1 end
  from jsonb_to_recordset(p_answers) a (task bigint, error jsonb, usage jsonb)
  join autotag.tasks t on t.id = a.task
  join autotag.jobs j on j.id = t.job_id
  cross join autotag.settings s
  where a.usage is not null
  group by j.workspace_id, j.user_id, s.batch_discount
  order by j.workspace_id, j.user_id
  on conflict (workspace_id, day, user_id) do update set
    images = u.images + excluded.images, requests = u.requests + excluded.requests,
    input_tokens = u.input_tokens + excluded.input_tokens,
    cached_tokens = u.cached_tokens + excluded.cached_tokens,
    output_tokens = u.output_tokens + excluded.output_tokens, cost = u.cost + excluded.cost
$$;

-- tagging_usage: rows per user and day, for members of the workspace.
create function autotag.list_usage(p_workspace_id uuid, p_since date, p_until date)
returns table (user_id uuid, day date, images integer, requests integer, input_tokens bigint,
  cached_tokens bigint, output_tokens bigint, cost numeric)
language plpgsql stable security definer set search_path = ''
as $$
begin
  perform autotag.check_member(p_workspace_id);
  return query
    select u.user_id, u.day, u.images, u.requests, u.input_tokens, u.cached_tokens, u.output_tokens, u.cost
    from autotag.usage u
    where u.workspace_id = p_workspace_id and u.day between p_since and p_until
    order by u.day, u.user_id;
end $$;
