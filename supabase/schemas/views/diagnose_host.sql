-- The doctor's checks of the host's tables.

-- {bucket, path} of an image in Storage, of the workspace with the newest upload, so that the doctor can try to read it; null:
-- there is none.
create or replace function autotag.sample_image() returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object('bucket', d.bucket, 'path', d.path)
  from (select j.workspace_id from autotag.jobs j order by j.created_at desc limit 1) newest
  cross join autotag.describe_assets(autotag.list_assets(newest.workspace_id, false, null, 20)) d
  where d.bucket is not null and d.path is not null limit 1
$$;

-- Whether rows name files of their own workspace only, and whether signed-in users could write other rows.
create or replace function autotag.diagnose_files() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_rule text := autotag.file_rule();
  v_files record := autotag.check_files(10000);
  v_open text := case when v_files.may_write is not null
    then format(' Signed-in users can write rows that name any file (%s).', v_files.may_write) else '' end;
begin
  if v_rule = 'any' then
    return autotag.finding('files', 'warning',
      'A row may name any file of the project (rule any), and its workspace gets that image''s tags.' || v_open,
      'Set a rule: autotag init --file-rule workspace-folder   (docs/install.md, "Whose a file is")');
  elsif v_files.foreign_files > 0 then
    return autotag.finding('files', 'warning',
      format('%s of %s checked rows name a file of another workspace (rule %s) and are not tagged, for example %s.',
        v_files.foreign_files, v_files.checked, v_rule, array_to_string(v_files.examples, ', ')) || v_open,
      'Correct these rows, or the rule in autotag.describe_assets.');
  end if;
  return autotag.finding('files', case when v_open <> '' and v_rule in ('uploader-folder', 'owner') then 'warning' else 'ok' end,
    format('Rows name files of %s (rule %s; %s rows checked).',
        case when v_rule in ('uploader-folder', 'owner') then 'members of their workspace' else 'their own workspace' end,
        v_rule, v_files.checked)
      || case when not autotag.users_see_files() and v_rule <> 'none'
        then ' Row level security of storage.objects is not checked (autotag.users_see_files).' else '' end
      || v_open || case
        when v_open = '' then ''
        when v_rule in ('uploader-folder', 'owner') then ' They get the tags of any file of a colleague, in any workspace.'
        else ' autotag does not tag them.' end,
    case when v_open <> '' and v_rule in ('uploader-folder', 'owner')
      then 'Add a policy that lets users insert only rows that name them as the uploader (… = (select auth.uid())).' end);
end $$;

-- Whether a rule on the host's table prevents updates, so that tags are paid for and cannot be stored. Postgres rewrites
-- `update … returning` only by an unconditional rule with its own `returning`, and not at all within `with`.
create or replace function autotag.diagnose_rules() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_rules text[] := array(
    select r.rulename::text from pg_rewrite r
    where r.ev_class = autotag.image_table() and r.ev_type = '2' and r.ev_enabled <> 'D' order by 1);
begin
  return case when v_rules = '{}' then autotag.finding('rules', 'ok', 'No rule changes the updates of the table of images.')
    else autotag.finding('rules', 'error',
      format('%s has a rule on update (%s), so no tags can be stored there: every image is paid for and fails.',
        autotag.image_table(), autotag.name_some(v_rules)),
      format('Use a trigger instead, and: drop rule %I on %s;', v_rules[1], autotag.image_table())) end;
end $$;

-- Which images of their workspace members may tag: those whose rows they see, if signed-in users read the table themselves.
create or replace function autotag.diagnose_rows() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text := autotag.image_table()::text;
  v_reads text := autotag.may_read_images('authenticated');
  v_secure boolean := (select c.relrowsecurity from pg_class c where c.oid = autotag.image_table());
