"""The parts of Supabase's HTTP and WebSocket interface that autotag and its clients use.

Responses match recordings of the real servers. Anything else gets a 501 that names the unsupported feature.
"""
