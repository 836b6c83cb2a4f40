"""Installing autotag into a project: what its tables look like, the adapter that fits them, the migrations.

Only here and in `db` is SQL outside the migrations: before they are applied there is no function to call.
"""
