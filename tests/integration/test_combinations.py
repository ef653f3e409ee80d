"""Every choice that the documentation names, by YAML alone: two steps of training and a validation, twice the same."""

import re
import sys
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ptp_lightning.auxiliary_strategies import AuxiliaryStrategy
from ptp_lightning.cli import main
from ptp_lightning.data.rendering import Rendering
from ptp_lightning.data.streaming.row_source import RowSource
from ptp_lightning.losses import Loss, PositionWeights
from ptp_lightning.models.correction.correction import Correction
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from ptp_lightning.models.slots.objectives import Objective
from ptp_lightning.models.students import Student
from ptp_lightning.training.windows.window_source import WindowSource
from tests.helpers.tiny_configs import CORPUS_LINE, shrink

ROOT = Path(__file__).parents[2]
GATED_LORA = ROOT / "configs" / "gated_lora.yaml"

NUM_FAST = 13
"""Combinations that CI tries; the others are slow."""
Choice = tuple[str, dict[str, Any]]
"""A class by its name, and its arguments."""

LOSSES: dict[str, list[str]] = {
    "OneHotObjective": ["CrossEntropy", "BinaryCrossEntropy"],
    "CategoricalObjective": [
        *("KullbackLeibler", "ReverseKullbackLeibler", "JensenShannon", "TotalVariation", "CrossEntropy"),
        *("NegativeLogOverlap", "MixedLoss"),
    ],
    "IndependentObjective": ["KullbackLeibler", "CrossEntropy"],
    "SequentialObjective": ["KullbackLeibler", "CrossEntropy"],
}
FEATURES = [
    *("RawFloatFeatures", "BinaryFeatures", "FloatBitFeatures", "ArithmeticFeatures", "ThresholdFeatures"),
    *("CosineFeatures", "FourierFeatures", "SawtoothFeatures", "LinearInterpolationFeatures", "RoundingFeatures"),
    *("MultiscaleHatFeatures", "ScaleFreeCosineFeatures"),
]
STRATEGIES: list[Choice] = [
    ("UniformInInterval", {}),
    ("BetaInInterval", {"b": 0.5}),
    ("ErrorSeekingInInterval", {"strength": 0.5}),
]
STUDENTS = ["GatedLoraStudent", "FullCopyStudent"]
ORDERS = ["vocabulary", "descending", "embedding"]
RANGE = {"min_temperature": 0.5, "max_temperature": 0.9, "top_k": [5, 50]}
HEADS: list[Choice] = [
    ("TokenConditionedHead", {"intermediate_size": 16}),
    ("MarkovHead", {"rank": 4, "order": "parallel"}),
    ("", {}),  # none
]
WEIGHTS: list[Choice] = [("UniformWeights", {}), ("GeometricWeights", {"decay": 0.8}), ("AcceptedLengthWeights", {})]


def as_yaml(package: str, choice: Choice) -> dict[str, Any]:
    name, arguments = choice
    return {"class_path": f"ptp_lightning.{package}.{name}", "init_args": arguments}


REFINER = as_yaml("models", ("DecoderRefiner", {"num_layers": 1, "num_refinement_steps": 2}))
MIXTURE = [
    {"weight": 0.1, "loss": as_yaml("losses", ("CrossEntropy", {}))},
    {"weight": 0.9, "loss": as_yaml("losses", ("TotalVariation", {}))},
]


def sources() -> list[dict[str, Any]]:
    drawn = [{"strategy": as_yaml("auxiliary_strategies", strategy)} for strategy in STRATEGIES]
    of_data = [as_yaml("training", ("DatasetWindows", arguments)) for arguments in drawn]
    of_teacher = [as_yaml("training", ("TeacherWindows", arguments)) for arguments in [{}, *drawn]]
    of_student = as_yaml("training", ("StudentWindows", {}))
    mixture = {
        "sources": [of_data[0], of_student],
        "initial_weights": [1.0, 0.0],
        "final_weights": [0.0, 1.0],
        "schedule_end": 0.5,
    }
    return [*of_teacher, *of_data, of_student, as_yaml("training", ("MixtureWindows", mixture))]


def combinations() -> list[dict[str, Any]]:
    """As many runs as the longest list has entries, and every entry of every list in one of them."""
    pairs = [(objective, loss) for objective, losses in LOSSES.items() for loss in losses]
    number = max(len(pairs), 2 * len(FEATURES), len(sources()))
    columns = (pairs, FEATURES, sources(), STUDENTS, WEIGHTS, ORDERS)
    rows = list(zip(*map(cycle, columns), range(number), strict=False))
    return [
        {
            "predictor": {
                "objective": as_yaml("models", (objective, {"cdf_error": 0.1} if objective.startswith("Cat") else {})),
                "features": as_yaml("models", (features, {})),
                "head": "linear" if index < len(FEATURES) else "mlp",
                "student": as_yaml("models", (student, {})),
                # The divisors keep these apart from the lists of two and three entries.
                "correction": REFINER if index // 2 % 2 else head(index, objective),
                "draft_vocabulary": 300 if index % 3 == 1 else None,
                "sampling": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "order": order},
                "sampling_range": RANGE if index // 3 % 2 else None,
            },
            "loss": as_yaml("losses", (loss, {"terms": MIXTURE} if loss == "MixedLoss" else {})),
            "source": source,
            "position_weights": as_yaml("losses", weights),
            "num_drafts": 1 + index // 4 % 2,
        }
        for (objective, loss), features, source, student, weights, order, index in rows
    ]


