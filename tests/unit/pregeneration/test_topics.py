"""Topics: the shipped ones, weights, and one line for a file that holds something else."""

from collections import Counter
from pathlib import Path

import pytest

from ptp_lightning.pregeneration.topics import Topic, draw_opening, read_topics


def test_the_shipped_topics_are_read_and_one_leaves_everything_to_the_model() -> None:
    topics = read_topics(None)
    assert len(topics) > 5
    assert [topic.openings for topic in topics if topic.system is None] == [("",)]


def test_entries_have_defaults(tmp_path: Path) -> None:
    (tmp_path / "topics.yaml").write_text("- system: Code.\n  weight: 2\n- openings: [a, 'b ']\n")
    first, second = read_topics(str(tmp_path / "topics.yaml"))
    assert first == Topic("Code.", 2)
    assert second == Topic(None, 1, ("a", "b "))


def test_shares_are_the_weights_and_openings_are_drawn_equally_often() -> None:
    topics = [Topic("a", 3, ("x", "y")), Topic("b", 1)]
    drawn = Counter((topic.system, opening) for topic, opening in (draw_opening(topics, 5, k) for k in range(4000)))
    assert drawn.keys() == {("a", "x"), ("a", "y"), ("b", "")}
    assert abs(drawn["a", "x"] / 4000 - 0.375) < 0.03
    assert abs(drawn["a", "y"] / 4000 - 0.375) < 0.03
    assert abs(drawn["b", ""] / 4000 - 0.25) < 0.03
    assert [draw_opening(topics, 5, k) for k in range(9)] != [draw_opening(topics, 6, k) for k in range(9)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("system: a", "expected a list of topics"),
        ("[]", "expected a list of topics"),
        ("- a", r"topic 1: expected entries among openings, system, weight, found 'a'"),
        ("- {system: a}\n- {sytem: a}", r"topic 2: expected entries among .*, found \['sytem'\]"),
        ("- {weight: 0}", "topic 1: expected weight > 0, found 0"),
        ("- {weight: much}", "topic 1: expected weight > 0, found 'much'"),
        ("- {system: 3}", "topic 1: expected text as system, found 3"),
        ("- {openings: a}", "topic 1: expected a list of texts as openings, found 'a'"),
        ("- {openings: []}", "topic 1: expected a list of texts as openings"),
        ("- {openings: [1]}", r"topic 1: expected a list of texts as openings, found \[1\]"),
        ("- [", "--topics=.*topics.yaml cannot be read"),
    ],
)
def test_errors_are_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "topics.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        read_topics(str(tmp_path / "topics.yaml"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"topics at .*nowhere, found none: set --topics"):
        read_topics(str(tmp_path / "nowhere"))
