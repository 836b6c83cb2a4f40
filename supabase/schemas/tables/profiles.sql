-- What a workspace wants asked about its images.

-- A version of a profile. A change inserts a new version (save_profile), so a row that was read never has to be read again.
-- check_profile() refuses versions that no request could ask, also in your own inserts. All workspaces share one sequence of versions.
-- So list_assets() can tell by the version in tagging_result whether an image was tagged with its workspace's present profile, even if
-- the image has moved from another workspace.
create sequence autotag.profile_versions as integer;
create table autotag.profiles (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id,     -- null: all workspaces that have none of their own
  version integer not null default nextval('autotag.profile_versions') check (version > 0),
  instructions text not null default '' check (length(instructions) <= 2000),   -- in the owner's words
  -- the language of tags and caption, in plain words; null: tags as settings.tag_language says, and the caption as the model likes
  language text check (length(language) between 1 and 100),
  tag_count integer check (tag_count between 1 and 50),   -- null: settings.max_tags
  min_confidence real not null default 0 check (min_confidence between 0 and 1),   -- less sure tags are not stored
  vocabulary_mode text not null default 'open' check (vocabulary_mode in ('open', 'prefer', 'only')),
  add_parents boolean not null default false,   -- stores the vocabulary's parents of a tag, too
  -- what else the model says about each image: [{name, kind, values (of an enum), description}]
  fields jsonb not null default '[]',
  created_at timestamptz not null
);
create unique index profiles_key on autotag.profiles (workspace_id, version) nulls not distinct;
alter table autotag.profiles enable row level security;

-- What the images of an upload are asked beside the question: a version of a profile, and the vocabulary of that moment. A job has one
-- brief, so all its images are asked the same, and the answers of a batch are read by what was asked. A job without a brief is asked
-- the question alone. Workers read a brief once.
create table autotag.briefs (
  id bigint generated always as identity primary key,
  profile_id bigint not null,
  vocabulary jsonb not null,             -- tags for the prompt; [] where the mode is open
  tag_count integer,                     -- of its profile
  extra_prompt integer not null,         -- first guess of the tokens that it adds to a prompt …
  extra_output integer not null,         -- … and to an answer, beside its number of tags
  -- What one image reserves and uses on average (as in provider_limits), and the version of the question for which this was estimated.
  -- Only the transaction that holds the provider row updates a brief.
  question_version bigint not null default -1,
  tokens_per_image integer not null,
  output_tokens integer not null,
  prompt_mean integer not null,
  output_mean integer not null,
  created_at timestamptz not null
) with (fillfactor = 50);
-- This index is not unique: two first uploads may each insert a brief, so that neither waits for the other's transaction.
create index briefs_profile_idx on autotag.briefs (profile_id, md5(vocabulary::text));
alter table autotag.briefs enable row level security;
