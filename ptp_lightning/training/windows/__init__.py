"""Window sources: which tokens and auxiliaries a training step learns from."""
