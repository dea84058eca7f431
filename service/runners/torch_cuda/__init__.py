"""Stages as CUDA graphs, and what rows carry between them in slots on the device. Imports torch; see `docs/gpu.md`.

network.py   a bundle's network, rebuilt and lowered: normalisation folded, channels-last, half precision
exact_images.py, rounding.py   what half precision need not round, and weights that it rounds best
joined.py    a convolution, its bias and its ReLU in one kernel; small_conv.py: of few channels by one of our own
widening.py  channels to multiples of eight
replaced.py  parts of a stage whose work the device's own kernels do
growing.py   maps that grow layer by layer without being copied
kernels.py   the device's own kernels: how each is called; kernel_sources.py: their text; kernel_making.py: checked
memory.py    slots, and the values that rows keep in them
scoring.py   what an exit says of a row, worked out on the device
resize.py    pictures of many sizes to the network's
device.py    streams: CUDA's with graphs, and the host's, on which the same programs run as they are
lane.py      one batch at a time: buffers, and a program a stage and bucket
compiling.py stages as compilers make them, where they are faster
runner.py    the runner
"""

import os

# Torch's threads copy pictures, and wait for more. By default they do that by running in circles, on the cores that the
# engine and its lanes need. Read as torch is loaded, so it is said before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
