"""DecoderRefiner: decoder layers after the stack that condition slots on the drafted tokens they stand for.

After the stack there is a draft: a token for every slot. The first token is exact, t_i = Pick(u_i, Q_i); each later one
is predicted by the slot before it. The refiner pairs the last hidden state of a position with the token at that
position. A slot attends to the pairs of the context, which are exact, and to the pairs of its own window up to itself,
and predicts the next token again. So the map from u to a token is computed after the stack, not learned inside it.

Only slots are refined. A wrong pair makes a worse draft; it never changes a committed token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.choice import AttentionChoice
from ptp_lightning.models.attention.dispatch import register_attention
from ptp_lightning.models.attention.interface import WindowKeys
from ptp_lightning.models.correction.correction import Correction, CorrectionModule, require_at_least
from ptp_lightning.models.correction.normalization import normalized

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

DEFAULT_EXPANSION = 3  # width of the MLPs in units of the model's width


@dataclass(frozen=True)
class DecoderRefiner(Correction):
    """Decoder layers over slots and context, as `Refiner`; drafts are refined in parallel.

    Args:
        num_layers: number of decoder layers, of the base model's width and number of heads.
        intermediate_size: width of their MLPs, three times the model's width by default.
        num_refinement_steps: how often a draft is refined. After step k, token k + 1 no longer changes, so more than
            window_length - 1 steps have no effect. A step runs `num_layers` layers and the output head on slots alone.

    Raises:
        ValueError: a value is out of range; names the key.
    """

    num_layers: int = 1
    intermediate_size: int | None = None
    num_refinement_steps: int = 3

    def __post_init__(self) -> None:
        for name in ("num_layers", "intermediate_size", "num_refinement_steps"):
            value = getattr(self, name)
            if value is not None:
                require_at_least(name, value, 1)

    @property
    def is_left_to_right(self) -> bool:
        """See `Correction`: a step runs all slots, because they attend to each other."""
        return False

    def build(self, model: PreTrainedModel, num_logits: int) -> Refiner:
        """See `Correction.build`.

        Raises:
            ValueError: rotary embeddings do not fit the base model's heads.
        """
        return Refiner(model, self)


class Refiner(CorrectionModule):
    """Decoder layers over pairs of a last hidden state and the token at its position.

    Args:
        model: the base model.
        settings: their sizes.

    Raises:
        ValueError: rotary embeddings do not fit the base model's heads.
    """

    def __init__(self, model: PreTrainedModel, settings: DecoderRefiner) -> None:
        super().__init__()
        hidden_size = cast(int, model.config.hidden_size)
        self.join = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        layers, self.rotary = _new_layers(model.config, settings)
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        for layer in cast("list[Any]", layers):
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        # The output is added to the hidden states: with zeros an untrained refiner changes nothing.
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        hidden: Tensor,
        token_embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        conditioning: Tensor | None = None,
        *,
        window_keys: WindowKeys | None = None,
    ) -> Tensor:
        """Refine hidden states.

        Args:
            hidden: `[B, T, H]`, last hidden states.
            token_embeddings: `[B, T, H]`, of the tokens at their positions; zeros where the tokens are not known.
            position_ids: `[B, T]`.
            mask: `[B, 1, T, P + T]` bool, P cached pairs; None with `window_keys`.
            cache: gets the keys and values of these T pairs appended.
            conditioning: `[H]` or `[T, H]`, embedding of the sampling settings, added to the joined pairs.
            window_keys: what the positions see in a call that reads windows.

        Returns:
            `[B, T, H]` in the dtype of `hidden`, for the base model's output head.
        """
        pairs = torch.cat([normalized(hidden, self.join), normalized(token_embeddings, self.join)], dim=-1)
        stream = self.join(pairs) if conditioning is None else self.join(pairs) + conditioning
        position_embeddings = self.rotary(stream, position_ids)
        windows = {} if window_keys is None else {"window_keys": window_keys}
        for layer in self.layers:
            stream = layer(stream, attention_mask=mask, cache=cache, position_embeddings=position_embeddings, **windows)
        return hidden + self.out(normalized(stream, self.out)).to(hidden.dtype)


class RefinerContext:
    """Keys and values of the pairs that the refiner has read so far.

    Args:
        refiner: the layers.
        cache: of the layers, a new one by default.
    """

    def __init__(self, refiner: Refiner, cache: Cache | None = None) -> None:
        from transformers import DynamicCache

        self._refiner = refiner
        self._cache = DynamicCache() if cache is None else cache

    def read(self, hidden: Tensor, token_embeddings: Tensor, position_ids: Tensor, mask: Tensor) -> None:
        """Append the pairs of context tokens; arguments as in `Refiner.forward`."""
        self._refiner(hidden, token_embeddings, position_ids, mask, self._cache)

    def refine(
        self,
        hidden: Tensor,
        token_embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """Refine the hidden states of slots, which are not appended; arguments as in `Refiner.forward`."""
        refined = self._refiner(hidden, token_embeddings, position_ids, mask, self._cache, conditioning)
        self._cache.crop(-hidden.shape[1])
        return refined

    def refine_windows(
        self,
        batch: PackedBatch,
        hidden: Tensor,
        token_embeddings: Tensor,
        conditioning: Tensor | None,
        attention: AttentionChoice,
    ) -> Tensor:
        """Refine the first J slots of packed windows.

        Args:
            batch: the packed rows and the starts of their windows.
            hidden: `[B, N, J, H]`, last hidden states of the slots.
            token_embeddings: `[B, N, J, H]`, of the tokens that the slots stand for.
            conditioning: as in `Refiner.forward`.
            attention: chooses the back-end for the windows.

        Returns:
            `[B, N, J, H]`.
        """

        def run(
            embeddings: Tensor,
            position_ids: Tensor,
            mask: Tensor | None,
            cache: Cache | None,
            *,
            window_keys: WindowKeys | None = None,
        ) -> Tensor:
            flat = token_embeddings.flatten(1, 2)
            return self._refiner(embeddings, flat, position_ids, mask, cache, conditioning, window_keys=window_keys)

        backend = attention.choose(hidden.device, self._refiner.join.weight.dtype)
        return backend.read_windows(run, batch, cast("DynamicCache", self._cache), hidden)


def _new_layers(base: PretrainedConfig, settings: DecoderRefiner) -> tuple[list[nn.Module], nn.Module]:
    """Llama layers of the base model's width and number of heads, and their rotary embedding."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    hidden_size, num_heads = cast(int, base.hidden_size), cast(int, base.num_attention_heads)
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"expected a base model whose width is a multiple of twice its number of heads, found {hidden_size} and "
            f"{num_heads}: set predictor.correction to null"
        )
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=settings.intermediate_size or DEFAULT_EXPANSION * hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=num_heads,
        attn_implementation=register_attention(),  # pyright: ignore[reportCallIssue]  taken by every configuration
    )
    return [LlamaDecoderLayer(config, index) for index in range(settings.num_layers)], LlamaRotaryEmbedding(config)
