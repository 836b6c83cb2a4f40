"""``python -m autotag``."""

from autotag.cli import app

app()
