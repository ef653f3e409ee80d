"""Planning: what memory a training step of a configuration needs, measured on tensors without values."""
