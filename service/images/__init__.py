"""Decodes image files that clients send to the pixels that a network reads, with limits on what decoding may cost."""
