"""What a network with exits is, what it costs, how it decides and how it is stored.

This room imports neither `training` nor `service`. `exits` and `bundle` need numpy alone, so that a server on ONNX
Runtime starts without loading torch; `msdnet`, `boosting`, `staging` and `cost` need torch.
"""
