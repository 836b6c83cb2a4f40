"""The checks of ``autotag doctor``.

`examine` runs all of them, `provider` those of the AI provider, and `findings` has their results.
"""
