"""Bytes count once for each storage, from the operation that makes it until nobody can read it any more."""

import torch

from ptp_lightning.planning.live_bytes import OTHER, LiveBytes


def test_views_count_once_and_what_is_let_go_no_more() -> None:
    with LiveBytes() as live:
        numbers = torch.zeros(10)
        rows = numbers.view(5, 2)[1:]
        assert live.now[OTHER] == 40
        del numbers
        assert live.now[OTHER] == 40  # the view still reads it
        more = torch.zeros(4, dtype=torch.int64)
        del rows
        assert live.now[OTHER] == 32
        assert live.peak[OTHER] == 72
        del more
        live.restart()
        assert live.now[OTHER] == live.peak[OTHER] == 0


def test_what_autograd_keeps_counts_until_the_backward_pass() -> None:
    weight = torch.ones(10, requires_grad=True)
    with LiveBytes() as live:
        live.claim("trained", [weight])
        total = weight.exp().sum()  # the exponentials are read again
        assert dict(live.now) == {"trained": 40, OTHER: 40 + 4}
        total.backward()
        del total
        assert live.now[OTHER] == 40
        assert weight.grad is not None
        live.claim("gradients", [weight.grad])
    assert dict(live.now) == {"trained": 40, OTHER: 0, "gradients": 40}


def test_the_peak_says_what_was_there_then() -> None:
    with LiveBytes() as live:
        with live.making("states"):
            state = torch.zeros(5)
        for size in (3, 7, 2):
            torch.zeros(size)
        del state
        assert dict(live.peak) == {"states": 20, OTHER: 28}
