"""The HTTP edge of Supabase, as far as autotag and its clients use it.

True to recordings of the real servers; what is not supported is refused with 501 and the feature's name.
"""
