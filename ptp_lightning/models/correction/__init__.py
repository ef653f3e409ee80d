"""Corrections: trained modules after the stack that predict a slot's token again, given the token before it."""
