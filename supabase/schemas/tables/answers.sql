-- The type in which outcomes travel between functions.

-- An answer about one image, or why there is none (error), with what is known of its task.
create type autotag.answer as (
  task bigint,
  attempt integer,
  job_id uuid,
  workspace_id uuid,
  reserved_at timestamptz,     -- single calls: what settle() needs to correct the reservation
  reserved_tokens integer,
  output_tokens integer,       -- the cap of the answer that was asked for
  result jsonb,                -- {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model}
  error jsonb,                 -- {kind, code, message, retry, retry_after, origin, parameter}
  usage jsonb,                 -- as clean_usage() makes it, whenever the provider answered
  called boolean               -- whether it was asked at all
);
