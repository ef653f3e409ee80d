"""Studies of tiny trainings on a Markov chain, for tests."""

from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import CategoricalDistribution

from ptp_lightning.sweeps.budget import Budget
from ptp_lightning.sweeps.queue import TrialQueue
from ptp_lightning.sweeps.run import open_study
from ptp_lightning.sweeps.storage import open_storage
from ptp_lightning.sweeps.study import Study, load_study
from ptp_lightning.sweeps.worker import Worker

CONFIG = Path(__file__).parents[2] / "configs" / "markov_categorical.yaml"
TOKENS_PER_STEP = 4 * 2 * 4  # rows, windows, window length
STEPS, TOKENS = 4, 4 * TOKENS_PER_STEP
METRIC = "val/correct_tokens"
INDEPENDENT = {"model.init_args.predictor.objective": "ptp_lightning.models.IndependentObjective"}
UNSOUND = {"model.init_args.loss": "ptp_lightning.losses.BinaryCrossEntropy"}  # detected when the module is built
ENTROPY = "data.init_args.series.init_args.entropy"


def plain_study(**changes: Any) -> dict[str, Any]:
    """The content of a study's file: two objectives, one seed, four steps."""
    return {
        "title": "tiny",
        "base": str(CONFIG),
        "budget": {"steps": STEPS, "tokens": TOKENS, "validations": 2},
        "overrides": {
            "trainer.num_sanity_val_steps": 0,
            "data.init_args.batch_size": 4,
            "data.init_args.num_windows": 2,
            "data.init_args.eval_rows": 16,
            "model.init_args.predictor.backbone.from_config.hidden_size": 16,
            "model.init_args.predictor.backbone.from_config.intermediate_size": 32,
        },
        "variants": {"objective": {"categorical": {}, "independent": INDEPENDENT}},
    } | changes


def write_study(folder: Path, **changes: Any) -> Path:
    """Write a study's file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(plain_study(**changes), sort_keys=False))
    return path


def letters(*, seeds: tuple[int, ...] = (0,), **changes: Any) -> Study:
    """A study of the points a and b, without training."""
    space = (
        {} if changes.keys() & {"variants", "settings"} else {"settings": {"x": CategoricalDistribution(["a", "b"])}}
    )
    usual = {"title": "letters", "base": "x.yaml", "budget": Budget(4, 8), "seeds": list(seeds)}
    return Study(**(usual | space | changes))


def worker_for(folder: Path, messages: list[str], **changes: Any) -> Worker:
    """A worker of the tiny study with these changes, whose points are enqueued."""
    study = load_study(write_study(folder, **changes), full=True)
    storage = open_storage(str(folder / "study.journal"), create=True)
    queue = TrialQueue(study, open_study(study, "tiny", storage), storage)
    queue.fill()
    return Worker(study, queue, str(CONFIG), {}, folder, messages.append)
