"""The command ``autotag``: one file for each of its commands."""
