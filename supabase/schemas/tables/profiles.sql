-- What a workspace wants asked about its images.

-- A version of a profile. A change inserts a new version (save_profile), so that whoever has read a row never has to read it again.
-- check_profile() refuses what no request could ask, also in your own inserts. Versions only grow: a workspace's first own version is
-- higher than that of the profile for all that held before.
create table autotag.profiles (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id,     -- null: all workspaces without an own profile
  version integer not null check (version > 0),
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
