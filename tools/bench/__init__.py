"""Benchmarks. What is timed has first been compared with float64, and everything else in a table is of the same run."""
