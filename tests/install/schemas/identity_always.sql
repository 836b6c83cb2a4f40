-- Identity columns that take no value from a client, and an integer for the team.
create table public.teams (id integer generated always as identity primary key, name text);
insert into public.teams (name) values ('a'), ('b');
create table public.team_members (team_id integer references public.teams, user_id uuid references auth.users, primary key (team_id, user_id));
insert into public.team_members values (1, '{u1}'), (2, '{u2}');
create table public.images (
  id bigint generated always as identity primary key, team_id integer not null references public.teams, storage_path text, tags text[]);
insert into public.images (team_id, storage_path) values (1, '1/a.jpg'), (2, '2/b.jpg');
