-- Initial rows of every installation. It may run again: existing rows stay, and error kinds get this version's values.

insert into autotag.settings default values on conflict do nothing;

-- Prices: OpenAI's pages, autumn 2026. Cache writes of the 5.6 and 6 families cost 1.25 times the input. Shutdowns: OpenAI's
-- page of deprecations on 2026-11-28. Reasoning is off where it can be, because tagging needs none (OpenAI's own advice for the
-- move from the 4.1 family). OpenAI publishes no image tokens for the newer models; 1.62 per patch is gpt-4.1-mini's figure.
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
  -- their shutdown is announced; prices are left out
  ('gpt-4.1', null, null, null, false, null, 85, 170, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4o', null, null, null, false, null, 85, 170, '2027-01-14', 'gpt-6-luna'),
  ('gpt-4.1-nano', null, null, null, false, 2.46, null, null, '2026-10-23', null),
  ('o4-mini', null, null, null, true, 1.72, null, null, '2026-10-23', null),
  ('gpt-5', null, null, null, true, null, 70, 140, '2026-12-11', null),
  ('gpt-5-mini', null, null, null, true, 1.62, null, null, '2026-12-11', null),
  ('gpt-5-nano', null, null, null, true, 2.46, null, null, '2026-12-11', null)
on conflict do nothing;

insert into autotag.provider_limits default values on conflict do nothing;

-- A new installation starts with the default question as proven; the first worker's fingerprint makes it unproven.
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
  ('transient', true, true, false, false, 'a broken connection, an error of the service, or an unknown error: retried later', '{}'),
  ('rate_limit', false, false, false, false, 'the provider asks to wait: retried when it says', '{}'),
  ('account', false, true, true, false, 'key, credit, model, address or an unsupported request: retried until the configuration is fixed',
    '{http_413,context_too_small}'),
  ('image', true, false, false, true, 'only this image, as the provider says or its file shows', '{}')
on conflict (kind) do update set counts = excluded.counts, delays = excluded.delays, pauses = excluded.pauses,
  ends = excluded.ends, meaning = excluded.meaning, suspects = excluded.suspects;
