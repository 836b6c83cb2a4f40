"""Requests to the AI provider and its replies, as types of this package."""
