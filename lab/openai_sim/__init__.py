"""A simulator of OpenAI's API: chat completions, files and batches, with configurable limits, latencies and failures.

It decodes each picture and derives the tags from its pixels (`vision`), so a test can prove that a picture's tags
reached the right row. It records every request (`Simulator.request_log`), so tests check the product against the
provider's record. It computes tokens and prices independently of the product (`models`). A `plan` says how the account
and the server differ from OpenAI's tier 1; a test may change it while the server runs.
"""
