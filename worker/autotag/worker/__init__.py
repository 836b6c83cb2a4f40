"""One worker process: the lanes for single calls and batches, heartbeat, reports, and shutdown."""
