-- Prisma with @db.Uuid: quoted names in camel case, singular tables.
create table public."Workspace" (id uuid primary key, name text not null default '');
create table public."WorkspaceMember" (
  "workspaceId" uuid not null references public."Workspace", "userId" uuid not null, "createdAt" timestamp(3) not null default current_timestamp,
  primary key ("workspaceId", "userId"));
create table public."Asset" (id uuid primary key, "workspaceId" uuid not null references public."Workspace", "storagePath" text, tags text[]);
insert into public."Workspace" values ('{w1}'), ('{w2}');
insert into public."WorkspaceMember" values ('{w1}', '{u1}'), ('{w2}', '{u2}');
insert into public."Asset" values ('{i1}', '{w1}', '{w1}/a.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
