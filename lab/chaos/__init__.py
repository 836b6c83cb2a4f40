"""Kills workers, makes the provider fail and restarts the database; then an auditor compares all records.

`doomed` makes a worker die at a certain point, `forks` starts such workers quickly, `run` runs rounds of them, `soak`
is one long run, and `auditor` compares the records of OpenAI, the database and the clients.
"""
