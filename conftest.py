"""Tests run in as many processes as there are cores, one thread each: the networks are tiny, and threads only wait."""

import gc
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """In a worker, before torch is imported there; programs that tests start inherit it."""
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """The objects of libraries stay, and searching them for garbage again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
