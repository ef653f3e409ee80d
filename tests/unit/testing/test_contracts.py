"""Contract tests find what is wrong with a part, and say it in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ptp_lightning import testing
from ptp_lightning.auxiliary_strategies import AuxiliaryStrategy, StudentProbe
from ptp_lightning.data import PlainText, RawRow, RowSource, ShardSpec, TokenDocument
from ptp_lightning.losses import CrossEntropy, UniformWeights
from ptp_lightning.models import (
    AuxiliaryFeatures,
    CategoricalObjective,
    CosineFeatures,
    GatedLoraStudent,
    PredictorNetwork,
    TokenConditionedHead,
)
from ptp_lightning.models.context import Context
from ptp_lightning.training import TeacherWindows, WindowSample
from tests.helpers.byte_tokenizer import byte_tokenizer


@dataclass(frozen=True)
class PowerFeatures(AuxiliaryFeatures):
    """A part of one's own."""

    degree: int = 4
    scale: float = 1.0
    rounded: bool = False
    stated: float = 1e-6

    @property
    def num_features(self) -> int:
        return self.degree

    @property
    def resolution(self) -> float:
        return self.stated

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        auxiliaries = auxiliaries.float().double() if self.rounded else auxiliaries
        exponents = torch.arange(1, self.degree + 1, device=auxiliaries.device)
        return (self.scale * auxiliaries[..., None] ** exponents * (2 * exponents + 1).sqrt()).float()


@dataclass(frozen=True)
class Misshapen(CosineFeatures):
    def __call__(self, auxiliaries: Tensor) -> Tensor:
        return super().__call__(auxiliaries)[..., :-1]


@dataclass(frozen=True)
class Unknown(CategoricalObjective):
    name: ClassVar[str] = "mine"


@dataclass(frozen=True)
class Optimist(CategoricalObjective):
    def correct_probability(self, *arguments: Any) -> Tensor:
        return torch.ones_like(super().correct_probability(*arguments))


@dataclass(frozen=True)
class TrainsNothing(GatedLoraStudent):
    trains_base: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Eager(TokenConditionedHead):
    def build(self, *arguments: Any) -> Any:
        head = super().build(*arguments)
        torch.nn.init.ones_(next(head.parameters()))
        torch.nn.init.ones_(list(head.parameters())[-1])
        return head


@dataclass(frozen=True)
class WrongGradients(CrossEntropy):
    def with_gradients(self, logits: Tensor, token_ids: Tensor, target: Any, out: Tensor) -> Tensor:
        nats = super().with_gradients(logits, token_ids, target, out)
        out.mul_(2)
        return nats


@dataclass(frozen=True)
class Doubled(UniformWeights):
    def relative(self, correct_probability: Tensor) -> Tensor:
        return 2 * super().relative(correct_probability)


class AnyAuxiliaries(TeacherWindows):
    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        sample = super().sample(predictor, context, generator)
        return sample._replace(auxiliaries=sample.auxiliaries.flip(-1))


class Constant(AuxiliaryStrategy):
    def draw(self, lower: Tensor, upper: Tensor, generator: torch.Generator, probe: StudentProbe) -> Tensor:
        return lower


class Letters(RowSource):
    """Rows that resume at their beginning."""

    def rows(self, key: str, shard: ShardSpec, position: Mapping[str, Any] | None = None) -> Iterator[RawRow]:
        for number in range(shard.rank, 6, shard.world_size):
            yield RawRow(number, f"row {number}", str(number).encode(), {})

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        return {"text": row.content}


@dataclass(frozen=True)
class NoEnd(PlainText):
    def document(self, row: Mapping[str, Any], tokenizer: Any) -> TokenDocument:
        whole = super().document(row, tokenizer)
        return TokenDocument(whole.token_ids[:-1], whole.completion_mask[:-1])


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (
            lambda: testing.check_features(PowerFeatures(scale=2.0)),
            "square between 0.7 and 1.02 .* found 2",
        ),
        (lambda: testing.check_features(PowerFeatures(rounded=True)), "of u rounded to float32 before the map"),
        (lambda: testing.check_features(PowerFeatures(stated=1e-15)), "expected different features of any u and v"),
        (lambda: testing.check_features(Misshapen(4)), r"expected the shape \(4,\), found \(3,\)"),
        (lambda: testing.check_objective(Unknown()), "expected a name out of .*, found 'mine'"),
        (lambda: testing.check_objective(Optimist()), "correct_probability is not how often"),
        (lambda: testing.check_student(TrainsNothing()), "expected trains_base to say whether"),
        (lambda: testing.check_correction(Eager()), "an untrained correction to change no logits"),
        (lambda: testing.check_loss(WrongGradients()), "gradients of with_gradients"),
        (lambda: testing.check_position_weights(Doubled()), "expected 1 for the first slot"),
        (lambda: testing.check_window_source(AnyAuxiliaries()), r"expected pick\(auxiliaries, teacher\) == token_ids"),
        (lambda: testing.check_auxiliary_strategy(Constant()), "expected other u for another generator"),
        (lambda: testing.check_row_source(Letters()), "expected the rows after row 0 when reading resumes"),
        (lambda: testing.check_rendering(NoEnd(), [{"text": "a"}], byte_tokenizer()), "expected the end-of-text token"),
    ],
)
def test_what_is_wrong(check: Callable[[], None], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check()


def test_a_part_that_is_right() -> None:
    testing.check_features(PowerFeatures())


def test_a_part_that_yaml_cannot_name() -> None:
    @dataclass(frozen=True)
    class Local(CosineFeatures):
        pass

    with pytest.raises(AssertionError, match="expected Local at the top of a module"):
        testing.check_features(Local())
