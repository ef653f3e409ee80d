"""What decoding changes in a network, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ptp_lightning.models.network import PredictorNetwork


@contextmanager
def prepare_for_decoding(network: PredictorNetwork) -> Iterator[None]:
    """Change a network for decoding inside the block; at its end every change is undone.

    * The mode of all modules, for the whole block: eval mode, because dropout would make a text depend on more than its
      seed.
    * `forward` of linear layers on a CPU, for the whole block: `PackedWeights`, because a call that verifies a draft
      spends half of its time on rearranging weights, and because products must be row-invariant.
    * Attention of the base model, and its matrix products and means on a GPU, for each of its calls: `batch_invariant`,
      because a token's hidden state must not depend on what else a call reads.

    Nothing is changed in a Llama-like base model on a CPU: a `JoinedDecoder` of a text reads its weights and takes the
    place of its decoder. It keeps the same promise with few operations, and without exceptions.

    Two more things differ from a plain call and change nothing in the model. Each call gets a `RaggedCache`, where the
    next call overwrites a rejected draft, with a mask and position ids of its own (`positions_and_mask`). And the gate
    of the adapter is open for slots and closed for tokens.

    Packed weights are copies, up to 1 GiB. `network.packed_weights` keeps them after the block, so that the next text
    does not pack them again.

    Args:
        network: in any mode; blocks can be nested.
    """
    with _eval_mode(network), network.packed_weights.in_use(network):
        yield


@contextmanager
def _eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is in the mode that it was in."""
    # Sets the flags itself: `network.eval()` sets that of every module, which takes as long as several calls.
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
