"""Benchmarks of the harness itself: what a part costs, measured and printed as a table."""
