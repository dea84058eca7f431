"""The compute budget: the target that an operator sets, the ledger that enforces it, the steering that aims at it.

Plain Python over numbers: no clock, no thread, no array.
"""
