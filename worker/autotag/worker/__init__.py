"""One worker process: its lanes, heartbeat, reports, and shutdown."""
