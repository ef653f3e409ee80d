"""The decoders of an evaluation behind one interface: this package's decoders, and the baselines of `transformers`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ptp_lightning.decoding import DECODERS, GenerationSettings
from ptp_lightning.decoding.timing import PhaseTimer
from ptp_lightning.evaluation.decoder_names import (
    AUTOREGRESSIVE,
    PARTIAL_QUADRATIC,
    PROMPT_LOOKUP,
    TRANSFORMERS,
)
from ptp_lightning.generation.comparison import generate_arguments
from ptp_lightning.models.network import PredictorNetwork

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_LOOKUP_TOKENS = 10


@dataclass(frozen=True)
class Answer:
    """The continuation of a prompt, and what it cost.

    Attributes:
        token_ids: the new tokens.
        num_calls: forward passes of the base model, and of a student's copy.
        seconds: wall-clock time from the tokenised prompt to the last token.
        phases: seconds by phase, if the decoder measures them.
        correct_per_cycle: see `Decoded`.
        drafted_per_cycle: see `Decoded`.
        committed_per_cycle: see `Decoded`.
    """

    token_ids: list[int]
    num_calls: int
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)
    correct_per_cycle: list[int] = field(default_factory=list)
    drafted_per_cycle: list[int] = field(default_factory=list)
    committed_per_cycle: list[int] = field(default_factory=list)


class Decoder(ABC):
    """Continues prompts.

    Attributes:
        name: in reports.
        is_exact: whether the same seed gives the text of this package's autoregressive decoder.
    """

    name: str
    is_exact: bool

    @abstractmethod
    def answer(self, prompt: Sequence[int], settings: GenerationSettings) -> Answer:
        """Continue the token ids of a prompt."""


class PredictorDecoder(Decoder):
    """One of `DECODERS`.

    Args:
        name: key in `DECODERS`.
        predictor: in eval mode.
        slot_budget: of partial quadratic decoding; part of the name in reports.
    """

    is_exact = True

    def __init__(self, name: str, predictor: PredictorNetwork, slot_budget: int | None = None) -> None:
        self.name = name if slot_budget is None else budget_name(slot_budget)
        self._decode = DECODERS[name]
        self._predictor = predictor
        self._changes = {} if slot_budget is None else {"slot_budget": slot_budget}

    def answer(self, prompt: Sequence[int], settings: GenerationSettings) -> Answer:
        """See `Decoder.answer`."""
        settings = replace(settings, **self._changes)
        begin = perf_counter()
        timer = PhaseTimer(device=self._predictor.base_model.device)
        (decoded,) = self._decode(self._predictor, [prompt], settings, None, timer=timer)
        seconds = perf_counter() - begin
        return Answer(
            decoded.token_ids,
            decoded.num_calls,
            seconds,
            timer.seconds,
            decoded.correct_per_cycle,
            decoded.drafted_per_cycle,
            decoded.committed_per_cycle,
        )


class TransformersDecoder(Decoder):
    """`transformers.generate` as people run it: the base model as it is loaded, without packed weights.

    Args:
        name: in reports.
        model: the base model, without an adapter.
        options: of `generate`.
    """

    is_exact = False

    def __init__(self, name: str, model: PreTrainedModel, **options: Any) -> None:
        self.name = name
        self._model = model
        self._options = options

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], settings: GenerationSettings) -> Answer:
        """See `Decoder.answer`."""
        assert isinstance(settings.seed, int)
        torch.manual_seed(settings.seed)
        input_ids = torch.tensor([list(prompt)], device=self._model.device)
        with _count_calls(self._model) as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about generation settings that the arguments replace
            begin = perf_counter()
            output = self._model.generate(  # pyright: ignore[reportCallIssue]
                input_ids, attention_mask=torch.ones_like(input_ids), **generate_arguments(settings), **self._options
            )
            token_ids = output[0, len(prompt) :].tolist()
            seconds = perf_counter() - begin
        return Answer(token_ids, calls[0], seconds)


def budget_name(slot_budget: int) -> str:
    """The name of partial quadratic decoding with this number of slots per call.

    >>> budget_name(16)
    'partial_quadratic_16'
    """
    return f"{PARTIAL_QUADRATIC}_{slot_budget}"


def make_decoders(
    names: Sequence[str], predictor: PredictorNetwork, base_model: PreTrainedModel | None, budgets: Sequence[int]
) -> list[Decoder]:
    """The decoders of these names, the autoregressive decoder first.

    Args:
        names: among `DECODER_NAMES`.
        predictor: in eval mode.
        base_model: without an adapter; needed for the baselines of `transformers`.
        budgets: slot budgets of partial quadratic decoding, each of which is a decoder.
    """
    decoders: list[Decoder] = [PredictorDecoder(AUTOREGRESSIVE, predictor)]
    for name in names:
        if name == PARTIAL_QUADRATIC:
            decoders += [PredictorDecoder(name, predictor, budget) for budget in budgets]
        elif name == TRANSFORMERS:
            assert base_model is not None
            decoders.append(TransformersDecoder(name, base_model))
        elif name == PROMPT_LOOKUP:
            assert base_model is not None
            decoders.append(TransformersDecoder(name, base_model, prompt_lookup_num_tokens=PROMPT_LOOKUP_TOKENS))
        elif name != AUTOREGRESSIVE:
            decoders.append(PredictorDecoder(name, predictor))
    return decoders


@contextmanager
def _count_calls(model: PreTrainedModel) -> Iterator[list[int]]:
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    hook = model.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()
