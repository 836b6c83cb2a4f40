"""Asks another model about images that have tags (``autotag compare``).

`ask` makes the calls within the database's limits, `figures` summarises the answers, and `page` shows them for each
image.
"""
