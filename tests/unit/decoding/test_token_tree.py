"""Trees of drafts: what is chosen and verified; states and texts are those without a tree."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptp_lightning.auxiliary import likely_picks, pick
from ptp_lightning.decoding import GenerationSettings, decode_speculatively
from ptp_lightning.decoding.drafting import NUM_DRAFT_TOKENS, num_tree_tokens
from ptp_lightning.decoding.joined_decoder import JoinedDecoder
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.decoding.state import BatchContext
from ptp_lightning.decoding.token_tree import TokenTree, TreeLevel, best_tree, depth_first, verified_paths
from ptp_lightning.models import LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.slots.objectives import PickingObjective
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution
from tests.helpers.tiny_decoding import decode_one, reference
from tests.helpers.tiny_models import tiny_family
from tests.helpers.tiny_predictors import CORRECTIONS, OBJECTIVES, tiny_predictor

VOCABULARY = 32
TREE = [0, 0, 0, 1, 3, 1, 2, 4, 6, 6]  # parents; four leaves, five tokens deep
PROMPTS = [[3, 1, 4, 1, 5], [7], [2, 2, 9, 8, 1, 0, 3, 3]]
SAMPLING = {
    "greedy": SamplingConfig(temperature=0),
    "sampled": SamplingConfig(),
    "truncated": SamplingConfig(0.7, 20, 0.9),
}

parents_of_trees = st.integers(1, 14).flatmap(
    lambda size: st.tuples(*(st.integers(0, max(0, column - 1)) for column in range(size)))
)


def path_to(column: int, parents: Sequence[int]) -> list[int]:
    """Columns from the root to this one."""
    path = [column]
    while path[-1] != 0:
        path.append(parents[path[-1]])
    return path[::-1]


@cache
def small(**options: Any) -> PredictorNetwork:
    defaults: dict[str, Any] = {"correction": None, "vocab_size": VOCABULARY}
    return tiny_predictor(**defaults | options)


class TestTrees:
    @given(parents_of_trees)
    def test_ancestors_are_the_path_to_a_token(self, parents: tuple[int, ...]) -> None:
        tree = TokenTree(torch.zeros(1, len(parents), dtype=torch.long), torch.tensor([parents]))
        for column, row in enumerate(tree.ancestors[0]):
            assert row.nonzero().flatten().tolist() == path_to(column, parents)

    @given(parents_of_trees)
    def test_a_walk_leaves_each_path_in_its_columns(self, parents: tuple[int, ...]) -> None:
        """Before a token is read, its ancestors are the latest that was written to the columns before its own."""
        tree = TokenTree(torch.zeros(1, len(parents), dtype=torch.long), torch.tensor([parents]))
        written: dict[int, int] = {}
        seen = []
        for run in depth_first(tree, [10]):
            written |= {run.start + k: column for k, column in enumerate(run.columns)}
            for k, column in enumerate(run.columns):
                assert [written[position] for position in range(10, run.start + k + 1)] == path_to(column, parents)
            seen += run.columns
        assert sorted(seen) == list(range(len(parents)))

    @given(parents_of_trees, st.randoms(use_true_random=False))
    def test_the_longest_correct_path_is_found(self, parents: tuple[int, ...], random: Any) -> None:
        token_ids = [random.randrange(3) for _ in parents]
        picks = [random.randrange(3) for _ in parents]
        tree = TokenTree(torch.tensor([token_ids]), torch.tensor([parents]))
        (columns,), (found,), _ = verified_paths(tree, torch.tensor([picks]))[0]
        correct = [
            path
            for path in (path_to(column, parents) for column in range(len(parents)))
            if all(token_ids[after] == picks[before] for before, after in pairwise(path))
        ]
        assert columns in correct and len(columns) == max(map(len, correct))
        assert found == [*(token_ids[column] for column in columns), picks[columns[-1]]]

    def test_the_likeliest_paths_are_chosen_and_parents_come_first(self) -> None:
        """Paths of probability 0.6, 0.3; 0.54, 0.06, 0.29, 0.01; equal ones are as long as their beginnings allow."""
        first = torch.tensor([[9]])
        level = TreeLevel(torch.tensor([[1, 2]]), torch.tensor([[0.6, 0.3]]).double().log(), torch.tensor([[0, 0]]))
        below = TreeLevel(
            torch.tensor([[3, 4, 5, 6]]),
            torch.tensor([[0.54, 0.06, 0.29, 0.01]]).double().log(),
            torch.tensor([[1, 1, 2, 2]]),
        )
        assert best_tree(first, [level, below], 2).token_ids.tolist() == [[9, 1, 3]]
        tree = best_tree(first, [level, below], 4)
        assert tree.token_ids.tolist() == [[9, 1, 2, 3, 5]] and tree.parents.tolist() == [[0, 0, 0, 1, 2]]
        certain = [level._replace(scores=torch.zeros(1, 2).double()), below._replace(scores=torch.zeros(1, 4).double())]
        assert best_tree(first, certain, 2).parents.tolist() == [[0, 0, 0]]


class TestReading:
    """A token of a tree has the bits that it has in a text that contains its path alone, and so has what follows."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("family", "is_joined"),
        [("llama", True), ("qwen3", True), ("llama", False), ("gpt2", False), ("gpt_neox", False)],
    )
    @torch.inference_mode()
    def test_states_of_a_tree(
        self, family: str, is_joined: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        network = tiny_predictor(family, dtype=dtype, vocab_size=VOCABULARY)
        if not is_joined:
            monkeypatch.setattr(JoinedDecoder, "is_supported", lambda model: False)
        counts, generator = [len(prompt) for prompt in PROMPTS], torch.Generator().manual_seed(0)
        token_ids = torch.randint(VOCABULARY, (3, len(TREE)), generator=generator)
        tree = TokenTree(token_ids, torch.tensor([TREE] * 3))
        prompts = torch.tensor([[*prompt, *[0] * (8 - len(prompt))] for prompt in PROMPTS])
        with prepare_for_decoding(network):
            for leaf in (0, 2, 5, 7, 9):
                path = path_to(leaf, TREE)
                context, alone = (BatchContext(network, GenerationSettings(), counts) for _ in range(2))
                for one in (context, alone):
                    one.read(prompts)
                    one.keep(counts)
                context.read_tree(tree)
                logits = context.next_logits([0] * 3, len(TREE))
                context.keep_path([path, path[:1], path])
                for k, column in enumerate(path):
                    alone.read(token_ids[:, column : column + 1])
                    rows = [0, 1, 2] if k == 0 else [0, 2]  # of the second row, the root alone is kept
                    assert torch.equal(alone.next_logits([0] * 3, 1)[rows, 0], logits[rows, column])
                    alone.keep([1, int(k == 0), 1])
                rest = torch.tensor([[1, 2], [3, 4], [5, 6]])
                context.read(rest)
                alone.read(rest)
                assert torch.equal(context.next_logits([0] * 3, 2), alone.next_logits([0] * 3, 2))


class ForcedTrees:
    """Drafts in which the token of the reference text is one of the choices now and then, at any rank.

    Args:
        texts: reference texts of the prompts, which end at the same time.
        rate: probability that the correct token is a choice.
    """

    def __init__(self, texts: list[list[int]], rate: float) -> None:
        self.texts = torch.tensor([[*text, *[0] * 9] for text in texts])
        self.rate = rate
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        raise AssertionError("a tree was asked for")

    def likely(
        self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int], count: int
    ) -> tuple[Tensor, Tensor]:
        assert slot_logits.shape[:2] == auxiliaries.shape
        shape = (*auxiliaries.shape, count)
        choices = torch.randint(VOCABULARY, shape, generator=self.generator)
        correct = self.texts.gather(1, torch.tensor(starts).unsqueeze(1)).unsqueeze(2).expand(shape)
        is_correct = torch.rand(shape, generator=self.generator) < self.rate / count
        probabilities = torch.rand(shape, generator=self.generator, dtype=torch.float64) / count
        return torch.where(is_correct, correct, choices), probabilities * 2


