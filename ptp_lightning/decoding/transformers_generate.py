"""`model.generate` of transformers, with several verified tokens a call.

    model.generate(**inputs, do_sample=True, max_new_tokens=64, custom_generate=CustomGenerate(predictor))

Arguments mean what they mean there: `GenerationConfig` says how to sample and when to stop, stopping criteria are asked
after every token, and the result is a tensor of whole texts. What would change a distribution in another way than
temperature, top-k and top-p is refused, since the adapter proposes and `u` picks from these.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.text import DECODERS, DecoderName, eval_mode
from ptp_lightning.export.checkpoint import PREDICTOR_FOLDER, build_network, read_predictor
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

OWN_SAMPLING = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")
OWN_STOPPING = ("MaxLengthCriteria", "EosTokenCriteria")
LARGEST_SEED = 2**62
IGNORED = ("trust_remote_code", "custom_generate")
CACHED = "_parallel_token_predictor"


class CustomGenerate:
    """For `custom_generate` of the predictor's base model.

    Args:
        predictor: what it proposes is verified by its base model, whose `generate` this is for.
    """

    def __init__(self, predictor: PredictorNetwork) -> None:
        self._predictor = predictor

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        seed: int | None = None,
        decoder: DecoderName = "speculative",
        window_length: int | None = None,
        slot_budget: int = 16,
        **model_kwargs: Any,
    ) -> Tensor:
        """Continue `input_ids`, `[B, S]`, padded on the left.

        Args:
            model: the base model.
            input_ids: prompts.
            logits_processor: as transformers makes it of the generation settings.
            stopping_criteria: the same.
            generation_config: the generation settings.
            seed: of the auxiliaries: equal seeds give equal texts, whichever the decoder. By default torch's own
                generator draws it, so that `torch.manual_seed` has its usual effect.
            decoder: as in `ptp_lightning.decoding.generate`.
            window_length: the same.
            slot_budget: the same.
            **model_kwargs: `attention_mask` is read.

        Returns:
            `[B, S + longest]`: prompts and texts; the shorter ones are filled up with the padding token.

        Raises:
            ValueError: this is not the predictor's base model, or a setting is not supported; names it.
        """
        predictor = self._predictor
        if model is not predictor.base_model:
            raise ValueError(
                "expected the base model of the predictor, found another model: call predictor.base_model.generate"
            )
        _require_supported(logits_processor, generation_config, decoder)
        sampled = bool(generation_config.do_sample)
        sampling = SamplingConfig(
            temperature=float(_or(generation_config.temperature, 1.0)) if sampled else 0.0,
            top_k=(generation_config.top_k or None) if sampled else None,
            top_p=float(_or(generation_config.top_p, 1.0)) if sampled else 1.0,
            order=predictor.config.sampling.order,
        )
        if seed is None:
            seed = int(torch.randint(LARGEST_SEED, ()))
        num_prompts, prompt_length = input_ids.shape
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        prompts = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        ends: int | list[int] | None = generation_config.eos_token_id
        settings = GenerationSettings(
            sampling=sampling,
            max_new_tokens=_max_length(generation_config) - prompt_length,
            # Each prompt has auxiliaries of its own, as each row of a batch has its own draws.
            seed=tuple(seed + row for row in range(num_prompts)),
            end_of_text=frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends),
            window_length=predictor.config.window_length if window_length is None else window_length,
            slot_budget=slot_budget,
        )
        criteria = [one for one in stopping_criteria if type(one).__name__ not in OWN_STOPPING]
        texts: list[list[int]] = [[] for _ in prompts]

        def receive(row: int, new: list[int]) -> int | None:
            for count, token_id in enumerate(new, start=1):
                texts[row].append(token_id)
                if criteria:
                    so_far = torch.cat([input_ids[row], input_ids.new_tensor(texts[row])]).unsqueeze(0)
                    if any(bool(one(so_far, None).all()) for one in criteria):
                        return count
            return None

        with eval_mode(predictor):
            decoded = DECODERS[decoder](predictor, prompts, settings, receive)
        padding = generation_config.pad_token_id
        filler = padding if isinstance(padding, int) else 0
        longest = max(len(text.token_ids) for text in decoded)
        rows = [text.token_ids + [filler] * (longest - len(text.token_ids)) for text in decoded]
        return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def generate_with_folder(model: PreTrainedModel, inputs: Tensor | None = None, **options: Any) -> Tensor:
    """What `custom_generate/generate.py` of a folder of `save_with_base_model` runs; reads the predictor at first use.

    Args:
        model: opened from such a folder or repository.
        inputs: as in `model.generate`.
        **options: the same.

    Raises:
        FileNotFoundError: the model was opened elsewhere.
    """
    predictor: PredictorNetwork | None = model.__dict__.get(CACHED)
    if predictor is None:
        folder = _folder_of(model) / PREDICTOR_FOLDER
        model.set_attn_implementation("sdpa")  # what our masks are for
        predictor = build_network(read_predictor(folder), model=model).to(model.device)
        model.__dict__[CACHED] = predictor  # no submodule: the predictor holds the model
    given = {name: value for name, value in options.items() if value is not None and name not in IGNORED}
    result = type(model).generate(model, inputs, custom_generate=CustomGenerate(predictor), **given)  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(result, Tensor)
    return result


def _folder_of(model: PreTrainedModel) -> Path:
    opened = str(model.name_or_path)
    if Path(opened).is_dir():
        return Path(opened)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(opened, allow_patterns=f"{PREDICTOR_FOLDER}/*"))


def _require_supported(
    logits_processor: LogitsProcessorList, generation_config: GenerationConfig, decoder: str
) -> None:
    if decoder not in DECODERS:
        raise ValueError(f"expected decoder to be one of {', '.join(DECODERS)}, found {decoder!r}")
    for processor in logits_processor:
        name = type(processor).__name__
        if name not in OWN_SAMPLING:
            raise ValueError(
                f"expected temperature, top_k and top_p alone to shape the distribution, found {name}: leave its "
                "setting out of generate"
            )
    for name, usual in (("num_beams", 1), ("num_return_sequences", 1), ("return_dict_in_generate", False)):
        found = _or(getattr(generation_config, name), usual)
        if found != usual:
            raise ValueError(f"expected {name}={usual} with this custom_generate, found {found}")


def _max_length(generation_config: GenerationConfig) -> int:
    """`generate` has turned `max_new_tokens` into it."""
    assert generation_config.max_length is not None
    return generation_config.max_length


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
