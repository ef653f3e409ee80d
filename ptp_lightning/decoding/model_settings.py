"""The generation settings of a base model's folder (`generation_config.json`): which of them decoding takes over.

The end-of-text tokens are taken over, and `TAKEN_OVER` where the sampling settings leave them open. Temperature, top-k
and top-p are those that the adapter was trained for; a warning names those of the folder that differ, and all other
settings that shape a text.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.whole_numbers import short

OF_ADAPTER = ("temperature", "top_k", "top_p")
TAKEN_OVER = ("min_p", "repetition_penalty", "no_repeat_ngram_size")
# Settings that shape texts and are not supported, with the values that have no effect besides null.
IGNORED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({},),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "stop_strings": ([], ""),
}


def with_model_settings(
    predictor: PredictorNetwork, sampling: SamplingConfig, *, given: Collection[str] = ()
) -> SamplingConfig:
    """Sampling settings whose open values are those of the model's folder.

    Warns of settings of the folder that are not taken over.

    Args:
        predictor: of the base model.
        sampling: the settings.
        given: names of `OF_ADAPTER` that the caller has chosen, so that nobody expects those of the folder.

    Raises:
        ValueError: `sampling` is something else.
    """
    if not isinstance(sampling, SamplingConfig):  # often a dict
        raise ValueError(f"expected a SamplingConfig, found {short(sampling)}: set sampling")
    found: Any = predictor.base_model.generation_config
    _warn_of_others(predictor, sampling, [name for name in OF_ADAPTER if name not in given])
    settings = {name: getattr(found, name, None) for name in (*TAKEN_OVER, *IGNORED)}
    ignored = [name for name in IGNORED if settings[name] is not None and settings[name] not in IGNORED[name]]
    if ignored:
        warnings.warn(
            f"the generation settings {', '.join(ignored)} of the base model's folder (generation_config.json) are not "
            "supported and have no effect on the texts",
            stacklevel=2,
        )
    return replace(sampling, **{name: settings[name] for name in TAKEN_OVER if getattr(sampling, name) is None})


def _warn_of_others(predictor: PredictorNetwork, sampling: SamplingConfig, names: list[str]) -> None:
    """The folder recommends settings, and the texts follow those of the adapter."""
    folder: Any = predictor.base_model.generation_config
    used = {name: _plain(name, getattr(sampling, name)) for name in names}
    found = {name: _plain(name, getattr(folder, name, None), used[name]) for name in names}
    others = [name for name in names if found[name] != used[name]]
    if others:
        warnings.warn(
            f"texts are sampled with {', '.join(f'{name} {used[name]}' for name in others)}, as the adapter was "
            f"trained, not with {', '.join(f'{name} {found[name]}' for name in others)} of the base model's folder "
            "(generation_config.json): give sampling to choose",
            stacklevel=3,
        )


def _plain(name: str, value: Any, default: Any = None) -> Any:
    """A setting; `default` in place of None, and None for a top-k of 0, which keeps all tokens."""
    value = default if value is None else value
    return None if name == "top_k" and value == 0 else value
