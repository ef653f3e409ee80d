"""What a family of causal LMs must pass to be supported, with tiny random models, for tests."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.decoding import (
    GenerationSettings,
    decode_autoregressively,
    decode_by_lookup,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.models import LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.lora.gated_lora import ALL_LINEAR
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.randomness import keyed_generator
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_decoding import Decode, decode_one
from tests.helpers.tiny_distillation import make_module, make_trainer, record_losses
from tests.helpers.tiny_families import NOT_BUILT, VOCAB_SIZE, build_family, family_config, require_tiny
from tests.helpers.tiny_windows import one_document

DECODERS: dict[str, Decode] = {
    "autoregressive": decode_autoregressively,
    "speculative": decode_speculatively,
    "speculative_lookup": partial(decode_speculatively, lookup=True),
    "lookup": decode_by_lookup,
    "partial_quadratic": decode_partially_quadratically,
}
PROMPT_LENGTH, NUM_NEW, NUM_STEPS = 20, 16, 3
ADVISED_TARGETS = re.compile(r"predictor\.lora\.target_modules to \[([\w, ]+)\]")

Status = Literal["supported", "refused", "not built"]


@dataclass(frozen=True)
class FamilyResult:
    """Whether a family is supported.

    Args:
        status: "supported" if it passes all checks, "refused" if the package refuses it when it is loaded, "not built"
            if it is in `NOT_BUILT`.
        reason: of a refusal, or of `NOT_BUILT`.
        target_modules: of the adapter with which it is supported, if it is not the default.
    """

    status: Status
    reason: str = ""
    target_modules: list[str] = field(default_factory=list)


def check_family(model_type: str) -> FamilyResult:
    """Build a tiny model of a family, and a predictor on it; check everything if neither is refused.

    Raises:
        AssertionError: it is not refused, and fails a check; or there is neither a tiny model nor a reason for that.
        Exception: another error than a `ValueError` of one line that names the type of the model.
    """
    if model_type in NOT_BUILT:
        return FamilyResult("not built", NOT_BUILT[model_type])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fields = family_config(model_type)
            require_tiny(fields)
        except Exception as error:  # of transformers, of any kind
            raise AssertionError(
                f"there is no tiny model of {model_type}: add fields to OVERRIDES of tests/helpers/tiny_families.py, "
                f"or a reason to NOT_BUILT: {_one_line(error)}"
            ) from error
        try:
            network, targets = _first_supported(model_type, fields)
        except ValueError as error:
            return FamilyResult("refused", str(error))
        check_gate(network, build_family(fields))
        check_packed_rows(network)
        check_texts(network)
        check_training(fields, targets)
    return FamilyResult("supported", target_modules=[] if isinstance(targets, str) else targets)


def check_gate(network: PredictorNetwork, base: PreTrainedModel) -> None:
    """With a closed gate the logits are those of the untouched base model, bit for bit."""
    ids = _prompt()
    with torch.no_grad(), network.gate.closed():
        assert torch.equal(network.base_model(input_ids=ids).logits, base(input_ids=ids).logits)
        hidden = network.base_model.base_model(input_ids=ids, use_cache=False)[0]
        with network.gate.open():
            adapted = network.base_model.base_model(input_ids=ids, use_cache=False)[0]
    assert not torch.equal(hidden, adapted), "the adapter changes nothing"


@torch.no_grad()
def check_packed_rows(network: PredictorNetwork) -> None:
    """Three documents in a row have the logits that each has on its own."""
    documents = torch.split(_prompt(3 * PROMPT_LENGTH)[0], [PROMPT_LENGTH, 7, 2 * PROMPT_LENGTH - 7])
    rows = one_document(torch.cat(documents).unsqueeze(0), torch.tensor([[1]]))
    rows = rows._replace(
        document_ids=torch.cat([torch.full_like(ids, k) for k, ids in enumerate(documents)]).unsqueeze(0),
        position_ids=torch.cat([torch.arange(len(ids)) for ids in documents]).unsqueeze(0),
    )
    packed = network.logits(network.encode(rows).hidden)[0]
    alone = [network.base_model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0] for ids in documents]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


def check_texts(network: PredictorNetwork) -> None:
    """Greedy texts are those of transformers; sampled ones are what u picks from the base model's own logits."""
    prompt = _prompt()
    model: Any = network.base_model
    text = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=None
    )
    greedy = GenerationSettings(SamplingConfig(temperature=0), max_new_tokens=NUM_NEW, window_length=4)
    assert _texts(network, greedy) == dict.fromkeys(DECODERS, text[0, PROMPT_LENGTH:].tolist())
    sampling = SamplingConfig(temperature=0.8, top_k=50, top_p=0.95)
    settings = GenerationSettings(sampling, max_new_tokens=NUM_NEW, seed=3, window_length=4)
    texts = _texts(network, settings)
    sampled = texts["autoregressive"]
    assert texts == dict.fromkeys(DECODERS, sampled)
    with torch.no_grad():
        whole = torch.cat([prompt, torch.tensor([sampled])], dim=1)
        logits = model(input_ids=whole, use_cache=False).logits[0, PROMPT_LENGTH - 1 : -1]
    u = draw_auxiliaries((NUM_NEW,), keyed_generator(3, "generate"), "cpu")
    assert sampled == pick(u, sampling.distribution(logits)).tolist()


def check_training(fields: dict[str, Any], targets: str | list[str]) -> None:
    """Three steps run, and losses and weights are finite."""
    module = make_module(
        fields, lora=LoraSettings(rank=2, target_modules=targets), sampling=SamplingConfig(), correction=None
    )
    losses = record_losses(module)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), max_steps=NUM_STEPS, limit_val_batches=0)
        trainer.fit(module, datamodule=tiny_data())
    assert len(losses) == NUM_STEPS and torch.tensor(losses).isfinite().all()
    assert all(weight.isfinite().all() for weight in module.predictor.parameters())


def _first_supported(model_type: str, fields: dict[str, Any]) -> tuple[PredictorNetwork, str | list[str]]:
    """A predictor with adapters on all linear layers, or on those that the refusal advises.

    Raises:
        ValueError: the last refusal.
    """
    targets: str | list[str] = ALL_LINEAR
    while True:
        try:
            return _network(build_family(fields), targets), targets
        except ValueError as error:
            _require_clear_refusal(model_type, error)
            advised = ADVISED_TARGETS.search(str(error))
            if advised is None:
                raise
            if advised[1].split(", ") == targets:
                raise AssertionError(f"the advice does not help: {error}") from error
            targets = advised[1].split(", ")


def _network(base: PreTrainedModel, targets: str | list[str]) -> PredictorNetwork:
    config = PredictorConfig(lora=LoraSettings(rank=2, target_modules=targets), window_length=4)
    network = PredictorNetwork(config, base)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def _texts(network: PredictorNetwork, settings: GenerationSettings) -> dict[str, list[int]]:
    prompt = _prompt()[0].tolist()
    return {name: decode_one(decode, network, settings, prompt).token_ids for name, decode in DECODERS.items()}


def _prompt(length: int = PROMPT_LENGTH) -> torch.Tensor:
    """`[1, length]` token ids, none of them special."""
    return torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(1))


def _require_clear_refusal(model_type: str, error: ValueError) -> None:
    """One line with the type of the model, or the class that carries its name, and the key to set."""
    reason = str(error)
    name, found = (re.sub(r"\W|_", "", text.lower()) for text in (model_type.removesuffix("_text"), reason))
    assert "\n" not in reason and name in found and "predictor." in reason, f"unclear refusal: {reason}"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
