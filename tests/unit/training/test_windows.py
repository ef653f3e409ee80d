"""Window sources: the teacher's own samples against a naive loop, dataset windows on readable integers."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.auxiliary_strategies import BetaInInterval, ErrorSeekingInInterval
from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.context import Context
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.continuous_features import CosineFeatures
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution
from ptp_lightning.testing import check_window_source
from ptp_lightning.training.windows.dataset_windows import DatasetWindows
from ptp_lightning.training.windows.mixture_windows import MixtureWindows
from ptp_lightning.training.windows.student_windows import StudentWindows
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSample, WindowSource, until_end_of_text
from tests.helpers.tiny_models import TINY_MODELS

VOCAB_SIZE = 30
SAMPLING = SamplingConfig(temperature=0.8, top_k=12, top_p=0.9)
DOCUMENT_IDS = torch.tensor([[0] * 5 + [1] * 5 + [-1, -1], [0] * 12])
POSITION_IDS = torch.tensor([[*range(5), *range(5), 0, 1], [*range(12)]])
WINDOW_STARTS = torch.tensor([[1, 4, 8], [3, 6, 11]])


@cache
def make_predictor(family: str = "llama", sampling: SamplingConfig = SAMPLING) -> PredictorNetwork:
    """With a trained adapter, which must not take part in the teacher's samples."""
    config = PredictorConfig(features=CosineFeatures(4), lora=LoraSettings(rank=2), sampling=sampling, window_length=4)
    predictor = PredictorNetwork(config, TINY_MODELS[family](vocab_size=VOCAB_SIZE)).eval()
    for name, parameter in predictor.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return predictor


def make_batch() -> PackedBatch:
    input_ids = torch.randint(VOCAB_SIZE, DOCUMENT_IDS.shape, generator=torch.Generator().manual_seed(0))
    return PackedBatch(input_ids, DOCUMENT_IDS, POSITION_IDS, WINDOW_STARTS, DOCUMENT_IDS >= 0)


def sample_from(
    source: WindowSource, predictor: PredictorNetwork, end_of_text: int | None = None, seed: int = 0
) -> tuple[WindowSample, Context]:
    context = predictor.encode(make_batch(), end_of_text=end_of_text)
    return source.sample(predictor, context, torch.Generator().manual_seed(seed)), context


