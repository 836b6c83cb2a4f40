-- Automatic mode: no call of enqueue_tagging is needed. New rows of the host's images are collected per workspace and
-- uploader, and become one job when no row has come for a while: a client that inserts 300 rows one by one still gets one
-- `batch-parallel` upload.
--
--   insert ─► autotag_collect (adapter) ─► collect(): arrivals ─► seal_uploads(): a job, or a postponed upload
--
-- The host's transaction only adds rows to arrivals. It shares no row and no key with another transaction, so no insert waits for
-- another one. The arrivals of an upload show when it is complete (list_uploads).

-- A new image that has no job yet. Rows are not unique: an image that comes twice is tagged once (start_upload).
create table autotag.arrivals (
  id bigint generated always as identity primary key,
  asset_id autotag.asset_id not null,
  workspace_id autotag.workspace_id not null,
  -- the signed-in user; nobody(): the service role, or a token that names nobody. Not null, so that indexes compare it.
  uploader autotag.user_id not null,
  arrived_at timestamptz not null,       -- when the row was inserted; it may be old when its transaction commits
  upload_id bigint                       -- the postponed upload that it waits in; null: its upload may still grow
) with (fillfactor = 90);
-- There is no foreign key, because its trigger would slow down each insert of the host. housekeeping() repairs rows whose upload is gone.
create index arrivals_new_idx on autotag.arrivals (workspace_id, uploader, arrived_at) where upload_id is null;
create index arrivals_upload_idx on autotag.arrivals (upload_id, id) where upload_id is not null;
alter table autotag.arrivals enable row level security;

-- A complete upload that cannot become a job yet. Several may belong to one workspace and uploader; they are sealed together.
create table autotag.uploads (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id not null,
  uploader autotag.user_id not null,
  seal_at timestamptz not null,                          -- when to try again
  failures integer not null default 0 check (failures >= 0)   -- attempts that raised; 0: it waits for room
);
create index uploads_key_idx on autotag.uploads (workspace_id, uploader);
create index uploads_seal_at_idx on autotag.uploads (seal_at);
alter table autotag.uploads enable row level security;

-- The pictures of an upload: a hash of id and location of each image. enqueue_tagging compares them, so that an image whose tags were
-- stored a moment ago is not tagged again (repeat_window). That takes 8 bytes per image, and no write when the image is tagged.
create table autotag.pictures (
  job_id uuid primary key references autotag.jobs on delete cascade,
  workspace_id autotag.workspace_id not null,
  marks bigint[] not null
);
alter table autotag.pictures alter column marks set storage external;   -- hashes do not shrink
alter table autotag.pictures enable row level security;
