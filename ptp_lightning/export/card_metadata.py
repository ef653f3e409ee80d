"""The YAML front matter of model cards, with which the Hugging Face hub files and finds a repository."""

from __future__ import annotations

from typing import Any

from ptp_lightning.utils.local_paths import expanded
from ptp_lightning.utils.packaged_models import PACKAGED_MODELS
from ptp_lightning.utils.pretrained import EMBEDDED

METHOD_TAG = "parallel-token-prediction"
PIPELINE_TAG = "text-generation"
CORRECT_TOKENS = "correct_tokens"


def card_metadata(
    base_model: str,
    name: str,
    training: dict[str, Any],
    *,
    library_name: str,
    tags: list[str],
    license: str | None,
) -> str:
    """YAML, without the lines of dashes around it.

    Args:
        base_model: path of the base model. Left out if it is no id of the hub.
        name: of the repository.
        training: see `StoredPredictor`; `prefix_counts` become the mean number of correct tokens.
        library_name: the library that opens the repository.
        tags: besides the method's own.
        license: as the hub names it, "apache-2.0" for instance; left out if None.

    >>> print(card_metadata("embedded", "mine", {}, library_name="peft", tags=["lora"], license="apache-2.0"))
    library_name: peft
    license: apache-2.0
    pipeline_tag: text-generation
    tags:
    - parallel-token-prediction
    - lora
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type="validation",
            dataset_name="validation split of the training data",
            metric_type=CORRECT_TOKENS,
            metric_name=f"Correct tokens of a window of {window_length}",
            metric_value=round(value, 3),
        )
        for window_length, value in mean_correct_tokens(training)
    ]
    data = ModelCardData(
        base_model=hub_name(base_model),
        library_name=library_name,
        license=license,
        pipeline_tag=PIPELINE_TAG,
        tags=[METHOD_TAG, *tags],
        metrics=[CORRECT_TOKENS] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml().rstrip()


def mean_correct_tokens(training: dict[str, Any]) -> list[tuple[int, float]]:
    """The window length L and the mean number of correct tokens, 1 .. L; empty without a validation.

    >>> mean_correct_tokens({"prefix_counts": [0, 1, 2, 1]})
    [(3, 2.0)]
    """
    counts = training.get("prefix_counts") or []
    num_windows = sum(counts)
    return [(len(counts) - 1, sum(k * count for k, count in enumerate(counts)) / num_windows)] if num_windows else []


def hub_name(path: str) -> str | None:
    """The hub's id of a base model; None for files, folders and the embedded model.

    >>> hub_name("smollm2"), hub_name("user/model"), hub_name("/models/mine"), hub_name("embedded")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', 'user/model', None, None)
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if path in PACKAGED_MODELS:
        return PACKAGED_MODELS[path].hub_id
    if path == EMBEDDED or expanded(path).exists() or path.endswith(".gguf"):
        return None
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    return path
