"""Serves a bundle: HTTP, the engine, and the compute budget.

This package imports `models`, never `training`. Scheduler and budget are plain Python over numbers, so that their
rules can be tested under a virtual clock. The ONNX runner needs no torch.
"""
