"""What is timed and counted: one registry (registry.py), one command (`python -m benchmarks`), one format
(report.py)."""
