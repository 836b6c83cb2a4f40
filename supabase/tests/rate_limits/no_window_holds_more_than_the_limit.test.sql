begin;
\ir ../setup.psql
select plan(13);
select pg_temp.workspace(1);

create function pg_temp.ask(n integer) returns text language sql as $$
  select allowed || ' ' || coalesce(retry_after::text, 'never')
  from public.check_rate_limit('00000000-0000-4000-8000-000000000001', 'realtime', n)
$$;
select is(pg_temp.ask(20), 'true 0', '20 of 30 requests');
select is(pg_temp.ask(11), 'false 60', '11 more do not fit: all or nothing');
select pg_temp.at(10);
select is(pg_temp.ask(10), 'true 0', '10 more do');
select is(pg_temp.ask(1), 'false 50', 'full: the first 20 leave in 50 s');
select is(pg_temp.ask(21), 'false 60', '21 need the second admission to leave as well');
select pg_temp.at(59.999999);
select is(pg_temp.ask(1), 'false 1e-06', 'one microsecond earlier is refused');
select pg_temp.at(60);
select is(pg_temp.ask(20), 'true 0', 'at that moment it is allowed');
select is(pg_temp.ask(1), 'false 10', 'and no more than that');
select is(pg_temp.ask(31), 'false never', 'more than the limit never fits');
select is((select cardinality(admitted_at) from public.workspace_rate_limits), 2, 'what left the window left the row');

update public.workspace_rate_limits set max_requests = 100, max_units = 40 * 1000;
select is(pg_temp.ask(10), 'true 0', 'a workspace''s own limits hold at once');
select is(pg_temp.ask(1), 'false 10', 'the second dimension, tokens, binds now');

-- Reserved by estimate, corrected by use: 10,000 reserved at second 60, 2,000 used.
select autotag.correct_window('00000000-0000-4000-8000-000000000001', 'realtime', autotag.now(), 0, -8000);
select is(pg_temp.ask(8), 'true 0', 'tokens that were not used are free again');
select * from finish();
rollback;
