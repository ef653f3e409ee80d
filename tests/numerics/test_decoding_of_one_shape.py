"""The computations of the benchmarks for a GPU are correct and can be captured, as far as a CPU can test it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.on_a_gpu import decoding, training
from benchmarks.on_a_gpu.branches import best_branches, break_even_acceptance_rate, expected_tokens
from benchmarks.on_a_gpu.graph_decoder import GraphDecoder, capture
from benchmarks.on_a_gpu.models import BenchmarkModel, counting_model
from ptp_lightning.decoding import GenerationSettings, decode_autoregressively
from ptp_lightning.decoding.joined_decoder import JoinedDecoder
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.models import (
    BackboneSettings,
    DecoderRefiner,
    LoraSettings,
    PredictorConfig,
    PredictorNetwork,
)
from ptp_lightning.models import network as network_module
from ptp_lightning.models.attention import blocks as blocks_module
from ptp_lightning.models.attention.block_attention import VisibleKeys
from ptp_lightning.models.attention.blocks import Blocks
from ptp_lightning.models.attention.dense import Dense
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import PROMPT, reference
from tests.helpers.tiny_distillation import LLAMA

SAMPLING = {
    "sampled": SamplingConfig(temperature=0.7, top_k=50, top_p=0.9),
    "plain": SamplingConfig(),
    "greedy": SamplingConfig(temperature=0),
}
BRANCHES = ((), (1, 0), (2, 0, 2), (4, 3, 2, 2, 1))
NUM_TOKENS = 31
NUM_CALLS = 1 + 20


def predictor(dtype: str = "float32", **more: Any) -> PredictorNetwork:
    torch.manual_seed(0)
    network = LLAMA | {"vocab_size": 64, "max_position_embeddings": 256}
    backbone = BackboneSettings(from_config=network, dtype=dtype)
    return PredictorNetwork(PredictorConfig(backbone, lora=LoraSettings(rank=4), **more)).eval()


def settings(sampling: SamplingConfig) -> GenerationSettings:
    return GenerationSettings(sampling, NUM_TOKENS, seed=3, window_length=5)


@one_in(3, drafts=["own", "mostly correct", "correct"], branches=BRANCHES, sampling=["sampled", "greedy"])
def test_texts_are_autoregressive(sampling: str, branches: tuple[int, ...], drafts: str) -> None:
    model = predictor()
    expected = reference(model, settings(SAMPLING[sampling]))
    rate = {"mostly correct": 0.8, "correct": 1.0}.get(drafts)
    forced = None if rate is None else decoding.forced_draft(expected, rate, model)
    decoder = GraphDecoder(model, settings(SAMPLING[sampling]), len(PROMPT), branches, forced)
    for _ in range(2):  # no state is left from the previous text
        text, num_calls = decoder.decode(PROMPT)
        assert text == expected
    if not branches:
        assert num_calls == NUM_TOKENS
    if drafts == "correct" and branches == (1, 0):
        assert num_calls == NUM_CALLS  # after the prompt's token 1 and 2 tokens in turn


class HostOperations(TorchDispatchMode):
    """Collects the operations that read or write memory of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type != "meta" for tensor in tensors):
            self.found.append(str(func))
        return result


@torch.inference_mode()
def host_operations(model: PredictorNetwork, decoder: GraphDecoder, call: Callable[[], Any]) -> list[str]:
    """Host operations of a call on the meta device, on which reading a value raises an error."""
    model.to("meta")
    for name, value in vars(decoder).items():
        if isinstance(value, Tensor):
            setattr(decoder, name, value.to("meta"))
        elif isinstance(value, Lookahead):
            setattr(decoder, name, Lookahead(*(part.to("meta") for part in value)))
    for layer in decoder._cache.layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")  # pyright: ignore
    # What torch can be asked for without waiting for a GPU is asked for there alone.
    with patch.object(Tensor, "is_cuda", True), HostOperations() as operations:
        call()
    return operations.found


def test_texts_are_autoregressive_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though keys of the cache that hold nothing yet are read, too."""
    monkeypatch.setattr(JoinedDecoder, "is_supported", lambda model: False)  # as on a GPU
    model = predictor("bfloat16")
    expected = reference(model, settings(SAMPLING["sampled"]))
    decoder = GraphDecoder(model, settings(SAMPLING["sampled"]), len(PROMPT), BRANCHES[-1])
    assert decoder.decode(PROMPT)[0] == expected


@one_in(3, dtype=["float32", "bfloat16"], branches=BRANCHES, sampling=SAMPLING)
def test_a_call_can_be_captured(sampling: str, branches: tuple[int, ...], dtype: str) -> None:
    """A call neither waits for the device nor copies from the host."""
    model = predictor(dtype)
    forced = torch.zeros(NUM_TOKENS, dtype=torch.long)
    decoder = GraphDecoder(model, settings(SAMPLING[sampling]), len(PROMPT), branches, forced)
    assert host_operations(model, decoder, decoder.call) == []


def test_operations_that_cannot_be_captured_are_found() -> None:
    model = predictor()
    decoder = GraphDecoder(model, settings(SAMPLING["greedy"]), len(PROMPT))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        host_operations(model, decoder, lambda: decoder._result.tolist())
    copied = host_operations(model, decoder, lambda: torch.tensor([1, 2]).to("meta"))
    assert copied != []


def test_a_graph_is_made_behind_calls_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order that torch asks for; the calls of torch.cuda are written down instead of made."""
    happened: list[str] = []

    def stream(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: happened.append(f"{name} waits for {other.name}"))

    @contextmanager
    def noted(what: str) -> Iterator[None]:
        happened.append(f"{what} begins")
        yield
        happened.append(f"{what} ends")

    def replay() -> None:
        happened.append("replay")

    usual = stream("usual")
    graph = SimpleNamespace(replay=replay)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: usual)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: noted(side.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda given: noted("capture" if given is graph else "another graph"))
    capture(lambda: happened.append("call"), torch.device("cuda"))()
    warm_up = ["side waits for usual", "side begins", *["call"] * 3, "side ends", "usual waits for side"]
    assert happened == [*warm_up, "capture begins", "call", "capture ends", "replay"]


