"""An OpenAI-shaped server: chat completions, files, batches; limits, latencies and failures as configured.

It opens the picture it is sent and derives tags from its pixels (`vision`), so that a test can prove that the
right picture's tags reached the right row, and it records every request (`book`), so that tests judge by the
provider's book and not by our own. Tokens and prices are its own too (`models`). A `plan` says how the account and
the server differ from OpenAI's tier 1; a test may change it while the server runs.
"""
