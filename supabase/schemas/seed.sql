-- What every installation begins with. It may run again: what is there stays, and kinds of error are as this version has them.

insert into autotag.settings default values on conflict do nothing;

-- Prices: OpenAI's pages, autumn 2026. Cache writes of the 5.6 and 6 families cost 1.25 times the input. Shutdowns: OpenAI's
-- page of deprecations on 2026-11-28. Where reasoning is a choice, tagging needs none: OpenAI's own advice for the move from
-- the 4.1 family. OpenAI publishes no figure for the images of the newer models; 1.62 tokens a patch is that of gpt-4.1-mini.
insert into autotag.models (name, input_price, cached_price, cache_write_price, output_price, reasons, reasoning_effort, patch_tokens) values
  ('gpt-6-luna', 0.10, 0.01, 0.125, 0.50, true, 'none', 1.62),
  ('gpt-6.1-terra', 1.00, 0.05, 1.25, 5.00, true, 'none', 1.62),
  ('gpt-5.6-luna', 0.20, 0.02, 0.25, 1.20, true, 'none', 1.62),
  ('gpt-5.6-terra', 2.00, 0.20, 2.50, 12.00, true, 'none', 1.62),
  ('gpt-5.6-sol', 4.00, 0.40, 5.00, 20.00, true, 'none', 1.62),
  ('gpt-5.4-mini', 0.75, 0.075, null, 4.50, true, 'none', 1.62)
on conflict do nothing;

insert into autotag.models (name, input_price, cached_price, output_price, reasons, patch_tokens, base_tokens, tile_tokens, shutdown_date, successor) values
  ('gpt-4.1-mini', 0.40, 0.10, 1.60, false, 1.62, null, null, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4o-mini', 0.15, 0.075, 0.60, false, null, 2833, 5667, '2027-01-14', 'gpt-6-luna'),
  -- known to shut down; their prices are not kept here
  ('gpt-4.1', null, null, null, false, null, 85, 170, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4o', null, null, null, false, null, 85, 170, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4.1-nano', null, null, null, false, 2.46, null, null, '2026-10-23', null),
  ('o4-mini', null, null, null, true, 1.72, null, null, '2026-10-23', null),
  ('gpt-5', null, null, null, true, null, 70, 140, '2026-12-11', null),
  ('gpt-5-mini', null, null, null, true, 1.62, null, null, '2026-12-11', null),
  ('gpt-5-nano', null, null, null, true, 2.46, null, null, '2026-12-11', null)
on conflict do nothing;

insert into autotag.provider_limits default values on conflict do nothing;

-- A new installation asks what the settings' defaults say; the first worker that registers makes it prove itself.
do $$
declare
  v_provider autotag.provider_limits;
begin
  select * into v_provider from autotag.provider_limits p where p.question = '{}' for update;
  if not found then
    return;
  end if;
  perform autotag.sync_question(v_provider);
  update autotag.provider_limits p set proven_at = '-infinity' where p.proven_at is null;
end $$;

insert into autotag.clock default values on conflict do nothing;

insert into autotag.error_kinds values
  ('transient', true, true, false, false, 'nobody''s fault: a broken connection, an error of the service, or what nobody knows', '{}'),
  ('rate_limit', false, false, false, false, 'the provider asks to wait: again when it says so', '{}'),
  ('account', false, true, true, false, 'key, credit, model, address or an unsupported request: again when somebody has fixed it',
    '{http_413,context_too_small}'),
  ('image', true, false, false, true, 'this image, by the provider''s own word or by its file', '{}')
on conflict (kind) do update set counts = excluded.counts, delays = excluded.delays, pauses = excluded.pauses,
  ends = excluded.ends, meaning = excluded.meaning, suspects = excluded.suspects;
