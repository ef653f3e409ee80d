"""Random numbers that depend on named keys alone: the same configuration draws the same numbers on every run."""

import hashlib

import torch


def keyed_generator(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by its keys, for instance (seed, rank, step).

    Keyed by the step, it needs no state of its own in a checkpoint: a resumed run draws what the uninterrupted one did.
    """
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
