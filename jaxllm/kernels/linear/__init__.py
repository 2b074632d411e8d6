"""Products of activations with weights kept as checkpoints keep them, `[out, in]`."""
