"""The parts of a run, by device. Those of a CPU are the same with the smallest models and few repetitions."""

from __future__ import annotations

from typing import Any

from benchmarks.on_a_gpu.process import Part

HERE = "benchmarks.on_a_gpu"
TEXT = {"prompt": 128, "new": 128, "drafted": 7, "slots": 32, "right": 0.8, "repetitions": 3}
SHORT_TEXT = {"prompt": 16, "new": 12, "drafted": 2, "slots": 4, "right": 0.8, "repetitions": 1}
STEP = {"dtype": "bfloat16", "vocab": 32000}
SMALL_BATCH = {"rows": 4, "row_length": 256, "windows": 64}
LARGE_BATCH = {"rows": 16, "row_length": 1024, "windows": 64}  # keeps a GPU busy
SHORT_STEP = {"dtype": "float32", "vocab": 64, "window_length": 4, "steps": 1}
TINY_BATCH = {"rows": 1, "row_length": 32, "windows": 2}


def _machine(device: str) -> Part:
    return Part("machine", f"{HERE}.machine:rows", {"device": device}, share=0.8, is_required=True)


def _exactness(device: str, vocab: int, sizes: dict[str, Any]) -> Part:
    arguments = {"device": device, "model": "small", "vocab": vocab, "sizes": sizes}
    return Part("texts in float32", f"{HERE}.decoding:exactness", arguments, share=3)


def _shipped(device: str, sizes: dict[str, Any]) -> Part:
    return Part("decoding shipped", f"{HERE}.decoding:shipped", {"device": device, "sizes": sizes}, share=4)


def _decoding(device: str, model: str, vocab: int, dtype: str, sizes: dict[str, Any], share: float) -> Part:
    arguments = {"device": device, "model": model, "vocab": vocab, "dtype": dtype, "sizes": sizes}
    return Part(f"decoding {model}", f"{HERE}.decoding:speed", arguments, share)


def _training(device: str, model: str, options: dict[str, Any], sizes: list[dict[str, int]], share: float) -> Part:
    options = {"model": model, **options}
    arguments = {"device": device, "options": options, "sizes": sizes, "compiled": device == "cuda"}
    return Part(f"training {model}", f"{HERE}.training:rows", arguments, share)


def _tests(options: list[str]) -> Part:
    return Part("tests", f"{HERE}.marked_tests:rows", {"options": options}, share=6)


PARTS = {
    "cuda": (
        _machine("cuda"),
        _exactness("cuda", 32000, TEXT),
        _shipped("cuda", TEXT),
        _decoding("cuda", "1.1b", 32000, "bfloat16", TEXT, share=5),
        _training("cuda", "1.1b", STEP, [SMALL_BATCH, LARGE_BATCH], share=4),
        _training("cuda", "135m", STEP, [SMALL_BATCH], share=2),
        _tests(["-m", "gpu", "tests/gpu", "-n", "6"]),  # most of their time Python prepares
        # The last, because it compiles longest; what it does not reach is lost.
        _decoding("cuda", "135m", 32000, "bfloat16", TEXT, share=3.5),
    ),
    "cpu": (
        _machine("cpu"),
        _exactness("cpu", 64, SHORT_TEXT),
        _shipped("cpu", SHORT_TEXT),
        _decoding("cpu", "small", 64, "float32", SHORT_TEXT, share=1),
        _training("cpu", "small", SHORT_STEP, [TINY_BATCH], share=1),
        _tests(["tests/unit/losses/test_position_weights.py"]),
    ),
}