class TestTexts:
    """Trees never change a text."""

    @pytest.mark.parametrize("sampling", SAMPLING)
    @pytest.mark.parametrize("correction", ["none", "token_conditioned", "markov"])
    def test_of_a_student(self, correction: str, sampling: str) -> None:
        predictor = small() if correction == "none" else small(correction=CORRECTIONS[correction])
        for size in (3, 8, 40):
            wanted = GenerationSettings(SAMPLING[sampling], 20, seed=2, window_length=6, num_draft_tokens=size)
            found = decode_speculatively(predictor, PROMPTS, wanted)
            assert [one.token_ids for one in found] == [reference(predictor, wanted, prompt) for prompt in PROMPTS]

    @pytest.mark.parametrize(
        ("family", "student"), [("llama", "gated_lora"), ("llama", "full_copy"), ("gpt2", "shared")]
    )
    @settings(max_examples=4, deadline=None)
    @given(rate=st.sampled_from([0.0, 0.5, 1.0, 3.0]), size=st.integers(1, 20), seed=st.integers(0, 99))
    def test_of_any_drafts(self, family: str, student: str, rate: float, size: int, seed: int) -> None:
        predictor = small(family=family, student=student)
        wanted = GenerationSettings(SamplingConfig(), 18, seed=seed, window_length=6, num_draft_tokens=size)
        texts = [reference(predictor, wanted, prompt) for prompt in PROMPTS]
        for prompts, expected in ((PROMPTS[:1], texts[:1]), (PROMPTS, texts)):
            drafter = ForcedTrees(expected, rate)
            found = decode_speculatively(predictor, prompts, wanted, drafter=drafter)
            assert [one.token_ids for one in found] == expected

    def test_of_a_model_with_a_sliding_window(self) -> None:
        model = tiny_family("mistral", vocab_size=VOCABULARY, sliding_window=6)
        predictor = PredictorNetwork(PredictorConfig(lora=LoraSettings(rank=2)), model).eval()
        wanted = GenerationSettings(SamplingConfig(), 18, seed=3, window_length=6, num_draft_tokens=9)
        texts = [reference(predictor, wanted, prompt) for prompt in PROMPTS]
        found = decode_speculatively(predictor, PROMPTS, wanted, drafter=ForcedTrees(texts, 2.0))
        assert [one.token_ids for one in found] == texts

    def test_an_end_of_text_inside_a_tree(self) -> None:
        predictor = small()
        wanted = GenerationSettings(SamplingConfig(), 18, seed=1, window_length=6, num_draft_tokens=6)
        text = reference(predictor, wanted)
        wanted = replace(wanted, end_of_text=frozenset({text[7]}))
        drafter = ForcedTrees([text], rate=4.0)
        found = decode_one(decode_speculatively, predictor, wanted, drafter=drafter)
        assert found.token_ids == text[: text.index(text[7]) + 1] and found.finish_reason == "eos"


