"""Which losses are sound for which objective; `require_sound` turns an unsound pair into an error."""

from __future__ import annotations

from ptp_lightning.losses.base import Loss

OBJECTIVES = frozenset({"one_hot", "categorical", "independent", "sequential"})


def require_sound(loss: Loss | type[Loss], objective_name: str) -> None:
    """Refuse a loss whose minimum is not the optimum of the objective.

    Args:
        loss: the loss, or its class.
        objective_name: one of `OBJECTIVES`.

    Raises:
        ValueError: with the reason, if the loss is unsound for the objective; or if there is no such objective.

    >>> from ptp_lightning.losses import CrossEntropy, KullbackLeibler
    >>> require_sound(CrossEntropy(), "one_hot")
    >>> require_sound(KullbackLeibler(), "one_hot")
    Traceback (most recent call last):
    ValueError: KullbackLeibler is not a sound loss for the one_hot objective: ...
    """
    if objective_name not in OBJECTIVES:
        raise ValueError(f"Expected an objective out of {sorted(OBJECTIVES)}, found {objective_name!r}.")
    if objective_name in loss.sound_for:
        return
    name = loss.__name__ if isinstance(loss, type) else type(loss).__name__
    raise ValueError(
        f"{name} is not a sound loss for the {objective_name} objective: {loss.unsound_because[objective_name]}. "
        f"Set `loss.class_path` to another loss (CrossEntropy, say), or `objective` to one of {sorted(loss.sound_for)}."
    )
