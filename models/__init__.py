"""What a network with exits is, what it costs, how it decides and how it is stored.

This room imports neither `training` nor `service`. `exits` and `bundle` need numpy and pydantic alone, so that a
server on ONNX Runtime starts without loading torch; the networks, `staging` and `cost` need torch.
"""

import os

# ONNX Runtime's own Linux packages report to their maker by default (from 1.29 on), what they run included. Set before
# anything imports it; whoever wants the reports sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
