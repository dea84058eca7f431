"""JEI-DNN (ICLR 2024): the last layers of a frozen network's heads, and gates that say who leaves, trained in turns.

inputs       what every head's last layer reads of every image, seen once and kept
gates        the exit model, what a gate is to say, and the fit that makes it say so
heads        the loss and the steps of the last layers
alternation  gates and heads in turns; which of them is kept
run          a calibrated run in, a calibrated run out, which is evaluated and exported as any other
report       what came of it, beside the run it started from
"""
