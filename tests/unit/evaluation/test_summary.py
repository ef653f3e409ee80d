"""Scores and acceptance gaps from records that can be counted by hand."""

import math

import pytest

from ptp_lightning.evaluation.acceptance_gap import ContextBin, acceptance_gaps
from ptp_lightning.evaluation.records import Record
from ptp_lightning.evaluation.summary import accuracy_given_prefix, scores, speed_ratio

NAMES = ["autoregressive", "transformers", "speculative"]


def record(
    decoder: str,
    question: str = "q1",
    tokens: int = 10,
    calls: int = 10,
    seconds: float = 1.0,
    cycles: list[tuple[int, int]] | None = None,
    **changes: object,
) -> Record:
    pairs = cycles or []
    fields: dict[str, object] = {
        "question_id": question,
        "category": "math",
        "turn": 0,
        "seed": 0,
        "temperature": 0.7,
        "decoder": decoder,
        "num_prompt_tokens": 30,
        "num_truncated": 0,
        "token_ids": list(range(tokens)),
        "num_calls": calls,
        "seconds": seconds,
        "phases": {},
        "peak_bytes": 5,
        "correct_per_cycle": [correct for correct, _ in pairs],
        "drafted_per_cycle": [drafted for _, drafted in pairs],
        "committed_per_cycle": [correct + 1 for correct, _ in pairs],
    }
    return Record(**(fields | changes))  # pyright: ignore[reportArgumentType]


def test_scores() -> None:
    records = [
        record("autoregressive"),
        record("autoregressive", "q2", tokens=10, calls=10, seconds=3.0, category="code"),
        record("speculative", calls=4, seconds=0.5, cycles=[(3, 4), (4, 4)], phases={"forward": 0.3, "drafting": 0.1}),
        record("speculative", "q2", calls=6, seconds=1.5, cycles=[(1, 4)] * 3, category="code", token_ids=[9] * 10),
        record("transformers", seconds=2.0),
        record("transformers", "q2", seconds=2.0, category="code"),
    ]
    found = {
        (score.category, score.decoder): score for score in scores(records, NAMES, ["autoregressive", "speculative"])
    }
    assert [name for category, name in found if category == "overall"] == NAMES
    assert len(found) == 9
    score = found["overall", "speculative"]
    assert (score.num_answers, score.num_tokens) == (2, 20)
    assert score.tokens_per_call == 20 / 10
    assert score.tokens_per_cycle == (4 + 5 + 2 + 2 + 2) / 5
    assert score.correct_per_cycle == (3 + 4 + 3) / 5
    assert score.milliseconds_per_token == pytest.approx((50 + 150) / 2)
    assert score.speed.value == pytest.approx(2.0)
    assert score.transformers_speed is not None and score.transformers_speed.value == pytest.approx(2.0)
    assert score.call_cost == pytest.approx((2.0 / 10) / (4.0 / 20))
    assert score.num_identical == 1
    assert score.phases == pytest.approx({"forward": 0.75, "drafting": 0.25})
    assert found["math", "speculative"].num_identical == 1 and found["code", "speculative"].num_identical == 0
    assert found["overall", "transformers"].num_identical is None
    assert found["overall", "transformers"].tokens_per_cycle is None


def test_break_even_is_where_tokens_per_call_meet_the_cost() -> None:
    records = [record("autoregressive"), record("speculative", calls=5, seconds=0.8, cycles=[(1, 2)])]
    (score,) = (
        score for score in scores(records, NAMES, []) if (score.decoder, score.category) == ("speculative", "overall")
    )
    assert score.speed.value == pytest.approx(score.tokens_per_call / score.call_cost)


class TestSpeedRatio:
    def test_equal_questions_give_a_zero_interval(self) -> None:
        own = [record("a", f"q{n}", seconds=1.0) for n in range(5)]
        other = [record("b", f"q{n}", seconds=3.0) for n in range(5)]
        assert speed_ratio(own, other) == pytest.approx((3.0, 3.0, 3.0))

    def test_the_interval_is_the_spread_over_questions(self) -> None:
        own = [record("a", f"q{n}", seconds=1.0) for n in range(40)]
        other = [record("b", f"q{n}", seconds=1.0 + n % 3) for n in range(40)]
        value, low, high = speed_ratio(own, other)
        spread = 1.96 * math.sqrt(2 / 3 / 40)
        assert value == pytest.approx(sum(1 + n % 3 for n in range(40)) / 40)
        assert value - low == pytest.approx(spread, rel=0.15) and high - value == pytest.approx(spread, rel=0.15)

    def test_longer_answers_of_a_question_count_by_token(self) -> None:
        assert speed_ratio([record("a", tokens=20)], [record("b", tokens=10)]).value == pytest.approx(2.0)


def test_accuracy_given_prefix() -> None:
    # Of 4 drafts, 3 reach token 1 (the second has none): correct, correct, wrong. Two reach token 2: correct, wrong.
    cycles = [(3, 3), (1, 1), (2, 3), (1, 2), (2, 4)]
    # The last draft ended with its text: its token 1 is correct, its token 2 unknown.
    assert accuracy_given_prefix([record("a", cycles=cycles)]) == pytest.approx([3 / 4, 1 / 2])


class TestGaps:
    RECORDS = (
        # Drafts after 30, 31 .. tokens; then a decoder that starts at 30, 34 and 36, where its draft is short.
        record("all_positions", tokens=0, cycles=[(4, 4), (1, 4), (2, 4), (1, 4)]),
        record("speculative", cycles=[(3, 4), (1, 4), (2, 2)]),
    )

    def test_survival_by_position(self) -> None:
        (gap,) = acceptance_gaps(self.RECORDS, 4, prefix_counts=[0, 1, 1, 0, 2], trained_temperature=0.7)
        assert gap.all_positions == [1.0, 0.5, 0.25, 0.25]
        assert gap.draft_positions == [1.0, 0.5, 0.5, 0.0]
        assert gap.validation == [1.0, 0.75, 0.5, 0.5]

    def test_by_context(self) -> None:
        (gap,) = acceptance_gaps(self.RECORDS, 4, prefix_counts=None, trained_temperature=0.7)
        assert gap.by_context == [ContextBin(0, 31, 2.5, 3.0), ContextBin(32, 63, 1.5, 1.0)]
        assert gap.validation is None

    def test_counts_of_a_stored_file_allocate_nothing(self) -> None:
        (gap,) = acceptance_gaps(
            self.RECORDS, 4, prefix_counts=[0, 10**15, 10**15, 0, 2 * 10**15], trained_temperature=0.7
        )
        assert gap.validation == [1.0, 0.75, 0.5, 0.5]

    def test_validation_at_another_temperature_is_not_shown(self) -> None:
        assert acceptance_gaps(self.RECORDS, 4, [0, 1, 1, 0, 2], trained_temperature=1.0)[0].validation is None
        assert acceptance_gaps(self.RECORDS, 4, [0, 1, 1, 0, 2], trained_temperature=None)[0].validation is not None
