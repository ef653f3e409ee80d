"""Attention of windows over a shared context: masks, back-ends, and what reads windows with them."""
