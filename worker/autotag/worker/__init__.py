"""One worker process: single calls, batches, and what wakes both."""
