"""Settings under flat names."""

from typing import Any

from ptp_lightning.training.hyperparameters import flat_settings


def component(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"ptp_lightning.somewhere.{name}", "init_args": arguments}


def test_components_have_the_names_of_their_classes_and_paths_are_short() -> None:
    predictor = {
        "backbone": {"path": "embedded", "from_config": {"hidden_size": 32}},
        "correction": component("DecoderRefiner", num_layers=1),
        "lora": {"rank": 2, "targets": ["q", "v"]},
        "draft_vocabulary": None,
    }
    config = {
        "seed_everything": 3,
        "model": component("DistillationModule", predictor=predictor, optimizer={"learning_rate": 0.5}),
        "data": component("StreamingCorpus", row_length=64, parts=[{"source": component("JsonLines"), "weight": 1.0}]),
        "trainer": {"max_steps": 9, "logger": component("Logger"), "callbacks": [component("RunText")]},
        "checkpoint": {"save_last": True},
    }
    assert flat_settings(config) == {
        "seed_everything": 3,
        "model": "DistillationModule",
        "backbone.path": "embedded",
        "backbone.hidden_size": 32,
        "correction": "DecoderRefiner",
        "correction.num_layers": 1,
        "lora.rank": 2,
        "lora.targets": "q, v",
        "optimizer.learning_rate": 0.5,
        "data": "StreamingCorpus",
        "data.row_length": 64,
        "data.parts.0.source": "JsonLines",
        "data.parts.0.weight": 1.0,
        "max_steps": 9,
    }


def test_equal_short_names_are_told_apart() -> None:
    config = {"model": component("Module", rank=1, predictor={"rank": 2}), "data": None, "trainer": {}}
    assert flat_settings(config) == {"model": "Module", "rank": 1, "model.init_args.predictor.rank": 2}


def test_what_people_compare_comes_first() -> None:
    predictor = {
        "backbone": {"path": "embedded"},
        "window_length": 8,
        "lora": {"rank": 2},
        "correction": component("MarkovHead", rank=3),
        "objective": component("OneHotObjective"),
    }
    model = component(
        "DistillationModule",
        predictor=predictor,
        optimizer={"name": "adamw", "learning_rate": 0.5},
        loss=component("CrossEntropy", chunk_size=4),
    )
    config = {
        "seed_everything": 3,
        "model": model,
        "data": component("Data", batch_size=2),
        "trainer": {"max_steps": 9},
    }
    assert list(flat_settings(config)) == [
        *("model", "objective", "loss", "correction", "optimizer.learning_rate", "lora.rank", "window_length"),
        *("backbone.path", "max_steps", "data.batch_size"),
        *("seed_everything", "correction.rank", "optimizer.name", "loss.chunk_size", "data"),
    ]
