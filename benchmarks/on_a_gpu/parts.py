"""The parts of a run, by device. On a CPU they have the smallest models and few repetitions."""

from __future__ import annotations

from typing import Any

from benchmarks.on_a_gpu.process import Part

PACKAGE = "benchmarks.on_a_gpu"
TEXT = {
    "prompt_length": 128,
    "new_tokens": 128,
    "draft_length": 7,
    "slots": 32,
    "acceptance_rate": 0.8,
    "repetitions": 3,
}
SHORT_TEXT = {
    "prompt_length": 16,
    "new_tokens": 12,
    "draft_length": 2,
    "slots": 4,
    "acceptance_rate": 0.8,
    "repetitions": 1,
}
STEP = {"dtype": "bfloat16", "vocab": 32000}
SMALL_BATCH = {"rows": 4, "row_length": 256, "windows": 64}
LARGE_BATCH = {"rows": 16, "row_length": 1024, "windows": 64}  # saturates a GPU
SHORT_STEP = {"dtype": "float32", "vocab": 64, "window_length": 4, "steps": 1}
TINY_BATCH = {"rows": 1, "row_length": 32, "windows": 2}


def _machine(device: str) -> Part:
    return Part("machine", f"{PACKAGE}.machine:rows", {"device": device}, weight=0.8, is_required=True)


def _exactness(device: str, vocab: int, sizes: dict[str, Any]) -> Part:
    arguments = {"device": device, "model": "small", "vocab": vocab, "sizes": sizes}
    return Part("texts in float32", f"{PACKAGE}.decoding:exactness", arguments, weight=3)


def _shipped(device: str, sizes: dict[str, Any]) -> Part:
    return Part("decoding shipped", f"{PACKAGE}.decoding:shipped", {"device": device, "sizes": sizes}, weight=4)


def _decoding(device: str, model: str, vocab: int, dtype: str, sizes: dict[str, Any], weight: float) -> Part:
    arguments = {"device": device, "model": model, "vocab": vocab, "dtype": dtype, "sizes": sizes}
    return Part(f"decoding {model}", f"{PACKAGE}.decoding:speed", arguments, weight)


def _training(device: str, model: str, options: dict[str, Any], sizes: list[dict[str, int]], weight: float) -> Part:
    options = {"model": model, **options}
    arguments = {"device": device, "options": options, "sizes": sizes, "compiled": device == "cuda"}
    return Part(f"training {model}", f"{PACKAGE}.training:rows", arguments, weight)


def _tests(options: list[str]) -> Part:
    return Part("tests", f"{PACKAGE}.marked_tests:rows", {"options": options}, weight=6)


PARTS = {
    "cuda": (
        _machine("cuda"),
        _exactness("cuda", 32000, TEXT),
        _shipped("cuda", TEXT),
        _decoding("cuda", "1.1b", 32000, "bfloat16", TEXT, weight=5),
        _training("cuda", "1.1b", STEP, [SMALL_BATCH, LARGE_BATCH], weight=4),
        _training("cuda", "135m", STEP, [SMALL_BATCH], weight=2),
        _tests(["-m", "gpu", "tests/gpu", "-n", "6"]),  # most of the time is spent in Python on the host
        # Last, because it compiles longest and may exceed the time limit.
        _decoding("cuda", "135m", 32000, "bfloat16", TEXT, weight=3.5),
    ),
    "cpu": (
        _machine("cpu"),
        _exactness("cpu", 64, SHORT_TEXT),
        _shipped("cpu", SHORT_TEXT),
        _decoding("cpu", "small", 64, "float32", SHORT_TEXT, weight=1),
        _training("cpu", "small", SHORT_STEP, [TINY_BATCH], weight=1),
        _tests(["tests/unit/losses/test_position_weights.py"]),
    ),
}
