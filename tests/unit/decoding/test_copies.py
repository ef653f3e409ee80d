"""Drafts that need no network: copies of the text, and that no draft changes a text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptp_lightning.decoding import (
    GenerationSettings,
    cycle_choice,
    decode_autoregressively,
    decode_by_lookup,
    decode_speculatively,
    speculative,
)
from ptp_lightning.decoding.cycle_choice import CycleChoice
from ptp_lightning.decoding.drafting import StudentDrafter, draft_trees, draft_windows, likely_tokens
from ptp_lightning.decoding.state import begin_decoding
from ptp_lightning.decoding.text_drafts import StudentTokens, TextDraft
from ptp_lightning.decoding.text_lookup import MAX_MATCH, TextLookup
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.ngrams import count_ngrams
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import PROMPT, Decode, SlotsOfTraining, decode_one, reference
from tests.helpers.tiny_predictors import CORRECTIONS, tiny_predictor

VOCABULARY = 32
PROMPTS = [[3, 1, 4, 1, 5, 9, 3, 1, 4, 1, 5, 9], [7], [2, 2, 2, 2, 2], [6, 7, 8] * 20]
SAMPLING = {
    "greedy": SamplingConfig(temperature=0),
    "cold": SamplingConfig(temperature=0.3, top_k=5),  # repeats itself often
    "truncated": SamplingConfig(temperature=0.7, top_k=50, top_p=0.9),
}
DECODERS: dict[str, Decode] = {
    "speculative": partial(decode_speculatively, lookup=True),
    "lookup": decode_by_lookup,
}


class TestTextLookup:
    @staticmethod
    def copied(tokens: list[int], size: int) -> list[int]:
        """What a draft of `size` tokens copies."""
        lookup, path = TextLookup(tokens), list[int]()
        while len(path) < size and (match := lookup.longest_match(path)):
            path.append(match.follower)
        return path

    def test_copies_what_followed(self) -> None:
        assert self.copied([1, 2, 3, 9, 4, 1, 2], size=2) == [3, 9]

    def test_the_longest_match_counts_then_the_latest(self) -> None:
        assert self.copied([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], size=1) == [3]
        assert self.copied([7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], size=1) == [4]

    def test_a_loop_goes_on(self) -> None:
        assert self.copied([8, 9, 1, 2, 3, 1, 2, 3, 1, 2], size=7) == [3, 1, 2, 3, 1, 2, 3]
        assert self.copied([4, 4], size=3) == [4, 4, 4]

    def test_a_new_token_is_no_match(self) -> None:
        assert TextLookup([1, 2, 1, 3]).longest_match() is None
        assert TextLookup([1, 2, 1]).longest_match([3]) is None
        assert TextLookup([5]).longest_match() is None

    @given(
        text=st.lists(st.integers(0, 3), min_size=1, max_size=60),
        path=st.lists(st.integers(0, 3), max_size=8),
        num_prompt=st.integers(0, 60),
    )
    def test_is_a_search_of_the_whole_text(self, text: list[int], path: list[int], num_prompt: int) -> None:
        lookup = TextLookup(text[:num_prompt])
        for token in text[num_prompt:]:
            lookup.append(token)
        found, whole = lookup.longest_match(path), text + path
        for length in range(min(MAX_MATCH, len(whole)), 0, -1):
            starts = [k for k in range(len(text) - length) if text[k : k + length] == whole[-length:]]
            if starts:
                assert found == (length, text[starts[-1] + length])
                break
        else:
            assert found is None


@cache
def predictor_of(kind: str, family: str = "llama", dtype: torch.dtype = torch.float32) -> PredictorNetwork:
    """Predictors whose cycles differ: two calls, a copy's third call, a pass of late slots, slots without a
    pass, with and without trees.
    """
    options = {
        "slots": {"correction": None},
        "refiner": {},
        "trees": {"correction": CORRECTIONS["token_conditioned"]},
        "copy": {"student": "full_copy"},
        "late": {"correction": CORRECTIONS["token_conditioned"], "slot_layers": 1, "num_layers": 3},
        "layerless": {"correction": None, "slot_layers": 0},
    }[kind]
    return tiny_predictor(family, vocab_size=VOCABULARY, dtype=dtype, **options)  # pyright: ignore[reportArgumentType]


KINDS = ["slots", "refiner", "trees", "copy", "late", "layerless"]


@one_in(3, kind=KINDS, family=["llama", "qwen2", "gpt_neox"], sampling=SAMPLING, decoder=DECODERS)
def test_texts_are_the_reference_texts(kind: str, family: str, sampling: str, decoder: str) -> None:
    """Alone and in a batch, whose rows end at other times."""
    predictor, decode = predictor_of(kind, family), DECODERS[decoder]
    settings = GenerationSettings(SAMPLING[sampling], 33, seed=4, window_length=5, end_of_text=frozenset({11}))
    expected = [reference(predictor, settings, prompt) for prompt in PROMPTS]
    assert [decode_one(decode, predictor, settings, prompt).token_ids for prompt in PROMPTS] == expected
    assert [text.token_ids for text in decode(predictor, PROMPTS, settings)] == expected


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_in_bfloat16(kind: str, decoder: str) -> None:
    predictor = predictor_of(kind, dtype=torch.bfloat16)
    settings = GenerationSettings(SAMPLING["cold"], 40, seed=2, window_length=5)
    for prompt in PROMPTS:
        decoded = decode_one(DECODERS[decoder], predictor, settings, prompt)
        assert decoded.token_ids == reference(predictor, settings, prompt)


def test_penalties_and_stops_hold() -> None:
    settings = GenerationSettings(
        SamplingConfig(0.5, repetition_penalty=0.8, no_repeat_ngram_size=6), 30, seed=1, window_length=5
    )
    predictor = predictor_of("slots")
    expected = reference(predictor, settings, PROMPTS[0])
    for decode in DECODERS.values():
        assert decode_one(decode, predictor, settings, PROMPTS[0]).token_ids == expected
        stopped = decode_one(
            decode, predictor, settings, PROMPTS[0], on_tokens=lambda _, tokens: 1 if expected[9] in tokens else None
        )
        assert stopped.finish_reason == "stop"


def chain(token_ids: list[int]) -> TextDraft:
    return TextDraft(token_ids, list(range(-1, len(token_ids) - 1)), len(token_ids), 1.0, 1.0)


class ForcedDrafts:
    """Takes the place of `CycleChoice.draft`: true tokens, some of them replaced, for some of the cycles.

    Trees have a wrong token beside each of them, before or after it.
    """

    def __init__(self, texts: list[list[int]], acceptance_rate: float, share: float, trees: bool = False) -> None:
        self.texts, self.acceptance_rate, self.share, self.trees = texts, acceptance_rate, share, trees
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, choice: CycleChoice, text: int, new: Sequence[int], max_depth: int) -> TextDraft | None:
        random = torch.rand(max_depth + 1, generator=self.generator).tolist()
        if random.pop() >= self.share:
            return None
        true = [*self.texts[text], *[0] * max_depth][len(new) : len(new) + max_depth]
        drafted = [t if r < self.acceptance_rate else (t + 1) % VOCABULARY for t, r in zip(true, random, strict=True)]
        if not self.trees:
            return chain(drafted)
        draft = TextDraft([], [], len(drafted), 1.0, 1.0)
        parent = -1
        for token, r in zip(drafted, random, strict=True):
            both = [token, (token + 2) % VOCABULARY]
            draft.token_ids.extend(both if r < 0.6 else both[::-1])
            draft.parents.extend([parent, parent])
            parent = draft.token_ids.index(token, len(draft.token_ids) - 2)
        return draft


@one_in(
    2,
    acceptance_rate=[0.0, 0.5, 0.9, 1.0],
    decoder=DECODERS,
    kind=["refiner", "trees", "copy", "late"],
    shape=["chain", "tree"],
)
def test_adversarial_drafts(
    kind: str, decoder: str, acceptance_rate: float, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right and wrong drafts between those of the student, up to the end of the text."""
    predictor = predictor_of(kind)
    settings = GenerationSettings(SAMPLING["truncated"], 22, seed=5, window_length=4)
    for prompts, share in ((PROMPTS[:1], 0.5), (PROMPTS[1:], 0.8)):
        texts = [reference(predictor, settings, prompt) for prompt in prompts]
        forced = ForcedDrafts(texts, acceptance_rate, share if decoder == "speculative" else 1.0, shape == "tree")
        monkeypatch.setattr(CycleChoice, "draft", lambda *args, forced=forced: forced(*args))
        found = DECODERS[decoder](predictor, prompts, settings)
        assert [text.token_ids for text in found] == texts


