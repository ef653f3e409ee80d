"""Token series: recorded pick-ups and Markov chains, and their data module."""
