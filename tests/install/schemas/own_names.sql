-- Members with names of their own.
create table public.teams (team uuid primary key);
create table public.crew (squad uuid references public.teams, person uuid references auth.users, primary key (squad, person));
create table public.pictures (id uuid primary key, team_id uuid not null references public.teams, storage_path text, tags text[]);
insert into public.teams values ('{w1}'), ('{w2}');
insert into public.crew values ('{w1}', '{u1}'), ('{w2}', '{u2}');
insert into public.pictures values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
