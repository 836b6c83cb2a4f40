-- Another schema, words of SQL and umlauts as names.
create schema "Büro";
create table "Büro"."user" ("order" uuid, "select" uuid, primary key ("order", "select"));
create table "Büro"."table" ("größe" uuid primary key, "order" uuid not null, "Pfad zur Datei" text, "from" text[]);
insert into "Büro"."user" values ('{w1}', '{u1}'), ('{w2}', '{u2}');
insert into "Büro"."table" values ('{i1}', '{w1}', '{w1}/ä.jpg'), ('{i2}', '{w2}', '{w2}/b.jpg');