SOURCES: dict[str, WindowSource] = {
    "teacher": TeacherWindows(),
    "teacher, error-seeking": TeacherWindows(ErrorSeekingInInterval()),
    "dataset": DatasetWindows(),
    "dataset, Beta": DatasetWindows(BetaInInterval(0.5)),
    "student": StudentWindows(),
    "mixture": MixtureWindows([TeacherWindows(), DatasetWindows()], [1.0, 1.0]),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
class TestEverySource:
    @pytest.mark.parametrize(
        "sampling",
        [
            SAMPLING,
            SamplingConfig(),
            SamplingConfig(order="vocabulary"),
            SamplingConfig(temperature=0.8, top_k=12, top_p=0.9, order="embedding"),
            SamplingConfig(order="embedding"),
            SamplingConfig(temperature=0),
        ],
        ids=["truncated", "full", "vocabulary order", "embedding order, truncated", "embedding order", "greedy"],
    )
    def test_contract(self, source: WindowSource, sampling: SamplingConfig) -> None:
        check_window_source(source, make_predictor(sampling=sampling), make_batch())
        if not isinstance(source, StudentWindows):
            sample, _ = sample_from(source, make_predictor(sampling=sampling))
            assert torch.equal(sample.conditioning_ids, sample.token_ids)


class TestTeacherWindows:
    def test_a_strategy_draws_again_inside_the_intervals_of_the_same_tokens(self) -> None:
        plain, _ = sample_from(TeacherWindows(), make_predictor())
        again, _ = sample_from(TeacherWindows(BetaInInterval(0.5)), make_predictor())
        assert torch.equal(again.token_ids, plain.token_ids)
        assert not (again.auxiliaries == plain.auxiliaries).any()
        assert torch.equal(pick(again.auxiliaries, plain.teacher.materialize()), plain.token_ids)

    @pytest.mark.parametrize("family", TINY_MODELS)
    def test_equals_a_loop_without_cache(self, family: str) -> None:
        sample, _ = sample_from(TeacherWindows(), make_predictor(family))
        batch, teacher = make_batch(), TINY_MODELS[family](vocab_size=VOCAB_SIZE)
        auxiliaries = draw_auxiliaries((2, 3, 4), torch.Generator().manual_seed(0), "cpu")
        assert torch.equal(sample.auxiliaries, auxiliaries)
        for row, window in [(row, window) for row in range(2) for window in range(3)]:
            start = int(WINDOW_STARTS[row, window])
            begin = start - 1 - int(POSITION_IDS[row, start - 1])
            token_ids = batch.input_ids[row, begin:start].tolist()
            for position in range(4):
                with torch.no_grad():
                    logits = teacher(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]
                Q = SAMPLING.distribution(logits)
                token_ids.append(int(pick(auxiliaries[row, window, position], Q)))
                probabilities = sample.teacher.materialize().probabilities[row, window, position]
                torch.testing.assert_close(probabilities, Q.probabilities, atol=1e-5, rtol=1e-4)
                target = sample.target.materialize().probabilities[row, window, position]
                before_the_cut = SAMPLING.target().distribution(logits).probabilities
                torch.testing.assert_close(target, before_the_cut, atol=1e-5, rtol=1e-4)
            assert sample.token_ids[row, window].tolist() == token_ids[-4:], (row, window)
        assert sample.mask.all()

    def test_end_of_text_masks_the_rest(self) -> None:
        free, _ = sample_from(TeacherWindows(), make_predictor())
        # A window's second token that is not its first as well.
        row, window = (free.token_ids[..., 1] != free.token_ids[..., 0]).nonzero()[0].tolist()
        end_of_text = int(free.token_ids[row, window, 1])
        sample, _ = sample_from(TeacherWindows(), make_predictor(), end_of_text)
        assert torch.equal(sample.token_ids, free.token_ids)
        windows = (tensor.flatten(0, 1).tolist() for tensor in (sample.token_ids, sample.mask))
        for tokens, mask in zip(*windows, strict=True):
            length = tokens.index(end_of_text) + 1 if end_of_text in tokens else 4
            assert mask == [True] * length + [False] * (4 - length)
        assert sample.mask[row, window].tolist() == [True, True, False, False]

    def test_until_end(self) -> None:
        token_ids = torch.tensor([[7, 7, 1], [0, 5, 0], [5, 0, 3], [4, 5, 0]])
        assert until_end_of_text(token_ids, 0).int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
        assert until_end_of_text(token_ids, None).all()


class TestDatasetWindows:
    """A teacher of ten tokens that goes on with the next number or the one after it, nothing else."""

    def sample(
        self,
        input_ids: list[int],
        starts: list[int],
        document_ids: list[int] | None = None,
        completion_mask: list[int] | None = None,
    ) -> WindowSample:
        token_ids = torch.tensor([input_ids])
        documents = torch.zeros_like(token_ids) if document_ids is None else torch.tensor([document_ids])
        completion = documents >= 0 if completion_mask is None else torch.tensor([completion_mask]).bool()
        logits = torch.full((1, len(input_ids), 10), -torch.inf)
        for step in (1, 2):
            logits.scatter_(2, ((token_ids + step) % 10).unsqueeze(-1), 0.0)
        predictor: Any = SimpleNamespace(
            config=SimpleNamespace(window_length=4),
            base_model=SimpleNamespace(config=SimpleNamespace(vocab_size=10)),
            logits=lambda hidden: hidden,
        )
        batch = PackedBatch(token_ids, documents, torch.empty(0), torch.tensor([starts]), completion)
        context: Any = SimpleNamespace(batch=batch, hidden=logits, sampling=Sampler(SamplingConfig(order="vocabulary")))
        return DatasetWindows().sample(predictor, context, torch.Generator().manual_seed(0))

    def seen(self, sample: WindowSample) -> list[list[int]]:
        """The unmasked tokens of each window."""
        return [tokens[mask].tolist() for tokens, mask in zip(sample.token_ids[0], sample.mask[0], strict=True)]

    def test_the_text_itself(self) -> None:
        sample = self.sample([1, 2, 4, 5, 6, 8], starts=[1, 2])
        assert self.seen(sample) == [[2, 4, 5, 6], [4, 5, 6, 8]]
        assert torch.equal(pick(sample.auxiliaries, sample.teacher.materialize()), sample.token_ids)

    def test_auxiliaries_lie_in_the_interval_of_their_token(self) -> None:
        auxiliaries = self.sample([1, 2, 4, 5, 6, 8], starts=[1]).auxiliaries[0, 0]
        # 2 after 1 is the lower half of [0, 1), 4 after 2 the upper.
        assert (auxiliaries < 0.5).tolist() == [True, False, True, True]

    def test_teacher_of_every_position(self) -> None:
        teacher: TokenDistribution = self.sample([1, 2, 4, 5, 6, 8], starts=[2]).teacher.materialize()
        possible = [row.nonzero().flatten().tolist() for row in teacher.probabilities[0, 0]]
        assert possible == [[3, 4], [5, 6], [6, 7], [7, 8]]

    def test_ends_before_a_token_outside_the_support(self) -> None:
        sample = self.sample([1, 2, 3, 9, 1, 2], starts=[1, 2, 3, 4])
        # No u picks 9 after 3; the window that starts there is empty. Behind it the text goes on: 9, 0 or 1.
        assert self.seen(sample) == [[2, 3], [3], [], [1, 2]]
        assert (sample.auxiliaries >= 0).all() and (sample.auxiliaries < 1).all()

    def test_ends_with_its_document(self) -> None:
        sample = self.sample([1, 2, 3, 4, 5, 6, 7], starts=[1, 2, 4, 5], document_ids=[0, 0, 0, 1, 1, 1, 1])
        assert self.seen(sample) == [[2, 3], [3], [5, 6, 7], [6, 7]]

    def test_ends_with_the_row(self) -> None:
        assert self.seen(self.sample([1, 2, 3, 4, 5], starts=[2, 3, 4])) == [[3, 4, 5], [4, 5], [5]]

    def test_ends_before_padding(self) -> None:
        sample = self.sample([1, 2, 3, 4, 5], starts=[1, 2], document_ids=[0, 0, 0, -1, -1])
        assert self.seen(sample) == [[2, 3], [3]]

    def test_ends_before_a_prompt_token(self) -> None:
        sample = self.sample([1, 2, 3, 4, 5, 6], starts=[1, 2, 3], completion_mask=[0, 0, 1, 1, 0, 1])
        assert self.seen(sample) == [[], [3, 4], [4]]