begin
  if v_reads = 'columns' and v_secure then
    return autotag.finding('rows', 'warning',
      format('Signed-in users may read columns of %s, but not its ids, so which rows they see cannot be found out, and they may tag no image.', v_table),
      format('grant select (%I) on %s to authenticated;', autotag.adapter_answers() #>> '{choices,id}', v_table));
  end if;
  return autotag.finding('rows', 'ok', case
    when v_reads is null
      then format('Signed-in users have no privilege to read %s, so members may tag every image of their workspace.', v_table)
    when not v_secure
      then format('Row level security of %s is off, so members may tag every image of their workspace.', v_table)
    else format('Members may tag the images whose rows they see under row level security of %s.', v_table) end);
end $$;

-- The triggers of the host that run when autotag writes a row.
create or replace function autotag.update_triggers() returns text[]
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select array(
    select tg.tgname::text from pg_trigger tg
    where tg.tgrelid = autotag.image_table() and not tg.tgisinternal and tg.tgenabled in ('O', 'A') and tg.tgtype & 16 <> 0 order by 1)
$$;

-- Writes tags to the row of one image as a worker's report does, and rolls that back, including what triggers did in this database. The
-- image is the last one whose row refused its tags, or any. p_tag: the first of ten tags. error: null if there was none. tried: false if
-- there is no image. kept: how many of the tags were in the row, or had been removed by people; null: the row's tags do not change.
create or replace function autotag.try_write(p_tag text, out tried boolean, out state text, out error text, out kept integer)
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '1s'
as $$
declare
  v_image record;
  v_tags text[] := p_tag || '{field,sky,grass,fence,tree,cloud,summer,wood,countryside}'::text[];
begin
  select d.asset_id, d.workspace_id into v_image
  from unnest(array[
    (select t.asset_id from autotag.tasks t where t.error_code = 'not_stored' order by t.id desc limit 1),
    (autotag.tags_in_use(null, null, 1) ->> 'last')::autotag.asset_id]) with ordinality u (id, place)
  cross join lateral autotag.describe_assets(array[u.id]) d
  where u.id is not null and d.workspace_id is not null order by u.place limit 1;
  tried := found;
  if tried then
    perform autotag.show_stage(array[v_image.asset_id], v_image.workspace_id, 'processing', 50);
    if autotag.store_tags(array[v_image.asset_id], v_image.workspace_id, array[jsonb_build_object(
      'tags', v_tags, 'confidence', jsonb_build_object(p_tag, 0.98, 'field', 0.9), 'caption', 'A red barn in a field.', 'model', 'autotag doctor')],
      array[null]::uuid[]) is null then
      raise exception 'the row did not change';
    end if;
    set constraints all immediate;
    select case when s.error is null then (
        select count(*) from unnest(autotag.tag_keys(v_tags)) k
        where k = any (autotag.tag_keys(s.tags) || autotag.recall_tags(s.result, 'removed'))) end
    into kept from autotag.stored_tags(array[v_image.asset_id]) s;
    raise exception 'it works' using errcode = 'AT002';
  end if;
exception when others or assert_failure then
  tried := true;
  if sqlstate <> 'AT002' then
    state := sqlstate;
    error := sqlerrm;
  end if;
end $$;

-- Whether a row accepts tags (try_write). p_triggers: try it even if triggers of the host run then. The doctor does that only on request,
-- because some effects of a trigger cannot be rolled back (a call of dblink, a request that it waits for).
create or replace function autotag.diagnose_write(p_triggers boolean) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text := autotag.image_table()::text;
  v_triggers text[] := autotag.update_triggers();
  v_try record;
  v_capital record;            -- the same with a capital, which tags of a vocabulary can have
  v_keep text := case v_triggers when '{}' then 'Let the column take tags of 50 characters.'
    else format('Let its triggers keep the tags: %s.', autotag.name_some(v_triggers)) end;
begin
  if v_triggers <> '{}' and p_triggers is not true then
    return autotag.finding('write', 'skipped', format('Not tried, because triggers of %s would run (%s).',
      v_table, autotag.name_some(v_triggers)), 'autotag doctor --try-write');
  end if;
  v_try := autotag.try_write('barn');
  v_capital := v_try;
  if v_try.tried and v_try.state is null then
    v_capital := autotag.try_write('Barn');
  end if;
  return case
    when not v_try.tried then autotag.finding('write', 'skipped', 'There is no image yet whose row could be written.',
      'Run autotag doctor again once there is one.')
    when autotag.is_lock_error(v_capital.state) then autotag.finding('write', 'warning',
      'The row that was tried is locked by another transaction.', 'Run autotag doctor again.')
    when v_try.state is not null then autotag.finding('write', 'error',
      format('%s refuses what autotag writes, so images are paid for and fail: %s', v_table, autotag.printable(v_try.error, 500)),
      'Let the constraint or trigger accept it. (Workers have no token: auth.uid() is null in triggers then.)')
    when v_try.kept = 0 then autotag.finding('write', 'error',
      format('%s kept none of ten tags, so images are paid for and get none.', v_table),
      v_keep)
    when v_try.kept < 10 then autotag.finding('write', 'warning', format('%s kept %s of ten tags.', v_table, v_try.kept),
      'If that is not meant: ' || v_keep)
    when v_capital.state is not null then autotag.finding('write', 'warning',
      format('%s takes tags, but none with a capital, which tags of a vocabulary can have: %s', v_table, autotag.printable(v_capital.error, 500)),
      'Let the constraint or trigger accept it, or write the vocabulary in lower case.')
    else autotag.finding('write', 'ok', 'A row takes tags (tried with one image, and taken back).') end;
end $$;

-- Whether rows have refused their tags lately. No finding if none has.
create or replace function autotag.diagnose_stored() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_images bigint := (
    select sum((e ->> 'images')::bigint) from jsonb_array_elements(autotag.recent_errors(100, autotag.now())) e
    where e ->> 'code' = 'not_stored');
begin
  return case when v_images is null then '[]' else jsonb_build_array(autotag.finding('stored', 'warning',
    format('The rows of %s images refused their tags within the last day (not_stored); they were paid for.', v_images),
    'autotag doctor --try-write   (says why; then: autotag enqueue --workspace …)')) end;
end $$;

-- Warns about profiles that allow only tags of the vocabulary while the vocabulary is empty, because then no tag is stored. No such
-- profile: no finding.
create or replace function autotag.diagnose_vocabulary() returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_empty bigint := (
    select count(*) from (
      select distinct on (pr.workspace_id) pr.workspace_id, pr.vocabulary_mode
      from autotag.profiles pr order by pr.workspace_id, pr.version desc) p
    where p.vocabulary_mode = 'only' and not autotag.has_vocabulary(p.workspace_id));
begin
  return case when v_empty = 0 then '[]' else jsonb_build_array(autotag.finding('vocabulary', 'warning',
    format('%s of the profiles (autotag.profiles) allow only tags of a vocabulary that is empty, so their images get no tags.', v_empty),
    'autotag vocabulary import tags.csv --workspace …   (or: autotag profile set --vocabulary-mode prefer)')) end;
end $$;

-- Whether the adapter's functions fit the host's tables, and whether rows name the right files. sample: as in sample_image().
create or replace function autotag.diagnose_host(out findings jsonb, out sample jsonb)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform from autotag.describe_assets(array[null]::autotag.asset_id[]);
  perform autotag.caller();
  perform autotag.is_member(null);
  perform from autotag.tagged_assets(null, 1);
  sample := autotag.sample_image();
  findings := jsonb_build_array(
    autotag.finding('host adapter', 'ok', 'The adapter''s functions fit the host''s tables.'),
    autotag.diagnose_rules(), autotag.diagnose_rows(), autotag.diagnose_files())
    || autotag.diagnose_stored() || autotag.diagnose_vocabulary();
exception when others then
  findings := jsonb_build_array(autotag.finding('host adapter', 'error',
    'The adapter does not fit the host''s tables: ' || sqlerrm,
    'Correct autotag.is_member, autotag.describe_assets, autotag.store_tags and autotag.show_stage.'));
end $$;