def head(index: int, objective: str) -> dict[str, Any] | None:
    """The corrections without attention, in both orders, and none; a head needs the draft."""
    name, arguments = HEADS[index // 4 % len(HEADS)]
    return as_yaml("models", (name, arguments)) if name and objective != "IndependentObjective" else None


def named(combination: dict[str, Any]) -> str:
    """For pytest: the classes of a combination, without the words that all of a kind share."""
    names = re.findall(r"\.(\w+)'", str(combination))
    words = "Objective|Features|Windows|Student$|InInterval|Weights"
    return "-".join(dict.fromkeys(re.sub(words, "", name) for name in names))


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """configs/gated_lora.yaml, shrunken, with a logger and a checkpoint after two steps."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS_LINE * 400)
    path = shrink(GATED_LORA, corpus, tmp_path)
    config = yaml.safe_load(path.read_text())
    config["trainer"] |= {"fast_dev_run": False, "max_steps": 2, "val_check_interval": 2, "num_sanity_val_steps": 0}
    config["trainer"] |= {"callbacks": [], "log_every_n_steps": 1}
    path.write_text(yaml.safe_dump(config))
    return path


def fit(configuration: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train in `folder`; returns the folder of the run's logs."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", str(configuration)])
    main()
    return folder / "runs" / "gated_lora" / "version_0"


def changed(configuration: Path, combination: dict[str, Any]) -> Path:
    config = yaml.safe_load(configuration.read_text())
    arguments = config["model"]["init_args"]
    arguments["predictor"] |= combination["predictor"]
    arguments |= {name: value for name, value in combination.items() if name != "predictor"}
    configuration.write_text(yaml.safe_dump(config))
    return configuration


def final_weights(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def leaves(value: Any, path: str = "") -> set[str]:
    """Every number and name in nested mappings and lists, with its keys."""
    if isinstance(value, dict):
        return set().union(*(leaves(part, f"{path}.{key}") for key, part in value.items()))
    if isinstance(value, list):
        return set().union(*(leaves(part, path) for part in value))
    return {f"{path}: {value}"}


def test_every_choice_is_in_a_fast_test() -> None:
    assert leaves(combinations()) == leaves(combinations()[:NUM_FAST])


@pytest.mark.parametrize(
    "combination",
    [*combinations()[:NUM_FAST], *(pytest.param(one, marks=pytest.mark.slow) for one in combinations()[NUM_FAST:])],
    ids=named,
)
def test_two_steps(
    combination: dict[str, Any], configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = final_weights(fit(changed(configuration, combination), tmp_path / "run", monkeypatch))
    assert weights and all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())


@pytest.mark.parametrize(
    "combination",
    [
        # Slow: what differs between these is tried above, and the same code saves it.
        pytest.param(combinations()[3], marks=pytest.mark.slow),
        pytest.param(combinations()[6], marks=pytest.mark.slow),
        combinations()[8],
    ],
    ids=named,
)
def test_a_run_is_reproduced_by_the_configuration_it_saved(
    combination: dict[str, Any], configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(changed(configuration, combination), tmp_path / "first", monkeypatch)
    second = fit(first / "config.yaml", tmp_path / "second", monkeypatch)
    expected, found = final_weights(first), final_weights(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("kind", "package", "tried"),
    [
        (Objective, "models", LOSSES),
        (AuxiliaryFeatures, "models", FEATURES),
        (Student, "models", [*STUDENTS, "SharedStudent"]),  # the last one is teacher-free
        (Correction, "models", ["DecoderRefiner", *(name for name, _ in HEADS if name)]),
        (Loss, "losses", {loss for losses in LOSSES.values() for loss in losses}),
        (PositionWeights, "losses", [name for name, _ in WEIGHTS]),
        (AuxiliaryStrategy, "auxiliary_strategies", [name for name, _ in STRATEGIES]),
        (
            WindowSource,
            "training",
            [*{source["class_path"].rpartition(".")[2] for source in sources()}, "AnalyticWindows"],  # a known chain's
        ),
        (RowSource, "data", ["HubRows", "JsonLines", "TextRows"]),  # tests/unit/data tries them
        (Rendering, "data", ["Chat", "PlainText", "PromptAndCompletion"]),  # likewise
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_nothing_is_left_out(kind: type, package: str, tried: Any) -> None:
    """What can be chosen is tried here and named in the documentation."""
    module = import_module(f"ptp_lightning.{package}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, kind)]
    concrete = {value.__name__ for value in classes if not getattr(value, "__abstractmethods__", None)}
    assert concrete == set(tried)
    page = (ROOT / "docs" / "how_to" / "your_own_parts.md").read_text(encoding="utf-8")
    assert not [name for name in concrete if f"`{name}`" not in page]
