"""The checkpoint format `unbroken-1` and its commit: safetensors shards, and a manifest written last."""
