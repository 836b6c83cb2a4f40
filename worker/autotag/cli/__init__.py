"""The command ``autotag``: one module for each of its commands.

`app` assembles them. `options` has the options and settings that they share, `errors` their messages and exit codes,
`console` how they print, `questions` what ``init`` and ``migrate`` ask, and `screen` the tables of ``status``.
"""
