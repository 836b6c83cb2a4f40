-- The kinds of error and their consequences. Python has the same table (autotag/errors.py); a test compares them.
-- A kind that is not in this table is treated as transient: an unknown error neither fails an image at once nor makes it
-- retry forever.
create table autotag.error_kinds (
  kind text primary key,
  counts boolean not null,               -- counts as a failure of its image, which fails for good after max_failures
  delays boolean not null,               -- the image waits before its next try: longer each time, or as long as the error asks
  pauses boolean not null,               -- tagging pauses until one image (the probe) succeeds
  ends boolean not null,                 -- the image fails, unless the error says that another answer may help
  meaning text not null,
  -- codes whose cause may be this image (for example, it is too large, and a smaller one would be accepted), so they count as its
  -- failures
  suspects text[] not null default '{}'
);
alter table autotag.error_kinds enable row level security;
