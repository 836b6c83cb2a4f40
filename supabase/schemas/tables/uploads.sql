-- Automatic mode: nobody has to call enqueue_tagging. New rows of the host's assets are collected per
-- workspace and uploader, and sealed into one job when nothing has come for a while, so that a client that
-- inserts 300 rows one by one still gets one `batch-parallel` upload.
--
--   insert ─► autotag_collect (adapter) ─► collect(): uploads + arrivals ─► claim() ─► seal_upload() ─► a job

-- An upload that is still coming in.
create table autotag.uploads (
  id bigint generated always as identity primary key,
  workspace_id uuid not null,
  user_id uuid,                          -- who uploads; null for the service role
  first_at timestamptz not null,
  seal_at timestamptz not null
);
create unique index uploads_key on autotag.uploads (workspace_id, user_id) nulls not distinct;
create index uploads_seal_at_idx on autotag.uploads (seal_at);
alter table autotag.uploads enable row level security;

create table autotag.arrivals (
  id bigint generated always as identity primary key,
  upload_id bigint not null references autotag.uploads on delete cascade,
  asset_id uuid not null
);
create index arrivals_upload_id_idx on autotag.arrivals (upload_id, id);
alter table autotag.arrivals enable row level security;
