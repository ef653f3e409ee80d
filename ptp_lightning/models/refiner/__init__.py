"""Refiner: layers after the stack that condition slots on a draft and predict it again."""
