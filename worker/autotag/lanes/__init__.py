"""The two ways to a tag: single calls (`realtime`) and OpenAI Batches (`batch`)."""
