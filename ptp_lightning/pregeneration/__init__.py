"""Pregeneration: a teacher generates completions of prompts, which are stored for later training."""
