"""Engines that run the stages of a bundle, behind one contract (`base.Runner`): same calls, same answers."""
