"""This service beside the servers people use today: `python -m benchmarks.league --help`."""
