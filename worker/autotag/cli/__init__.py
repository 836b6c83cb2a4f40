"""The command ``autotag``: one module for each of its commands.

`app` assembles them. `options` has shared options and settings, `errors` has messages and exit codes, `console` prints,
`questions` asks the questions of ``init`` and ``migrate``, and `screen` makes the tables of ``status``.
"""
