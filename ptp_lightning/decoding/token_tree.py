"""TokenTree: several drafts of a text that share their beginnings, verified in one call.

Near the border of its interval a student is unsure which token u picks. Then the second choice is worth a position of
the verifying call, too, and so is a draft that continues it. All drafts are for the same u, so one path is correct at
most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.models.attention.aligned_blocks import TokenRun

LONGER_IS_LESS_LIKELY = 1e-6  # nats a token; where a token has probability 1, its path still comes after its beginning


@dataclass(frozen=True)
class TokenTree:
    """Drafted tokens of B texts, M of each. Column 0 is the root, the exact first token; parents come before children.

    Attributes:
        token_ids: `[B, M]` int64.
        parents: `[B, M]` int64, the column of the token before; 0 for the root.
        is_chain: whether each column follows the one before it.

    Two tokens may follow the root, and one more follows the first of them:

    >>> tree = TokenTree(torch.tensor([[7, 4, 5, 6]]), torch.tensor([[0, 0, 0, 1]]))
    >>> tree.depths
    tensor([[0, 1, 1, 2]])
    >>> tree.ancestors.int()[0, 3]  # the last one sees the root, the first of both, and itself
    tensor([1, 1, 0, 1], dtype=torch.int32)
    """

    token_ids: Tensor
    parents: Tensor
    is_chain: bool = False

    @classmethod
    def chain(cls, token_ids: Tensor) -> TokenTree:
        """One draft `[B, M]` without alternatives."""
        parents = torch.arange(-1, token_ids.shape[1] - 1, device=token_ids.device).clamp_min(0)
        return cls(token_ids, parents.expand(token_ids.shape), is_chain=True)

    @cached_property
    def ancestors(self) -> Tensor:
        """`[B, M, M]` bool, true where a token (row) is another one (column) or follows it."""
        num_tokens = self.parents.shape[1]
        found = torch.eye(num_tokens, dtype=torch.bool, device=self.parents.device).expand(len(self.parents), -1, -1)
        jump = self.parents
        for _ in range(max(num_tokens - 1, 0).bit_length()):  # 1, 2, 4, .. generations
            found = found | found.gather(1, jump.unsqueeze(2).expand_as(found))
            jump = jump.gather(1, jump)
        return found

    @cached_property
    def depths(self) -> Tensor:
        """`[B, M]`, number of tokens between the root and each token, itself included."""
        return self.ancestors.sum(dim=2) - 1


class Verified(NamedTuple):
    """The longest correct path of each tree.

    Attributes:
        columns: of its tokens, from the root on.
        token_ids: its tokens, and the base model's pick after them.
        rejected: the first choices that were drafted after it.
    """

    columns: list[list[int]]
    token_ids: list[list[int]]
    rejected: list[list[int]]


def verified_paths(tree: TokenTree, picks: Tensor) -> tuple[Verified, Tensor]:
    """Compare a tree with the base model's picks. Waits for the device.

    Args:
        tree: of M tokens; the roots are correct.
        picks: `[B, M]`, the base model's token after each.

    Returns:
        The paths, and the pick after each of them `[B, 1]`.

    >>> tree = TokenTree(torch.tensor([[7, 4, 5, 6]]), torch.tensor([[0, 0, 0, 1]]))
    >>> verified_paths(tree, picks=torch.tensor([[5, 0, 8, 0]]))[0]
    Verified(columns=[[0, 2]], token_ids=[[7, 5, 8]], rejected=[[]])
    """
    is_wrong = tree.token_ids != picks.gather(1, tree.parents)
    is_wrong[:, 0] = False
    is_correct = ~(tree.ancestors & is_wrong.unsqueeze(1)).any(dim=2)
    last = (tree.depths + 1).mul(is_correct).argmax(dim=1, keepdim=True)
    on_path = tree.ancestors.gather(1, last.unsqueeze(2).expand(-1, -1, tree.parents.shape[1])).squeeze(1)
    after = picks.gather(1, last)
    num_tokens = tree.parents.shape[1]
    rows = torch.cat([on_path, tree.token_ids, tree.parents, after], dim=1).tolist()
    found = Verified([], [], [])
    for row in rows:
        path, drafted, before = (row[part * num_tokens : (part + 1) * num_tokens] for part in range(3))
        columns = [column for column, is_on_path in enumerate(path) if is_on_path]
        found.columns.append(columns)
        found.token_ids.append([*(drafted[column] for column in columns), row[-1]])
        end, rejected = columns[-1], []
        for column in range(1, len(before)):
            if before[column] == end:
                rejected.append(drafted[column])
                end = column
        found.rejected.append(rejected)
    return found, after


class TreeLevel(NamedTuple):
    """Candidates of one depth of a tree.

    Attributes:
        token_ids: `[B, C]`.
        scores: `[B, C]` float64, log probability of the path to each; never above that of its parent.
        parents: `[B, C]`, index of the parent among all candidates: 0 is the root, then level follows level.
    """

    token_ids: Tensor
    scores: Tensor
    parents: Tensor


def best_tree(first: Tensor, levels: Sequence[TreeLevel], size: int) -> TokenTree:
    """The root and the `size` likeliest candidates.

    Args:
        first: `[B, 1]`, the roots.
        levels: at least one.
        size: number of candidates to choose; all if there are fewer.

    >>> level = TreeLevel(torch.tensor([[4, 5]]), torch.tensor([[-0.1, -3.0]]).double(), torch.tensor([[0, 0]]))
    >>> below = TreeLevel(torch.tensor([[6, 8]]), torch.tensor([[-0.5, -9.0]]).double(), torch.tensor([[1, 1]]))
    >>> best_tree(torch.tensor([[7]]), [level, below], size=2)
    TokenTree(token_ids=tensor([[7, 4, 6]]), parents=tensor([[0, 0, 1]]), is_chain=False)
    """
    token_ids, scores, parents = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    depths = torch.cat([torch.full_like(level.scores, depth) for depth, level in enumerate(levels)], dim=1)
    chosen = (
        (scores - LONGER_IS_LESS_LIKELY * depths).topk(min(size, scores.shape[1]), dim=1).indices.sort(dim=1).values
    )
    zero = torch.zeros_like(first)
    column = torch.zeros(len(first), scores.shape[1] + 1, dtype=torch.long, device=first.device)
    own = torch.arange(1, chosen.shape[1] + 1, device=first.device).expand_as(chosen)
    column.scatter_(1, chosen + 1, own)
    return TokenTree(
        torch.cat([first, token_ids.gather(1, chosen)], dim=1),
        torch.cat([zero, column.gather(1, parents.gather(1, chosen))], dim=1),
    )


def depth_first(tree: TokenTree, lengths: Sequence[int]) -> list[TokenRun]:
    """The runs of a depth-first walk through each tree: each begins where the one before branches off.

    Args:
        tree: of each row.
        lengths: number of tokens before the root of each row.

    >>> tree = TokenTree(torch.tensor([[7, 4, 5, 6]]), torch.tensor([[0, 0, 0, 1]]))
    >>> depth_first(tree, lengths=[10])
    [TokenRun(row=0, start=10, columns=[0, 1, 3]), TokenRun(row=0, start=11, columns=[2])]
    """
    runs: list[TokenRun] = []
    for row, (length, parents) in enumerate(zip(lengths, tree.parents.tolist(), strict=True)):
        children: list[list[int]] = [[] for _ in parents]
        for column, parent in enumerate(parents[1:], start=1):
            children[parent].append(column)
        waiting = [(0, 0)]
        while waiting:
            column, depth = waiting.pop()
            start, columns = length + depth, [column]
            while children[columns[-1]]:
                nearest, *others = children[columns[-1]]
                depth += 1
                waiting += [(other, depth) for other in reversed(others)]
                columns.append(nearest)
            runs.append(TokenRun(row, start, columns))
    return runs
