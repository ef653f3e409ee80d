"""Everything that needs a GPU, in one command: the tests marked `gpu`, and what training and decoding take."""
