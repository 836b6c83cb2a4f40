-- Clerk: organisations and users are texts from its tokens.
create table public.organization_members (org_id text, user_id text, primary key (org_id, user_id));
insert into public.organization_members values ('org_1', 'user_2abc'), ('org_2', 'user_2xyz');
create table public.assets (id uuid primary key, org_id text not null, image_url text, tags text[]);
insert into public.assets values ('{i1}', 'org_1', 'https://img.example.com/a.jpg'), ('{i2}', 'org_2', 'https://img.example.com/b.jpg');
