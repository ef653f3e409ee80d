"""The order "embedding" of the inverse CDF: one fixed permutation that puts similar tokens side by side.

Neighbouring u then mean similar tokens, so that the map from u to a token's embedding is smoother than in vocabulary
order. Any fixed order keeps decoding exact; what matters is that everybody uses the same one, so it is stored with the
adapter's weights and never computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

POWER_ITERATIONS = 8  # a direction close to the principal one splits as well
CHUNK_NUMBERS = 2**24  # float64 numbers of small groups that are cut at once


@torch.no_grad()
def similar_tokens_together(token_embeddings: Tensor) -> Tensor:
    """The place of each token in an order that runs through the leaves of a tree of ever smaller groups.

    Principal direction divisive partitioning (Boley, 1998): a group is cut at the median of its first principal
    component, and that axis is turned to lead from the group's left neighbour to its right one. Embeddings are centred
    and compared by direction, for their length says how rare a token is. No library gives a leaf order in less than the
    `O(V^2)` of linkage; this takes `O(V H log V)`.

    Ties fall to the lower token id, and nothing is drawn or depends on the sign of an eigenvector. Machines may still
    round sums differently, which can exchange tokens at a cut: store the result.

    Args:
        token_embeddings: `[V, H]`, any float dtype.

    Returns:
        `[V]` int64, a permutation of 0 .. V - 1, on the CPU.
    """
    vectors = token_embeddings.detach().to("cpu", torch.float64)
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=-1)
    order = torch.arange(len(vectors))
    sizes, centres = torch.tensor([len(vectors)]), vectors.mean(0, keepdim=True)
    while sizes.max() > 1:
        order, sizes, centres = _halve_groups(order, sizes, centres, vectors)
    return order.argsort()


def require_permutation(token_ranks: Tensor, num_tokens: int) -> None:
    """Refuse places that are no order of V = `num_tokens` tokens.

    Raises:
        ValueError: a place is missing, taken twice or out of range.
    """
    if not torch.equal(token_ranks.cpu().long().sort().values, torch.arange(num_tokens)):
        raise ValueError(
            f"expected a token order, a permutation of 0 .. {num_tokens - 1}, found {token_ranks.numel()} numbers that "
            "are none: it belongs to another base model or is damaged, take another copy of the adapter"
        )


def _halve_groups(order: Tensor, sizes: Tensor, centres: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each group of two tokens or more.

    Args:
        order: `[V]`, token ids, group after group.
        sizes: `[G]`.
        centres: `[G, H]`.
        vectors: `[V, H]` by token id.

    Returns:
        The same three, of up to twice as many groups.
    """
    starts = sizes.cumsum(0) - sizes
    across = torch.cat([centres[1:], centres[-1:]]) - torch.cat([centres[:1], centres[:-1]])
    order, halves = order.clone(), centres.unsqueeze(1).repeat(1, 2, 1)
    for size in sizes[sizes > 1].unique().tolist():  # two at most: halves of a median cut differ by one
        for groups in (sizes == size).nonzero().flatten().split(max(1, CHUNK_NUMBERS // (size * vectors.shape[1]))):
            places = starts[groups].unsqueeze(1) + torch.arange(size)
            points = vectors[order[places]]
            points -= points.mean(1, keepdim=True)
            axis = _principal_axis(points)
            axis = torch.where((axis * across[groups]).sum(-1, keepdim=True) < 0, -axis, axis)
            rank = torch.einsum("gsh,gh->gs", points, axis).argsort(dim=1, stable=True)
            order[places] = order[places].gather(1, rank)
            left, right = (vectors[order[part]].mean(1) for part in (places[:, : size // 2], places[:, size // 2 :]))
            halves[groups] = torch.stack([left, right], dim=1)
    pairs = torch.stack([sizes // 2, sizes - sizes // 2], dim=1).flatten()
    return order, pairs[pairs > 0], halves.flatten(0, 1)[pairs > 0]


def _principal_axis(points: Tensor) -> Tensor:
    """About the first principal component of each group of centred points `[G, size, H]`: `[G, H]`."""
    farthest = points.square().sum(-1).argmax(1)
    axis = points[torch.arange(len(points)), farthest]
    for _ in range(POWER_ITERATIONS):
        scores = torch.einsum("gsh,gh->gs", points, axis)
        axis = torch.nn.functional.normalize(torch.einsum("gsh,gs->gh", points, scores), dim=-1)
    return axis
