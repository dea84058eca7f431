"""Stages as CUDA graphs, and what rows carry between them in slots on the device. Imports torch; see `docs/gpu.md`.

network.py   a bundle's network, rebuilt and lowered: normalisation folded, channels-last, half precision
memory.py    slots, and the values that rows keep in them
scoring.py   what an exit says of a row, worked out on the device
device.py    streams: CUDA's with graphs, and the host's, on which the same programs run as they are
lane.py      one batch at a time: buffers, and a program a stage and bucket
runner.py    the runner
"""
