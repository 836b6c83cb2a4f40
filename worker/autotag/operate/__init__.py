"""The work behind two commands of an operator: `backfill` for ``autotag enqueue``, `follow` for ``autotag watch``."""
