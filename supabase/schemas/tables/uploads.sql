-- Automatic mode: no call of enqueue_tagging is needed. New rows of the host's images are collected per workspace and
-- uploader, and become one job when no row has come for a while: a client that inserts 300 rows one by one still gets one
-- `batch-parallel` upload.
--
--   insert ─► autotag_collect (adapter) ─► collect(): uploads + arrivals ─► claim() ─► seal_upload() ─► a job

-- An upload whose images are still coming in.
create table autotag.uploads (
  id bigint generated always as identity primary key,
  workspace_id uuid not null,
  user_id uuid,                          -- the uploader; null: the service role
  first_at timestamptz not null,
  seal_at timestamptz not null,
  postponed boolean not null default false   -- it was complete, and there was no room for it: seal_at is when to look again
);
create unique index uploads_key on autotag.uploads (workspace_id, user_id) nulls not distinct;
create index uploads_seal_at_idx on autotag.uploads (seal_at);
create index uploads_user_idx on autotag.uploads (user_id, seal_at);
alter table autotag.uploads enable row level security;

create table autotag.arrivals (
  id bigint generated always as identity primary key,
  upload_id bigint not null references autotag.uploads on delete cascade,
  asset_id uuid not null
);
create index arrivals_upload_id_idx on autotag.arrivals (upload_id, id);
alter table autotag.arrivals enable row level security;
