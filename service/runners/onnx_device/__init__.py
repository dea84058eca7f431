"""ONNX Runtime with the state of rows in slots on a device: CUDA, TensorRT, or the CPU, where this is tested.

graph.py    extends a stage's graph, so that it reads rows from slots and writes them there
staging.py  host memory for copies to and from the device, pinned if possible
lane.py     runs one batch at a time: sessions, and fixed buffers bound to their inputs and outputs
runner.py   the runner
"""
