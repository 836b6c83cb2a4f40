"""Workers that are killed, a provider that fails, a database that restarts; and an auditor who compares the books.

`doomed` makes a worker die at a point, `forks` starts such workers quickly, `run` keeps them busy and dying, `soak`
goes on for long, and `auditor` compares OpenAI's book, the database's and the clients'.
"""
