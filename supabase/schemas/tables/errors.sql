-- The kinds of error, and what follows from each. Python has the same table (autotag/errors.py); a test compares them.
-- A kind that is not here counts as transient, so that what nobody knows can neither fail an image at once nor be tried
-- for ever.
create table autotag.error_kinds (
  kind text primary key,
  counts boolean not null,               -- each one counts as a failure of its image, which ends after max_failures
  delays boolean not null,               -- the image waits before its next try, longer each time (or as long as was asked)
  pauses boolean not null,               -- nothing is tagged until one image that tries succeeds
  ends boolean not null,                 -- the image ends as failed, unless the error says that another answer may help
  meaning text not null,
  -- codes with which it may be the image's after all (it is too large, and a smaller one would pass): these count, too
  suspects text[] not null default '{}'
);
alter table autotag.error_kinds enable row level security;
