"""`scripts/bench NAME`: each measures ratios in one run, because a machine's speed drifts and a ratio does not.

A module for each name that `scripts/bench --help` lists. What they are compared with: `bound` (the fastest that limits
allow), `peers` and `litellm_peer` (other limiters), `queue_peers` (other queues), `batch_plain` (a batch by hand).
"""
