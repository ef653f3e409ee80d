"""Auxiliary variables: the uniform numbers u that determine which token is drawn (Draxler et al., arXiv:2512.21323).

A sampled token is a function of its distribution P and of u in [0, 1). `pick` is this function and `token_interval` its
inverse: `pick(u, P) == t` if and only if `lower <= u < upper` for `lower, upper = token_interval(P, t)`. Both use the
same float64 cumulative distribution, so this holds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptp_lightning.sampling import TokenDistribution, require


@torch.no_grad()
def pick(u: Tensor, P: TokenDistribution) -> Tensor:
    """The token that u picks: `Pick(u, P) = min { j : F_j > u }` (arXiv:2512.21323).

    Args:
        u: auxiliaries `[...]` in [0, 1), any float dtype, in the leading shape of P.
        P: distributions `[..., K]`.

    Returns:
        Token ids `[...]`, int64; never a token of probability zero.

    Raises:
        ValueError: if u is outside [0, 1), NaN, or not in the leading shape of P.

    >>> P = TokenDistribution(torch.tensor([[0.5, 0.25, 0.25]]).expand(3, -1))
    >>> pick(torch.tensor([0.3, 0.5, 0.9]), P)  # the intervals are [0, 1/2), [1/2, 3/4) and [3/4, 1)
    tensor([0, 1, 2])
    """
    _require_leading_shape("u", u, P)
    require((u >= 0) & (u < 1), u, "auxiliaries u must lie in [0, 1)")
    F = P.cdf()
    j = torch.searchsorted(F, u.double()[..., None].contiguous(), right=True)
    return (j if P.token_ids is None else P.token_ids.gather(-1, j)).squeeze(-1)


@torch.no_grad()
def likely_pick(u: Tensor, P: TokenDistribution, error: float) -> Tensor:
    """The token that u most likely picks if the cumulative distribution F of P is an inexact estimate.

    Suppose the edges of an interval have a common normal error of standard deviation `error`, reflected at 0 and 1.
    Then u falls into the interval of token j with the mass that a normal distribution around u, folded at 0 and 1, has
    in it: of two intervals equally close to u, the wider one is more likely. With an error of 0 this is `pick`, and
    with a large one it is the most likely token.

    Args:
        u: auxiliaries `[...]` in [0, 1), in the leading shape of P.
        P: distributions `[..., K]`.
        error: standard deviation, in units of probability.

    Returns:
        Token ids `[...]`, int64; never a token of probability zero.

    Raises:
        ValueError: as `pick`.

    >>> P = TokenDistribution(torch.tensor([[0.50, 0.02, 0.48]]))
    >>> u = torch.tensor([0.505])
    >>> pick(u, P), likely_pick(u, P, error=0.1)  # u lies in the narrow interval of token 1
    (tensor([1]), tensor([0]))
    """
    if error == 0:
        return pick(u, P)
    j = _pick_probabilities(u, P, error).argmax(-1, keepdim=True)
    return (j if P.token_ids is None else P.token_ids.gather(-1, j)).squeeze(-1)


@torch.no_grad()
def likely_picks(u: Tensor, P: TokenDistribution, error: float, count: int) -> tuple[Tensor, Tensor]:
    """The tokens that u most likely picks, with their probabilities; see `likely_pick`, whose token is the first.

    Args:
        u: auxiliaries `[...]` in [0, 1), in the leading shape of P.
        P: distributions `[..., K]`.
        error: standard deviation, in units of probability; positive.
        count: C, number of tokens; K if that is less.

    Returns:
        Token ids `[..., C]`, int64, and probabilities `[..., C]`, float64, which fall.

    Raises:
        ValueError: as `pick`.

    >>> P = TokenDistribution(torch.tensor([[0.50, 0.02, 0.48]]))
    >>> likely_picks(torch.tensor([0.505]), P, error=0.1, count=2)[0]
    tensor([[0, 2]])
    """
    probabilities = _pick_probabilities(u, P, error)
    probabilities, j = probabilities.topk(min(count, probabilities.shape[-1]), dim=-1)
    return j if P.token_ids is None else P.token_ids.gather(-1, j), probabilities


def _pick_probabilities(u: Tensor, P: TokenDistribution, error: float) -> Tensor:
    """`[..., K]` float64: the mass in each interval of a normal distribution around u that is folded at 0 and 1."""
    _require_leading_shape("u", u, P)
    require((u >= 0) & (u < 1), u, "auxiliaries u must lie in [0, 1)")
    F = torch.nn.functional.pad(P.cdf(), (1, 0))
    u = u.double().unsqueeze(-1)
    mass, left, right = (torch.special.ndtr((edge - u) / error) for edge in (F, -F, 2 - F))
    return (mass - left - right).diff(dim=-1)


@torch.no_grad()
def token_interval(P: TokenDistribution, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The auxiliaries that pick a given token: `[F_{t-1}, F_t)` (arXiv:2512.21323, eq. 9).

    Args:
        P: distributions `[..., K]`.
        token_ids: `[...]`, int64, in the leading shape of P.

    Returns:
        (lower, upper), each `[...]`, float64; both 0 for a token that no u picks, because it is not listed or has
        probability zero (below 2^-53).

    Raises:
        ValueError: if token_ids are not in the leading shape of P.

    >>> P = TokenDistribution(torch.tensor([[0.5, 0.25, 0.25]]))
    >>> token_interval(P, torch.tensor([1]))
    (tensor([0.5000], dtype=torch.float64), tensor([0.7500], dtype=torch.float64))
    """
    _require_leading_shape("token_ids", token_ids, P)
    j, found = P.find(token_ids)
    lower, upper = P.interval(j)
    has_interval = found & (lower < upper)
    return lower.where(has_interval, 0.0), upper.where(has_interval, 0.0)


def draw_auxiliaries(shape: Sequence[int], generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Auxiliaries of shape `shape`, float64, uniform in [0, 1).

    They are drawn on the generator's device and then moved, so a CPU generator gives the same numbers on every device.
    """
    drawn = torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=torch.float64)
    if torch.device(device).type == "cuda" and not drawn.is_cuda:
        # A copy from pinned memory does not synchronise.
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)


def _require_leading_shape(name: str, tensor: Tensor, P: TokenDistribution) -> None:
    expected = P.probabilities.shape[:-1]
    if tensor.shape != expected:
        raise ValueError(f"{name} must have the leading shape {tuple(expected)} of P, found {tuple(tensor.shape)}")
