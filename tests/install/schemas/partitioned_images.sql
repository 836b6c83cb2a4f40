create table public.members (workspace_id uuid, user_id uuid, primary key (workspace_id, user_id));
create table public.assets (id uuid, workspace_id uuid not null, created_at date not null default '2026-01-01', storage_path text, tags text[],
  primary key (id, created_at)) partition by range (created_at);
create table public.assets_2026 partition of public.assets for values from ('2026-01-01') to ('2027-01-01');
