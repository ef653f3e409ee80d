"""Contenders: everything that answers in an evaluation, our decoders and the library's, behind one call."""

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
from ptp_lightning.models.network import PredictorNetwork

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTOREGRESSIVE, SPECULATIVE, PARTIAL_QUADRATIC = "autoregressive", "speculative", "partial_quadratic"
TRANSFORMERS, PROMPT_LOOKUP = "transformers", "prompt_lookup"
CONTENDERS = (AUTOREGRESSIVE, TRANSFORMERS, PROMPT_LOOKUP, SPECULATIVE, PARTIAL_QUADRATIC)
NUM_LOOKED_UP = 10


@dataclass(frozen=True)
class Answer:
    """What a contender gives.

    Attributes:
        token_ids: the new tokens.
        num_calls: forward passes of the base model, and of a student's copy.
        seconds: wall-clock time from the tokenised prompt to the last token.
        phases: seconds of each phase, where the contender tells.
        correct_per_cycle: see `Decoded`.
        drafted_per_cycle: see `Decoded`.
    """

    token_ids: list[int]
    num_calls: int
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)
    correct_per_cycle: list[int] = field(default_factory=list)
    drafted_per_cycle: list[int] = field(default_factory=list)


class Contender(ABC):
    """Continues a prompt."""

    name: str
    exact: bool
    """Whether the same seed gives the text of our autoregressive decoder."""

    @abstractmethod
    def answer(self, prompt: Sequence[int], settings: GenerationSettings) -> Answer:
        """The continuation of a prompt's token ids."""


class OurDecoder(Contender):
    """One of `DECODERS`.

    Args:
        name: of the decoder.
        predictor: in eval mode.
        slot_budget: of partial quadratic decoding; part of the contender's name.
    """

    exact = True

    def __init__(self, name: str, predictor: PredictorNetwork, slot_budget: int | None = None) -> None:
        self.name = name if slot_budget is None else name_of_budget(slot_budget)
        self._decode = DECODERS[name]
        self._predictor = predictor
        self._changes = {} if slot_budget is None else {"slot_budget": slot_budget}

    def answer(self, prompt: Sequence[int], settings: GenerationSettings) -> Answer:
        """See `Contender.answer`."""
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
        )


class LibraryGenerate(Contender):
    """`transformers.generate` of the plain base model, which knows neither adapter nor auxiliaries.

    Args:
        name: of the contender.
        model: the base model.
        options: of `generate`.
    """

    exact = False

    def __init__(self, name: str, model: PreTrainedModel, **options: Any) -> None:
        self.name = name
        self._model = model
        self._options = options

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], settings: GenerationSettings) -> Answer:
        """See `Contender.answer`."""
        assert isinstance(settings.seed, int)
        torch.manual_seed(settings.seed)
        input_ids = torch.tensor([list(prompt)], device=self._model.device)
        with _counted_calls(self._model) as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about generation settings that the arguments replace
            begin = perf_counter()
            output = self._model.generate(  # pyright: ignore[reportCallIssue]
                input_ids, attention_mask=torch.ones_like(input_ids), **_as_arguments(settings), **self._options
            )
            token_ids = output[0, len(prompt) :].tolist()
            seconds = perf_counter() - begin
        return Answer(token_ids, calls[0], seconds)


def name_of_budget(slot_budget: int) -> str:
    """Of partial quadratic decoding with so many slots a call."""
    return f"{PARTIAL_QUADRATIC}_{slot_budget}"


def make_contenders(
    names: Sequence[str], predictor: PredictorNetwork, plain: PreTrainedModel | None, budgets: Sequence[int]
) -> list[Contender]:
    """The contenders of these names, the autoregressive decoder first.

    Args:
        names: among `CONTENDERS`.
        predictor: in eval mode.
        plain: the base model without an adapter, if one of the library's is asked for.
        budgets: slots of partial quadratic decoding; each is a contender of its own.
    """
    contenders: list[Contender] = [OurDecoder(AUTOREGRESSIVE, predictor)]
    for name in names:
        if name == PARTIAL_QUADRATIC:
            contenders += [OurDecoder(name, predictor, budget) for budget in budgets]
        elif name == TRANSFORMERS:
            assert plain is not None
            contenders.append(LibraryGenerate(name, plain))
        elif name == PROMPT_LOOKUP:
            assert plain is not None
            contenders.append(LibraryGenerate(name, plain, prompt_lookup_num_tokens=NUM_LOOKED_UP))
        elif name != AUTOREGRESSIVE:
            contenders.append(OurDecoder(name, predictor))
    return contenders


def _as_arguments(settings: GenerationSettings) -> dict[str, Any]:
    """The settings in the words of `transformers`; its order is temperature, top-k, top-p too."""
    sampling = settings.sampling
    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    ends = sorted(settings.end_of_text)
    return {
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": ends or None,
        "pad_token_id": ends[0] if ends else 0,
        **chosen,
    }


@contextmanager
def _counted_calls(model: PreTrainedModel) -> Iterator[list[int]]:
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    hook = model.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()
