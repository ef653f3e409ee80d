"""After the stack: layers for slots alone that are told which tokens the slots stand for.

When the stack ends, the token of every slot has been proposed: the first one's by the base model, t_i = Pick(u_i, Q_i),
exactly, the others by the slots to their left. The refiner pairs each position's last hidden state with its token. A
slot attends to the pairs of the context, which are exact, and to those of its own window up to itself, and predicts
anew what comes next. So the map from u to a token is computed at the end of the stack, not learned inside it.

Only slots are refined. The pairs may be wrong: they decide how good a draft is, never what is committed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ptp_lightning.models.lower_layers import LowerLayers

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig

RMS_EPSILON = 1e-6
DEFAULT_EXPANSION = 3  # width of the MLPs in units of the model's width


@dataclass(frozen=True)
class RefinerSettings:
    """Size of the refiner, and how often it runs.

    Args:
        num_layers: decoder layers, of the base model's width and number of heads; 0 for no refiner.
        intermediate_size: width of their MLPs, by default three times the model's.
        rounds: how often a draft is refined. Round k lets token k + 1 know all tokens before it as they will stand, so
            more than window_length - 1 change nothing. A round costs `num_layers` + `base_layers` layers and a head on
            slots alone.
        base_layers: first layers of the base model that read the tokens, so that slots are told what these layers make
            of them instead of bare embeddings (see `LowerLayers`).

    Raises:
        ValueError: a value is out of range; names the key.
    """

    num_layers: int = 0
    intermediate_size: int | None = None
    rounds: int = 3
    base_layers: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("num_layers", 0), ("intermediate_size", 1), ("rounds", 1), ("base_layers", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"expected predictor.refiner.{name} >= {minimum}, found {value}")
        if self.base_layers and not self.num_layers:
            raise ValueError(
                "expected predictor.refiner.num_layers >= 1 beside predictor.refiner.base_layers "
                f"{self.base_layers}, found 0: without a refiner nobody is told what they say"
            )


class Refiner(nn.Module):
    """Decoder layers over pairs of a last hidden state and the token at its place.

    Args:
        base: configuration of the base model.
        settings: size.

    Raises:
        ValueError: heads of this size cannot be rotated.
    """

    def __init__(self, base: PretrainedConfig, settings: RefinerSettings) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        hidden_size, num_heads = cast(int, base.hidden_size), cast(int, base.num_attention_heads)
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"expected a base model whose width is an even multiple of its heads, found {hidden_size} and "
                f"{num_heads}: set predictor.refiner.num_layers to 0"
            )
        config = LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=settings.intermediate_size or DEFAULT_EXPANSION * hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=num_heads,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]  taken by every configuration
        )
        self.join = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        layers = [LlamaDecoderLayer(config, index) for index in range(settings.num_layers)]
        self.layers = nn.ModuleList(layers)
        self.rotary = LlamaRotaryEmbedding(config)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        # What is added to a residual stream starts at zero: an untrained refiner changes nothing.
        nn.init.zeros_(self.out.weight)
        for layer in layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)

    def forward(
        self,
        hidden: Tensor,
        token_embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: DynamicCache,
        told: Tensor | None = None,
    ) -> Tensor:
        """Refine hidden states.

        Args:
            hidden: `[B, T, H]`, last hidden states.
            token_embeddings: `[B, T, H]`, of the tokens at their places; zeros where they are not known.
            position_ids: `[B, T]`.
            mask: `[B, 1, T, P + T]` bool, P cached pairs.
            cache: gets the keys and values of these T pairs appended.
            told: `[H]`, added to every pair once it is joined.

        Returns:
            `[B, T, H]` in the dtype of `hidden`, for the base model's output head.
        """
        pairs = torch.cat([_normalized(hidden, self.join), _normalized(token_embeddings, self.join)], dim=-1)
        stream = self.join(pairs) if told is None else self.join(pairs) + told
        position_embeddings = self.rotary(stream, position_ids)
        for layer in self.layers:
            stream = layer(stream, attention_mask=mask, cache=cache, position_embeddings=position_embeddings)
        return hidden + self.out(_normalized(stream, self.out)).to(hidden.dtype)


class RefinerContext:
    """The pairs that the refiner has read so far, as its keys and values.

    Args:
        refiner: the layers.
        lower_layers: read the tokens first, with keys and values of their own; None to take embeddings as they are.

    Attributes:
        length: number of pairs per row.
    """

    def __init__(self, refiner: Refiner, lower_layers: LowerLayers | None) -> None:
        from transformers import DynamicCache

        self.length = 0
        self._refiner = refiner
        self._cache = DynamicCache()
        self._lower_layers = lower_layers
        self._lower_cache = DynamicCache()

    def read(self, hidden: Tensor, token_embeddings: Tensor, position_ids: Tensor, mask: Tensor) -> None:
        """Append the pairs of context tokens; arguments as in `Refiner.forward`."""
        tokens = self._read_tokens(token_embeddings, position_ids, mask)
        self._refiner(hidden, tokens, position_ids, mask, self._cache)
        self.length += hidden.shape[1]

    def refine(
        self,
        hidden: Tensor,
        token_embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        told: Tensor | None = None,
    ) -> Tensor:
        """Refined hidden states of slots, which leave no trace; see `Refiner.forward`."""
        num_slots = hidden.shape[1]
        tokens = self._read_tokens(token_embeddings, position_ids, mask)
        if self._lower_layers is not None:
            self._lower_cache.crop(-num_slots)
        refined = self._refiner(hidden, tokens, position_ids, mask, self._cache, told)
        self._cache.crop(-num_slots)
        return refined

    def _read_tokens(self, embeddings: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        if self._lower_layers is None:
            return embeddings
        return self._lower_layers(embeddings, position_ids, mask, self._lower_cache)


def refine_draft(draft: Tensor, rounds: int, propose: Callable[[Tensor], Tensor]) -> Tensor:
    """Let each token after the first be proposed again, knowing the draft before it.

    Args:
        draft: `[..., L]` token ids, the first exact.
        rounds: of proposals for all L - 1 places at once; round k settles token k + 1, so L - 1 are enough.
        propose: from the tokens `[..., L - 1]` that the slots stand for to those they predict.
    """
    for _ in range(min(rounds, draft.shape[-1] - 1)):
        draft = torch.cat([draft[..., :1], propose(draft[..., :-1])], dim=-1)
    return draft


def _normalized(states: Tensor, reader: nn.Linear) -> Tensor:
    """Of root mean square one, in the dtype of the layer that reads them."""
    return nn.functional.rms_norm(states.to(reader.weight.dtype), states.shape[-1:], eps=RMS_EPSILON)