class SecondChoice(ForcedTrees):
    """The first choice is wrong, the second is the token of the reference text."""

    def likely(
        self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int], count: int
    ) -> tuple[Tensor, Tensor]:
        correct = self.texts.gather(1, torch.tensor(starts).unsqueeze(1)).expand(auxiliaries.shape)
        choices = torch.stack([(correct + 1) % VOCABULARY, correct], dim=2)
        return choices, torch.tensor([0.55, 0.45], dtype=torch.float64).expand(choices.shape)


def test_a_second_choice_is_worth_a_call() -> None:
    predictor = small()
    wanted = GenerationSettings(SamplingConfig(), 21, seed=1, window_length=3, num_draft_tokens=6)
    text = reference(predictor, wanted)
    found = decode_one(decode_speculatively, predictor, wanted, drafter=SecondChoice([text], 1.0))
    assert found.token_ids == text
    assert found.correct_per_cycle[:5] == [3] * 5  # the exact first token, and two second choices after it


@pytest.mark.parametrize(
    ("correction", "sampling", "given_number", "expected"),
    [
        ("token_conditioned", SamplingConfig(), None, NUM_DRAFT_TOKENS),
        ("token_conditioned", SamplingConfig(), 0, 0),
        ("token_conditioned", SamplingConfig(), 5, 5),
        ("token_conditioned", SamplingConfig(repetition_penalty=1.3), 5, 0),
        ("token_conditioned_parallel", SamplingConfig(), 5, 0),
        ("refiner", SamplingConfig(), None, 0),
        ("none", SamplingConfig(), None, 0),
        ("none", SamplingConfig(), 5, 5),
    ],
)
def test_who_drafts_trees(correction: str, sampling: SamplingConfig, given_number: int | None, expected: int) -> None:
    predictor = small() if correction == "none" else small(correction=CORRECTIONS[correction])
    wanted = GenerationSettings(sampling, num_draft_tokens=given_number)
    assert num_tree_tokens(predictor, wanted) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_likeliest_token_is_that_of_a_single_draft(name: str, temperature: float) -> None:
    objective = OBJECTIVES[name]
    if isinstance(objective, PickingObjective):
        objective = replace(objective, cdf_error=0.3)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 4, VOCABULARY, generator=generator)
    u = torch.rand(50, 4, generator=generator, dtype=torch.float64)
    sampler = Sampler(SamplingConfig(temperature, 20, 0.9))
    token_ids, probabilities = objective.likely_tokens(logits, u, sampler, 4)
    assert torch.equal(token_ids[..., 0], objective.tokens_from_logits(logits, u, sampler))
    assert (probabilities.diff(dim=-1) <= 0).all() and (probabilities.sum(-1) <= 1 + 1e-6).all()


def test_the_probabilities_of_choices_are_those_of_a_shifted_distribution() -> None:
    """The edges of P have a common error: u - error, reflected at 0 and 1, falls into the intervals that often."""
    P = TokenDistribution(torch.tensor([0.5, 0.2, 0.3]).expand(200_000, -1))
    u, generator = torch.full((200_000,), 0.6, dtype=torch.float64), torch.Generator().manual_seed(0)
    token_ids, probabilities = likely_picks(u, P, error=0.2, count=3)
    shifted = (u + 0.2 * torch.randn(200_000, generator=generator, dtype=torch.float64)).abs()
    shifted = torch.where(shifted > 1, 2 - shifted, shifted).clamp(0, 1 - 1e-9)
    counts = pick(shifted, P).bincount(minlength=3) / 200_000
    assert (counts[token_ids[0]] - probabilities[0]).abs().max() < 5 * (0.25 / 200_000) ** 0.5
