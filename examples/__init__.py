"""Networks of one's own, from a PyTorch module to a running server."""
