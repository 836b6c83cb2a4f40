-- The types in which what workers report travels between functions.

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

-- What a look at OpenAI has shown of one batch.
create type autotag.batch_look as (
  id text,                     -- OpenAI's
  status text,
  output_file_id text,
  error_file_id text,
  total integer,               -- lines …
  done integer,                -- … of which so many are answered or failed
  error_code text,
  error text,
  error_kind text
);
