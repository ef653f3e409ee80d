"""LightningModules: distillation, inverse autoregressive training, and the training of small teachers."""
