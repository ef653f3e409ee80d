"""The joined decoder computes what the model's own does, and a token's bits depend on the text before it alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ptp_lightning.decoding import (
    GenerationSettings,
    decode_autoregressively,
    decode_partially_quadratically,
    decode_speculatively,
    state,
)
from ptp_lightning.decoding.joined_decoder import JoinedDecoder
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.decoding.state import MIN_PREFILL_TOKENS, BatchContext
from ptp_lightning.decoding.token_tree import TokenTree
from ptp_lightning.models import LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.layers.packed_linear import PackedWeights
from ptp_lightning.models.lora.joined_adapter import JoinedAdapter, base_layer, kept_merged
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import Decode, decode_one, reference
from tests.helpers.tiny_models import TINY_MODELS, cast_weights
from tests.helpers.tiny_predictors import CORRECTIONS, tiny_predictor

DTYPES = (torch.float32, torch.bfloat16)
FAMILIES = ("llama", "qwen2", "qwen3")
VOCABULARY = 300
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wide(
    hidden_size: int, dtype: torch.dtype, num_layers: int = 1, targets: str | list[str] = "all-linear"
) -> PredictorNetwork:
    """A random model with widths of real ones, and an adapter that acts."""
    shape = {"intermediate_size": 5 * hidden_size // 2, "num_attention_heads": hidden_size // 64}
    shape["num_key_value_heads"] = shape["num_attention_heads"] // 3 if hidden_size % 192 == 0 else 4
    model = TINY_MODELS["llama"](VOCABULARY, hidden_size, num_layers, **shape)
    network = PredictorNetwork(
        PredictorConfig(lora=LoraSettings(rank=8, target_modules=targets)), cast_weights(model, dtype)
    )
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return network.eval()


@torch.inference_mode()
def hidden_states(
    network: PredictorNetwork, texts: Sequence[Tensor], kept: Sequence[int], sizes: Sequence[int], num_slots: int = 0
) -> Tensor:
    """Of the tokens of each text `[B, sum(sizes), H]` that follow the `kept` ones, in calls of `sizes` tokens."""
    with prepare_for_decoding(network):
        context = BatchContext(network, GenerationSettings(max_new_tokens=100), list(kept))
        longest = max(kept)
        context.read(
            torch.stack([torch.nn.functional.pad(t[:n], (0, longest - n)) for t, n in zip(texts, kept, strict=True)])
        )
        context.keep(kept)
        results, starts = [], list(kept)
        for size in sizes:
            tokens = torch.stack([text[start : start + size] for text, start in zip(texts, starts, strict=True)])
            branches = [[num_slots // 2] + [0] * (size - 1) + [num_slots - num_slots // 2]] * len(texts)
            lookahead = Lookahead.branches([1] * len(texts), [row[:size] for row in branches], context.device)
            hidden, _ = context.read(tokens, lookahead)
            context.keep([size] * len(texts))
            starts = [start + size for start in starts]
            results.append(hidden)
    return torch.cat(results, dim=1)


def random_texts(count: int, length: int = 110) -> list[Tensor]:
    return list(torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0)))


@one_in(2, shape=[(576, 2), (1536, 1), (2048, 1)], dtype=DTYPES)
def test_bits_do_not_depend_on_rows_slots_or_texts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """For 1 to 64 tokens, 0 to 33 slots and batches of 1 to 8 texts of different lengths."""
    hidden_size, num_layers = shape
    network = wide(hidden_size, dtype, num_layers)
    assert JoinedDecoder.is_supported(network.base_model)
    texts = random_texts(8)
    one_by_one = hidden_states(network, texts[:1], [37], [1] * 64)
    for sizes, num_slots in (([64], 0), ([33, 31], 16), ([2, 3, 5, 8, 13, 16, 17], 33), ([1, 31, 32], 7)):
        assert torch.equal(hidden_states(network, texts[:1], [37], sizes, num_slots), one_by_one)
    kept = [37, 5, 12, 40, 21, 1, 30, 44]
    together = hidden_states(network, texts, kept, [1, 4, 2], 16)
    assert torch.equal(together[:1], one_by_one[:, :7])
    for row in (1, 5):
        assert torch.equal(hidden_states(network, texts[row : row + 1], kept[row : row + 1], [7])[0], together[row])
    pair = hidden_states(network, texts[:2], kept[:2], [3, 4])
    assert torch.equal(pair, together[:2])


@by_dtype
@pytest.mark.parametrize("hidden_size", [576, 2048])
@torch.inference_mode()
def test_bits_do_not_depend_on_other_paths_of_a_tree(hidden_size: int, dtype: torch.dtype) -> None:
    """Paths of 1 to 6 tokens from a tree of 12, across borders of blocks, and the tokens that follow the kept one."""
    network, (text, *_) = wide(hidden_size, dtype), random_texts(1)
    parents = [0, 0, 0, 1, 1, 3, 3, 2, 5, 8, 7, 6]
    for kept in (36, 37, 38, 39):
        for path in ([0, 1, 3, 5, 8, 9], [0, 1, 3, 6, 11], [0, 2, 7, 10], [0, 1, 4]):
            columns = dict(zip(path, text[kept:], strict=False))
            tree = torch.tensor([[columns.get(column, (7 * column) % VOCABULARY) for column in range(len(parents))]])
            with prepare_for_decoding(network):
                context = BatchContext(network, GenerationSettings(), [kept])
                context.read(text[:kept].unsqueeze(0))
                context.keep([kept])
                context.read_tree(TokenTree(tree, torch.tensor([parents])))
                logits = context.next_logits([0], len(parents))[:, path]
                context.keep_path([path])
                context.read(text[None, kept + len(path) : kept + len(path) + 3])
                found = torch.cat([logits, context.next_logits([0], 3)], dim=1)
                expected = context.logits(hidden_states(network, [text], [kept], [1] * (len(path) + 3)))
            assert torch.equal(found, expected)


@by_dtype
def test_a_prompt_is_read_as_single_tokens_are(dtype: torch.dtype) -> None:
    network, texts = wide(576, dtype), random_texts(1)
    assert torch.equal(hidden_states(network, texts, [70], [5]), hidden_states(network, texts, [1], [1] * 74)[:, 69:])


@by_dtype
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_results_are_those_of_the_general_path(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of tokens and of slots, alone and in a batch."""
    network, tolerance = tiny_predictor(family, dtype=dtype), 1e-4 if dtype == torch.float32 else 0.1
    token_ids = torch.tensor([[5, 9, 7, 3, 8, 2, 6], [5, 1, 1, 4, 0, 0, 0]])
    found = []
    for is_joined in (True, False):
        if not is_joined:
            monkeypatch.setattr(JoinedDecoder, "is_supported", lambda model: False)
        with prepare_for_decoding(network):
            context = BatchContext(network, GenerationSettings(), [7, 4])
            assert (context._joined is not None) == is_joined
            context.read(token_ids)
            context.keep([7, 4])
            lookahead = Lookahead.branches([1, 1], [[2, 0, 3], [1, 2, 1]], context.device)
            found.append(context.read(token_ids[:, 2:5], lookahead))
    for joined, general in zip(*found, strict=True):
        torch.testing.assert_close(joined, general, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["up_proj", "v_proj"], ["o_proj"]])
