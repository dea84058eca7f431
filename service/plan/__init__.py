"""`python -m service plan`: what to expect of a network under load, without serving it.

The very scheduler, core and budget controller that serve run here under a virtual clock; only the stages are replaced,
by the times that they take and the scores that held-out images got.
"""
