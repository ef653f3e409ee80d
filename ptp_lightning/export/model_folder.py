"""A predictor with its base model in one folder that transformers opens by itself.

It is an ordinary model folder with the unchanged configuration, weights and tokenizer of the base model. In addition it
holds the predictor in a folder of its own, and `custom_generate/generate.py`, which transformers runs in place of its
`generate` if remote code is trusted.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ptp_lightning.export.card_metadata import card_metadata
from ptp_lightning.export.checkpoint import require_free_folder, save_network
from ptp_lightning.export.stored_predictor import CARD_FILE, PREDICTOR_FOLDER
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.utils.atomic_files import replacing
from ptp_lightning.utils.pretrained import PATH_KEY, load_tokenizer, quiet_transformers

GENERATE_FILE, REQUIREMENTS_FILE = "custom_generate/generate.py", "custom_generate/requirements.txt"

# Folders that were written once import this function: it keeps its name.
GENERATE = '''\
"""Runs in place of `model.generate`: several verified tokens per call (pip install ptp_lightning)."""


def generate(inputs=None, *, model, **options):
    from ptp_lightning.decoding.transformers_generate import generate_with_folder

    return generate_with_folder(model, inputs, **options)
'''

CARD = """\
---
{metadata}
---

# {name}

The unchanged language model `{base}`, and in `{predictor}/` an adapter that predicts several tokens per call: Parallel
Token Prediction (Draxler et al., ICLR 2026, arXiv:2512.21323). The model verifies every token, so the text is what the
model alone would have sampled.

```bash
pip install ptp_lightning
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder})
model = AutoModelForCausalLM.from_pretrained({folder}, trust_remote_code=True)
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=True)[0]))
```

An OpenAI-compatible server, whose streams come in bursts of several tokens (`pip install 'transformers[serving]'`):

```bash
transformers serve {shell_folder} --trust-remote-code
```

Training and metrics: `{predictor}/{card_file}`.
"""


def save_with_base_model(
    predictor: PredictorNetwork,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    training: dict[str, Any] | None = None,
    license: str | None = None,
) -> None:
    """Write the folder, complete or not at all; arguments and errors as in `save_network`."""
    target = require_free_folder(folder)
    backbone = predictor.config.backbone
    located = replace(backbone, path=predictor.backbone_path)
    with replacing(target) as draft:
        base_model = load_backbone(located)  # again, because the predictor's base model has the adapter
        with quiet_transformers(progress_bar=False):
            base_model.save_pretrained(str(draft))
        load_tokenizer(located.path, revision=backbone.revision, key=PATH_KEY).save_pretrained(str(draft))
        save_network(predictor, draft / PREDICTOR_FOLDER, dtype=dtype, training=training, license=license)
        card = CARD.format(
            metadata=card_metadata(
                backbone.path, target.name, training or {}, library_name="transformers", tags=[], license=license
            ),
            name=target.name,
            base=backbone.path,
            predictor=PREDICTOR_FOLDER,
            folder=json.dumps(target.name),
            shell_folder=shlex.quote(target.name),
            card_file=CARD_FILE,
        )
        files = {GENERATE_FILE: GENERATE, REQUIREMENTS_FILE: "ptp_lightning\n", CARD_FILE: card}
        for name, text in files.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(text, encoding="utf-8")
        for file in draft.glob("*.safetensors"):  # safetensors writes files that nobody else may read
            file.chmod((draft / CARD_FILE).stat().st_mode)
