"""Compares this service with servers in common use: `python -m benchmarks.league --help`."""
