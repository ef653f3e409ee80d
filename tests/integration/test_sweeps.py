"""Every study of the repository can be run: classes, paths and budgets of both versions are correct."""

from pathlib import Path

import pytest

from ptp_lightning.sweeps.run import validate_choices
from ptp_lightning.sweeps.study import load_study, path_from_study
from ptp_lightning.sweeps.training_run import build, fit_arguments, override_arguments, read_configuration
from ptp_lightning.sweeps.worker import trial_arguments
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_configs import SHRUNKEN

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "sweeps").glob("*.yaml"))
NAMES = {
    "as_in_the_paper",
    "auxiliary_sampling",
    "best_of",
    "cdf_order",
    "crossing_embeddings",
    "crossing_losses",
    "crossing_overlap",
    "depth",
    "embeddings",
    "gate_rank",
    "joint",
    "losses",
    "objective",
    "what_u_is_worth",
    "window",
}
MARKOV = {"model_type": "llama", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "max_position_embeddings": 128, "bos_token_id": 8}  # fmt: skip
MOST_QUICK_TRIALS = 20


def test_there_is_a_study_for_each_question() -> None:
    assert {path.stem for path in STUDIES} == NAMES


@one_in(2, path=STUDIES, version=["quick", "full"], ids=lambda value: Path(value).stem)
def test_every_path_of_a_study_exists(path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(path, full=version == "full")
    validate_choices(study, path_from_study(path, study.base), {})
    for preparation in study.prepare:
        written = read_configuration(fit_arguments(path_from_study(path, preparation.config), preparation.overrides))
        assert written["model"]["init_args"]["output"] == preparation.output


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_choice_of_a_study_can_be_built(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that do not fit would be found out only when their trial begins."""
    monkeypatch.chdir(ROOT)
    study = load_study(path, full=False)
    network = SHRUNKEN if "gated_lora" in study.base else MARKOV
    small = {"model.init_args.predictor.backbone": {"path": "embedded", "from_config": network}}
    for parameters in study.covering_points():
        arguments = trial_arguments(study, path_from_study(path, study.base), {}, parameters, 0)
        kept = [argument for argument in arguments if ".backbone." not in argument]
        build([*kept, *override_arguments(small), f"--trainer.logger.init_args.save_dir={tmp_path}"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_quick_version_is_small_and_needs_no_data(path: Path) -> None:
    study = load_study(path, full=False)
    assert len(study.points()) <= MOST_QUICK_TRIALS
    assert study.published is None  # it is not what the paper measured
    base = read_configuration(fit_arguments(str(path.parent / study.base)))
    assert "PickUps" not in str(base["data"])
