-- Like MakerKit's starter: accounts, and memberships with a role.
create table public.accounts (id uuid primary key, name varchar(255), is_personal_account boolean not null default false);
create table public.roles (name varchar(50) primary key, hierarchy_level int not null);
create table public.accounts_memberships (
  user_id uuid references auth.users not null, account_id uuid references public.accounts not null, account_role varchar(50) references public.roles not null,
  created_at timestamptz default current_timestamp not null, updated_at timestamptz default current_timestamp not null, created_by uuid references auth.users,
  updated_by uuid references auth.users, primary key (user_id, account_id));
create table public.invitations (id serial primary key, email varchar(255), account_id uuid references public.accounts, invited_by uuid references auth.users);
create table public.images (id uuid primary key, account_id uuid not null references public.accounts, storage_path text, tags text[]);
insert into public.accounts values ('{w1}'), ('{w2}');
insert into public.roles values ('owner', 1);
insert into public.accounts_memberships (user_id, account_id, account_role) values ('{u1}', '{w1}', 'owner'), ('{u2}', '{w2}', 'owner');
insert into public.images values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
