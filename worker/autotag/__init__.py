"""autotag tags every image of a Supabase project.

The database decides; this package does the I/O. It claims work from Postgres (`db`), fetches and shrinks images
(`images`), calls OpenAI (`openai`) with single calls or batches (`worker`), and reports in bulk.
"""

__version__ = "0.1.0"
