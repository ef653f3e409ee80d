"""A predictor with its base model in one folder, which transformers opens by itself.

The folder is an ordinary model folder: configuration, weights and tokenizer of the base model, as they were. Beside
them lie the predictor, in a folder of its own, and `custom_generate/generate.py`, which transformers runs in place of
its `generate` if it is trusted to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.models.checkpoint import PREDICTOR_FOLDER, replacing, require_free_folder, save_predictor
from ptp_lightning.models.predictor import ParallelTokenPredictor
from ptp_lightning.pretrained import PATH_KEY, load_tokenizer

GENERATE_FILE, REQUIREMENTS_FILE = "custom_generate/generate.py", "custom_generate/requirements.txt"

GENERATE = '''\
"""What transformers runs in place of `model.generate`: several verified tokens a call (pip install ptp_lightning)."""


def generate(inputs=None, *, model, **options):
    from ptp_lightning.decoding.transformers_generate import generate_with_folder

    return generate_with_folder(model, inputs, **options)
'''


def save_with_base_model(
    predictor: ParallelTokenPredictor,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write the folder, complete or not at all; arguments and errors as in `save_predictor`."""
    target = require_free_folder(folder)
    backbone = predictor.config.backbone
    with replacing(target) as draft:
        load_backbone(backbone).save_pretrained(str(draft))  # anew, because the predictor's carries the adapter
        load_tokenizer(backbone.path, revision=backbone.revision, key=PATH_KEY).save_pretrained(str(draft))
        save_predictor(predictor, draft / PREDICTOR_FOLDER, dtype=dtype, training=training)
        for name, text in {GENERATE_FILE: GENERATE, REQUIREMENTS_FILE: "ptp_lightning\n"}.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(text, encoding="utf-8")
