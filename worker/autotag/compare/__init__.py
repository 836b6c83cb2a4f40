"""``autotag compare``: another model asked about images that have their tags.

`ask` asks under the database's limits, `figures` counts what the answers come to, `page` shows them picture by picture,
and `command` is what an operator calls.
"""
