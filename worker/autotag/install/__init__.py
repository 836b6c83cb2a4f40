"""Installs autotag into a project.

`survey` looks at the project: `facts` reads its database, `host` finds its tables, and `files` finds its file rule.
`adapter` writes the host adapter, and `migrations` writes or applies the migrations. Apart from `db`, only this package
contains SQL, because there is no function to call before the migrations are applied.
"""
