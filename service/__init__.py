"""Serves a bundle: the HTTP face, the engine behind it, and the budget that the operator sets.

This room imports `models` and never `training`. Scheduler and budget are plain Python over numbers, so that their
rules can be tested under a virtual clock; the ONNX path needs no torch.
"""
