"""An open-loop load generator for HTTP servers that classify images: `python -m benchmarks.load --help`."""
