"""The check of a base model before it is used: whether this package computes what the model itself computes."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.choice import AttentionChoice
from ptp_lightning.models.attention.dense import Dense
from ptp_lightning.models.attention.dispatch import register_attention
from ptp_lightning.models.attention.eager_attention import needs_eager_attention, register_eager_attention
from ptp_lightning.models.attention.masks import context_mask
from ptp_lightning.models.attention.sliding_window import FULL, SLIDING, has_sliding_window, layer_masks
from ptp_lightning.models.lora.gated_linear import GatedLoraLinear
from ptp_lightning.models.positions import long_rope_positions, max_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

    from ptp_lightning.models.network import PredictorNetwork

FIRST_LENGTH, SECOND_LENGTH = 7, 16  # tokens of the two documents of the check
NUM_ROWS = 3
"""Rows of the comparison with the model's own logits, each of other random tokens."""
SHORT_WINDOW = 6
"""Sliding window during the check. Documents that reach beyond a longer one would take seconds."""
MAX_LENGTH = 1024
"""Longest document for a model that keeps its own window."""
MAX_WINDOW = 64
"""Longest window of the check. A slot after these sees nothing but more slots, which take memory."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Of `_difference`. Measured: SmolLM2 differs by 6e-6 in float32 and by 0.04 in bfloat16."""
ADVICE = "set predictor.backbone.path to another model"
ROWS_ADVICE = "set model.init_args.backbone to another model"


@torch.no_grad()
def require_supported(network: PredictorNetwork) -> None:
    """Refuse base models that this package would not run as they are.

    Two documents of random tokens are packed into a row. Compared are

    * in several such rows, logits of each document, read in the packed row, with those of the model's own forward pass
      on it alone: a mask, position or state that crosses documents shows, and so do a window of attention and scaled
      logits. If the model does not say that its attention function can be exchanged, as decoding does, this is tried;
    * logits of slots before and after all tokens that they must not see are exchanged, and all other slots;
    * logits of slots by the chosen attention back-end, with those under an explicit mask, as in decoding;
    * what each adapter reads, with what the gate needs.

    The check runs under a sliding window of `SHORT_WINDOW` tokens in place of a longer one, if the model reads its
    window from its configuration in each call, as all supported families of transformers do. Documents reach beyond the
    window of any other model, but for one of more than `MAX_LENGTH` tokens, which is not checked.

    Args:
        network: complete, on any device but meta.

    Raises:
        ValueError: in one line, with the type of the model, what is wrong, and the key to set.
    """
    model = network.base_model
    if model.device.type == "meta":
        return
    _say_limit_of_long_rope(model.config)
    kind = model.config.model_type
    choice = AttentionChoice(network.student_model, is_logged=False)
    with _named_errors(model.config), _short_window(model), _attention(network, choice):
        batch = _batch(model, _window_length(network))
        _require_own_logits(network)
        _require_positions(network, batch, kind)
        _require_visible_tokens_alone(network, batch, kind)
        _require_slots_as_under_a_mask(network, batch, kind)


