"""Model card of an exported predictor: method, base model, use and metrics."""

from __future__ import annotations

import json
from typing import Any

from ptp_lightning.export.card_metadata import card_metadata, mean_correct_tokens
from ptp_lightning.models.config import PredictorConfig

TITLES = {
    "categorical": "categorical (C-PTP): a slot predicts a distribution, from which the token's auxiliary picks",
    "one_hot": "one-hot (O-PTP): a slot also carries its token's auxiliary, and its most likely token is drafted",
    "independent": "independent (MTP baseline): slots carry no auxiliaries and predict marginals",
    "sequential": "sequential: slots carry no auxiliaries but know the token before; u picks from what they predict",
}

TEMPLATE = """\
---
{metadata}
---

# {name}

An adapter with which its base model predicts {window_length} dependent tokens per call: Parallel Token Prediction
(Draxler et al., ICLR 2026, arXiv:2512.21323). It acts on auxiliary slots only. The unchanged distributions of the base
model verify every token, so the text is what the base model alone would have sampled.

| | |
|---|---|
{facts}

## Use

```python
from ptp_lightning import ParallelTokenPredictor

predictor = ParallelTokenPredictor.from_pretrained({folder})
print(predictor.generate("def ").text)
```

```bash
python -m ptp_lightning generate --ckpt_path {shell_folder} --prompt "def "
```
{of_peft}"""

OF_PEFT = """
PEFT opens `adapter_model.safetensors` as an ordinary LoRA. Without the slots and the gate of `ptp_lightning` it would
act on every token, for which it was not trained.
"""


def model_card(
    config: PredictorConfig,
    base_fingerprint: str,
    name: str,
    training: dict[str, Any],
    license: str | None = None,
) -> str:
    """Markdown with the YAML front matter of the Hugging Face hub.

    Args:
        config: of the predictor.
        base_fingerprint: of its base model.
        name: of the folder, or "user/name" of the hub.
        training: see `StoredPredictor`.
        license: see `card_metadata`.
    """
    sampling = config.sampling
    facts = {
        "Base model": f"`{config.backbone.path}` (fingerprint `{base_fingerprint[:12]}`)",
        "Objective": TITLES.get(config.objective.name, config.objective.name),
        "Features of an auxiliary": f"`{config.features}`, {config.head} head"
        if config.objective.num_inputs
        else "none",
        "Window length": f"{config.window_length} tokens, the first exact, {config.window_length - 1} from slots",
        "Layers of slots": {None: "all", 0: "none"}.get(config.slot_layers, f"the last {config.slot_layers}"),
        "Sampling": f"temperature {sampling.temperature}, top-k {sampling.top_k or 'off'}, top-p {sampling.top_p}, "
        f"{sampling.order} order",
        "Trained for": "these settings only" if config.sampling_range is None else f"`{config.sampling_range}`",
        "Correction": "none" if config.correction is None else f"`{config.correction}`",
        "Draft vocabulary": "all tokens"
        if config.draft_vocabulary is None
        else f"the {config.draft_vocabulary:,} most frequent tokens of the training data",
        "N-grams": "none" if config.ngrams is None else f"{config.ngrams:,}, counted in the training data",
        "LoRA": f"rank {config.lora.rank}, alpha {config.lora.alpha}, on `{config.lora.target_modules}`"
        if config.has_lora
        else "none",
    } | {_label(tag): _number(value) for tag, value in training.items() if not isinstance(value, list)}
    for length, value in mean_correct_tokens(training):
        facts["Correct tokens"] = (
            f"{value:.2f} of a window of {length} (mean of the last validation before the checkpoint)"
        )
    return TEMPLATE.format(
        metadata=card_metadata(
            config.backbone.path,
            name,
            training,
            library_name="peft" if config.has_lora else "ptp_lightning",
            tags=["lora"] if config.has_lora else [],
            license=license,
        ),
        name=name,
        window_length=config.window_length,
        facts="\n".join(f"| {label} | {text} |" for label, text in facts.items()),
        folder=json.dumps(name),
        shell_folder=json.dumps(name),
        of_peft=OF_PEFT if config.has_lora else "",
    )


def _label(tag: str) -> str:
    return "Training steps" if tag == "steps" else f"`{tag}`"


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
