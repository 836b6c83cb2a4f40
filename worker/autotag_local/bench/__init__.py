"""`scripts/bench NAME`: each measures ratios in one run, because a machine's speed drifts and a ratio does not.

`makespan`, `limiter`, `growth`; what they are compared with is in `peers`.
"""