@torch.no_grad()
def require_packed_rows(model: PreTrainedModel, advice: str = ROWS_ADVICE) -> None:
    """Refuse models that read the documents of a packed row otherwise than each on its own.

    Args:
        model: in eval mode, to be trained on packed rows.
        advice: what to do if it is refused.

    Raises:
        ValueError: as `require_supported`.
    """
    if model.device.type == "meta":
        return
    _say_limit_of_long_rope(model.config)

    def logits(batch: PackedBatch) -> Tensor:
        return model(
            input_ids=batch.input_ids,
            attention_mask=layer_masks(model.config, context_mask(batch.document_ids)),
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits[0]

    with _named_errors(model.config, advice), _short_window(model):
        _require_equal_rows(logits, model, 0, advice)


def require_text_model(config: PreTrainedConfig) -> None:
    """Refuse models of images and sounds beside text, before anything is built for them.

    Raises:
        ValueError: the size of the vocabulary or of hidden states is not the configuration's own.
    """
    if missing := [name for name in ("vocab_size", "hidden_size") if not hasattr(config, name)]:
        raise ValueError(
            f"expected a model of text alone, whose configuration has {missing[0]}, found {config.model_type}: set "
            "predictor.backbone.path to a model of text alone"
        )


def require_finite(embeddings: Tensor) -> None:
    """Refuse a broken base model before anything is built for it.

    Args:
        embeddings: `[V, H]`, of its tokens.

    Raises:
        ValueError: an entry is NaN or infinite.
    """
    if embeddings.device.type != "meta" and not embeddings.isfinite().all():
        raise ValueError(f"expected finite embeddings of the base model, found a NaN or infinity: {ADVICE}")


def _say_limit_of_long_rope(config: PreTrainedConfig) -> None:
    """Its configuration promises more positions, and `max_positions` explains the limit."""
    limit = long_rope_positions(config)
    if limit is not None and limit < config.max_position_embeddings:
        warnings.warn(
            f"texts of {config.model_type} have at most {limit} positions, because RoPE of the type longrope changes "
            "all keys beyond: for longer ones set predictor.backbone.path to a model with another type of RoPE",
            stacklevel=2,
        )


def _batch(model: PreTrainedModel, window_length: int = 0, seed: int = 0) -> PackedBatch:
    """One row of two documents, with two windows in the second."""
    config: Any = model.config.get_text_config()
    beyond_window = (getattr(config, "sliding_window", None) or 0) + SECOND_LENGTH // 2
    second = SECOND_LENGTH if beyond_window > MAX_LENGTH else max(SECOND_LENGTH, beyond_window)
    limit = max_positions(model.config)
    if limit is not None:
        second = max(min(second, limit - window_length), 3)
    lengths = torch.tensor([FIRST_LENGTH, second])
    generator = torch.Generator().manual_seed(seed)
    # Not the token 0, whose embedding is often a row of zeros.
    ids = torch.randint(min(1, config.vocab_size - 1), config.vocab_size, (1, int(lengths.sum())), generator=generator)
    documents = torch.repeat_interleave(lengths).unsqueeze(0)
    positions = torch.cat([torch.arange(int(length)) for length in lengths]).unsqueeze(0)
    starts = torch.tensor([[FIRST_LENGTH + 1 + second // 3, FIRST_LENGTH + second - 1]])
    return PackedBatch(ids, documents, positions, starts, torch.ones_like(ids, dtype=torch.bool)).to(model.device)


def _require_own_logits(network: PredictorNetwork) -> None:
    model = network.base_model
    contexts: list[Callable[[], AbstractContextManager[None]]] = [nullcontext]
    if needs_eager_attention(model):
        contexts.append(partial(_exchanged_attention, model, register_eager_attention(in_float64=True)))
    elif not model._supports_attention_backend:
        contexts.append(partial(_exchanged_attention, model, register_attention()))

    def logits(batch: PackedBatch) -> Tensor:
        return network.logits(network.encode(batch).hidden)[0]

    _require_equal_rows(logits, model, _window_length(network), ADVICE, contexts)


def _require_equal_rows(
    logits: Callable[[PackedBatch], Tensor],
    model: PreTrainedModel,
    window_length: int,
    advice: str,
    contexts: Sequence[Callable[[], AbstractContextManager[None]]] = (nullcontext,),
) -> None:
    """Compare logits of packed rows with the model's own, in each of these contexts.

    Args:
        logits: makes those `[S, V]` of a row.
        model: the base model.
        window_length: L.
        advice: what to do if they differ.
        contexts: in which `logits` is called.
    """
    for seed in range(NUM_ROWS):
        batch = _batch(model, window_length, seed)
        expected = _own_logits(model, batch)
        for context in contexts:
            with context():
                found = logits(batch)
            _require_equal(found, expected, model, advice)


@contextmanager
def _short_window(model: PreTrainedModel) -> Iterator[None]:
    """With a sliding window of `SHORT_WINDOW`, if the model's own is longer and read from its configuration."""
    config: Any = model.config
    own = config.sliding_window if has_sliding_window(config) else 0
    if own <= SHORT_WINDOW:
        yield
        return
    try:
        config.sliding_window = SHORT_WINDOW
        batch = _batch(model)
        shorter = _own_logits(model, batch)
        config.sliding_window = own
        if not torch.equal(_own_logits(model, batch), shorter):
            config.sliding_window = SHORT_WINDOW
        yield
    finally:
        config.sliding_window = own


def _own_logits(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """`[S, V]`: those of the model's own forward pass on each document alone."""
    documents = [batch.input_ids[:, batch.document_ids[0] == document] for document in (0, 1)]
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in documents])


def _require_equal(found: Tensor, expected: Tensor, model: PreTrainedModel, advice: str) -> None:
    """Compare logits `[S, V]` of a packed row."""
    kind = model.config.model_type
    if not found.isfinite().all():
        raise ValueError(f"expected finite logits of the base model ({kind}), found a NaN or infinity: {advice}")
    for one in (slice(None, FIRST_LENGTH), slice(FIRST_LENGTH, None)):
        difference = _difference(found[one], expected[one])
        if difference > TOLERANCES[model.dtype]:
            raise ValueError(
                f"expected the logits of the base model ({kind}), found others in packed rows, which differ by "
                f"{difference:.2g} of their standard deviation: this type of model is not supported, {advice}"
            )


@contextmanager
def _exchanged_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """With another attention function, as in decoding.

    A model that chooses its own code by the name of the function does something else then, which no error shows, and so
    may one whose eager attention takes arguments that ours does not know.
    """
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _window_length(network: PredictorNetwork) -> int:
    return min(network.config.window_length, MAX_WINDOW)


def _auxiliaries(network: PredictorNetwork, batch: PackedBatch) -> Tensor:
    """`[1, 2, L]`, of the two windows."""
    length = _window_length(network)
    auxiliaries = torch.linspace(0.1, 0.9, 2 * length, dtype=torch.float64, device=batch.input_ids.device)
    return auxiliaries.view(1, 2, length)


def _require_visible_tokens_alone(network: PredictorNetwork, batch: PackedBatch, kind: str) -> None:
    """Exchange what the first window must not see: the other document, later tokens, the other window."""
    auxiliaries = _auxiliaries(network, batch)
    start = int(batch.window_starts[0, 0])
    visible = torch.zeros_like(batch.completion_mask)
    visible[0, FIRST_LENGTH:start] = True
    shifted = 1 + batch.input_ids % (network.base_model.config.get_text_config().vocab_size - 1)
    first_tokens = batch.input_ids.gather(1, batch.window_starts)
    exchanged = auxiliaries.clone()
    exchanged[:, 1] = 1 - exchanged[:, 1]
    first, second = (
        network.slot_logits(network.slot_hidden(network.encode(tokens), u, first_tokens))[0, 0]
        for tokens, u in (
            (batch, auxiliaries),
            (batch._replace(input_ids=batch.input_ids.where(visible, shifted)), exchanged),
        )
    )
    difference = _difference(second, first)
    if difference > TOLERANCES[network.base_model.dtype]:
        raise ValueError(
            f"expected slots that see the text before them alone, found that other tokens change their logits in "
            f"{kind} by {difference:.2g} of their standard deviation: this type of model is not supported, {ADVICE}"
        )


def _require_slots_as_under_a_mask(network: PredictorNetwork, batch: PackedBatch, kind: str) -> None:
    """A back-end replaces the model's attention, and with it whatever else the model does there."""
    auxiliaries, context = _auxiliaries(network, batch), network.encode(batch)
    first_tokens = batch.input_ids.gather(1, batch.window_starts)
    with _slots_as_tokens(network, batch):
        found = network.slot_logits(network.slot_hidden(context, auxiliaries, first_tokens))
        with _attention(network, AttentionChoice(network.student_model, (Dense(),), is_logged=False)):
            expected = network.slot_logits(network.slot_hidden(context, auxiliaries, first_tokens))
    difference = _difference(found, expected)
    if difference > TOLERANCES[network.base_model.dtype]:
        raise ValueError(
            f"expected plain softmax attention, found that slots of {kind} differ from those under a mask by "
            f"{difference:.2g} of their standard deviation: this type of model is not supported, {ADVICE}"
        )


@contextmanager
def _slots_as_tokens(network: PredictorNetwork, batch: PackedBatch) -> Iterator[None]:
    """Slots get embeddings of the row's tokens.

    Their own have random weights before training. In bfloat16, those of SmolLM2 then differ by 0.03 to 0.11 from
    rounding alone, by the draw of the weights, and tokens by 0.03.
    """

    def exchange(module: nn.Module, args: tuple[Tensor], slots: Tensor) -> Tensor:
        num_slots = slots.shape[:-1].numel()
        ids = batch.input_ids[0, torch.arange(num_slots, device=slots.device) % batch.input_ids.shape[1]]
        return network.student_embed(ids).view(slots.shape).to(slots.dtype)

    handle = network.slot_encoder.register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _attention(network: PredictorNetwork, choice: AttentionChoice) -> Iterator[None]:
    """Another choice of the attention of windows inside the block."""
    before, network.attention = network.attention, choice
    try:
        yield
    finally:
        network.attention = before


def _require_positions(network: PredictorNetwork, batch: PackedBatch, kind: str) -> None:
    """Adapters act on the last positions of a call, so their input must be `[rows, positions, features]`.

    A base model without adapters has no such layer.
    """
    layers = {
        name: module for name, module in network.base_model.named_modules() if isinstance(module, GatedLoraLinear)
    }
    num_positions, flattened = batch.input_ids.shape[1], set[str]()
    hooks = []
    for name, layer in layers.items():

        def record(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            if inputs[0].shape[:2] != (1, num_positions) or inputs[0].ndim != 3:
                flattened.add(name)

        hooks.append(layer.register_forward_pre_hook(record))
    try:
        network.encode(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if flattened:
        suited = sorted({name.rpartition(".")[2] for name in layers} - {name.rpartition(".")[2] for name in flattened})
        raise ValueError(
            f"expected adapters on layers that read [rows, positions, features], found {min(flattened)} of {kind}, "
            f"which does not: set predictor.lora.target_modules to [{', '.join(suited)}] or fewer"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """The root mean square of differences, as a fraction of the standard deviation of what is expected."""
    scale = expected.float().std().clamp_min(1e-6)
    return float((found.float() - expected.float()).square().mean().sqrt() / scale)


@contextmanager
def _named_errors(config: PreTrainedConfig, advice: str = ADVICE) -> Iterator[None]:
    """Any error of a model that takes no masks, no positions or no cache of ours, as one line."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("expected "):
            raise
        raise _unsupported(config, error, advice) from error
    except (LookupError, AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise _unsupported(config, error, advice) from error


def _unsupported(config: PreTrainedConfig, error: Exception, advice: str) -> ValueError:
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    others = sorted(set(types) - {FULL, SLIDING})
    layers = f" with layers of type {', '.join(others)}" if others else ""
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        "expected a base model that takes masks, positions and a cache of keys and values, found "
        f"{config.model_type}{layers}, which fails with {type(error).__name__}: {reason}: {advice}"
    )
