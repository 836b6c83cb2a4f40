-- Each user has photos of their own, as in Supabase's first tutorials.
create table public.photos (id uuid primary key, user_id uuid not null references auth.users default auth.uid(), file_path text, tags text[]);
alter table public.photos enable row level security;
create policy "own photos" on public.photos to authenticated using ((select auth.uid()) = user_id);
insert into public.photos values ('{i1}', '{u1}', '{u1}/a.jpg'), ('{i2}', '{u2}', '{u2}/b.jpg');
