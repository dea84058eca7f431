"""Networks with exits: architectures, costs, exit decisions and bundles.

This package imports neither `training` nor `service`. `exits` and `bundle` need only numpy and pydantic, so that a
server on ONNX Runtime starts without loading torch. The networks, `staging` and `cost` need torch.
"""

import os

# From 1.29 on, ONNX Runtime's official Linux packages send telemetry by default, including what they run. The variable
# must be set before the import; to allow telemetry, set it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
