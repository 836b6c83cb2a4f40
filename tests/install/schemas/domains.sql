create domain public.ulid as uuid;
create domain public.label_list as text[];
create table public.members (workspace_id public.ulid, user_id uuid, primary key (workspace_id, user_id));
create table public.assets (id public.ulid primary key, workspace_id public.ulid not null, storage_path text, tags text[]);
insert into public.members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
insert into public.assets values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
