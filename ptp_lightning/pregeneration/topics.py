"""Topics of user turns that a chat model writes itself: system prompts that steer them, and how turns begin."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from ptp_lightning.utils.local_paths import local_path
from ptp_lightning.utils.pretrained import clear_errors, embedded_folder

TOPICS_KEY = "--topics"
SHIPPED_TOPICS = "topics.yaml"


@dataclass(frozen=True)
class Topic:
    """What a share of the user turns is about.

    Args:
        system: system prompt while the user turn is written; None is that of the chat template. The answer is written
            with that of the template.
        weight: share of the turns, relative to the other topics.
        openings: texts with which turns begin, equally often; an empty one leaves everything to the model.

    Raises:
        ValueError: a value is out of range.
    """

    system: str | None = None
    weight: float = 1.0
    openings: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        if not isinstance(self.system, str | None):
            raise ValueError(f"expected text as system, found {self.system!r}")
        if not isinstance(self.weight, int | float) or not 0 < self.weight < float("inf"):
            raise ValueError(f"expected weight > 0, found {self.weight!r}")
        if not self.openings or not all(isinstance(opening, str) for opening in self.openings):
            raise ValueError(f"expected a list of texts as openings, found {list(self.openings)!r:.80}")


def read_topics(file: str | None) -> list[Topic]:
    """The topics of a YAML file, a list of entries with the arguments of `Topic`; by default those of the package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; names the entry.
    """
    path = embedded_folder(SHIPPED_TOPICS) if file is None else local_path(file, TOPICS_KEY)
    if not path.is_file():
        raise FileNotFoundError(f"expected a YAML file of topics at {path}, found none: set {TOPICS_KEY}")
    with clear_errors(path, TOPICS_KEY):
        entries: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"expected a list of topics in {path}, found {entries!r:.60}: set {TOPICS_KEY}")
    return [_topic(entry, f"{path}, topic {number}") for number, entry in enumerate(entries, start=1)]


def draw_opening(topics: Sequence[Topic], seed: int, number: int) -> tuple[Topic, str]:
    """The topic and the opening of a user turn. They depend on the seed and on the number of the turn alone.

    >>> topics = [Topic("You solve riddles.", openings=("Why ", "Which ")), Topic("You write code.", weight=3)]
    >>> [draw_opening(topics, seed=0, number=k)[1] for k in range(6)]
    ['', 'Which ', '', 'Why ', '', 'Which ']
    """
    generator = random.Random(f"{seed}/user turn/{number}")
    (topic,) = generator.choices(topics, [one.weight for one in topics])
    return topic, generator.choice(topic.openings)


def _topic(entry: Any, where: str) -> Topic:
    names = {field.name for field in fields(Topic)}
    if not isinstance(entry, Mapping) or not entry.keys() <= names:
        found = sorted(map(str, entry)) if isinstance(entry, Mapping) else repr(entry)[:60]
        raise ValueError(f"{where}: expected entries among {', '.join(sorted(names))}, found {found}: set {TOPICS_KEY}")
    openings = entry.get("openings", [""])
    if not isinstance(openings, list):
        raise ValueError(f"{where}: expected a list of texts as openings, found {openings!r:.60}: set {TOPICS_KEY}")
    try:
        return Topic(**{**entry, "openings": tuple(openings)})
    except ValueError as error:
        raise ValueError(f"{where}: {error}: set {TOPICS_KEY}") from error
