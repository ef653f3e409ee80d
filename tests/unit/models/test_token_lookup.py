"""Look-ups inside the stack: which token a slot is told, where the estimate comes from, and what stays untouched."""

import pytest
import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.generation import CachedContext
from ptp_lightning.models import ParallelTokenPredictor
from ptp_lightning.models.token_lookup import LookupCall, TokenLookup
from ptp_lightning.sampling import SamplingConfig
from tests.tiny_models import TINY_MODELS, tiny_llama
from tests.tiny_predictors import tiny_predictor

SAMPLING = SamplingConfig(temperature=0.7, top_k=20, top_p=0.9)
INPUT_IDS = torch.tensor([[5, 9, 7, 3, 8, 2, 6]])
U = torch.tensor([[0.05, 0.35, 0.65, 0.95]], dtype=torch.float64)


def fresh_lookup(family: str) -> tuple[torch.nn.Module, TokenLookup, list[tuple[Tensor, Tensor]]]:
    """A base model, untrained look-ups before its second layer, and what they chose: (logits, tokens)."""
    model = TINY_MODELS[family]()
    chosen: list[tuple[Tensor, Tensor]] = []

    def choose(logits: Tensor, auxiliaries: Tensor) -> Tensor:
        chosen.append((logits, pick(auxiliaries, SAMPLING.proposal().distribution(logits))))
        return chosen[-1][1]

    return model, TokenLookup(model, (1,), choose), chosen


@pytest.mark.parametrize("family", TINY_MODELS)
@torch.no_grad()
def test_an_untrained_lens_is_the_models_own_early_exit(family: str) -> None:
    """Position k is asked about the token of position k + 1: final norm and head, applied to its stream early."""
    model, lookup, chosen = fresh_lookup(family)
    output = model(input_ids=INPUT_IDS, output_hidden_states=True, use_cache=False)
    stream = output.hidden_states[1]  # before the second layer
    with lookup.acting(LookupCall(U[:, None, :2])):  # the last two positions play the slots
        model(input_ids=INPUT_IDS, use_cache=False)
    ((logits, token_ids),) = chosen
    norm = model.get_submodule(model.base_model_prefix).get_submodule(  # pyright: ignore
        {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(family, "norm")
    )
    expected = model.get_output_embeddings()(norm(stream[0, 4:6]))  # pyright: ignore
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(token_ids, pick(U[0, :2], SAMPLING.proposal().distribution(logits)))


@torch.no_grad()
def test_the_embedding_of_the_chosen_token_is_added_to_slots_alone() -> None:
    model, lookup, chosen = fresh_lookup("llama")
    streams: list[Tensor] = []
    layer = model.get_submodule("model.layers.1")
    layer.register_forward_pre_hook(lambda _, args: streams.append(args[0].clone()))  # after the look-up's hook
    model(input_ids=INPUT_IDS, use_cache=False)
    with lookup.acting(LookupCall(U[:, None, :2])):
        model(input_ids=INPUT_IDS, use_cache=False)
    before, after = streams
    assert torch.equal(before[:, :5], after[:, :5])
    embedded = model.get_input_embeddings()(chosen[0][1])  # pyright: ignore
    unit = embedded / embedded.square().mean(-1, keepdim=True).sqrt()
    size = before[:, 4].square().mean().sqrt()  # of the last context token's stream
    torch.testing.assert_close(after[0, 5:] - before[0, 5:], 0.1 * size * unit, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_outside_of_the_block_the_model_is_untouched() -> None:
    plain = tiny_llama()(input_ids=INPUT_IDS, use_cache=False).logits
    model, lookup, _ = fresh_lookup("llama")
    assert torch.equal(model(input_ids=INPUT_IDS, use_cache=False).logits, plain)
    with pytest.raises(RuntimeError, match="stop"), lookup.acting(LookupCall(U[:, None, :2])):
        raise RuntimeError("stop")
    assert torch.equal(model(input_ids=INPUT_IDS, use_cache=False).logits, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_context_tokens_of_a_propose_call_keep_their_bits(dtype: torch.dtype) -> None:
    """Look-ups and gate act on the same call; the tokens before the slots must not notice either."""
    predictor = tiny_predictor(dtype=dtype)
    hidden = CachedContext(predictor).read(INPUT_IDS, U)[:, :7]
    decoder = predictor.base_model.get_submodule(predictor.base_model.base_model_prefix)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()[None, None]
    slots = predictor.slot_encoder(U).to(dtype)
    with predictor.gate.closed():  # the same call shape, without look-ups
        expected = decoder(
            inputs_embeds=torch.cat([predictor.embed(INPUT_IDS), slots], dim=1),
            position_ids=torch.arange(10).unsqueeze(0),
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state[:, :7]
    assert torch.equal(hidden, expected)


def estimates(predictor: ParallelTokenPredictor, u: Tensor) -> Tensor:
    zeros, positions = torch.zeros_like(INPUT_IDS), torch.arange(7).unsqueeze(0)
    with torch.no_grad():
        context = predictor.encode(INPUT_IDS, zeros, positions, torch.tensor([[7]]))
        (estimate,) = predictor.slot_hidden(context, u[:, None]).estimates
    return predictor.logits(estimate)[0, 0]  # [J, V]


@pytest.mark.parametrize(("objective", "informed"), [("categorical", True), ("one_hot", True), ("independent", False)])
def test_a_slots_estimate_knows_the_u_of_earlier_slots_and_not_its_own(objective: str, informed: bool) -> None:
    predictor = tiny_predictor(objective=objective)
    before = estimates(predictor, U)
    changed = U.clone()
    changed[0, 1] = 0.99
    differs = (estimates(predictor, changed) != before).any(-1).tolist()
    own = objective == "one_hot"  # slot 0 carries u_1 as well, and slot 1 reads slot 0
    assert differs == [False, own, informed]


@pytest.mark.parametrize("layers", [(0,), (2,), (1, 1), (-1,)])
def test_layers_that_do_not_exist_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="predictor.lookup_layers to be ascending numbers from 1 to 1, found"):
        TokenLookup(tiny_llama(), layers, lambda logits, _: logits.argmax(-1))


def test_a_model_whose_parts_are_not_found_is_refused() -> None:
    model = tiny_llama()
    model.model.norm = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        ValueError, match=r"one list of 2 layers and one final norm, found 1 and 0: set .*lookup_layers"
    ):
        TokenLookup(model, (1,), lambda logits, _: logits.argmax(-1))


def test_the_base_models_parts_stay_its_own() -> None:
    """Two linear maps a layer are trained and stored, and nothing of the base model."""
    _, lookup, _ = fresh_lookup("llama")
    assert sorted(lookup.state_dict()) == ["lenses.0.bias", "lenses.0.weight", "writers.0.weight"]
