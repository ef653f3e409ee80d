"""Planning: the memory of a training step of a configuration, measured on tensors without values."""
