"""What an image may cost: the number an operator sets, the ledger that keeps it, the thresholds that aim at it.

Plain Python over numbers: no clock, no thread, no array.
"""
