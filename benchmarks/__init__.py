"""What is timed and counted: one registry (registry.py), one command (`python -m benchmarks`), one format (report.py).

test_ops.py is beside them for work on an op: pytest-benchmark, a small call of each.
"""
