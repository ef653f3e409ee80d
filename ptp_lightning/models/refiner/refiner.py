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
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.window_reader import WindowReader
from ptp_lightning.models.refiner.layers import last_layers, new_layers, stream_scale
from ptp_lightning.models.refiner.lower_layers import LowerLayers

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache, PreTrainedModel

RMS_EPSILON = 1e-6
HIDDEN_SHARE = 1 / 3  # of hidden states in what copied layers read at first; the rest is what is known of the token


@dataclass(frozen=True)
class RefinerSettings:
    """Size of the refiner, and how often it runs.

    Args:
        num_layers: decoder layers, of the base model's width and number of heads; 0 for no refiner.
        intermediate_size: width of their MLPs, by default three times the model's; of new layers only.
        num_refinement_steps: how often a draft is refined. Step k lets token k + 1 know all tokens before it as they
            will stand, so more than window_length - 1 change nothing. A step costs `num_layers` + `base_layers` layers
            and a head on slots alone.
        base_layers: first layers of the base model that read the tokens, so that slots are told what these layers make
            of them instead of bare embeddings (see `LowerLayers`).
        start: `random` for new layers, or `last_layers` for copies of the base model's last ones, which can already
            tell from a context what comes next, and learn in far fewer steps.

    Raises:
        ValueError: a value is out of range, or two contradict each other; names the key.
    """

    num_layers: int = 0
    intermediate_size: int | None = None
    num_refinement_steps: int = 3
    base_layers: int = 0
    start: Literal["random", "last_layers"] = "random"

    def __post_init__(self) -> None:
        for name, minimum in (
            ("num_layers", 0),
            ("intermediate_size", 1),
            ("num_refinement_steps", 1),
            ("base_layers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"expected predictor.refiner.{name} >= {minimum}, found {value}")
        if self.base_layers and not self.num_layers:
            raise ValueError(
                "expected predictor.refiner.num_layers >= 1 beside predictor.refiner.base_layers "
                f"{self.base_layers}, found 0: without a refiner nobody is told what they say"
            )
        if self.start not in ("random", "last_layers"):
            raise ValueError(f"expected predictor.refiner.start random or last_layers, found {self.start!r}")
        if self.start == "last_layers" and (self.num_layers == 0 or self.intermediate_size is not None):
            raise ValueError(
                "expected predictor.refiner.num_layers >= 1 and no intermediate_size beside predictor.refiner.start "
                f"last_layers, whose size is the base model's, found {self.num_layers} and {self.intermediate_size}"
            )


class Refiner(nn.Module):
    """Decoder layers over pairs of a last hidden state and the token at its place.

    Args:
        model: the base model.
        settings: size and start.

    Raises:
        ValueError: new layers cannot have heads of the base model's size, or copied ones do not fit in here.
    """

    def __init__(self, model: PreTrainedModel, settings: RefinerSettings) -> None:
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
        # What is added to a residual stream starts at zero: an untrained refiner changes nothing.
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        hidden: Tensor,
        token_embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: Cache | None,
        told: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Refine hidden states.

        Args:
            hidden: `[B, T, H]`, last hidden states.
            token_embeddings: `[B, T, H]`, of the tokens at their places; zeros where they are not known.
            position_ids: `[B, T]`.
            mask: `[B, 1, T, P + T]` bool, P cached pairs.
            cache: gets the keys and values of these T pairs appended.
            told: `[H]` or `[T, H]`, added to pairs once they are joined.
            more: for the layers' attention.

        Returns:
            `[B, T, H]` in the dtype of `hidden`, for the base model's output head.
        """
        pairs = torch.cat([_normalized(hidden, self.join), _normalized(token_embeddings, self.join)], dim=-1)
        stream = self.join(pairs) if told is None else self.join(pairs) + told
        position_embeddings = self.rotary(stream, position_ids)
        for layer in self.layers:
            stream = layer(stream, attention_mask=mask, cache=cache, position_embeddings=position_embeddings, **more)
        return hidden + self.out(_normalized(stream, self.out)).to(hidden.dtype)


class RefinerContext:
    """The pairs that the refiner has read so far, as its keys and values.

    Args:
        refiner: the layers.
        lower_layers: read the tokens first, with keys and values of their own; None to take embeddings as they are.
        caches: of the refiner and of the lower layers, by default new ones.
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
        tokens = self._read_tokens(token_embeddings, position_ids, mask)
        self._refiner(hidden, tokens, position_ids, mask, self._cache)

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

    def refine_windows(
        self,
        batch: PackedBatch,
        hidden: Tensor,
        token_embeddings: Tensor,
        told: Tensor | None,
        *,
        in_blocks: bool,
    ) -> Tensor:
        """Refined hidden states `[B, N, J, H]` of the first J slots of packed windows; see `WindowReader`."""
        tokens = token_embeddings
        if self._lower_layers is not None:
            reader = WindowReader(batch, cast("DynamicCache", self._lower_cache), in_blocks=in_blocks)
            tokens = reader.read(self._lower_layers, tokens)

        def run(embeddings: Tensor, position_ids: Tensor, mask: Tensor, cache: Cache | None, **more: Any) -> Tensor:
            return self._refiner(embeddings, tokens.flatten(1, 2), position_ids, mask, cache, told, **more)

        reader = WindowReader(batch, cast("DynamicCache", self._cache), in_blocks=in_blocks)
        return reader.read(run, hidden)

    def _read_tokens(self, embeddings: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        if self._lower_layers is None:
            return embeddings
        return self._lower_layers(embeddings, position_ids, mask, self._lower_cache)


def refine_draft(draft: Tensor, num_refinement_steps: int, predict: Callable[[Tensor], Tensor]) -> Tensor:
    """Let each token after the first be proposed again, knowing the draft before it.

    Args:
        draft: `[..., L]` token ids, the first exact.
        num_refinement_steps: each proposes all L - 1 tokens at once; step k settles token k + 1, so L - 1 are enough.
        predict: from the tokens `[..., L - 1]` that the slots stand for to those they predict.
    """
    for _ in range(min(num_refinement_steps, draft.shape[-1] - 1)):
        draft = torch.cat([draft[..., :1], predict(draft[..., :-1])], dim=-1)
    return draft


def _normalized(states: Tensor, reader: nn.Linear) -> Tensor:
    """Of root mean square one, in the dtype of the layer that reads them."""
    return nn.functional.rms_norm(states.to(reader.weight.dtype), states.shape[-1:], eps=RMS_EPSILON)
