-- Workers and their leases. One heartbeat extends the lease on everything that the worker holds; when the lease ends, all
-- of it is released.
create table autotag.workers (
  id uuid primary key,
  host text not null,
  version text not null,
  listening boolean not null default true,   -- false: polls, because it is behind a transaction pooler
  started_at timestamptz not null,
  last_heartbeat_at timestamptz not null,
  lease_until timestamptz not null,
  resumed_at timestamptz not null default '-infinity',   -- when it sent the first heartbeat after a time without any (can_expire)
  unsent integer not null default 0,         -- calls released to it that it has not sent yet …
  unsent_extra bigint not null default 0,    -- … and the tokens that they reserve beyond the usual
  claim integer not null default 0,          -- number of its last claim, and of its last claim of batches; the worker counts them
  batch_claim integer not null default 0,
  base_url text,                             -- the provider's address that it calls …
  fingerprint text,                          -- … and the hash of that address and its key
  poll_assigned_at timestamptz,              -- when it was last assigned a poll of the provider (claim_batches)
  login name not null default session_user   -- the login that registered it: no other login may act for it
) with (fillfactor = 50);
create index workers_lease_until_idx on autotag.workers (lease_until);
create index workers_login_idx on autotag.workers (login);
alter table autotag.workers enable row level security;