@torch.inference_mode()
def test_adapters_of_some_layers(targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    network, found = wide(192, torch.float32, 2, targets), []
    for is_joined in (True, False):
        if not is_joined:
            monkeypatch.setattr(JoinedDecoder, "is_supported", lambda model: False)
        with prepare_for_decoding(network):
            context = BatchContext(network, GenerationSettings(), [3])
            found.append(context.read(torch.tensor([[3, 4, 5]]), Lookahead.single([3], 4, context.device))[1])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
    ids=["gpt2", "gpt_neox", "sliding window", "dynamic rotation"],
)
def test_other_models_take_the_general_path(family: str, settings: dict) -> None:
    assert not JoinedDecoder.is_supported(TINY_MODELS[family](**settings))


def test_other_dtypes_take_the_general_path() -> None:
    assert JoinedDecoder.is_supported(TINY_MODELS["llama"]())
    assert not JoinedDecoder.is_supported(TINY_MODELS["llama"]().double())


def test_it_follows_when_weights_are_trained() -> None:
    network = tiny_predictor(student="shared")
    settings = GenerationSettings(SamplingConfig(temperature=0), 8)
    before = reference(network, settings)
    with torch.no_grad():
        for layer in network.base_model.model.layers:
            layer.mlp.down_proj.weight.neg_()
    after = reference(network, settings)
    fresh = tiny_predictor(student="shared")
    fresh.load_state_dict(network.state_dict())
    assert after == reference(fresh, settings) != before


SAMPLING = {
    "sampled": SamplingConfig(),
    "truncated": SamplingConfig(0.7, 50, 0.9),
    "greedy": SamplingConfig(temperature=0),
}


@one_in(
    3,
    decode=[decode_autoregressively, decode_speculatively, decode_partially_quadratically],
    sampling=SAMPLING,
    dtype=DTYPES,
)
def test_texts_of_a_wide_model_are_the_reference_texts(decode: Decode, sampling: str, dtype: torch.dtype) -> None:
    """In batches of 1 to 8 texts."""
    network = wide(576, dtype)
    prompts = [
        text[:length].tolist() for text, length in zip(random_texts(8), [5, 17, 1, 30, 8, 9, 4, 12], strict=True)
    ]
    expected = [
        reference(network, GenerationSettings(SAMPLING[sampling], 12, seed, window_length=6), prompt)
        for seed, prompt in enumerate(prompts)
    ]
    for size in (1, 3, 8):
        settings = GenerationSettings(SAMPLING[sampling], 12, tuple(range(size)), window_length=6)
        found = [decoded.token_ids for decoded in decode(network, prompts[:size], settings)]
        assert found == expected[:size]
    settings = GenerationSettings(SAMPLING[sampling], 12, 4, window_length=3, slot_budget=5)
    assert decode_one(decode, network, settings, prompts[4]).token_ids == expected[4]


