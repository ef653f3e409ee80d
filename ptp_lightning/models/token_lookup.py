"""Inside the stack: which token a slot stands for, found by inverting an early estimate of its distribution at u.

A slot has to do three things in one pass: rebuild the distribution of the token it stands for, invert it at u, and
predict what comes after. The inversion is known arithmetic, so it is computed here and not learned. Before some of the
decoder layers, a lens reads the stream of the position to the left (the last context token, or the slot before),
whose business it is to predict this slot's token. `Pick(u, lens estimate)` names a token, and its embedding is added to
the slot's stream. Later look-ups see better estimates, and what a slot has learned from one reaches its right neighbour
with the next.

Only slots are written to. The lens may be wrong: it decides how good a draft is, never what is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOOKUP_CHUNK = 1024  # slots whose logits exist at the same time
RMS_EPSILON = 1e-6
WRITE_GAIN = 0.1  # share of the stream's size that the first looked-up embeddings have

FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm")  # of Llama and Qwen, GPT-2, GPT-NeoX

ChooseToken = Callable[[Tensor, Tensor], Tensor]
"""Logits `[M, V]` and auxiliaries `[M]` to token ids `[M]`."""


@dataclass
class LookupCall:
    """One forward pass in which slots look their tokens up.

    Args:
        auxiliaries: `[B, N, J]`, of the tokens that the J slots of each window stand for; the slots are the last N * J
            positions of the pass.
        context_streams: `[B, N, H]` per look-up layer: the streams of the last context tokens, if these were read in an
            earlier pass. None: they stand right before the slots in this one (N = 1).

    Attributes:
        estimates: per look-up layer `[B, N, J, H]`, for the output head: what the lens said about the slots' tokens.
    """

    auxiliaries: Tensor
    context_streams: list[Tensor] | None = None
    estimates: list[Tensor] = field(default_factory=list)


class BaseParts(NamedTuple):
    """Parts of the base model that look-ups use; in a tuple, so that they stay the base model's submodules alone.

    Attributes:
        layers: the decoder layers.
        final_norm: what follows the last.
        embed: token embeddings.
        head: output head.
    """

    layers: nn.ModuleList
    final_norm: nn.Module
    embed: nn.Module
    head: nn.Module

    @property
    def table(self) -> Tensor:
        """`[V, H]`, the token embeddings as they are now (wrappers may have replaced the parameter)."""
        return cast(Tensor, self.embed.weight)


class TokenLookup(nn.Module):
    """Look-ups before chosen decoder layers.

    Args:
        model: the causal LM; gets a hook on each chosen layer that does nothing outside of `recording` and `acting`.
        layers: numbers of decoder layers, ascending, from 1 on.
        choose: how an estimate becomes a token.

    Raises:
        ValueError: the model has no such layer, or no list of layers or final norm that can be found.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...], choose: ChooseToken) -> None:
        super().__init__()
        self._base = _find_parts(model)
        last = len(self._base.layers) - 1
        if list(layers) != sorted(set(layers)) or not all(0 < layer <= last for layer in layers):
            raise ValueError(
                f"expected predictor.lookup_layers to be ascending numbers from 1 to {last}, found {list(layers)}"
            )
        hidden_size = self._base.table.shape[1]
        self.lenses = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in layers)
        self.writers = nn.ModuleList(nn.Linear(hidden_size, hidden_size, bias=False) for _ in layers)
        with torch.no_grad():
            for place in range(len(layers)):
                lens, writer = self._heads(place)
                nn.init.eye_(lens.weight)
                nn.init.zeros_(lens.bias)
                nn.init.eye_(writer.weight).mul_(WRITE_GAIN)
        self._choose = choose
        self._call: LookupCall | None = None
        self._record: list[Tensor] | None = None
        for place, layer in enumerate(layers):
            self._base.layers[layer].register_forward_pre_hook(partial(self._before_layer, place), with_kwargs=True)

    def _heads(self, place: int) -> tuple[nn.Linear, nn.Linear]:
        """Lens and writer of a look-up layer."""
        return cast(nn.Linear, self.lenses[place]), cast(nn.Linear, self.writers[place])

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Passes inside the block append the streams `[B, T, H]` before each look-up layer to the yielded list."""
        self._record = []
        try:
            yield self._record
        finally:
            self._record = None

    @contextmanager
    def acting(self, call: LookupCall) -> Iterator[None]:
        """The pass inside the block looks tokens up as `call` says, and fills `call.estimates`."""
        self._call = call
        try:
            yield
        finally:
            self._call = None

    def _before_layer(self, place: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook: hidden states are the layer's first argument."""
        if self._record is None and self._call is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self._record is not None:
            self._record.append(hidden)
            return None
        hidden = self._look_up(place, hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _look_up(self, place: int, hidden: Tensor) -> Tensor:
        """Streams `[B, T, H]` with the looked-up tokens written to the slots."""
        assert self._call is not None
        rows, windows, slots = self._call.auxiliaries.shape
        before = hidden.shape[1] - windows * slots
        streams = hidden[:, before:].unflatten(1, (windows, slots))
        if self._call.context_streams is None:
            context = hidden[:, before - 1 : before]
        else:
            context = self._call.context_streams[place]
        left = torch.cat([context.unsqueeze(2), streams[:, :, :-1]], dim=2)

        lens, writer = self._heads(place)
        estimate = self._base.final_norm(lens(left.to(lens.weight.dtype)).to(self._base.table.dtype))
        self._call.estimates.append(estimate)
        with torch.no_grad():
            token_ids = torch.cat(
                [
                    self._choose(self._base.head(chunk).float(), auxiliaries)
                    for chunk, auxiliaries in zip(
                        estimate.flatten(0, 2).split(LOOKUP_CHUNK),
                        self._call.auxiliaries.flatten().split(LOOKUP_CHUNK),
                        strict=True,
                    )
                ]
            ).view(rows, windows, slots)
            found = self._base.embed(token_ids).to(writer.weight.dtype)
            found = nn.functional.rms_norm(found, found.shape[-1:], eps=RMS_EPSILON)
            size = context.float().square().mean(-1, keepdim=True).sqrt().unsqueeze(2)
        streams = streams + (size * writer(found)).to(streams.dtype)
        return torch.cat([hidden[:, :before], streams.flatten(1, 2)], dim=1)


def _find_parts(model: PreTrainedModel) -> BaseParts:
    decoder = cast(nn.Module, getattr(model, model.base_model_prefix))
    count = model.config.num_hidden_layers
    stacks = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    norms = [child for name, child in decoder.named_children() if name in FINAL_NORM_NAMES]
    if len(stacks) != 1 or len(norms) != 1:
        raise ValueError(
            f"expected {type(decoder).__name__} to hold one list of {count} layers and one final norm, found "
            f"{len(stacks)} and {len(norms)}: set predictor.lookup_layers to []"
        )
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head is not None, "checked by the predictor"
    return BaseParts(stacks[0], norms[0], embed, head)
