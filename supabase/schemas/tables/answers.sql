-- The types that carry results and errors between functions.

-- The answer about one image, or the error instead of one, with what the other functions need of its task.
create type autotag.answer as (
  task bigint,
  attempt integer,
  job_id uuid,
  workspace_id autotag.workspace_id,
  reserved_at timestamptz,     -- single calls: settle() needs these two to correct the reservation
  reserved_tokens integer,
  output_tokens integer,       -- the cap of the answer, as it was requested
  result jsonb,                -- {tags: [tag, …], confidence: {tag: 0 to 1}, caption, model}, and image: clean_image_notes()
  error jsonb,                 -- {kind, code, message, retry, retry_after, origin, parameter}
  usage jsonb,                 -- as clean_usage() returns it; null: the provider gave no figures
  called boolean,              -- whether the call was sent
  mark uuid,                   -- of the picture that the model saw (describe_assets); null: not known
  asset_id autotag.asset_id,
  brief_id bigint              -- what its job is asked (autotag.briefs); null: the question alone
);

-- The state of one batch, as a poll of OpenAI showed it.
create type autotag.batch_poll as (
  id text,                     -- OpenAI's
  status text,
  output_file_id text,
  error_file_id text,
  total integer,               -- lines of the batch
  done integer,                -- lines that are answered or have failed
  error_code text,
  error text,
  error_kind text
);
