"""Where a model runs: engines, tensors, workers and remote endpoints. It knows nothing of bundles."""

import os

# From 1.29 on, ONNX Runtime tells its maker over the network of each process that uses it, and keeps an identifier of
# the device in the user's cache, unless this is set before it is imported (its docs/Privacy.md). 0 lets it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
