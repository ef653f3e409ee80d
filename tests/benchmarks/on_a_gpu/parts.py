"""The parts of a run, by device. Those of a CPU are the same with the smallest models and few repetitions."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.on_a_gpu.process import Part

HERE = "tests.benchmarks.on_a_gpu"
TEXT = {"prompt": 128, "new": 128, "drafted": 7, "slots": 32, "right": 0.8, "repetitions": 3}
SHORT_TEXT = {"prompt": 16, "new": 12, "drafted": 2, "slots": 4, "right": 0.8, "repetitions": 1}
STEP = {"dtype": "bfloat16", "vocab": 32000}
LONG_STEP = {**STEP, "rows": 16, "row_length": 1024}  # keeps a GPU busy
SHORT_STEP = {"dtype": "float32", "vocab": 64, "rows": 1, "row_length": 32, "window_length": 4, "steps": 1}


def _machine(device: str) -> Part:
    return Part("machine", f"{HERE}.machine:rows", {"device": device}, share=0.8, is_required=True)


def _exactness(device: str, vocab: int, sizes: dict[str, Any]) -> Part:
    arguments = {"device": device, "model": "small", "vocab": vocab, "sizes": sizes}
    return Part("texts in float32", f"{HERE}.decoding:exactness", arguments, share=3)


def _shipped(device: str, sizes: dict[str, Any]) -> Part:
    return Part("decoding shipped", f"{HERE}.decoding:shipped", {"device": device, "sizes": sizes}, share=3)


def _decoding(device: str, model: str, vocab: int, dtype: str, sizes: dict[str, Any], share: float) -> Part:
    arguments = {"device": device, "model": model, "vocab": vocab, "dtype": dtype, "sizes": sizes}
    return Part(f"decoding {model}", f"{HERE}.decoding:speed", arguments, share)


def _training(
    device: str, model: str, options: dict[str, Any], windows: list[int], share: float, name: str = ""
) -> Part:
    options = {"model": model, **options}
    arguments = {"device": device, "options": options, "windows": windows, "compiled": device == "cuda"}
    return Part(f"training {model}{name}", f"{HERE}.training:rows", arguments, share)


def _tests(options: list[str]) -> Part:
    return Part("tests", f"{HERE}.marked_tests:rows", {"options": options}, share=6)


PARTS = {
    "cuda": (
        _machine("cuda"),
        _exactness("cuda", 32000, TEXT),
        _shipped("cuda", TEXT),
        _decoding("cuda", "1.1b", 32000, "bfloat16", TEXT, share=3.5),
        _training("cuda", "1.1b", STEP, [64], share=2),
        _training("cuda", "1.1b", LONG_STEP, [64], share=2, name=" on long rows"),
        _training("cuda", "135m", STEP, [64], share=2),
        _tests(["-m", "gpu", "tests/gpu", "-n", "4"]),  # most of their time Python prepares
        # The last, because it compiles longest; what it does not reach is lost.
        _decoding("cuda", "135m", 32000, "bfloat16", TEXT, share=3.5),
    ),
    "cpu": (
        _machine("cpu"),
        _exactness("cpu", 64, SHORT_TEXT),
        _shipped("cpu", SHORT_TEXT),
        _decoding("cpu", "small", 64, "float32", SHORT_TEXT, share=1),
        _training("cpu", "small", SHORT_STEP, [2], share=1),
        _tests(["tests/unit/losses/test_position_weights.py"]),
    ),
}
