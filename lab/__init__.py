"""A local stack that replaces Supabase and OpenAI for the demo and the tests. No wheel contains it.

`postgres` runs a temporary Postgres server, `edge` implements the parts of Supabase's HTTP and WebSocket interface that
autotag and its clients use, `openai_sim` simulates OpenAI, `pictures` draws pictures whose correct tags are known, and
`stack` starts all of them. `schema` and `release` generate the migrations.
"""
