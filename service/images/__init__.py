"""From the bytes that a client sends to the pixels a network reads, and what such bytes may not do meanwhile."""
