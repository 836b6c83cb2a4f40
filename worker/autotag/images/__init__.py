"""Fetches images from Storage and URLs, and prepares them for the model."""
