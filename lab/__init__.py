"""What stands in on a machine that has neither Supabase nor an OpenAI key.

For development and tests only, and never shipped: an embedded Postgres (`postgres`), the parts of Supabase's HTTP and
websocket edge that autotag and its clients use (`edge`), an OpenAI simulator (`openai_sim`), pictures whose tags are
knowable (`pictures`), and the stack that starts them together (`stack`). `schema` and `release` make the migrations.
"""
