"""Benchmarks: one module for each command of `scripts/bench`.

Most figures are ratios of two measurements in the same run, because the speed of a machine drifts. The baselines are
`bound` (the theoretical minimum under the limits), `peers` and `litellm_peer` (other rate limiters), `queue_peers`
(other queues) and `batch_plain` (a plain script for a batch).
"""
