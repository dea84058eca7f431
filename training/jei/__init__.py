"""JEI-DNN (ICLR 2024): alternately trains gates, which decide who exits, and the last layers of a frozen network.

inputs       the inputs of the heads' last layers for every image: computed once, then cached
gates        the gates' targets and class weights, and fitting them
heads        the last layers of the heads: their loss, optimiser and batches
alternation  the alternation of the two, and which turn of it is kept
run          makes a calibrated run with gates from an evaluated run; it is evaluated and exported as any other
report       the gated run beside the run it was made from
"""
