-- Workers and their leases: what a worker holds goes back when its heart stops.

-- A worker's heartbeat is the lease of everything it holds: when it stops, all of that goes back.
create table autotag.workers (
  id uuid primary key,
  host text not null,
  version text not null,
  listening boolean not null default true,   -- false: behind a transaction pooler, polls
  started_at timestamptz not null,
  seen_at timestamptz not null,
  lease_until timestamptz not null,
  unsent integer not null default 0,         -- calls released to it that it has not sent yet
  base_url text,                             -- of the provider that it asks …
  fingerprint text,                          -- … and what stands for that and its key
  look_at timestamptz,                       -- when it was handed a look at the provider last (claim_batches)
  login name not null default session_user   -- whose it is: nobody else acts for it
) with (fillfactor = 50);
create index workers_lease_until_idx on autotag.workers (lease_until);
create index workers_login_idx on autotag.workers (login);
alter table autotag.workers enable row level security;
