"""Everything that is said to the AI provider and read from it, as types of our own."""