def test_a_correction_is_rejected() -> None:
    model = predictor(correction=DecoderRefiner(num_layers=1))
    assert GraphDecoder(model, settings(SAMPLING["greedy"]), len(PROMPT)).decode(PROMPT)[1] == NUM_TOKENS
    with pytest.raises(ValueError, match="neither a correction nor a copied student"):
        GraphDecoder(model, settings(SAMPLING["greedy"]), len(PROMPT), (1, 0))


def test_the_counting_model_counts() -> None:
    device = torch.device("cpu")
    model = counting_model(device, "small", 64, "bfloat16", 5)
    (decoded,) = decode_autoregressively(model.predictor, [[7, 3, 61]], settings(SAMPLING["greedy"]))
    assert decoded.token_ids == [(62 + k) % 64 for k in range(NUM_TOKENS)]


def test_a_different_text_is_not_timed() -> None:
    model = predictor()
    target = BenchmarkModel(model, model.base_model, PROMPT)
    expected = reference(model, settings(SAMPLING["greedy"]))
    wrong = [*expected[:20], (expected[20] + 1) % 64, *expected[21:]]
    _, agreement = decoding._check(lambda: lambda: (expected, 1), target, settings(SAMPLING["greedy"]), expected)
    assert agreement == {"same_tokens": "31 of 31"}
    for text, position in ((wrong, 20), (expected[:25], 25)):
        with pytest.raises(ValueError, match=f"a difference from token {position} on"):
            decoding._check(lambda text=text: lambda: (text, 1), target, settings(SAMPLING["greedy"]), expected)


def test_expected_tokens_are_those_of_many_calls() -> None:
    branches, rate = (3, 1, 0, 2), 0.6
    generator = np.random.default_rng(0)
    length = committed = 0
    for _ in range(20_000):
        draws = generator.random(length) < rate
        correct = length if draws.all() else int(draws.argmin())
        committed += correct + 1
        length = branches[correct]
    assert expected_tokens(branches, rate) == pytest.approx(committed / 20_000, rel=0.02)


def test_perfect_drafts() -> None:
    assert expected_tokens((1, 0), 1.0) == pytest.approx(1.5, rel=1e-3)  # 1 and 2 tokens in turn
    assert expected_tokens((2, 2, 2), 1.0) == pytest.approx(3.0, rel=1e-3)


def test_break_even() -> None:
    branches = (2, 2, 2)
    rate = break_even_acceptance_rate(branches, 2.0)
    assert rate is not None
    assert expected_tokens(branches, rate) == pytest.approx(2.0, rel=1e-3)
    assert rate == pytest.approx((5**0.5 - 1) / 2, abs=1e-3)  # 1 + r + r^2 = 2
    assert break_even_acceptance_rate(branches, 3.5) is None


@pytest.mark.parametrize(("longest", "slots", "rate"), [(2, 4, 0.8), (7, 32, 0.8)])
def test_slots_are_allocated_better_than_evenly(longest: int, slots: int, rate: float) -> None:
    branches = best_branches(longest, slots, rate)
    assert sum(branches) == slots
    assert max(branches) <= longest
    even = [slots // (longest + 1)] * (longest + 1)
    assert expected_tokens(branches, rate) > expected_tokens(even, rate)


def test_a_wrong_attention_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = training.difference(torch.device("cpu"))
    assert 0 < float(found["difference_gradients"] or 0) < 1e-5
    attention = blocks_module.block_attention

    def sees_everything(queries: Tensor, context: Any, own: Any, visible: VisibleKeys, scale: float) -> Tensor:
        everything = VisibleKeys(torch.ones_like(visible.context), torch.ones_like(visible.own))
        return attention(queries, context, own, everything, scale)

    monkeypatch.setattr(blocks_module, "block_attention", sees_everything)
    monkeypatch.setattr(network_module, "require_supported", lambda network: None)  # which notices it, too
    with pytest.raises(ValueError, match="expected hidden states and gradients to differ by at most"):
        training.difference(torch.device("cpu"))


def test_a_dense_step_reads_windows_through_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other does not; both are measured."""
    calls: list[type] = []
    monkeypatch.setattr(network_module, "require_supported", lambda network: None)  # which reads windows, too
    for backend in (Blocks, Dense):
        monkeypatch.setattr(backend, "read_windows", noting(backend.read_windows, calls))
    sizes = {"rows": 1, "row_length": 12, "window_length": 3, "windows": 1, "vocab": 40, "rank": 1, "steps": 1}
    for variant, backend in {"blocks": Blocks, training.DENSE: Dense}.items():
        calls.clear()
        found = training.step(training.parse(variant, {"device": "cpu", "dtype": "float32", **sizes}))
        assert set(calls) == {backend}
        assert found["seconds"]


def noting(read_windows: Any, calls: list[type]) -> Any:
    def wrapped(self: Any, *args: Any) -> Tensor:
        calls.append(type(self))
        return read_windows(self, *args)

    return wrapped