@by_dtype
@torch.inference_mode()
def test_a_long_prompt_is_read_in_one_piece_alike_in_every_batch(dtype: torch.dtype) -> None:
    """All but the last token, with the bits that it has alone; short prompts wait for the first call."""
    network, texts = wide(576, dtype, 2), [text.tolist() for text in random_texts(3)]
    prompts, found = [texts[0][:70], texts[1][: MIN_PREFILL_TOKENS - 1], texts[2][:100]], []
    for batch in ([prompts[0]], prompts):
        with prepare_for_decoding(network):
            context = BatchContext(network, GenerationSettings(), [len(prompt) for prompt in batch])
            counts = context.prefill(batch)
            assert context._cache.lengths == counts
            keys = cast(Any, context._cache.layers[1]).keys
            found.append((counts, keys[0, :, :69].clone()))
    assert [counts for counts, _ in found] == [[69], [69, 0, 99]]
    assert torch.equal(found[0][1], found[1][1])


@by_dtype
@torch.inference_mode()
def test_a_prompt_in_one_piece_gives_the_same_numbers(dtype: torch.dtype) -> None:
    network, prompt, found = wide(576, dtype, 2), random_texts(1)[0][:80].tolist(), []
    for is_prefilled in (True, False):
        with prepare_for_decoding(network):
            context = BatchContext(network, GenerationSettings(), [80])
            if is_prefilled:
                context.prefill([prompt])
            else:
                context.read(torch.tensor([prompt[:-1]]))
                context.keep([79])
            found.append(context.read(torch.tensor([prompt[-1:]]), Lookahead.single([1], 5, context.device)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for whole, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, in_parts, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("decode", [decode_speculatively, decode_partially_quadratically])
def test_texts_after_long_prompts(decode: Decode) -> None:
    """Alone, and in a batch with a short prompt."""
    network, texts = wide(192, torch.bfloat16, 2), [text.tolist() for text in random_texts(3)]
    prompts = [texts[0][:64], texts[1][:5], texts[2][:90]]
    settings = GenerationSettings(SamplingConfig(temperature=0.8), max_new_tokens=12, window_length=5, seed=(1, 2, 3))
    together = [text.token_ids for text in decode(network, prompts, settings)]
    for seed, prompt, text in zip((1, 2, 3), prompts, together, strict=True):
        [alone] = decode_autoregressively(network, [prompt], replace(settings, seed=seed))
        assert text == alone.token_ids


@pytest.mark.parametrize(
    "options", [{"correction": CORRECTIONS["refiner"]}, {"student": "full_copy"}], ids=["refiner", "copy"]
)
def test_a_refiner_and_a_copy_read_long_prompts_too(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are as good as after a prompt that the first call reads."""
    network, found = tiny_predictor(window_length=5, **options), []
    prompts = [[3, 5, 7, 2, 9] * 12, [4, 4, 1]]
    for minimum in (MIN_PREFILL_TOKENS, 1000):
        monkeypatch.setattr(state, "MIN_PREFILL_TOKENS", minimum)
        settings = GenerationSettings(SamplingConfig(temperature=0), max_new_tokens=20, window_length=5)
        found.append([text.correct_per_cycle for text in decode_speculatively(network, prompts, settings)])
    assert found[0] == found[1]


@pytest.mark.parametrize("change", ["in place", "switched off"])
@torch.inference_mode(False)
def test_the_kept_adapter_follows_its_weights(change: str) -> None:
    layer = cast(Any, wide(192, torch.float32).base_model).model.layers[0].mlp.down_proj
    packed_weights, rows = PackedWeights(), torch.randn(3, layer.in_features)

    def update() -> Tensor:
        output = torch.zeros(3, layer.out_features)
        adapter = JoinedAdapter.kept([layer], torch.float32, True, packed_weights)
        assert adapter is JoinedAdapter.kept([layer], torch.float32, True, packed_weights)
        adapter.add_(output, rows)
        return output

    with torch.no_grad():
        before = update()
        assert before.abs().max() > 0
        if change == "in place":
            layer.lora_weights.b.mul_(2)
            torch.testing.assert_close(update(), 2 * before)
        else:
            layer.enable_adapters(False)
            assert not update().any()


@torch.inference_mode(False)
def test_merged_weights_follow_both_parts() -> None:
    layers = cast(Any, wide(192, torch.float32).base_model).model.layers[0].mlp
    pair, packed_weights = [layers.gate_proj, layers.up_proj], PackedWeights()
    rows = torch.randn(3, layers.gate_proj.in_features)

    def expected() -> Tensor:
        product = torch.cat([base_layer(layer)(rows) for layer in pair], dim=1)
        JoinedAdapter(pair, torch.float32).add_(product, rows)
        return product

    with torch.no_grad():
        torch.testing.assert_close(kept_merged(pair, packed_weights)(rows), expected(), atol=1e-4, rtol=1e-4)
        assert kept_merged(pair, packed_weights) is kept_merged(pair, packed_weights)
        for weight in (layers.up_proj.lora_weights.b, base_layer(layers.gate_proj).weight):
            weight.mul_(2)
            torch.testing.assert_close(kept_merged(pair, packed_weights)(rows), expected(), atol=1e-4, rtol=1e-4)
