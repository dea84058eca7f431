"""Benchmarks of engine and service. Ratios compare interleaved runs of one session; every table names its images."""
