"""Attention of windows to a shared context and to themselves: masks, back-ends and the choice between them."""
