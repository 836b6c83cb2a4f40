-- Like Basejump: its tables are in a schema of their own.
create schema basejump;
create type basejump.account_role as enum ('owner', 'member');
create table basejump.accounts (id uuid primary key, slug text);
create table basejump.account_user (
  user_id uuid references auth.users on delete cascade not null, account_id uuid references basejump.accounts on delete cascade not null,
  account_role basejump.account_role not null, constraint account_user_pkey primary key (user_id, account_id));
create table public.assets (id uuid primary key, account_id uuid not null references basejump.accounts, image_url text, tags text[]);
insert into basejump.accounts values ('{w1}'), ('{w2}');
insert into basejump.account_user values ('{u1}', '{w1}', 'owner'), ('{u2}', '{w2}', 'member');
insert into public.assets values ('{i1}', '{w1}', 'https://img.example.com/a.jpg'), ('{i2}', '{w2}', 'https://img.example.com/b.jpg');
