"""A worker's HTTP ports: health, metrics and OpenAI's webhook. Untrusted clients may reach them."""
