"""Stages as CUDA graphs, with the state of rows in slots on the device. Imports torch; see `docs/gpu.md`.

network.py   rebuilds a bundle's network and lowers it: BatchNorm folded, channels-last, half precision
exact_images.py, rounding.py   images that half precision holds exactly; rounding weights with the least error
joined.py    a convolution, its bias and its ReLU in one kernel; small_conv.py: a custom kernel for few channels
widening.py  pads channels to multiples of eight
replaced.py  concatenation and max pooling by custom kernels
growing.py   maps that grow layer by layer without being copied
kernels.py   how the custom kernels are called; kernel_sources.py: their source; kernel_making.py: makes and checks them
memory.py    the values that rows keep in their slots
scoring.py   class, confidence and score of each row, computed on the device
resize.py    scales images of any size to the network's
device.py    streams: CUDA's with graphs, and the host's, on which programs run directly
lane.py      runs one batch at a time: buffers, and a program per stage and bucket
compiling.py compiled stages, used where they are faster
runner.py    the runner
"""

import os

# Torch's threads copy pictures. While they wait for more, they spin by default, on cores that the engine and its lanes
# need. The variable is read when torch is loaded, so it is set here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
