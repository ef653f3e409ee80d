"""The counter of operations, on products that are counted by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.step_operations import OperationCounter


def test_products_of_both_passes() -> None:
    """A frozen weight has no gradient, so its backward pass is one product; a trained one has two."""
    rows, inputs, outputs = 3, 5, 7
    once = 2 * rows * inputs * outputs
    for trained, products in ((False, 2), (True, 3)):
        layer = nn.Linear(inputs, outputs).requires_grad_(trained)
        states = torch.randn(rows, inputs, requires_grad=True)
        with OperationCounter() as counter:
            layer(states).sum().backward()
        assert counter.total == products * once


def test_attention() -> None:
    """Scores and values: two products of each query with each key."""
    heads, queries, keys, size = 2, 3, 4, 8
    query, key, value = (torch.randn(1, heads, number, size) for number in (queries, keys, keys))
    with torch.no_grad(), OperationCounter() as counter:
        F.scaled_dot_product_attention(query, key, value)
    assert counter.total == 2 * (2 * heads * queries * keys * size)


def test_nothing_else_counts() -> None:
    with OperationCounter() as counter:
        torch.randn(4).exp().sum()
    assert counter.total == 0
