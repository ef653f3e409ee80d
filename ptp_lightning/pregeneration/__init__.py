"""Pregeneration: the teacher completes prompts before a training, and the tokens are stored."""
