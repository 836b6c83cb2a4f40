-- Prisma's defaults: text keys (cuid), quoted names in camel case, the id of the user of Supabase as text.
create table public."Workspace" (id text primary key, name text not null);
create table public."User" (id text primary key, email text not null);
create table public."WorkspaceMember" (
  "workspaceId" text not null references public."Workspace", "userId" text not null, role text not null default 'member',
  constraint "WorkspaceMember_pkey" primary key ("workspaceId", "userId"));
create table public."Asset" (
  id text not null, "workspaceId" text not null references public."Workspace", "storagePath" text, tags text[], "createdAt" timestamp(3) not null default current_timestamp,
  constraint "Asset_pkey" primary key (id));
insert into public."Workspace" values ('cw1', 'a'), ('cw2', 'b');
insert into public."WorkspaceMember" values ('cw1', '{u1}'), ('cw2', '{u2}');
insert into public."Asset" values ('ci1', 'cw1', 'cw1/a.jpg'), ('ci2', 'cw2', 'cw2/b.jpg');
