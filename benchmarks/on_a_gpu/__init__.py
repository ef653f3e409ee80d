"""All checks that need a GPU in one command: the tests marked `gpu`, and benchmarks of training and decoding."""
