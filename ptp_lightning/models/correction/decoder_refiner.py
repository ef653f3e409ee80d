"""DecoderRefiner: decoder layers after the stack that condition slots on the drafted tokens they stand for.

After the stack there is a draft: a token for every slot. The first token is exact, t_i = Pick(u_i, Q_i); each later one
is predicted by the slot before it. The refiner pairs the last hidden state of a position with the token at that
position. A slot attends to the pairs of the context, which are exact, and to the pairs of its own window up to itself,
and predicts the next token again. So the map from u to a token is computed after the stack, not learned inside it.

Only slots are refined. A wrong pair makes a worse draft; it never changes a committed token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.choice import AttentionChoice
from ptp_lightning.models.attention.interface import WindowKeys
from ptp_lightning.models.correction.correction import KEY, Correction, CorrectionModule, require_at_least
from ptp_lightning.models.correction.lower_layers import LowerLayers
from ptp_lightning.models.correction.normalization import normalized
from ptp_lightning.models.correction.refiner_layers import last_layers, new_layers, stream_scale

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache, PreTrainedModel

HIDDEN_SHARE = 1 / 3
"""Weight of the hidden state in what copied layers read at the start of training; the rest is the token's weight."""


@dataclass(frozen=True)
class DecoderRefiner(Correction):
    """Decoder layers over slots and context, as `Refiner`; drafts are refined in parallel.

    Args:
        num_layers: number of decoder layers, of the base model's width and number of heads.
        intermediate_size: width of their MLPs, three times the model's width by default; for new layers only.
        num_refinement_steps: how often a draft is refined. After step k, token k + 1 no longer changes, so more than
            window_length - 1 steps have no effect. A step runs `num_layers` + `base_layers` layers and the output head
            on slots alone.
        base_layers: number of the base model's first layers that encode the drafted tokens for the refiner (see
            `LowerLayers`); 0 for their embeddings.
        start: `random` for new layers, or `last_layers` for copies of the base model's last layers, which already
            predict the next token from a context and learn in far fewer steps.

    Raises:
        ValueError: a value is out of range, or two contradict each other; names the key.
    """

    num_layers: int = 1
    intermediate_size: int | None = None
    num_refinement_steps: int = 3
    base_layers: int = 0
    start: Literal["random", "last_layers"] = "random"

    def __post_init__(self) -> None:
        minimums = {"num_layers": 1, "intermediate_size": 1, "num_refinement_steps": 1, "base_layers": 0}
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None:
                require_at_least(name, value, minimum)
        if self.start not in ("random", "last_layers"):
            raise ValueError(f"expected {KEY}.start random or last_layers, found {self.start!r}")
        if self.start == "last_layers" and self.intermediate_size is not None:
            raise ValueError(
                f"expected no {KEY}.intermediate_size beside {KEY}.start last_layers, whose size is the base model's, "
                f"found {self.intermediate_size}"
            )

    @property
    def is_left_to_right(self) -> bool:
        """See `Correction`: a step runs all slots, because they attend to each other."""
        return False

    def build(self, model: PreTrainedModel, num_logits: int) -> Refiner:
        """See `Correction.build`.

        Raises:
            ValueError: rotary embeddings do not fit the base model's heads, or its layers cannot be copied.
        """
        return Refiner(model, self)


class Refiner(CorrectionModule):
    """Decoder layers over pairs of a last hidden state and the token at its position.

    Args:
        model: the base model.
        settings: size and initialisation.

    Raises:
        ValueError: rotary embeddings do not fit the base model's heads, or its layers cannot be copied.
    """

    def __init__(self, model: PreTrainedModel, settings: DecoderRefiner) -> None:
        super().__init__()
        hidden_size = cast(int, model.config.hidden_size)
        self.join = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        copied = settings.start == "last_layers"
        if copied:
            layers, self.rotary = last_layers(model, settings.num_layers)
        else:
            layers, self.rotary = new_layers(model.config, settings.num_layers, settings.intermediate_size)
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        if copied:
            scale = stream_scale(model, settings.num_layers)
            shares = [HIDDEN_SHARE * torch.eye(hidden_size), (1 - HIDDEN_SHARE) * torch.eye(hidden_size)]
            self.join.weight.data = scale * torch.cat(shares, dim=1)
        else:
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
        lower_layers: encode the tokens, with a cache of their own; None if the refiner reads embeddings.
        caches: of the refiner and of the lower layers, new ones by default.
    """

    def __init__(
        self, refiner: Refiner, lower_layers: LowerLayers | None, caches: tuple[Cache, Cache] | None = None
    ) -> None:
        from transformers import DynamicCache

        self._refiner = refiner
        self._lower_layers = lower_layers
        self._cache, self._lower_cache = (DynamicCache(), DynamicCache()) if caches is None else caches

    def read(self, hidden: Tensor, token_embeddings: Tensor, position_ids: Tensor, mask: Tensor) -> None:
        """Append the pairs of context tokens; arguments as in `Refiner.forward`."""
        tokens = self._encode_tokens(token_embeddings, position_ids, mask)
        self._refiner(hidden, tokens, position_ids, mask, self._cache)

    def refine(
        self,
        hidden: Tensor,
        token_embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """Refine the hidden states of slots, which are not appended; arguments as in `Refiner.forward`."""
        num_slots = hidden.shape[1]
        tokens = self._encode_tokens(token_embeddings, position_ids, mask)
        if self._lower_layers is not None:
            self._lower_cache.crop(-num_slots)
        refined = self._refiner(hidden, tokens, position_ids, mask, self._cache, conditioning)
        self._cache.crop(-num_slots)
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
            attention: back-ends for the windows.

        Returns:
            `[B, N, J, H]`.
        """
        tokens = token_embeddings
        if self._lower_layers is not None:
            of_lower = attention.choose(hidden.device, self._lower_layers.dtype)
            cache = cast("DynamicCache", self._lower_cache)
            tokens = of_lower.read_windows(self._lower_layers, batch, cache, tokens)

        def run(
            embeddings: Tensor,
            position_ids: Tensor,
            mask: Tensor | None,
            cache: Cache | None,
            *,
            window_keys: WindowKeys | None = None,
        ) -> Tensor:
            flat = tokens.flatten(1, 2)
            return self._refiner(embeddings, flat, position_ids, mask, cache, conditioning, window_keys=window_keys)

        of_refiner = attention.choose(hidden.device, self._refiner.join.weight.dtype)
        return of_refiner.read_windows(run, batch, cast("DynamicCache", self._cache), hidden)

    def _encode_tokens(self, embeddings: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        if self._lower_layers is None:
            return embeddings
        return self._lower_layers(embeddings, position_ids, mask, self._lower_cache)
