"""The work behind an operator's commands, for example `backfill` for ``autotag enqueue``, `follow` for ``autotag
watch``."""
