"""Integers that callers give: what is one, and what is refused in one line."""

from typing import Any

import numpy as np
import pytest
import torch

from ptp_lightning.utils.whole_numbers import one_or_several, whole_number, whole_numbers


@pytest.mark.parametrize("given", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)], ids=repr)
def test_integers_of_all_libraries(given: Any) -> None:
    found = whole_number(given, "seed")
    assert type(found) is int and found == 3


@pytest.mark.parametrize(
    "given",
    [
        *(3.0, 2.5, "5", True, None, np.bool_(True), np.float64(3), np.array([3])),
        *(torch.tensor(3.0), torch.tensor(True), torch.tensor([3]), torch.zeros(40, 40)),
    ],
    ids=repr,
)
def test_others_are_refused_in_one_line(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^expected an integer, found [^\n]{1,60}: set seed$"):
        whole_number(given, "seed")


@pytest.mark.parametrize("given", [[4, 5], (4, 5), np.array([4, 5]), torch.tensor([4, 5]), [torch.tensor(4), 5]])
def test_sequences(given: Any) -> None:
    found = whole_numbers(given, "prompt")
    assert found == [4, 5] and {type(one) for one in found} == {int}


@pytest.mark.parametrize("given", [7, torch.tensor(7), torch.tensor([[7]]), torch.tensor([1.0]), [True], "7", [[7]]])
def test_other_sequences_are_refused_in_one_line(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^expected (an integer|several integers), found [^\n]{1,60}: set prompt$"):
        whole_numbers(given, "prompt")


def test_one_or_several() -> None:
    assert one_or_several(np.int64(3), "seed") == 3
    assert one_or_several([3, np.int64(4)], "seed") == (3, 4)
    with pytest.raises(ValueError, match="expected an integer, found '5': set seed"):
        one_or_several(["5"], "seed")
