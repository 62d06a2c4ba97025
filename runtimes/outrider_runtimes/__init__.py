"""Where a model runs: engines, tensors, workers and remote endpoints. It knows nothing of bundles."""
