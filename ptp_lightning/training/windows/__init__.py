"""Window sources: where the tokens of training windows come from, with their auxiliaries and distributions."""
