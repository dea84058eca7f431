"""ONNX Runtime with the state of rows in slots on a device: CUDA, TensorRT, or the processor, where it is tested.

graph.py    a stage's graph, extended: it reads rows from slots and writes them there
staging.py  host memory for copies to and from the device, pinned where it can be had
lane.py     one batch at a time: sessions, buffers that stay where they are, and what is bound to them
runner.py   the runner
"""
