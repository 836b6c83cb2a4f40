-- Two kinds of teams: the members belong to teams of the other kind.
create table public.teams (id uuid primary key);
create table public.sport_teams (id uuid primary key);
create table public.team_members (team_id uuid references public.sport_teams, user_id uuid, primary key (team_id, user_id));
create table public.images (id uuid primary key, team_id uuid not null references public.teams, storage_path text, tags text[]);
insert into public.teams values ('{w1}');
insert into public.sport_teams values ('{w1}');
insert into public.team_members values ('{w1}', '{u2}');
insert into public.images values ('{i1}', '{w1}', '{w1}/a.jpg');
