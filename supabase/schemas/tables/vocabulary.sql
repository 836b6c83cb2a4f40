-- The tags that a workspace uses, in its own words. A model's tags are matched with the vocabulary when they are stored (match_tags).

--   insert into autotag.vocabulary (tag, aliases, parent) values ('cat', '{kitty, pussycat}', 'animal');
-- Two triggers clean what comes in and refuse what would be ambiguous (vocabulary/words.sql).
create table autotag.vocabulary (
  id bigint generated always as identity primary key,
  workspace_id autotag.workspace_id,     -- null: all workspaces; a workspace's own entry replaces the general one with its name
  tag text not null check (length(tag) between 1 and 50),      -- as images get it
  key text collate "C" not null,         -- tag_key(tag): what is compared
  aliases text[] not null default '{}',  -- other names of it
  description text check (length(description) between 1 and 500),   -- for the model, where the tag says too little
  parent text check (length(parent) between 1 and 50),   -- the tag above it …
  parent_key text collate "C",           -- … and its key
  uses bigint not null default 0 check (uses >= 0)   -- images that have it, when they were last counted (count_uses)
);
create unique index vocabulary_key on autotag.vocabulary (workspace_id, key) nulls not distinct;
create index vocabulary_uses_idx on autotag.vocabulary (workspace_id, uses desc, key);
alter table autotag.vocabulary enable row level security;

-- Every name of every entry: its tag and its aliases. Because of the unique index, a name has one tag.
create table autotag.vocabulary_names (
  id bigint generated always as identity primary key,
  vocabulary_id bigint not null references autotag.vocabulary on delete cascade,
  workspace_id autotag.workspace_id,     -- of the entry
  key text collate "C" not null
);
create unique index vocabulary_names_key on autotag.vocabulary_names (workspace_id, key) nulls not distinct;
create index vocabulary_names_entry_idx on autotag.vocabulary_names (vocabulary_id);
alter table autotag.vocabulary_names enable row level security;

-- A tag of a model that the vocabulary knows.
create type autotag.known_tag as (
  given text,                  -- as the model gave it
  id bigint                    -- of the entry
);

-- An entry, and one above it. depth: 1 is the parent.
create type autotag.ancestor as (id bigint, above bigint, depth integer);

-- An entry as it will be stored (read_entries).
create type autotag.vocabulary_entry as (key text, tag text, aliases text[], description text, parent text, uses bigint);
