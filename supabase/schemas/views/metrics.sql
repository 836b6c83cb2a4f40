-- Metrics for a monitoring system.

-- Metrics for a monitoring system: counts, ages in seconds, and what is left of the provider's bucket. Each query is short, and
-- none gets slower with the number of images already tagged.
create or replace function autotag.metrics() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := autotag.now();
  v_provider autotag.provider_limits := autotag.refilled_provider(v_now);
begin
  return (
    select jsonb_build_object(
      'queued', c.images, 'queued_workspaces', c.workspaces,
      'oldest_queued', (
        select extract(epoch from v_now - min(j.created_at)) from autotag.queues q join autotag.jobs j on j.id = q.job_id
        where q.queued > 0 and j.finished_at is null),
      'delayed', k.delayed, 'live', l.images,
      'work', c.images + k.held + k.due + g.images,
      'batches', g.states, 'oldest_batch', extract(epoch from v_now - g.oldest))
    || jsonb_build_object(
      'requests_left', floor(v_provider.requests_left), 'requests_per_minute', v_provider.requests_per_minute,
      'tokens_left', floor(v_provider.tokens_left), 'tokens_per_minute', v_provider.tokens_per_minute,
      'blocked_seconds', extract(epoch from greatest(v_provider.blocked_until, v_now) - v_now),
      'account_error', (v_provider.account_error is not null)::integer,
      'workers', (select count(*) from autotag.workers wk where wk.lease_until > v_now),
      'outbox', o.messages, 'oldest_message', extract(epoch from v_now - o.oldest),
      'unstored', n.images, 'oldest_unstored', extract(epoch from v_now - n.oldest),
      'images_today', u.images, 'cost_today', u.cost, 'unpriced_today', u.unpriced,
      'shutdown_days', (select m.shutdown_date from autotag.settings s, autotag.find_model(s.model) m) - (v_now at time zone 'utc')::date)
    from autotag.count_waiting() c
    cross join (select count(*) filter (where t.retry_at is not null) as delayed,
                  count(*) filter (where t.retry_at <= v_now) as due,
                  count(*) filter (where t.worker_id is not null) as held
                from autotag.tasks t where t.finished_at is null) k
    cross join (select coalesce(sum(j.image_count - j.completed - j.failed), 0) as images
                from autotag.jobs j where j.finished_at is null) l
    cross join (select coalesce(jsonb_object_agg(x.state, x.batches), '{}') as states, min(x.oldest) as oldest,
                  coalesce(sum(x.images) filter (where x.state not in ('submitted')), 0) as images
                from (select b.state, count(*) as batches, min(b.created_at) as oldest,
                        sum(b.image_count - b.express_count) filter (where b.not_before <= v_now) as images
                      from autotag.batches b where b.state not in ('done', 'cancelled') group by b.state) x) g
    cross join (select count(*) as messages, min(ob.created_at) as oldest from autotag.outbox ob) o
    cross join (select count(*) as images, min(un.kept_at) as oldest from autotag.unstored un) n
    cross join (select coalesce(sum(us.images), 0) as images, coalesce(sum(us.cost), 0) as cost,
                  coalesce(sum(us.requests) filter (where us.cost is null), 0) as unpriced
                from autotag.usage us where us.day = (v_now at time zone 'utc')::date) u);
end $$;
