"""`python -m service plan`: predicts a network's performance under load, without serving it.

The server's own scheduler, core and budget controller run under a virtual clock. Only the stages are replaced: by their
measured times, and by the scores of held-out images.
"""
