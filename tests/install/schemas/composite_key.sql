-- The key of an image is (org_id, id): neither column is unique by itself.
create table public.org_members (org_id uuid, user_id uuid, primary key (org_id, user_id));
insert into public.org_members values ('{w1}', '{u1}');
create table public.assets (org_id uuid, id uuid, storage_path text, tags text[], primary key (org_id, id));
insert into public.assets values ('{w1}', '{i1}', '{w1}/a.jpg'), ('{w1}', '{i2}', '{w1}/b.jpg');
