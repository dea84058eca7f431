"""Runs images stage by stage: one thread owns every row, regroups batches at exits, asks the budget who leaves."""
