"""Benchmarks. Only what has passed a comparison with float64 is timed, and all numbers of a table are from one run."""
