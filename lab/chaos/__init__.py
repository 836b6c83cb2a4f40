"""Workers that are killed, a provider that fails, a database that restarts; and an auditor who compares the books.

`doomed` is a worker that dies at a point it was told, `run` keeps such workers busy and dying, and `auditor` holds
OpenAI's book, the database's and the clients' against each other.
"""