@pytest.mark.parametrize("kind", KINDS)
def test_right_copies_are_one_call_a_cycle(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = predictor_of(kind)
    settings = GenerationSettings(max_new_tokens=22, seed=1)
    text = reference(predictor, settings)
    forced = ForcedDrafts([text], 1.0, 1.0)
    monkeypatch.setattr(CycleChoice, "draft", lambda choice, row, new, depth: forced(choice, row, new, min(depth, 4)))
    decoded = decode_one(decode_by_lookup, predictor, settings)
    assert decoded.token_ids == text
    first, *cycles = decoded.cycles
    assert (first.num_committed, first.num_drafted) == (1, 0)
    # Four copied tokens and the pick after them, 1 + 4 * 5 tokens; there is no room for a draft before the last one.
    assert [(cycle.num_committed, cycle.num_correct, cycle.num_drafted) for cycle in cycles] == [(5, 5, 5)] * 4 + [
        (1, 0, 0)
    ]
    assert decoded.num_calls == 6


def test_texts_of_a_batch_copy_different_numbers_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = predictor_of("slots")
    settings = GenerationSettings(max_new_tokens=9, seed=1)
    prompts = [PROMPT, [7], [5, 5]]
    texts = [reference(predictor, settings, prompt) for prompt in prompts]

    def by_row(choice: CycleChoice, text: int, new: Sequence[int], max_depth: int) -> TextDraft:
        return chain(texts[text][len(new) : len(new) + min(max_depth, 2 * text)])

    monkeypatch.setattr(CycleChoice, "draft", by_row)
    found = decode_by_lookup(predictor, prompts, settings)
    assert [text.token_ids for text in found] == texts
    assert [text.num_calls for text in found] == [9, 4, 3]  # 1, 3 and 5 tokens a call, after the first


@pytest.mark.parametrize("kind", ["slots", "copy", "late"])
def test_slots_after_copies_are_those_of_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches, and the states that slots read, are those of the accepted tokens, also after a copy that was wrong."""
    options = {"late": {"slot_layers": 1, "num_layers": 3}, "copy": {"student": "full_copy"}}.get(kind, {})
    predictor = tiny_predictor(vocab_size=VOCABULARY, correction=None, **options)  # pyright: ignore[reportArgumentType]
    settings = GenerationSettings(SamplingConfig(), 24, 2, window_length=5)
    tokens = reference(predictor, settings)
    compare, turns = SlotsOfTraining(predictor, settings, tokens, VOCABULARY), [0]

    def every_other(choice: CycleChoice, row: int, new: Sequence[int], max_depth: int) -> TextDraft | None:
        turns[0] += 1
        copied = [*tokens, 0, 0][len(new) : len(new) + 2]
        return chain([copied[0], (copied[1] + 1) % VOCABULARY][:max_depth]) if turns[0] % 2 else None

    monkeypatch.setattr(CycleChoice, "draft", every_other)
    decoded = decode_one(decode_speculatively, predictor, settings, drafter=compare, lookup=True)
    assert decoded.token_ids == tokens
    assert len(compare.begins) > 2 and turns[0] > 2


@cache
def late_student() -> PredictorNetwork:
    """Late slots that draft trees, so that their tokens are one source of a draft among others."""
    options = {"correction": CORRECTIONS["token_conditioned"], "slot_layers": 1, "num_layers": 3, "ngrams": 64}
    predictor = tiny_predictor(vocab_size=VOCABULARY, **options)  # pyright: ignore[reportArgumentType]
    table = predictor.slot_encoder.ngrams
    assert table is not None
    table.set(count_ngrams([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3] * 2], 64))
    return predictor


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("gain", [-9.0, 9.0], ids=["never asked", "always asked"])
def test_drafts_of_all_sources_change_no_text(sampling: str, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, settings = late_student(), GenerationSettings(SAMPLING[sampling], 24, seed=5, window_length=4)
    texts = [reference(predictor, settings, prompt) for prompt in PROMPTS]
    asked: list[int] = []
    draft_with_student = CycleChoice.draft_with_student

    def note(choice: CycleChoice, text: int, *args: Any) -> TextDraft:
        asked.append(text)
        return draft_with_student(choice, text, *args)

    monkeypatch.setattr(CycleChoice, "draft_with_student", note)
    monkeypatch.setattr(CycleChoice, "learn", lambda *args, **options: None)
    for first in ("EXPECTED_GAIN", "EXPECTED_SPEED"):
        monkeypatch.setattr(cycle_choice, first, gain)
    assert [text.token_ids for text in decode_speculatively(predictor, PROMPTS, settings, lookup=True)] == texts
    assert bool(asked) == (gain > 0)


@pytest.mark.parametrize("kind", ["true", "wrong", "anything"])
def test_whatever_a_student_expects_texts_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, settings = late_student(), GenerationSettings(SamplingConfig(), 24, seed=5, window_length=4)
    prompt, generator = PROMPTS[0], random.Random(0)
    text = [*reference(predictor, settings, prompt), *[0] * 4]

    def expect(*args: Any) -> list[StudentTokens]:
        *_, starts = args
        after = text[starts[0] + 1 :]
        if kind == "anything":
            tokens = [generator.randrange(VOCABULARY) for _ in range(4)]
            return [{(): [(token, 0.3) for token in tokens], (tokens[0],): [(tokens[1], 0.9)]}]
        right = [(token + (kind == "wrong")) % VOCABULARY for token in after[:3]]
        return [{tuple(right[:count]): [(token, 0.95)] for count, token in enumerate(right)}]

    monkeypatch.setattr(speculative, "likely_tokens", expect)
    monkeypatch.setattr(cycle_choice, "EXPECTED_GAIN", 9.0)
    (decoded,) = decode_speculatively(predictor, [prompt], settings, lookup=True)
    assert decoded.token_ids == text[:24]
    assert kind != "true" or decoded.num_calls < 10


def test_expected_tokens_are_the_candidates_of_trees() -> None:
    """The likeliest of them is the draft that the student makes alone."""
    predictor, settings = late_student(), GenerationSettings(SAMPLING["truncated"], 8, seed=5, window_length=4)
    drafter: Any = StudentDrafter(predictor.config.objective, predictor.sampler(settings.sampling))
    with (
        torch.inference_mode(),
        begin_decoding(predictor, [PROMPTS[0], PROMPTS[1]], settings) as (context, _, unread, counts),
    ):
        context.read(unread)
        context.keep(counts)
        first = torch.tensor([[4], [2]])
        slots = context.late_slots(first, 3)
        found = likely_tokens(context, drafter, first, slots, [0, 0])
        draft = draft_windows(context, drafter, first, slots, [0, 0]).tolist()
        tree = draft_trees(context, drafter, first, slots, [0, 0], size=64)
    for row in range(2):
        path: tuple[int, ...] = ()
        for token in draft[row][1:]:
            if path in found[row]:
                assert found[row][path][0][0] == token
            path = (*path, token)
        candidates = {(*start, token) for start, tokens in found[row].items() for token, _ in tokens}
        parents, token_ids = tree.parents[row].tolist(), tree.token_ids[row].tolist()
        paths: list[tuple[int, ...]] = [()]
        for column in range(1, len(token_ids)):
            paths.append((*paths[parents[column]], token_ids[column]))
        assert set(paths[1:]) <= candidates and len(paths) > 2


def test_repetitive_texts_take_fewer_calls() -> None:
    """Greedy texts of a tiny model go round in circles, which a lookup finds."""
    predictor = predictor_of("slots")
    settings = GenerationSettings(SAMPLING["greedy"], 64, window_length=5)
    plain = decode_one(decode_autoregressively, predictor, settings)
    copied = decode_one(decode_by_lookup, predictor, settings)
    assert copied.token_ids == plain.token_ids
    assert plain.num_calls == 64 and copied.num_calls < 32


def test_ngrams_take_fewer_calls_and_change_no_text() -> None:
    """Those of the text itself: a model whose texts do not repeat themselves profits, alone and in a batch."""
    predictor = tiny_predictor(vocab_size=VOCABULARY, ngrams=64)
    settings = GenerationSettings(SAMPLING["truncated"], 40, seed=3, window_length=5)
    texts = [reference(predictor, settings, prompt) for prompt in PROMPTS]
    table = predictor.slot_encoder.ngrams
    assert table is not None
    before = [decode_one(decode_by_lookup, predictor, settings, prompt) for prompt in PROMPTS]
    table.set(count_ngrams([prompt[-2:] + text for prompt, text in zip(PROMPTS, texts, strict=True)], 64))
    for decode in DECODERS.values():
        assert [text.token_ids for text in decode(predictor, PROMPTS, settings)] == texts
    after = [decode_one(decode_by_lookup, predictor, settings, prompt) for prompt in PROMPTS]
    assert [text.token_ids for text in after] == [text.token_ids for text in before] == texts
    assert sum(text.num_calls for text in after) < 0.8 * sum(text.num_calls for text in before)
