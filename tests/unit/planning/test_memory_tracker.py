"""MemoryTracker: each storage is counted once, from its creation until the last reference is gone."""

import torch

from ptp_lightning.planning.memory_tracker import ACTIVATIONS, MemoryTracker


def test_views_are_counted_once_and_freed_storages_no_more() -> None:
    with MemoryTracker() as tracker:
        numbers = torch.zeros(10)
        rows = numbers.view(5, 2)[1:]
        assert tracker.current[ACTIVATIONS] == 40
        del numbers
        assert tracker.current[ACTIVATIONS] == 40  # the view still references the storage
        more = torch.zeros(4, dtype=torch.int64)
        del rows
        assert tracker.current[ACTIVATIONS] == 32
        assert tracker.peak[ACTIVATIONS] == 72
        del more
        tracker.reset_peak()
        assert tracker.current[ACTIVATIONS] == tracker.peak[ACTIVATIONS] == 0


def test_tensors_saved_by_autograd_are_counted_until_the_backward_pass() -> None:
    weight = torch.ones(10, requires_grad=True)
    with MemoryTracker() as tracker:
        tracker.assign("trained", [weight])
        total = weight.exp().sum()  # the exponentials are saved for the backward pass
        assert dict(tracker.current) == {"trained": 40, ACTIVATIONS: 40 + 4}
        total.backward()
        del total
        assert tracker.current[ACTIVATIONS] == 40
        assert weight.grad is not None
        tracker.assign("gradients", [weight.grad])
    assert dict(tracker.current) == {"trained": 40, ACTIVATIONS: 0, "gradients": 40}


def test_the_peak_is_by_category() -> None:
    with MemoryTracker() as tracker:
        with tracker.category("states"):
            state = torch.zeros(5)
        for size in (3, 7, 2):
            torch.zeros(size)
        del state
        assert dict(tracker.peak) == {"states": 20, ACTIVATIONS: 28}
