-- Firebase: no organisations; the owner is the uid of Firebase.
create table public.photos (id uuid primary key, owner_id text not null, image_url text, tags text[]);
insert into public.photos values ('{i1}', 'Fb1kQ', 'https://img.example.com/a.jpg'), ('{i2}', 'Fb2zW', 'https://img.example.com/b.jpg');
