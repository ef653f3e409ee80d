"""The refiner: layers after the stack that correct a draft, given the proposed tokens."""
