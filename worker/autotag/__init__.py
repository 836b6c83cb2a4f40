"""autotag: every image of a Supabase project gets its tags.

The database decides and this package does: it asks Postgres for work (`db`), fetches and shrinks images
(`images`), calls OpenAI (`openai`) one by one or in batches (`worker`), and reports back in bulk.
"""

__version__ = "0.1.0"
