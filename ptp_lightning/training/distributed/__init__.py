"""Many devices: strategies, sharding, checkpoint files, and how all processes stop together."""
